"""One image, or two, or none: each command does what is right, or says so before its work.

And what a number cannot be told of is null in JSON, which knows no NaN.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

from etils import epath
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from builders.evaluation import make_bits_per_dim, make_measurements, reference_file
from builders.setup import build
from configs.ve import digits as ve_digits
from configs.vp import digits as vp_digits
import run_lib
from runtime.errors import UserError
from workdir import artifacts, page, reports


def strict(text: str):
  """What JSON says that is JSON to everyone."""

  def refuse(word: str):
    raise ValueError(f'{word} is not JSON')

  return json.loads(text, parse_constant=refuse)


def folder_of(folder: Path, n: int, alike: bool = False) -> Path:
  (folder / 'photos').mkdir()
  for i in range(n):
    pixels = np.random.default_rng(0 if alike else i).integers(0, 256, (8, 8))
    Image.fromarray(np.uint8(pixels)).save(folder / 'photos' / f'{i}.png')
  return folder / 'photos'


def config_of(folder: Path, make=vp_digits, **fields):
  config = make.get_config()
  config.data.update(dataset='folder', path=str(folder))
  config.eval.update(stats_path=str(folder.parent / 'stats.npz'), enable_loss=False)
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
  return config


@pytest.mark.parametrize('make', [vp_digits, ve_digits])
def test_statistics_of_one_image_are_refused(tmp_path, make):
  config = config_of(folder_of(tmp_path, 1), make)
  with pytest.raises(UserError, match=r"at least 2 images; dataset 'folder' has 1 in split train"):
    run_lib.stats(config)
  assert not (tmp_path / 'stats.npz').exists()


def test_where_no_noise_levels_are_recommended_statistics_are_made(tmp_path, caplog):
  """Of images that are all alike; alone, the levels are refused."""
  photos = folder_of(tmp_path, 6, alike=True)
  assert run_lib.stats(config_of(photos, ve_digits)) is None
  assert 'no noise levels are recommended: the largest distance' in caplog.text
  assert (tmp_path / 'stats.npz').exists()
  with pytest.raises(UserError, match='the largest distance between two of 6 examples is 0'):
    run_lib.stats(config_of(photos, eval__features=''))
  caplog.clear()
  assert run_lib.stats(config_of(photos)) is None  # of VP, where they are of no use
  assert 'noise levels' not in caplog.text


@pytest.mark.parametrize('n', [2, 3, 4])
def test_too_few_images_for_precision_and_recall_are_told_before_samples_are_drawn(
  tmp_path, caplog, n
):
  config = config_of(folder_of(tmp_path, n))
  run_lib.stats(config)
  assert ('can be compared with more than 3 only' in caplog.text) == (n < 4)
  if n < 4:
    with pytest.raises(UserError, match=rf'stats\.npz is of {n} images: .* more than 3 only'):
      make_measurements(build(config))
  else:
    assert len(make_measurements(build(config))) == 1
  config.eval.features = ''
  assert len(make_measurements(build(config))) == 1


def test_earlier_statistics_of_one_image_are_refused(tmp_path):
  config = config_of(folder_of(tmp_path, 5))
  run_lib.stats(config)
  arrays = artifacts.read_npz(epath.Path(tmp_path / 'stats.npz'))
  np.savez(tmp_path / 'stats.npz', **arrays | {'cov': np.full_like(arrays['cov'], np.nan)})
  with pytest.raises(UserError, match='samples can be compared with more than 3 only'):
    reference_file(build(config)).load()


def test_statistics_in_place_of_a_folder_are_refused_before_the_work(tmp_path):
  config = config_of(folder_of(tmp_path, 5))
  (tmp_path / 'stats.npz').mkdir()
  with pytest.raises(UserError, match='is a folder; set config'):
    run_lib.stats(config)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_a_split_without_images_is_refused(tmp_path, split):
  photos = folder_of(tmp_path, 4)
  (photos / 'train').mkdir()
  (photos / 'test').mkdir()
  kept = 'test' if split == 'train' else 'train'
  for image in photos.glob('*.png'):
    image.rename(photos / kept / image.name)
  for run in (run_lib.train, run_lib.stats):
    config = config_of(photos, eval__stats_split=split)
    with pytest.raises(UserError, match=rf'no images in .*/{split}') as error:
      run(config, str(tmp_path / 'run')) if run is run_lib.train else run(config)
    assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('n', [1, 2])
def test_bits_of_one_image_have_no_standard_error(tmp_path, n):
  setup = build(config_of(folder_of(tmp_path, n), eval__bpd_repeats=2, eval__batch_size=4))
  bits = make_bits_per_dim(setup)
  density = SimpleNamespace(
    estimates=lambda rngs, score_fn, x0: (-(x0**2).sum((1, 2, 3))[None], jnp.int32(7))
  )
  bits = dataclasses.replace(bits, estimator=dataclasses.replace(bits.estimator, density=density))
  report = {'step': 6} | bits.measure({}, 6, epath.Path(tmp_path / 'step_6'))
  error = report['bpd_test_std_error']
  assert np.isfinite(report['bpd_test']) and (error is None if n == 1 else error > 0)
  reports.write(epath.Path(tmp_path), report)
  text = (tmp_path / 'report_6.json').read_text()
  assert strict(text)['bpd_test_std_error'] == error
  other = {'step': 12, 'bpd_test': 3.0, 'bpd_test_std_error': 0.5}  # in one table with others
  assert reports.table([report, other]).count('\n') == 6
  page.write(epath.Path(tmp_path))


def test_json_has_neither_nan_nor_infinity(tmp_path):
  value = {
    'NaN': float('nan'),
    'x': [float('inf'), -float('inf'), 1.5, None],
    'text': 'NaN, "Infinity" and \\ -Infinity',
    'deep': {'nan': [float('nan')]},
  }
  artifacts.write_json(epath.Path(tmp_path / 'a.json'), value)
  read = strict((tmp_path / 'a.json').read_text())
  assert read == {
    'NaN': None,
    'x': [float('inf'), -float('inf'), 1.5, None],
    'text': value['text'],
    'deep': {'nan': [None]},
  }
  with artifacts.Metrics(epath.Path(tmp_path), 0) as metrics:
    metrics.write(1, loss=float('nan'), rate=2.0)
  assert strict((tmp_path / 'metrics.jsonl').read_text()) == {'step': 1, 'loss': None, 'rate': 2.0}
  page.write(epath.Path(tmp_path))  # which shows such a file


def test_a_config_with_an_infinite_number_comes_back(tmp_path):
  config = vp_digits.get_config()
  config.sampling.s_tmax = float('inf')
  build(config)
  artifacts.write_json(epath.Path(tmp_path / 'config.json'), config.to_dict())
  strict((tmp_path / 'config.json').read_text())
  read = artifacts.read_json(epath.Path(tmp_path / 'config.json'))
  assert read['sampling']['s_tmax'] == float('inf')


def test_an_earlier_report_with_nan_is_read_and_mended(tmp_path):
  (tmp_path / 'report_3.json').write_text('{"step": 3, "bpd_test": 2.0, "bpd_test_std_error": NaN}')
  report = reports.read(epath.Path(tmp_path), 3)
  assert reports.scalars(report) == {'bpd_test': 2.0}
  reports.write(epath.Path(tmp_path), report)
  assert strict((tmp_path / 'report_3.json').read_text())['bpd_test_std_error'] is None
