"""Distances of snapshots' samples from the data, as an evaluation has them; the best is named."""

from functools import partial
import json
import os
from pathlib import Path
import re
import shutil
import signal

from ml_collections import ConfigDict
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from whole_runs import refusal, UNSEEN, values_of

from configs.vp import digits
from evaluation.sample_quality import SampleQuality
import run_lib
from runtime.errors import UserError
from workdir import best, reports


@pytest.fixture(scope='module')
def fields(tmp_path_factory) -> dict:
  """Two snapshots, of each 24 samples in two rounds; the statistics are made by the first run."""
  stats = tmp_path_factory.mktemp('stats') / 'digits.npz'
  compared = {'eval__features': 'pixels', 'eval__stats_path': str(stats)}
  return UNSEEN | compared | {'training__fid_freq': 1, 'training__fid_samples': 24}


def config_of(fields: dict, **changes) -> ConfigDict:
  config = digits.get_config()
  config.update_from_flattened_dict(values_of(fields | changes))
  return config


@pytest.fixture(scope='module')
def whole(fields, tmp_path_factory) -> Path:
  """A run that nothing disturbed."""
  root = tmp_path_factory.mktemp('whole')
  run_lib.train(config_of(fields), str(root))
  return root


def report(root: Path, step: int, folder: str = best.FOLDER) -> dict:
  return json.loads((root / folder / f'report_{step}.json').read_text())


def measured(found: dict) -> dict:
  """What a report says of the samples, without what it took."""
  return {name: v for name, v in found.items() if name != 'versions' and 'seconds' not in name}


def curve(root: Path, name: str) -> dict[int, list[float]]:
  """The values of a scalar in TensorBoard, by step: of the events that no later ones make void."""
  points: dict[int, list[float]] = {}
  for path in sorted((root / best.FOLDER / 'tensorboard').iterdir(), key=os.path.getmtime):
    points.clear()  # each file begins by making void what is from step 0 on
    data = path.read_bytes()
    while data:
      n = int.from_bytes(data[:8], 'little')
      event = event_pb2.Event.FromString(data[12 : 12 + n])
      data = data[16 + n :]
      for value in event.summary.value:
        if value.tag == name:
          points.setdefault(event.step, []).append(value.simple_value)
  return points


def test_each_snapshot_has_a_point_and_the_best_is_named(whole):
  found = [report(whole, step) for step in (6, 12)]
  distances = [one['frechet_pixels'] for one in found]
  assert all(one['samples'] == 24 and one['frechet_pixels_floor'] > 0 for one in found)
  points = curve(whole, 'eval/frechet_pixels')
  assert points == {6: [pytest.approx(distances[0])], 12: [pytest.approx(distances[1])]}
  named = json.loads((whole / best.FILE).read_text())
  step = (6, 12)[int(np.argmin(distances))]
  assert (named['step'], named['value'], named['samples']) == (step, min(distances), 24)
  assert named['checkpoint'] == report(whole, step)['checkpoint'] and named['compared'] == 2
  page = (whole / 'index.html').read_text()
  assert 'Samples of snapshots, compared with the data' in page
  assert f'Best by frechet_pixels: the checkpoint of step {step}' in page


def test_an_evaluation_says_the_same(whole, fields):
  """To the bit, of the same checkpoint, average, keys, number of samples and rounds."""
  changes = {'eval__enable_sampling': True, 'eval__enable_loss': False, 'eval__num_samples': 24}
  run_lib.evaluate(config_of(fields, **changes), str(whole))
  for step in (6, 12):
    assert measured(report(whole, step)) == measured(report(whole, step, 'eval'))
    for i in range(2):
      rounds = [
        np.load(whole / folder / f'step_{step}' / f'samples_{i}.npz')['samples']
        for folder in (best.FOLDER, 'eval')
      ]
      np.testing.assert_array_equal(*rounds)


def test_a_run_stopped_in_between_neither_loses_nor_doubles_a_point(
  whole, fields, tmp_path, monkeypatch
):
  """By a signal in a round of one snapshot, at once in one of the next; whole rounds are kept."""
  draw, drawn = SampleQuality._draw_round, []

  def disturbed(self, params, step, i, *rest):
    drawn.append((step, i))
    if drawn == [(6, 0), (6, 1)]:
      os.kill(os.getpid(), signal.SIGTERM)
    if drawn[2:] == [(6, 1), (12, 0), (12, 1)]:
      raise RuntimeError('killed')
    return draw(self, params, step, i, *rest)

  monkeypatch.setattr(SampleQuality, '_draw_round', disturbed)
  with pytest.raises(SystemExit):
    run_lib.train(config_of(fields), str(tmp_path))
  assert not reports.path_of(tmp_path / best.FOLDER, 6).exists()
  assert not [p for p in (tmp_path / 'checkpoints-meta').iterdir() if int(p.name) > 6]
  with pytest.raises(RuntimeError, match='killed'):
    run_lib.train(config_of(fields), str(tmp_path))
  run_lib.train(config_of(fields), str(tmp_path))
  assert drawn == [(6, 0), (6, 1), (6, 1), (12, 0), (12, 1), (12, 1)]
  for step in (6, 12):
    assert measured(report(tmp_path, step)) == measured(report(whole, step))
  assert curve(tmp_path, 'eval/frechet_pixels') == curve(whole, 'eval/frechet_pixels')
  assert best.read(tmp_path) == best.read(whole)


def test_the_best_can_be_sampled_and_evaluated(whole, fields, tmp_path):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  named = json.loads((tmp_path / best.FILE).read_text())
  (tmp_path / best.FILE).write_text(json.dumps(named | {'step': 6}))
  chosen = config_of(fields, eval__best=True, eval__enable_loss=False)
  run_lib.sample(chosen, str(tmp_path))
  assert [path.name for path in (tmp_path / 'sample').glob('step_*')] == ['step_6']
  (found,) = run_lib.evaluate(chosen, str(tmp_path), 'other')
  assert found['step'] == 6
  (tmp_path / best.FILE).unlink()
  for what in (run_lib.sample, partial(run_lib.evaluate, eval_folder='other')):
    with pytest.raises(UserError, match=r'has no best\.json, which training writes'):
      what(chosen, str(tmp_path))


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'eval__features': ''}, 'compares samples with images by config.eval.features'),
    ({'training__fid_samples': 9}, 'fid_samples = 9 must be at least 10'),
    ({'training__fid_samples': 32}, 'fid_samples: 24 there, 32 now.*must be comparable'),
    ({'sampling__num_steps': 6}, 'num_steps: 25 there, 6 now.*move that folder away'),
  ],
)
def test_distances_that_cannot_be_compared_are_refused(whole, fields, changes, said):
  error = refusal(run_lib.train, whole, **fields | changes)
  assert re.search(said, error), error
