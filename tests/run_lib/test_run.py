"""Whole runs of main.py: resuming, stopping, devices, bad input; worse is in `test_faults`.

What is killed, resumed or shared by devices runs in a process of its own, and so do mistakes in
flags and configs, on devices, of an evaluation and in mid-training. The others are made in this
process, which need not load the libraries again.
"""

import json
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image
import pytest
from whole_runs import (
  assert_same_bits,
  command,
  in_process,
  losses_in,
  refusal,
  refused,
  ROOT,
  run,
  state_of,
  succeed,
  UNSEEN,
)

import run_lib

# Samples of snapshots are compared with the data.
COMPARED = {'training__fid_freq': 1, 'training__fid_samples': 16, 'eval__features': 'pixels'}


@pytest.fixture(scope='module')
def stats(tmp_path_factory) -> dict:
  """The field for the statistics that the first run makes."""
  return {'eval__stats_path': tmp_path_factory.mktemp('stats') / 'digits.npz'}


@pytest.fixture(scope='module')
def whole(tmp_path_factory, stats) -> Path:
  """The workdir of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('whole')
  in_process('train', workdir, **COMPARED, **stats)
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
  assert losses_in(tmp_path) == losses_in(whole)


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
  in_process('train', tmp_path, **UNSEEN)
  assert_same_bits(state_of(tmp_path, 12), state_of(whole, 12))


def test_eight_devices_give_the_parameters_of_one(whole, tmp_path, stats):
  """The mathematics does not know of devices; only the order of sums differs.

  Eight devices take long to write a checkpoint, so that only the last is.
  """
  last = {'training__snapshot_freq': 12, 'training__snapshot_freq_for_preemption': 12}
  succeed('train', tmp_path, devices=8, **last, **COMPARED, **stats)
  one, eight = state_of(whole, 12), state_of(tmp_path, 12)
  for name, value in one.items():
    np.testing.assert_allclose(value, eight[name], rtol=1e-4, atol=1e-5, err_msg=name)
  pictures = [w / 'samples' / 'iter_12' / 'sample.png' for w in (whole, tmp_path)]
  a, b = (np.asarray(Image.open(p), np.int32) for p in pictures)
  assert np.abs(a - b).max() <= 2
  distances = [
    json.loads((w / 'quality' / 'report_12.json').read_text())['frechet_pixels']
    for w in (whole, tmp_path)
  ]
  assert distances[0] == pytest.approx(distances[1], rel=0.01) and distances[0] > 0


def test_a_run_goes_on_with_other_devices_and_says_so(whole, half, tmp_path):
  shutil.copytree(half, tmp_path, dirs_exist_ok=True)
  said = succeed('train', tmp_path, devices=2, **UNSEEN).stderr
  assert 'devices 2, processes 1, before devices 1, processes 1' in said and 'at step 6' in said
  one, two = state_of(whole, 12), state_of(tmp_path, 12)
  for name, value in one.items():
    np.testing.assert_allclose(value, two[name], rtol=1e-4, atol=1e-5, err_msg=name)


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


def test_another_model_is_refused_on_resuming(whole):
  assert 'config.model.nf: 8 there, 16 now' in refusal(run_lib.train, whole, model__nf=16)


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


def test_without_a_flag_it_is_told_how_to_begin():
  """By commands whose configs and pages are there."""
  alone = [sys.executable, str(ROOT / 'main.py')]
  done = subprocess.run(alone, capture_output=True, text=True, check=False)
  assert done.returncode == 2 and not done.stderr
  named = re.findall(r'[\w/]+\.(?:py|md)', done.stdout)
  assert named and all((ROOT / name).exists() for name in named)
  done = subprocess.run([*alone, '--mode=train'], capture_output=True, text=True, check=False)
  assert '--config is missing, for example --config configs/vp/digits.py' in refused(done)


@pytest.mark.parametrize(
  ('config', 'said'),
  [
    ('configs/vp/digits.py:large', 'has no variants'),
    ('configs/vp/digit.py', 'is not a file'),
    ('configs/../runtime/errors.py', 'is not a config file'),
  ],
)
def test_a_wrong_config_file_is_refused(tmp_path, config, said):
  assert said in refused(run('train', tmp_path, config=config))


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
  error = refused(run('train', tmp_path, devices=8, training__batch_size=12))
  assert 'batch_size = 12 must be a multiple of the number of devices, 8' in error


def test_an_unknown_dataset_is_refused_with_the_nearest(tmp_path):
  assert "did you mean 'CIFAR10'" in refusal(run_lib.train, tmp_path, data__dataset='CIFAR1O')


def test_an_empty_image_folder_is_refused(tmp_path):
  folder = tmp_path / 'photos'
  folder.mkdir()
  error = refusal(run_lib.train, tmp_path, data__dataset='folder', data__path=str(folder))
  assert f'no images in {folder}' in error


def test_a_corrupt_image_is_named(tmp_path):
  folder = tmp_path / 'photos'
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(6):
    Image.fromarray(rng.integers(0, 256, (9, 12), np.uint8)).save(folder / f'{i}.png')
  broken = folder / '3.png'
  broken.write_bytes(broken.read_bytes()[:60])
  error = refusal(run_lib.train, tmp_path / 'run', data__dataset='folder', data__path=str(folder))
  assert f'{broken} cannot be read' in error


def test_a_loss_that_is_not_finite_stops_and_is_never_saved(tmp_path):
  """Also where a checkpoint is due, here at step 2, before the next line of the log, at step 5."""
  wild = {'optim__lr': 1e30, 'optim__warmup': 0, 'optim__grad_clip': -1.0}
  error = refused(run('train', tmp_path, training__log_freq=5, **wild))
  assert ' at step 2: nothing was saved' in error
  assert not [p for p in tmp_path.glob('checkpoints*/*') if p.name.isdigit()]


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').touch()
  assert 'cannot write to' in refusal(run_lib.train, tmp_path / 'file' / 'run')


def damage(folder: Path, everywhere: bool = False) -> None:
  """Flips one bit in the middle of the largest file, or in every other hundredth of it.

  Which array lies in the middle differs from run to run: arrays are written at the same time.
  """
  largest = max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(largest.read_bytes())
  places = range(0, len(data), max(1, len(data) // 50)) if everywhere else [len(data) // 2]
  for place in places:
    data[place] ^= 1
  largest.write_bytes(data)


@pytest.fixture(scope='module')
def half(tmp_path_factory) -> Path:
  """The workdir of a run to step 6."""
  workdir = tmp_path_factory.mktemp('half')
  in_process('train', workdir, training__n_iters=6, **UNSEEN)
  return workdir


def test_a_damaged_checkpoint_is_skipped_with_a_warning(whole, half, tmp_path):
  shutil.copytree(half, tmp_path, dirs_exist_ok=True)
  damage(tmp_path / 'checkpoints' / '6', everywhere=True)  # or evaluation might not read it
  assert 'checkpoints/6 is damaged' in refusal(run_lib.evaluate, tmp_path)
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
  assert 'can be restored; move' in refusal(run_lib.train, tmp_path)
  assert sorted(tmp_path.rglob('*')) == before
