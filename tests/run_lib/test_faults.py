"""What happens to runs: they are killed, the disk fills, files are damaged, a process is lost.

Each time one line says so, nothing that was saved is lost, and the same command goes on to the same
bits. `make test-faults` also stops runs `--kills` times at random moments.
"""

import json
from pathlib import Path
import random
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from whole_runs import (
  assert_same_bits,
  command,
  in_process,
  losses_in,
  refusal,
  run,
  state_of,
  succeed,
  two_processes,
  UNSEEN,
)

from builders.training import abstract_state
import run_lib
from runtime.errors import UserError
from training import checkpoints as checkpoints_lib
from training.checkpoints import Checkpoints
from workdir import progress

OFTEN = UNSEEN | {'training__snapshot_freq_for_preemption': 1, 'training__eval_freq': 12}
LAST_ALONE = {'training__snapshot_freq_for_preemption': 1000}
PATIENCE = 400.0  # seconds


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory) -> tuple[Path, float]:
  """The workdir of a run that nothing happened to, and how many seconds it took."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  began = time.monotonic()
  succeed('train', workdir, **OFTEN)
  return workdir, time.monotonic() - began


def stop_at_random(
  start: list[str], folder: Path, longest: float, rng: random.Random, sent: int
) -> bool:
  """Stops a run at a random moment, every other time while it writes; whether it came to its end.

  What it says must be no traceback.
  """
  process = subprocess.Popen(start, stderr=subprocess.PIPE, text=True)
  wait, writing = rng.uniform(0, longest), rng.random() < 0.5
  began = time.monotonic()
  while process.poll() is None and time.monotonic() - began < wait:
    if writing and time.monotonic() - began > wait / 2 and list(folder.rglob('*tmp*')):
      break
    time.sleep(0.001)
  process.send_signal(sent)
  said = process.communicate(timeout=PATIENCE)[1]
  assert 'Traceback' not in said, said
  # Before Python is up, SIGTERM kills it; then it is noticed, and what is new is saved.
  assert process.returncode in (0, -sent, 128 + sent), said
  return process.returncode == 0


@pytest.mark.slow  # in test_run.py at chosen moments
def test_training_stopped_at_random_moments_loses_nothing(undisturbed, tmp_path, request):
  (whole, seconds), rng = undisturbed, random.Random(0)
  kills = stopped = runs = 0
  while kills < request.config.option.kills:
    workdir = tmp_path / str(runs)
    ended = False
    while not ended and kills < request.config.option.kills:
      sent = rng.choice([signal.SIGKILL, signal.SIGTERM])
      start = command('train', workdir, **OFTEN)
      ended = stop_at_random(start, workdir, seconds, rng, sent)
      kills += 1
      stopped += not ended
    succeed('train', workdir, **OFTEN)
    for step in (6, 12):
      assert_same_bits(state_of(workdir, step), state_of(whole, step))
    assert losses_in(workdir) == losses_in(whole)
    runs += 1
  print(f'training: {kills} signals, {stopped} before the end of {runs} runs; bits differ in 0')


@pytest.mark.slow  # in test_evaluate.py at chosen moments
def test_evaluation_stopped_at_random_moments_says_the_same(undisturbed, request):
  (whole, _), rng = undisturbed, random.Random(1)
  fields = {'eval__enable_sampling': True, 'eval__enable_loss': True}

  def report_of(folder: str) -> dict:
    report = json.loads((whole / folder / 'report_12.json').read_text())
    return {name: value for name, value in report.items() if 'seconds' not in name}

  began = time.monotonic()
  succeed('eval', whole, **fields)
  seconds = time.monotonic() - began
  kills = stopped = runs = 0
  while kills < request.config.option.kills:
    name, ended = f'eval_{runs}', False
    while not ended and kills < request.config.option.kills:
      sent = rng.choice([signal.SIGKILL, signal.SIGTERM])
      start = command('eval', whole, eval_folder=name, **fields)
      ended = stop_at_random(start, whole / name, seconds, rng, sent)
      kills += 1
      stopped += not ended
    succeed('eval', whole, eval_folder=name, **fields)
    assert report_of(name) == report_of('eval')
    runs += 1
  print(f'evaluation: {kills} signals, {stopped} before the end of {runs} runs; none differs')


# Disks.


@pytest.fixture
def disk(tmp_path):
  """A small disk of its own, and a function that gives it so many kB, or makes it read-only."""
  folder = tmp_path / 'disk'
  folder.mkdir()

  def mount(options: str) -> None:
    subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'none', folder], check=True)

  try:
    mount('size=4k')
  except (OSError, subprocess.CalledProcessError):
    pytest.skip('only root can mount a small disk')
  yield folder, lambda options: mount(f'remount,{options}')
  subprocess.run(['umount', '-l', folder], check=True)


def failed(done: subprocess.CompletedProcess) -> str:
  """The one line of a run that the machine failed."""
  assert done.returncode == 1, done.stderr
  assert 'Traceback' not in done.stderr, done.stderr
  return done.stderr.splitlines()[-1]


@pytest.mark.parametrize('kilobytes', [pytest.param(60, marks=pytest.mark.slow), 700])
def test_a_full_disk_stops_training_and_room_lets_it_go_on(undisturbed, disk, kilobytes):
  whole, _ = undisturbed
  folder, remount = disk
  remount(f'size={kilobytes}k')
  said = failed(run('train', folder / 'run', **OFTEN))
  assert said.startswith('error: ') and 'No space left' in said and 'goes on' in said
  remount('size=100m')
  succeed('train', folder / 'run', **OFTEN)
  assert_same_bits(state_of(folder / 'run', 12), state_of(whole, 12))


def test_a_full_disk_stops_sampling_and_room_lets_it_go_on(undisturbed, disk):
  whole, _ = undisturbed
  folder, remount = disk
  remount('size=20m')
  shutil.copytree(whole / 'checkpoints', folder / 'run' / 'checkpoints')
  shutil.copy(whole / 'config.json', folder / 'run')
  (folder / 'filler').touch()
  free = shutil.disk_usage(folder).free - 6 * 4096
  (folder / 'filler').write_bytes(bytes(free))
  fields = {'sampling__num_samples': 24, 'sampling__method': 'ddim', 'sampling__num_steps': 4}
  said = failed(run('sample', folder / 'run', **fields))
  assert said.startswith('error: No space left')
  (folder / 'filler').unlink()
  succeed('sample', folder / 'run', **fields)
  assert len(list(folder.glob('run/sample/step_12/sample_*.png'))) == 24


def test_a_disk_that_cannot_be_written_is_refused(disk):
  folder, remount = disk
  remount('ro')
  assert 'cannot write to' in refusal(run_lib.train, folder / 'run')


# Checkpoints.


@pytest.mark.slow
@pytest.mark.parametrize('how', ['cut off', 'changed', 'gone'])
def test_whatever_happens_to_a_checkpoint_an_older_one_is_taken(undisturbed, tmp_path, how):
  """To each of its files in turn; what is restored has the arrays that were saved."""
  whole, _ = undisturbed
  setup, _ = run_lib.load(str(whole))
  like = abstract_state(setup)
  with Checkpoints(whole) as checkpoints:
    assert checkpoints.steps() == [6, 12]
    good = checkpoints.restore(12, like)
  files = [p.relative_to(whole) for p in (whole / 'checkpoints' / '12').rglob('*') if p.is_file()]
  assert len(files) > 5
  for file in files:
    workdir = tmp_path / 'damaged'
    shutil.copytree(whole / 'checkpoints', workdir / 'checkpoints')
    data = bytearray((workdir / file).read_bytes())
    if how == 'gone':
      (workdir / file).unlink()
    else:
      middle = len(data) // 2
      data[middle : middle + 1] = bytes([data[middle] ^ 1]) if data else b''
      (workdir / file).write_bytes(data[:middle] if how == 'cut off' else data)
    with Checkpoints(workdir) as checkpoints:
      state = checkpoints.restore_latest(like)
    assert int(state.step) in (6, 12)
    if int(state.step) == 12:
      jax.tree.map(np.testing.assert_array_equal, state, good)
    shutil.rmtree(workdir)


# Others.


def test_a_second_run_is_kept_out_of_a_workdir(tmp_path):
  lines = tmp_path / 'metrics.jsonl'
  endless = OFTEN | {'training__n_iters': 100_000}
  first = subprocess.Popen(command('train', tmp_path, **endless), stderr=subprocess.DEVNULL)
  try:
    began = time.monotonic()
    while not lines.exists() or not lines.read_text():
      assert first.poll() is None and time.monotonic() - began < PATIENCE
      time.sleep(0.01)
    assert 'another run is at work' in refusal(run_lib.train, tmp_path, **OFTEN)
    assert first.poll() is None
  finally:
    first.kill()
    first.wait()
  with run_lib.artifacts.claimed(tmp_path):  # which is free at once
    pass


def test_a_lost_image_is_named_and_once_it_is_back_the_run_goes_on(tmp_path):
  folder, rng = tmp_path / 'photos', np.random.default_rng(0)
  folder.mkdir()
  for i in range(40):
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / f'{i}.png')
  fields = OFTEN | {'data__dataset': 'folder', 'data__path': str(folder)}
  in_process('train', tmp_path / 'whole', **fields | LAST_ALONE)
  lost, aside = folder / '7.png', tmp_path / '7.png'
  process = subprocess.Popen(
    command('train', tmp_path / 'run', **fields), stderr=subprocess.PIPE, text=True
  )
  while not (tmp_path / 'run' / 'config.json').exists():  # the files are listed, and not yet read
    assert process.poll() is None
    time.sleep(0.001)
  lost.rename(aside)
  said = process.communicate(timeout=PATIENCE)[1]
  assert process.returncode == 2 and f'{lost} cannot be read' in said.splitlines()[-1], said
  assert 'Traceback' not in said
  aside.rename(lost)
  in_process('train', tmp_path / 'run', **fields)
  assert_same_bits(state_of(tmp_path / 'run', 12), state_of(tmp_path / 'whole', 12))


@pytest.mark.parametrize('which', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_one_of_two_processes_dies_the_other_ends_and_both_go_on(tmp_path, which):
  """Each of them holds one half of the large arrays of the state."""
  fields = OFTEN | {'training__snapshot_freq': 12, 'training__snapshot_freq_for_preemption': 3}
  fields |= {'training__fsdp': 2, 'model__nf': 96}
  pair = two_processes('train', tmp_path / 'pair', **fields)
  while not checkpoints_lib.exist(tmp_path / 'pair'):
    assert [process.poll() for process in pair] == [None, None]
    time.sleep(0.01)
  pair[which].kill()
  began = time.monotonic()
  said = pair[1 - which].communicate(timeout=PATIENCE)[1]
  print(f'the other ended after {time.monotonic() - began:.0f} s')
  assert 'Traceback' not in said, said
  if pair[1 - which].returncode == -signal.SIGABRT:  # JAX's own service was faster, in C++
    assert 'another task died' in said, said
  else:
    assert pair[1 - which].returncode == 1 and 'error: ' in said, said
  pair = two_processes('train', tmp_path / 'pair', late=2.0, **fields)
  said = [process.communicate(timeout=PATIENCE)[1] for process in pair]
  assert [process.returncode for process in pair] == [0, 0] and 'resuming' in said[0], said
  assert 'resuming' not in said[1]  # process 0 alone says so
  succeed('train', tmp_path / 'whole', devices=2, **fields | LAST_ALONE)
  assert_same_bits(state_of(tmp_path / 'pair', 12), state_of(tmp_path / 'whole', 12))


@pytest.mark.slow
def test_of_64_devices_one_is_left_and_the_run_goes_on(tmp_path):
  """A pod, simulated: an image on each device, and all of them on the one that is left."""
  fields = UNSEEN | {'training__batch_size': 64, 'training__snapshot_samples': 64}
  fields |= {'eval__batch_size': 64, 'eval__num_samples': 64}
  fields |= {'training__snapshot_freq_for_preemption': 1000}
  succeed('train', tmp_path / 'one', **fields)
  succeed('train', tmp_path / 'pod', devices=64, training__n_iters=6, **fields)
  said = succeed('train', tmp_path / 'pod', **fields).stderr
  assert 'devices 1, processes 1, before devices 64, processes 1' in said, said
  one, pod = state_of(tmp_path / 'one', 12), state_of(tmp_path / 'pod', 12)
  for name, value in one.items():
    np.testing.assert_allclose(value, pod[name], rtol=1e-4, atol=1e-5, err_msg=name)


# Losses that are not finite.


class Lines:
  """What a log writes."""

  def __init__(self):
    self.written = {}

  def write(self, step, **means):
    self.written[step] = means


def log_of(
  steps: list[dict[str, float]], log_freq: int, saved: int = 0, eval_freq: int = 1000
) -> dict:
  lines, n = Lines(), len(steps)
  choices = {'n_iters': n, 'step': 0, 'batch_size': 1, 'log_freq': log_freq}
  with progress.TrainLog(lines, **choices) as log:
    log.saved = saved
    for step, measured in enumerate(steps, 1):
      log.add(step, {name: jnp.float32(value) for name, value in measured.items()})
      if step % eval_freq == 0:
        log.add_eval(step, {'loss': jnp.float32(1.0)})
    log.settle(n)
  return lines.written


def test_skipped_steps_are_counted_and_not_part_of_means():
  nan = {'loss': np.nan, 'skipped': 1.0}
  steps = [{'loss': 1.0, 'skipped': 0.0}, nan, {'loss': 3.0, 'skipped': 0.0}, nan, nan, nan]
  written = log_of(steps, 3)
  assert (written[3]['loss'], written[3]['skipped']) == (2.0, 1.0)
  assert 'loss' not in written[6] and written[6]['skipped'] == 3.0
  for eval_freq in (1000, 6):  # held-out losses, which stay finite, do not count
    with pytest.raises(UserError, match='101 steps in a row up to 102 were skipped'):
      log_of(steps[:2] + 101 * [nan], 3, eval_freq=eval_freq)


def test_the_step_of_a_loss_that_is_not_finite_is_named():
  steps = [{'loss': 1.0}] * 4 + [{'loss': np.inf}] + [{'loss': 1.0}]
  with pytest.raises(UserError, match='loss is inf at step 5: nothing was saved'):
    log_of(steps, 3)
  with pytest.raises(UserError, match='at step 5: the checkpoint of step 2 is good'):
    log_of(steps, 4, saved=2)
