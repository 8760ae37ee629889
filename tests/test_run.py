"""Whole runs of main.py in processes of their own: resuming, stopping, devices, bad input."""

import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image
import pytest

import run_lib

ROOT = Path(__file__).parent.parent
# A network of a few thousand parameters, and a checkpoint every other step.
TINY = {
  'model.nf': 8,
  'model.ch_mult': '(1,)',
  'model.num_res_blocks': 1,
  'model.attn_resolutions': '()',
  'training.batch_size': 8,
  'training.n_iters': 12,
  'training.log_freq': 1,
  'training.eval_freq': 4,
  'training.snapshot_freq': 6,
  'training.snapshot_freq_for_preemption': 2,
  'training.snapshot_samples': 8,
  'sampling.num_steps': 25,
  'sampling.corrector': 'langevin',
  'eval.begin_ckpt': 1,
  'eval.batch_size': 16,
  'eval.num_samples': 24,
}
UNSEEN = {'training__snapshot_sampling': False}


@pytest.fixture(scope='module', autouse=True)
def environment(tmp_path_factory) -> None:
  """Processes compile quickly, and once for all of them."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path_factory.mktemp('cache')))
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
    yield


def command(
  mode: str,
  workdir: Path,
  config: str = 'configs/vp/digits.py',
  eval_folder: str = 'eval',
  **fields,
) -> list[str]:
  """The command line of a tiny run; a field section.name is passed as section__name."""
  values = TINY | {name.replace('__', '.'): value for name, value in fields.items()}
  overrides = [f'--config.{name}={value}' for name, value in values.items()]
  return [
    sys.executable, str(ROOT / 'main.py'), '--config', str(ROOT / config), '--mode', mode,
    '--workdir', str(workdir), '--eval_folder', eval_folder, *overrides,
  ]  # fmt: skip


def run(mode: str, workdir: Path, devices: int = 1, **fields) -> subprocess.CompletedProcess:
  """Runs main.py to its end on so many host devices."""
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
  return subprocess.run(
    command(mode, workdir, **fields),
    env=os.environ | {'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
  )


def succeed(*args, **kwargs) -> subprocess.CompletedProcess:
  done = run(*args, **kwargs)
  assert done.returncode == 0, done.stderr
  return done


def state_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
  """The arrays of a kept checkpoint, by name."""
  checkpointer = ocp.StandardCheckpointer()
  path = workdir / 'checkpoints' / str(step) / 'default'
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
    dict(checkpointer.metadata(path).item_metadata),
  )
  leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path, like)['state'])
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name], err_msg=name)


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
  """The workdir of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('whole')
  succeed('train', workdir)
  return workdir


def test_training_leaves_checkpoints_metrics_and_pictures(whole):
  assert sorted(p.name for p in (whole / 'checkpoints').iterdir()) == ['12', '6']
  lines = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines if 'loss' in line] == list(range(1, 13))
  assert [line['step'] for line in lines if 'eval_loss' in line] == [4, 8, 12]
  assert all(np.isfinite(list(line.values())).all() for line in lines)
  assert list((whole / 'tensorboard').glob('events.*'))
  picture = np.asarray(Image.open(whole / 'samples' / 'iter_12' / 'sample.png'))
  assert picture.dtype == np.uint8 and picture.std() > 0
  assert json.loads((whole / 'config.json').read_text())['model']['nf'] == 8


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(whole, tmp_path):
  """SIGKILL in the middle of training, twice, loses nothing that a checkpoint held."""
  for lines in (3, 8):
    process = subprocess.Popen(command('train', tmp_path), stderr=subprocess.DEVNULL)
    metrics = tmp_path / 'metrics.jsonl'
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count('"loss"') < lines:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.005)
    process.kill()
    process.wait()
  assert 'resuming' in succeed('train', tmp_path).stderr
  assert_same_bits(state_of(tmp_path, 12), state_of(whole, 12))
  assert_same_bits(state_of(tmp_path, 6), state_of(whole, 6))

  def training_losses(workdir):
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return {line['step']: line['loss'] for line in lines if 'loss' in line}

  assert training_losses(tmp_path) == training_losses(whole)


def test_a_signal_saves_and_leaves(whole, tmp_path):
  """SIGTERM, then Ctrl-C after the run went on, and it ends as if neither had come."""
  never = UNSEEN | {'training__snapshot_freq_for_preemption': 1000}
  metrics = tmp_path / 'metrics.jsonl'
  for sent, lines in ((signal.SIGTERM, 2), (signal.SIGINT, 8)):
    train = command('train', tmp_path, **never)
    process = subprocess.Popen(train, stderr=subprocess.PIPE, text=True)
    while not metrics.exists() or metrics.read_text().count('"loss"') < lines:
      assert process.poll() is None
      time.sleep(0.005)
    process.send_signal(sent)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + sent, said
    assert 'Traceback' not in said
    assert list((tmp_path / 'checkpoints-meta').iterdir())
  succeed('train', tmp_path, **UNSEEN)
  assert_same_bits(state_of(tmp_path, 12), state_of(whole, 12))


def test_eight_devices_give_the_parameters_of_one(whole, tmp_path):
  """The mathematics does not know of devices; only the order of sums differs."""
  succeed('train', tmp_path, devices=8)
  one, eight = state_of(whole, 12), state_of(tmp_path, 12)
  for name, value in one.items():
    np.testing.assert_allclose(value, eight[name], rtol=1e-4, atol=1e-5, err_msg=name)
  pictures = [w / 'samples' / 'iter_12' / 'sample.png' for w in (whole, tmp_path)]
  a, b = (np.asarray(Image.open(p), np.int32) for p in pictures)
  assert np.abs(a - b).max() <= 2


@pytest.fixture(scope='module')
def evaluated(whole) -> Path:
  """The workdir of that run, and what evaluation adds."""
  succeed('eval', whole)
  return whole


def repeat_evaluation(folder: Path, lost: list[str], **fields) -> dict[str, dict[str, np.ndarray]]:
  """Evaluates step 12 again without its report and some rounds; all comes out as it was.

  Returns:
    The arrays of every round.
  """
  report, rounds = folder / 'report_12.json', sorted((folder / 'step_12').glob('*.npz'))
  first = json.loads(report.read_text())
  arrays, stamps = [load(path) for path in rounds], [os.stat(path).st_mtime_ns for path in rounds]
  for path in (report, *(folder / 'step_12' / name for name in lost)):
    path.unlink()
  succeed('eval', folder.parent, eval_folder=folder.name, **fields)
  again = json.loads(report.read_text())
  timeless = [k for k in first if not k.endswith('seconds')]
  assert [first[k] for k in timeless] == [again[k] for k in timeless]
  for path, stamp, before in zip(rounds, stamps, arrays, strict=True):
    assert (os.stat(path).st_mtime_ns == stamp) == (path.name not in lost)
    assert_same_bits(load(path), before)
  return {path.name: values for path, values in zip(rounds, arrays, strict=True)}


def load(path: Path) -> dict[str, np.ndarray]:
  with np.load(path) as arrays:
    return dict(arrays)


def test_evaluation_resumes_where_it_was_stopped(evaluated):
  report = json.loads((evaluated / 'eval' / 'report_12.json').read_text())
  assert report['step'] == 12 and report['samples'] == 24 and report['loss_images'] == 297
  assert 'report_6.json' in {p.name for p in (evaluated / 'eval').iterdir()}
  rounds = repeat_evaluation(evaluated / 'eval', ['samples_1.npz'])
  assert [len(arrays['samples']) for arrays in rounds.values()] == [16, 8]
  assert rounds['samples_0.npz']['samples'].shape == (16, 8, 8, 1)


def test_bits_per_dimension_resume_where_they_were_stopped(whole, tmp_path):
  """Of ten images in batches of eight, twice, by the network of the last checkpoint."""
  rng = np.random.default_rng(0)
  for i in range(10):
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / f'{i}.png')
  fields = {'data__dataset': 'folder', 'data__path': tmp_path, 'eval__batch_size': 8}
  fields |= {'eval__begin_ckpt': 2, 'eval__enable_loss': False, 'eval__enable_sampling': False}
  fields |= {'eval__enable_bpd': True, 'eval__bpd_repeats': 2}
  succeed('eval', whole, eval_folder='bits', **fields)
  report = json.loads((whole / 'bits' / 'report_12.json').read_text())
  rounds = repeat_evaluation(whole / 'bits', ['bpd_test_1.npz'], **fields)
  bits = [arrays['bpd'] for arrays in rounds.values()]
  assert report['bpd_test_images'] == 10 and [len(of_round) for of_round in bits] == [8, 2, 8, 2]
  assert report['bpd_test'] == pytest.approx(np.concatenate(bits).mean(), rel=1e-6)
  assert all(bool(arrays['nfe'] > 10) for arrays in rounds.values())


def test_samples_are_drawn_from_the_newest_checkpoint(whole):
  few = {'sampling__num_samples': 5, 'sampling__method': 'ddim', 'sampling__num_steps': 4}
  succeed('sample', whole, **few)
  folder = whole / 'sample' / 'step_12'
  assert np.load(folder / 'samples.npz')['samples'].shape == (5, 8, 8, 1)
  assert len(list(folder.glob('sample_*.png'))) == 5
  error = refused(run('sample', whole, **few | {'sampling__num_steps': 5}))
  assert 'config.sampling.num_steps: 4 there, 5 now' in error
  assert 'no classifier' in refused(
    run('sample', whole, **few, sampling__labels='3,', sampling__guidance_scale=2.0)
  )
  setup, params = run_lib.load(str(whole))
  kept = state_of(whole, 12)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    np.testing.assert_array_equal(leaf, kept[f"['ema_params']{jax.tree_util.keystr(path)}"])
  assert setup.config.model.nf == 8


# Mistakes: one line, exit code 2, nothing lost.


def refused(done: subprocess.CompletedProcess) -> str:
  """The one line that a mistake gets."""
  assert done.returncode == 2, done.stderr
  *said, error = done.stderr.splitlines()
  assert error.startswith('error: ')
  assert not [line for line in said if 'Traceback' in line or 'Error' in line]
  return error


def test_another_model_is_refused_on_resuming(whole):
  assert 'config.model.nf: 8 there, 16 now' in refused(run('train', whole, model__nf=16))


def test_other_samples_are_refused_in_an_eval_folder(evaluated):
  error = refused(run('eval', evaluated, sampling__num_steps=30))
  assert 'config.sampling.num_steps: 25 there, 30 now' in error


def test_evaluation_without_a_checkpoint_is_refused(tmp_path):
  assert 'holds no checkpoints' in refused(run('eval', tmp_path))
  assert not list(tmp_path.iterdir())


def test_a_wrong_variant_lists_those_that_exist(tmp_path):
  error = refused(run('train', tmp_path, config='configs/ve/cifar10.py:ncsnp'))
  assert 'ncsnpp_deep_continuous' in error and "did you mean 'ncsnpp'" in error


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    ('--config.training.n_iter=3', "did you mean 'n_iters'"),
    ('--noconfig.eval.enable_sampling_', "did you mean 'enable_sampling'"),
    ('--config.training.n_iters=abc', "'abc'"),
    ('--config.sampling.noise_removal=maybe', "'maybe'"),
    ('--mod=train', 'Did you mean: mode'),
    ('--config.training=3', 'training'),
    ('train', "'train' is not a flag"),
  ],
)
def test_a_misspelt_flag_or_field_is_refused(tmp_path, arguments, said):
  done = subprocess.run(
    [*command('train', tmp_path), arguments], capture_output=True, text=True, check=False
  )
  assert said in refused(done)


@pytest.mark.parametrize(
  ('config', 'said'),
  [
    ('configs/vp/digits.py:large', 'has no variants'),
    ('configs/vp/digit.py', 'is not a file'),
    ('configs/../errors.py', 'is not a config file'),
  ],
)
def test_a_wrong_config_file_is_refused(tmp_path, config, said):
  assert said in refused(run('train', tmp_path, config=config))


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
  error = refused(run('train', tmp_path, devices=8, training__batch_size=12))
  assert 'batch_size = 12 must be a multiple of the number of devices, 8' in error


def test_an_unknown_dataset_is_refused_with_the_nearest(tmp_path):
  assert "did you mean 'CIFAR10'" in refused(run('train', tmp_path, data__dataset='CIFAR1O'))


def test_an_empty_image_folder_is_refused(tmp_path):
  folder = tmp_path / 'photos'
  folder.mkdir()
  error = refused(run('train', tmp_path, data__dataset='folder', data__path=folder))
  assert f'no images in {folder}' in error


def test_a_corrupt_image_is_named(tmp_path):
  folder = tmp_path / 'photos'
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(6):
    Image.fromarray(rng.integers(0, 256, (9, 12), np.uint8)).save(folder / f'{i}.png')
  broken = folder / '3.png'
  broken.write_bytes(broken.read_bytes()[:60])
  error = refused(run('train', tmp_path / 'run', data__dataset='folder', data__path=folder))
  assert f'{broken} cannot be read' in error


def test_a_loss_that_is_not_finite_stops_and_is_never_saved(tmp_path):
  """Also where a checkpoint is due, here at step 2, before the next line of the log, at step 5."""
  wild = {'optim__lr': 1e30, 'optim__warmup': 0, 'optim__grad_clip': -1.0}
  error = refused(run('train', tmp_path, training__log_freq=5, **wild))
  assert ' at step 2; what was saved before is good' in error
  assert not [p for p in tmp_path.glob('checkpoints*/*') if p.name.isdigit()]


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').touch()
  assert 'cannot write to' in refused(run('train', tmp_path / 'file' / 'run'))


def damage(folder: Path) -> None:
  """Flips one bit in the middle of the largest file."""
  largest = max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)


@pytest.fixture(scope='module')
def half(tmp_path_factory) -> Path:
  """The workdir of a run to step 6."""
  workdir = tmp_path_factory.mktemp('half')
  succeed('train', workdir, training__n_iters=6, **UNSEEN)
  return workdir


def test_a_damaged_checkpoint_is_skipped_with_a_warning(whole, half, tmp_path):
  shutil.copytree(half, tmp_path, dirs_exist_ok=True)
  damage(tmp_path / 'checkpoints' / '6')
  assert 'checkpoints/6 is damaged' in refused(run('eval', tmp_path))
  done = succeed('train', tmp_path, **UNSEEN)
  assert 'checkpoints/6 is damaged' in done.stderr and 'resuming' in done.stderr
  assert 'Traceback' not in done.stderr and 'Exception' not in done.stderr
  for step in (6, 12):  # the damaged one was made again
    assert_same_bits(state_of(tmp_path, step), state_of(whole, step))


def test_damaged_checkpoints_are_never_taken_for_a_new_run(half, tmp_path):
  shutil.copytree(half, tmp_path, dirs_exist_ok=True)
  for checkpoint in tmp_path.glob('checkpoints*/*'):
    damage(checkpoint)
  before = sorted(tmp_path.rglob('*'))
  assert 'can be restored; move' in refused(run('train', tmp_path))
  assert sorted(tmp_path.rglob('*')) == before
