"""What numbers of an evaluation are worth: floors, how many samples, averages that are late."""

from functools import partial
import json
from pathlib import Path

from etils import epath
import numpy as np
import pytest

from configs.toy import two_moons
from evaluation import metrics
from evaluation.average import is_late, LATE, what_is_late
from evaluation.metrics import Floor
import run_lib
from training.averages import ConstantRate, HalfLife, Power, WarmingRate
from workdir import page, reports


def test_a_floor_is_the_distance_of_disjoint_halves(monkeypatch):
  """Of 2 n rows, however they are ordered; it falls with n as it does for independent samples."""
  few = partial(metrics.kernel_distance, subsets=2)  # all of so few rows are in each
  monkeypatch.setattr(metrics, 'kernel_distance', few)
  data = np.random.default_rng(0).normal(size=(800, 16)).astype(np.float32)
  data = data[data[:, 0].argsort()]  # of which the first half and the second differ
  floors = [Floor.of(data, n) for n in (20, 100, 400, 10**6)]
  assert [floor.n for floor in floors] == [20, 100, 400, 400]
  assert floors[2] == floors[3]
  assert floors[0].frechet > 2 * floors[1].frechet > 4 * floors[2].frechet > 0
  first, last = (metrics.Moments.of(half) for half in np.split(data, 2))
  of_order = metrics.frechet_distance(first.mean, first.cov, last.mean, last.cov)
  assert floors[2].frechet < of_order / 5 and abs(floors[2].kernel) < 0.05
  seen = []
  moments = metrics.Moments.of
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(metrics.Moments, 'of', lambda x: seen.append(x) or moments(x))
    Floor.of(np.arange(22.0)[:, None], 10)
  assert len(np.unique(np.concatenate(seen))) == 20 and [len(half) for half in seen] == [10, 10]


def test_a_summary_says_what_distances_are_worth():
  report = {'step': 7, 'samples': 128, 'fid': 12.5, 'fid_floor': 3.25, 'fid_floor_images': 100}
  report |= {'kid': 0.25, 'kid_floor': 0.5, 'few_samples': True, 'reference_inception': 'abc'}
  assert reports.summary(report) == (
    'samples 128, fid 12.5 (floor 3.25), kid 0.25 (floor 0.5). 128 samples are fewer than 10,000: '
    'the fewer, the larger is the distance, so that it can be compared with that of as many only. '
    'The floor is the distance between two halves of the data, of 100 images each, as there are '
    'too few for 128'
  )
  many = report | {'samples': 10_000, 'fid_floor_images': 10_000, 'few_samples': False}
  assert [note.partition(' ')[0] for note in reports.notes(many)] == ['The']
  assert 'too few' not in reports.notes(many)[0]
  earlier = {'step': 7, 'samples': 9999, 'frechet_pixels': 1.0}  # of code that knew no floors
  assert [note.partition(' ')[0] for note in reports.notes(earlier)] == ['9,999']
  assert reports.notes({'step': 7, 'samples': 5, 'loss': 1.0}) == []
  assert 'few_samples' not in reports.scalars(report)
  table = reports.table([report, earlier]).splitlines()
  assert sum('fewer than 10,000' in line for line in table) == 2 and table[0].count('|') == 9


def test_the_share_of_the_first_parameters_in_an_average():
  rate = ConstantRate(0.9999)
  assert rate.share_of_first(100) == pytest.approx(0.9999**100)
  assert ConstantRate(0.0).share_of_first(1) == 0 and ConstantRate(0.5).share_of_first(0) == 1
  assert WarmingRate(0.9999).share_of_first(3) == pytest.approx(2 / 11 * 3 / 12 * 4 / 13)
  assert WarmingRate(0.1).share_of_first(2) == pytest.approx(0.1 * 0.1)
  assert HalfLife(640.0, 32, ramp_up=0).share_of_first(40) == pytest.approx(0.25)
  assert HalfLife(640.0, 32).share_of_first(1) == Power(0.1).share_of_first(1) == 0
  assert rate.share_of_first(29_900) > LATE
  assert not is_late(rate, 30_000) and not is_late(WarmingRate(0.9999), 5)
  assert 'after 100 steps, 99% of the moving average' in what_is_late(rate, 100)


def config_of(**fields):
  config = two_moons.get_config('vp')
  config.training.update(n_iters=100, snapshot_freq=100, eval_freq=100, snapshot_samples=64)
  config.model.update(ema_rate=0.9999, ema_warmup=False)
  config.sampling.update(method='ddim', num_steps=3)
  config.eval.update(enable_sampling=False, begin_ckpt=1)
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
  return config


@pytest.fixture(scope='module')
def late(tmp_path_factory) -> Path:
  """The workdir of a run of a hundred steps whose average is almost what it began with."""
  workdir = tmp_path_factory.mktemp('late')
  run_lib.train(config_of(), str(workdir))
  return workdir


def test_the_loss_of_an_average_that_is_late_stands_beside_that_of_the_parameters(late, caplog):
  (report,) = run_lib.evaluate(config_of(), str(late))
  assert report['loss_without_average'] < 0.8 * report['loss']
  assert report['score_error_without_average'] < report['score_error']
  (line,) = (
    m for m in caplog.messages if 'without' not in m and 'of the parameters themselves' in m
  )
  assert f'the loss is {report["loss"]:.4g}' in line and '99% of the moving average' in line
  assert f'{report["loss_without_average"]:.4g}' in line and 'ConstantRate(rate=0.9999)' in line
  assert json.loads((late / 'eval' / 'report_100.json').read_text()) == report
  stamp = (late / 'eval' / 'report_100.json').stat().st_mtime_ns
  caplog.clear()
  assert run_lib.evaluate(config_of(), str(late)) == [report]  # what is there is not done again
  assert (late / 'eval' / 'report_100.json').stat().st_mtime_ns == stamp
  assert 'of the parameters themselves' in caplog.text
  page.write(epath.Path(late))
  assert 'loss_without_average' in (late / 'index.html').read_text()


def test_samples_of_an_average_that_is_late_say_so(late, caplog):
  run_lib.sample(config_of(), str(late))
  assert 'samples are of parameters that have not arrived: after 100 steps, 99%' in caplog.text


def test_an_average_that_has_arrived_is_not_doubted(tmp_path, caplog):
  config = config_of(model__ema_warmup=True, training__n_iters=20, training__snapshot_freq=20)
  run_lib.train(config, str(tmp_path))
  (report,) = run_lib.evaluate(config, str(tmp_path))
  assert 'loss_without_average' not in report and 'average' not in caplog.text
