"""One command says what is in a folder, and all that is wrong with it."""

import numpy as np
from PIL import Image
import pytest

from builders.data import check_data, make_decoder
from builders.setup import build
from configs.vp.photos import get_config
from data.deep import Span
from runtime.errors import UserError


def config_of(path, **fields):
  config = get_config()
  config.data.path, config.data.image_size = str(path), 8
  config.data.update(fields)
  return config


def save(file, shape, seed, mode='RGB'):
  file.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.RandomState(seed).randint(0, 256, (*shape, 3), np.uint8)
  Image.fromarray(pixels).convert(mode).save(file)


@pytest.fixture
def folder(tmp_path):
  """Two classes, two splits; long, small, grey, doubled and damaged images."""
  save(tmp_path / 'train/cat/a.png', (8, 8), 0)
  save(tmp_path / 'train/cat/b.png', (16, 32), 1, 'L')
  save(tmp_path / 'train/cat/same.png', (8, 8), 0)
  save(tmp_path / 'train/dog/d.jpg', (8, 8), 2)
  save(tmp_path / 'train/dog/e.png', (4, 4), 3)
  save(tmp_path / 'test/cat/leaked.png', (8, 8), 0)
  save(tmp_path / 'test/dog/f.png', (8, 8), 4)
  return tmp_path


def test_all_is_said_of_a_folder(folder, caplog):
  caplog.set_level('INFO')
  train, test = check_data(config_of(folder))
  assert train.lines[:4] == [
    '5 images',
    'sizes from 4x4 to 32x16; most often 8x8 (3 images)',
    'modes: RGB PNG 3, L PNG 1, RGB JPEG 1',
    '2 classes: 0 cat (3 images), 1 dog (2 images)',
  ]
  assert train.lines[4].startswith(
    '1 images are not square: crop cuts away 50 % of their pixels on average, 50 % at most ('
  )
  assert 'b.png' in train.lines[4]
  assert train.lines[5] == '1 images are smaller than 8 pixels, and are enlarged'
  assert (
    train.lines[6].startswith('1 images are seen before at 8x8 pixels') and len(train.lines) == 7
  )
  assert 'same.png, which is ' in train.lines[6]
  assert test.lines[0] == '2 images' and 'all images are square' in test.lines
  assert '1 images of test are in train as well' in caplog.text
  padded, _ = check_data(config_of(folder, fit='pad'))
  assert 'pad fills 50 % of their square' in padded.lines[4]
  stretched, _ = check_data(config_of(folder, fit='stretch'))
  assert 'up to 2.0 times' in stretched.lines[4]


def test_all_damaged_images_are_named_at_once(folder, caplog):
  for name in ('train/cat/a.png', 'train/dog/d.jpg', 'test/dog/f.png'):
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
  with pytest.raises(UserError, match=r'3 images in .* cannot be read, .*skip_damaged') as error:
    check_data(config_of(folder))
  assert '\n' not in str(error.value)
  for name in ('a.png', 'd.jpg', 'f.png'):
    assert name in caplog.text
  assert 'b.png cannot' not in caplog.text
  train, test = check_data(config_of(folder, skip_damaged=True))
  assert (len(train.seen), len(train.damaged), len(test.damaged)) == (3, 2, 1)


def test_a_folder_without_splits_is_read_once_and_one_value_is_refused(tmp_path):
  Image.new('L', (8, 8), 100).save(tmp_path / 'a.png')
  Image.new('L', (8, 8), 100).save(tmp_path / 'b.png')
  with pytest.raises(UserError, match=r'every pixel of all images in .* is 100 of 255'):
    check_data(config_of(tmp_path))
  save(tmp_path / 'c.png', (8, 8), 0)
  (report,) = check_data(config_of(tmp_path))
  assert report.lines[0] == '3 images'
  assert any(line.startswith('2 images are of one value all over') for line in report.lines)


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'black': 5.0}, r'data\.white = 0 must be above config\.data\.black = 5'),
    ({'black': 9.0, 'white': 9.0}, r'data\.white = 9 must be above'),
    ({'fit': 'fill'}, r"config\.data\.fit 'fill' does not exist"),
    ({'background': 'whit'}, 'is no colour'),
    ({'num_channels': 5}, r'num_channels is 5; allowed: 1 \(grey\), 2'),
    ({'max_pixels': 0}, r'max_pixels must be positive'),
  ],
)
def test_fields_of_images_are_checked(folder, fields, said):
  with pytest.raises(UserError, match=said):
    check_data(build(config_of(folder, **fields)).config)


def test_black_may_be_below_a_white_of_zero(folder):
  config = config_of(folder, black=-1000.0)
  assert make_decoder(build(config).config).span == Span(-1000, 0)
