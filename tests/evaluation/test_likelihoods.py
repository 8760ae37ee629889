"""Bits/dim of a user's images: the table, the pictures, what is refused."""

import csv
import dataclasses

from etils import epath
import numpy as np
from PIL import Image
import pytest
from test_likelihood import few_digits, known_model

from builders.evaluation import make_bits_of_files
from builders.setup import build
from configs import base, own
from evaluation.likelihoods import measure
from runtime.errors import UserError
from workdir.pictures import histogram


def config_of(**fields):
  config = own.digits(base.vp('ddpmpp'))
  config.eval.update(enable_bound=True, bound_times=20, bpd_repeats=2)
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
  return config


@pytest.fixture
def folder(tmp_path):
  """Three grey images, and white ones, which a model of N(0, 1/4) in [0, 1] finds less likely."""
  inside = tmp_path / 'mine' / 'more'
  inside.mkdir(parents=True)
  for name, value in {'a.png': 10, 'more/b,c.png': 255, 'd.png': 20}.items():
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / 'mine' / name)
  return tmp_path / 'mine'


def test_the_least_likely_images_come_first(folder, tmp_path, caplog):
  setup = build(config_of(data__centered=False, eval__enable_bound=False))
  bits, files = make_bits_of_files(setup, str(folder))
  assert len(bits.source) == 3
  bits = dataclasses.replace(bits, model=known_model(setup.model.sde))
  names, out = [str(file.relative_to(folder)) for file in files], epath.Path(tmp_path / 'out')
  with caplog.at_level('INFO'):
    report = measure(bits, names, few_digits(), {}, out)
  rows = list(csv.DictReader((out / 'images.csv').open()))
  assert rows[0]['image'] == 'more/b,c.png' and {row['image'] for row in rows} == {*names}
  found = [float(row['bits_per_dim']) for row in rows]
  assert found == sorted(found, reverse=True) and all(float(row['std_error']) > 0 for row in rows)
  # White is x = 1: at x^2 / (2 s^2) = 2 nats, 2 / ln 2 bits, more than black.
  assert found[0] - found[-1] == pytest.approx(2 / np.log(2), abs=0.15)
  assert (report['images'], report['data']) == (3, 10)
  assert report['bpd_images'] == pytest.approx(np.mean(found), abs=1e-4)
  assert 'b,c.png' in caplog.text
  assert {file.name for file in out.glob('*.npz')} == {
    f'bpd_{of}_{repeat}.npz' for of in ('images', 'data') for repeat in (0, 1)
  }  # one batch of each
  sheet = np.asarray(Image.open(out / 'least_likely.png'))
  assert (sheet[20, 20] == 255).all() and sheet[20, 90].max() < 30  # in the order of the table
  assert Image.open(out / 'histogram.png').size > (400, 200)


def test_a_histogram_shows_each_kind_where_it_lies():
  rng = np.random.default_rng(0)
  apart = {'x': rng.normal(0, 0.1, 500), 'y': rng.normal(5, 0.1, 100)}
  picture = np.asarray(histogram(apart, 'bits/dim'))[40:240]  # between the words
  colours = [np.array([0xD1, 0x49, 0x5B]), np.array([0x00, 0x79, 0x8C])]
  centre = [np.where((picture == c).all(-1).any(0))[0] for c in colours]
  tall = [np.where((picture == c).all(-1).sum(0) > 20)[0].mean() for c in colours]
  assert tall[0] < 100 < 400 < tall[1] and len(centre[0])
  assert histogram({'one': np.ones(3)}, 'bits/dim')  # all alike


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'training__single_scale': True, 'sampling__method': 'langevin', 'sampling__eps': 1e-5,
      'eval__enable_bound': False}, 'all levels of noise'),
    ({'model__num_classes': 3, 'training__label_dropout': 0.0}, 'label_dropout = 0'),
  ],
)  # fmt: skip
def test_models_without_such_a_likelihood_are_refused(folder, fields, said):
  with pytest.raises(UserError, match=said):
    make_bits_of_files(build(config_of(**fields)), str(folder))


def test_no_images_are_told(tmp_path):
  with pytest.raises(UserError, match=r'--images=.* is neither an image nor a folder'):
    make_bits_of_files(build(config_of()), str(tmp_path))
  (tmp_path / 'x.png').write_bytes(b'no image')
  bits, _ = make_bits_of_files(build(config_of()), str(tmp_path / 'x.png'))
  with pytest.raises(UserError, match=r'x\.png cannot be read'):
    bits.source.batch(np.arange(1))
