"""Whole evaluations: statistics, reports, kills, several processes."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
import signal
import subprocess
import time

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest
from whole_runs import (
  assert_same_bits,
  command,
  in_process,
  one_after_another,
  refusal,
  state_of,
  succeed,
  UNSEEN,
)

from builders.evaluation import checkpoint_range, reference_file
from builders.setup import build, Setup
from configs.vp.digits import get_config
from data import sources
from data.codec import ImageCodec
from data.deep import Span
from evaluation import evaluate, features, metrics, reference
from evaluation.metrics import Moments
import run_lib
from runtime.errors import UserError
from training.checkpoints import Checkpoints
from workdir import artifacts, reports
from workdir.rounds import kept_or_made
from workdir.same_config import check_unchanged, FIXED_IN_EVAL, LEARNED


@pytest.fixture(scope='module')
def stats(tmp_path_factory) -> Path:
  """The statistics of the digits' pixels."""
  config = get_config()
  path = tmp_path_factory.mktemp('stats') / 'digits.npz'
  config.eval.stats_path = str(path)
  run_lib.stats(config)
  return path


@pytest.fixture(scope='module')
def wanted(stats) -> dict:
  """Fields of an evaluation of samples."""
  return {'eval__features': 'pixels', 'eval__stats_path': stats, 'eval__batch_size': 16}


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory, wanted) -> Path:
  """The workdir of a run that was trained and evaluated."""
  workdir = tmp_path_factory.mktemp('evaluated')
  in_process('train', workdir, **UNSEEN)
  in_process('eval', workdir, **wanted)
  return workdir


def load(path: Path) -> dict[str, np.ndarray]:
  with np.load(path) as arrays:
    return dict(arrays)


def report_of(folder: Path, step: int = 12) -> dict:
  """What a report says, the time that it took left out."""
  report = json.loads((folder / f'report_{step}.json').read_text())
  return {k: v for k, v in report.items() if not k.endswith('seconds')}


def repeat_evaluation(folder: Path, lost: list[str], **fields) -> dict[str, dict[str, np.ndarray]]:
  """Evaluates step 12 again without its report and some rounds; all comes out as it was.

  Returns:
    The arrays of every round.
  """
  rounds, first = sorted((folder / 'step_12').glob('*.npz')), report_of(folder)
  arrays, stamps = [load(path) for path in rounds], [os.stat(path).st_mtime_ns for path in rounds]
  for path in (folder / 'report_12.json', *(folder / 'step_12' / name for name in lost)):
    path.unlink()
  in_process('eval', folder.parent, folder.name, **fields)
  assert report_of(folder) == first
  for path, stamp, before in zip(rounds, stamps, arrays, strict=True):
    assert (os.stat(path).st_mtime_ns == stamp) == (path.name not in lost)
    after = load(path)
    assert_same_bits(
      {k: after[k] for k in after if k != 'seconds'},
      {k: before[k] for k in before if k != 'seconds'},
    )
  return {path.name: values for path, values in zip(rounds, arrays, strict=True)}


def test_an_evaluation_resumes_where_it_was_stopped(evaluated, wanted):
  assert report_of(evaluated / 'eval', 6)['samples'] == 24
  lost = ['samples_1.npz', 'features_pixels_1.npz']
  rounds = repeat_evaluation(evaluated / 'eval', lost, **wanted)
  samples = [rounds[f'samples_{i}.npz']['samples'] for i in (0, 1)]
  assert [x.shape for x in samples] == [(16, 8, 8, 1), (8, 8, 8, 1)]


def test_a_report_says_what_the_samples_and_the_data_say(evaluated):
  """Every distance once more, from the samples and the images themselves."""
  report, folder = report_of(evaluated / 'eval'), evaluated / 'eval' / 'step_12'
  samples = np.concatenate([load(folder / f'samples_{i}.npz')['samples'] for i in (0, 1)])
  images = sources.load('digits', 'train', image_size=8, num_channels=1).gather(np.arange(1500))
  x, y = (np.float32(a.reshape(len(a), -1)) / 255 for a in (samples, images))
  a, b = Moments.of(x), Moments.of(y)
  assert report['frechet_pixels'] == pytest.approx(
    metrics.frechet_distance(a.mean, a.cov, b.mean, b.cov), rel=1e-6
  )
  assert report['kernel_pixels'] == pytest.approx(metrics.kernel_distance(x, y)[0], rel=1e-6)
  mesh = build(get_config()).devices.mesh
  found = [report['precision_pixels'], report['recall_pixels']]
  assert found == pytest.approx(metrics.precision_recall(x, y, mesh))
  assert (report['step'], report['samples'], report['loss_images']) == (12, 24, 297)
  assert report['versions']['jax'] == jax.__version__ and report['nfe'] == 50


def test_a_table_compares_the_checkpoints(evaluated):
  both = [report_of(evaluated / 'eval', step) for step in (6, 12)]
  lines = (evaluated / 'eval' / 'table.md').read_text().splitlines()
  assert [line.split(' | ')[0] for line in lines[:4]] == ['| step', '| ---', '| 6', '| 12']
  best = min(both, key=lambda report: report['frechet_pixels'])['step']
  assert lines[-1] == f'Best by frechet_pixels: the checkpoint of step {best}.'
  assert list((evaluated / 'eval' / 'tensorboard').glob('events.*'))
  assert reports.best([{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 0.5, 'fid': 3.0}]) == (
    2,
    'loss',
  )
  assert reports.best([]) is None


def test_killed_at_any_moment_it_says_the_same_in_the_end(evaluated, wanted):
  """SIGKILL as soon as there is a first round, then as soon as there is one more."""
  fields = wanted | {'eval__begin_ckpt': 2, 'eval_folder': 'killed'}
  folder = evaluated / 'killed'
  for n in (1, 3):
    process = subprocess.Popen(command('eval', evaluated, **fields), stderr=subprocess.DEVNULL)
    while len(list(folder.glob('step_12/*.npz'))) < n:
      assert process.poll() is None
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
  succeed('eval', evaluated, **fields)
  assert report_of(folder) == report_of(evaluated / 'eval')


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> dict:
  """Ten images, of which bits per dimension are wanted, and the like."""
  folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
  for i in range(10):
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / f'{i}.png')
  fields = {'data__dataset': 'folder', 'data__path': folder, 'eval__batch_size': 8}
  return fields | {'eval__enable_bpd': True, 'eval__bpd_repeats': 2}


def test_bits_per_dimension_resume_where_they_were_stopped(evaluated, photos):
  """In batches of eight, twice, by the network of the last checkpoint."""
  fields = photos | {'eval__enable_loss': False, 'eval__enable_sampling': False}
  fields |= {'eval__begin_ckpt': 2}
  in_process('eval', evaluated, 'bits', **fields)
  report = report_of(evaluated / 'bits')
  rounds = repeat_evaluation(evaluated / 'bits', ['bpd_test_1.npz'], **fields)
  bits = [arrays['bpd'] for arrays in rounds.values()]
  assert report['bpd_test_images'] == 10 and [len(of_round) for of_round in bits] == [8, 2, 8, 2]
  assert report['bpd_test'] == pytest.approx(np.concatenate(bits).mean(), rel=1e-6)
  assert all(bool(arrays['nfe'] > 10) for arrays in rounds.values())


def test_two_processes_of_four_devices_are_one_of_eight(tmp_path, photos):
  """Training, loss, samples and their distances, of a state in eight parts."""
  fields = photos | {'training__n_iters': 6, 'training__batch_size': 8} | UNSEEN
  fields |= {'training__snapshot_freq_for_preemption': 6, 'training__fsdp': 8, 'model__nf': 96}
  fields |= {'training__n_jitted_steps': 3, 'eval__num_samples': 16, 'eval__features': 'pixels'}
  fields |= {'training__log_freq': 3, 'training__eval_freq': 3, 'sampling__num_steps': 4}
  fields |= {'eval__enable_bpd': False, 'eval__stats_path': str(tmp_path / 'stats.npz')}
  fields |= {'data__path': str(photos['data__path'])}
  one, two = tmp_path / 'one', tmp_path / 'two'
  one_after_another(2, 4, [(mode, two, fields) for mode in ('train', 'stats', 'eval')])
  one_after_another(1, 8, [(mode, one, fields) for mode in ('train', 'eval')])
  ours, theirs = state_of(two, 6), state_of(one, 6)
  for name, value in theirs.items():
    np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
  a, b = (report_of(workdir / 'eval', 6) for workdir in (one, two))
  assert a.pop('versions')['processes'] == 1 and b.pop('versions')['processes'] == 2
  del a['checkpoint'], b['checkpoint']  # of the bits, which differ by rounding
  assert a['loss_images'] == 10 and 'frechet_pixels' in a
  assert a.keys() == b.keys()
  for name, value in a.items():
    assert b[name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name
  # Of the snapshot each process has written its own part.
  written = [
    sum(file.stat().st_size for file in (two / f'checkpoints/6/default/{part}').rglob('*'))
    for part in ('ocdbt.process_0', 'ocdbt.process_1')
  ]
  assert 0.5 < written[0] / written[1] < 2, written


# What samples are compared with.


def test_other_samples_are_refused_in_an_eval_folder(evaluated, wanted):
  other = wanted | {'eval__stats_path': str(wanted['eval__stats_path']), 'sampling__num_steps': 30}
  error = refusal(run_lib.evaluate, evaluated, **other)
  assert 'config.sampling.num_steps: 25 there, 30 now' in error


def test_a_missing_reference_names_the_command(evaluated, tmp_path):
  nowhere = {'eval__features': 'pixels', 'eval__stats_path': str(tmp_path / 'none.npz')}
  error = refusal(run_lib.evaluate, evaluated, **nowhere)
  assert f'{tmp_path}/none.npz does not exist' in error and '--mode stats makes it' in error


def setup_with(stats: Path, **fields) -> Setup:
  config = get_config()
  config.eval.stats_path = str(stats)
  for name, value in fields.items():
    config.update_from_flattened_dict({name.replace('__', '.'): value})
  return build(config)


def test_a_reference_of_something_else_is_refused(stats, tmp_path):
  of_test = reference_file(setup_with(stats, eval__stats_split='test'))
  with pytest.raises(UserError, match=r"split: 'train' there, 'test' now"):
    of_test.load()
  broken = tmp_path / 'broken.npz'
  broken.write_bytes(stats.read_bytes()[:1000])
  with pytest.raises(UserError, match=r'broken\.npz cannot be read'):
    reference_file(setup_with(broken)).load()


def test_statistics_that_are_stopped_go_on_and_end_the_same(stats, tmp_path):
  path = tmp_path / 'again.npz'
  setup = setup_with(path)
  source = sources.load('digits', 'train', image_size=8, num_channels=1)
  pixels = features.load('pixels')
  calls = []

  class Stopping(features.FeatureNetwork):
    def compile(self, mesh):
      extract = super().compile(mesh)

      def stop_at_the_third(images):
        calls.append(len(images))
        if len(calls) == 3:
          raise KeyboardInterrupt
        return extract(images)

      return stop_at_the_third

  stopping = Stopping(**{name: getattr(pixels, name) for name in pixels.__dataclass_fields__})
  file = dataclasses.replace(reference_file(setup), network=stopping)
  with pytest.raises(KeyboardInterrupt):
    file.make(source, 400, setup.devices.mesh)
  assert not path.exists()
  file.make(source, 400, setup.devices.mesh)
  assert len(calls) == 5 and [p.name for p in tmp_path.iterdir()] == ['again.npz']  # 3 + 2 of 4
  once, again = load(stats), load(path)
  for name in ('mean', 'cov'):
    np.testing.assert_allclose(once[name], again[name], rtol=1e-12, atol=1e-15)
  np.testing.assert_array_equal(once['features'], again['features'])
  told = json.loads(str(again['provenance']))
  assert told['count'] == 1500 and told['split'] == 'train' and told['versions']


def test_statistics_keep_of_many_images_only_what_is_used(tmp_path, monkeypatch):
  """On disk lie the features of `KEPT` images, and sums; whatever is stopped, in whatever round."""
  monkeypatch.setattr(reference, 'KEPT', 20)
  setup = setup_with(tmp_path / 'few.npz')
  source = sources.load('digits', 'train', image_size=8, num_channels=1)
  write, on_disk = reference.artifacts.write_large_npz, []

  def look_and_stop(path, **arrays):
    if len(on_disk) in (0, 4, 9):  # the rows of a round are there, its sums are not
      on_disk.append(0)
      raise KeyboardInterrupt
    write(path, **arrays)
    on_disk.append(sum(len(load(p)['features']) for p in path.parent.glob('[0-9]*.npz')))

  monkeypatch.setattr(reference.artifacts, 'write_large_npz', look_and_stop)
  file = reference_file(setup)
  for _ in range(3):
    with pytest.raises(KeyboardInterrupt):
      file.make(source, 100, setup.devices.mesh)
  file.make(source, 100, setup.devices.mesh)
  assert max(on_disk) == 20 and len(on_disk) == 15 + 3
  pixels = source.gather(np.arange(1500)).reshape(1500, -1) / 255
  found = file.load()
  np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=1e-6)
  np.testing.assert_allclose(found.cov, np.cov(pixels.T), rtol=1e-5, atol=1e-9)
  chosen = np.linspace(0, 1499, 20).round().astype(int)
  np.testing.assert_allclose(found.features, pixels[chosen], rtol=1e-6)
  labels = source.batch(np.arange(1500))['label']
  assert found.class_counts == tuple(np.bincount(labels).tolist())
  assert [path.name for path in tmp_path.iterdir()] == ['few.npz']


def test_statistics_that_were_stopped_at_the_very_end_are_written(stats, tmp_path, monkeypatch):
  """Once all rounds are done, and the file is not there yet."""
  setup = setup_with(tmp_path / 'again.npz')
  source = sources.load('digits', 'train', image_size=8, num_channels=1)

  def stop(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(reference.versions, 'here', stop)
    reference_file(setup).make(source, 512, setup.devices.mesh)
  reference_file(setup).make(source, 512, setup.devices.mesh)
  np.testing.assert_array_equal(load(stats)['features'], load(tmp_path / 'again.npz')['features'])
  assert [path.name for path in tmp_path.iterdir()] == ['again.npz']


def test_statistics_of_two_folders_of_one_name_are_two_files(tmp_path):
  paths = [
    reference.Images('folder', '', str(tmp_path / where / 'images'), 'train', (8, 8, 1)).usual_path(
      'pixels'
    )
    for where in ('cats', 'dogs', 'dogs/../dogs')
  ]
  assert paths[0] != paths[1] == paths[2] and paths[0].name.startswith('folder-images-')


def test_what_is_left_of_a_write_does_not_stop_statistics(stats, tmp_path):
  """A process that is killed while it writes leaves a file of another name."""
  setup = setup_with(tmp_path / 'again.npz')
  source = sources.load('digits', 'train', image_size=8, num_channels=1)
  write = reference.artifacts.write_npz

  def leave_more(path, **arrays):
    write(path, **arrays)
    for folder in tmp_path.glob('.again*'):
      (folder / '.0.npz.tmp').touch()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reference.artifacts, 'write_npz', leave_more)
    reference_file(setup).make(source, 512, setup.devices.mesh)
  assert [path.name for path in tmp_path.iterdir()] == ['again.npz']


def test_rounds_of_another_version_are_made_again(tmp_path):
  def make(value):
    return lambda: {'features': np.full(3, value)}

  path = epath.Path(tmp_path / 'features_0.npz')
  for version, value, found in (('1', 1, 1), ('1', 2, 1), ('2', 3, 3), ('2', 4, 3)):
    arrays = kept_or_made(path, 'features', 3, make(value), version)
    np.testing.assert_array_equal(arrays['features'], found)


@pytest.mark.parametrize(
  ('name', 'value', 'in_run', 'in_eval'),
  [
    ('model.remat', True, False, False),
    ('model.dtype', 'bfloat16', False, True),
    ('data.path', 'elsewhere', False, True),
    ('ebm.buffer_size', 7, True, True),
    ('optim.grad_clip', 3.0, False, False),
  ],
)
def test_what_may_change_in_a_run_and_in_an_evaluation(tmp_path, name, value, in_run, in_eval):
  config = get_config()
  path = epath.Path(tmp_path / 'config.json')
  artifacts.write_json(path, config.to_dict())
  config.update_from_flattened_dict({name: value})
  for fixed, refused in ((LEARNED, in_run), (FIXED_IN_EVAL, in_eval)):
    with pytest.raises(UserError, match=name) if refused else contextlib.nullcontext():
      check_unchanged(path, config.to_dict(), fixed)


def test_samples_that_are_not_finite_are_told():
  x = np.zeros((4, 8, 8, 1), np.float32)
  x[1, 2, 3] = np.nan
  with pytest.raises(FloatingPointError, match='1 of 4 samples are not finite'):
    ImageCodec((8, 8, 1)).to_stored(x)


def test_the_released_statistics_are_read(tmp_path):
  """pool_3 alone, as in cifar10_stats.npz; here of 64 pixels."""
  pool_3 = np.random.default_rng(0).random((50, 64), np.float32)
  np.savez(tmp_path / 'released.npz', pool_3=pool_3)
  of_pixels = reference_file(setup_with(tmp_path / 'released.npz'))
  with pytest.raises(UserError, match="features: 'inception' there, 'pixels' now"):
    of_pixels.load()
  network = dataclasses.replace(of_pixels.network, name='inception')
  found = dataclasses.replace(of_pixels, network=network).load()
  assert found.n == 50
  np.testing.assert_array_equal(found.features, pool_3)
  np.testing.assert_allclose(found.cov, np.cov(np.float64(pool_3).T), rtol=1e-10)


# Which checkpoints.


class Some(Checkpoints):
  """Checkpoints of certain steps, one more at each look."""

  def __init__(self, *steps: int):
    self._all, self._seen = steps, 0

  def steps(self) -> list[int]:
    self._seen += 1
    return list(self._all[: self._seen])


def chosen(checkpoints: Checkpoints, monkeypatch, **fields) -> list[int]:
  monkeypatch.setattr(evaluate, 'WAIT_SECONDS', 0.0)
  fields = {'training__snapshot_freq': 10, 'training__n_iters': 45} | fields
  setup = setup_with(Path(), **fields)
  return list(checkpoint_range(setup.config).steps(checkpoints))


def test_checkpoints_are_waited_for_only_if_asked(monkeypatch):
  span = {'eval__begin_ckpt': 2, 'eval__end_ckpt': 4}
  everything = 10, 20, 30, 40, 45
  at_once = Some(*everything)
  at_once._seen = 5
  assert chosen(at_once, monkeypatch, **span) == [20, 30, 40]
  waiting = span | {'eval__wait': True}
  assert chosen(Some(*everything), monkeypatch, **waiting) == [20, 30, 40]
  assert chosen(Some(*everything), monkeypatch, **waiting | {'eval__end_ckpt': 9}) == [
    20,
    30,
    40,
    45,
  ]
  assert chosen(Some(10), monkeypatch, **span) == [10]  # the newest stands for those to come
  assert chosen(Some(45), monkeypatch, **span) == [45]  # released ones end a little after
  late = Some(50)
  late._seen = 1
  with pytest.raises(UserError, match=r'no checkpoints 2 to 4 \(steps 20 to 40\)'):
    chosen(late, monkeypatch, **span)


def test_statistics_of_images_that_were_read_otherwise_are_refused(stats):
  """Of another fit, background or range of the same files."""
  file = reference_file(setup_with(stats))
  file.load()
  for changed in ({'fit': 'pad'}, {'background': 'black'}, {'span': Span(0, 4095)}):
    images = dataclasses.replace(
      file.images, decoder=dataclasses.replace(file.images.decoder, **changed)
    )
    with pytest.raises(UserError, match=rf'of something else: {next(iter(changed))}: .* there'):
      dataclasses.replace(file, images=images).load()
