"""Classes by name, and what tells a folder of images from another."""

from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from data.classes import check_same, describe, numbers_of
from data.sources import load
import main
from runtime.errors import UserError

NAMES = ('10', '2', 'great white')


def test_classes_are_told_in_a_line():
  assert describe(('cat', 'dog'), (1200, 900)) == (
    '2 classes: 0 cat (1200 images), 1 dog (900 images)'
  )
  many = describe([f'c{i}' for i in range(1000)])
  assert many.startswith('1000 classes: 0 c0, 1 c1,') and many.endswith(', ..., 999 c999')
  assert len(many) < 300


@pytest.mark.parametrize(
  ('given', 'labels'),
  [
    ('cat', ('cat',)),
    ('cat,dog', ('cat', 'dog')),
    ('3', (3,)),
    ('3,', (3,)),
    ('(3,5)', (3, 5)),
    ('cat, 3', ('cat', 3)),
    ('great white,cat', ('great white', 'cat')),
    ("'10'", ('10',)),
    ("'a,b',3", ('a,b', 3)),
    ('ca\udcfft', ('ca\udcfft',)),
    ("it's", ("it's",)),
  ],
)
def test_labels_on_the_command_line(given, labels):
  assert eval(main._literal('config.sampling.labels', given, ())) == labels


def test_names_and_numbers_are_classes():
  """A number is a number, also where a class has another one for its name."""
  assert numbers_of((2, 'great white', '2', '10', 0), NAMES, 3) == [2, 2, 1, 0, 0]
  with pytest.raises(UserError, match=r"class 'grate white' does not exist.*did you mean 'great"):
    numbers_of(('grate white',), NAMES, 3)
  with pytest.raises(UserError, match='has 3; allowed: 0 to 2'):
    numbers_of((3,), NAMES, 3)
  with pytest.raises(UserError, match='does not say the names of its 3 classes'):
    numbers_of(('10',), (), 3)
  for label in (0, 'cat'):
    with pytest.raises(UserError):
      numbers_of((label,), (), 0)


def test_other_classes_are_refused_with_both_lists():
  check_same((), NAMES, 'run', '')  # of earlier code
  check_same(NAMES, list(NAMES), 'run', '')
  for now in (('2', '10', 'great white'), NAMES[:2], ()):
    with pytest.raises(UserError) as error:
      check_same(NAMES, now, 'run', 'Do this')
    said = str(error.value)
    assert describe(NAMES) in said and describe(now) in said and said.endswith('Do this')


def fill(folder: Path, seed: int = 0) -> Path:
  rng = np.random.default_rng(seed)
  for i in range(12):
    file = folder / 'abc'[i % 3] / f'{i}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (9, 5 + i), np.uint8)).save(file)
  return folder


def fingerprint(folder: Path) -> str:
  return load('folder', 'train', image_size=4, num_channels=1, path=str(folder)).fingerprint()


def test_a_fingerprint_is_that_of_the_images_wherever_they_lie(tmp_path, monkeypatch):
  found = fingerprint(fill(tmp_path / 'one'))
  assert len(found) == 16 and found == fingerprint(fill(tmp_path / 'two'))
  monkeypatch.chdir(tmp_path)
  assert fingerprint(Path('one')) == found
  others = fill(tmp_path / 'others')
  (others / 'a/0.png').write_bytes((others / 'a/0.png').read_bytes() + b' ')  # of another size
  fewer, named = fill(tmp_path / 'fewer'), fill(tmp_path / 'named')
  (fewer / 'b/1.png').unlink()
  (named / 'c').rename(named / 'd')
  assert len({found, *map(fingerprint, (others, fewer, named))}) == 4


def test_classes_of_a_folder_are_counted(tmp_path):
  folder = fill(tmp_path)
  (folder / 'a/0.png').unlink()
  source = load('folder', 'train', image_size=4, num_channels=1, path=str(folder))
  assert source.class_counts() == [3, 4, 4]
  counts = load('digits', 'train', image_size=8, num_channels=1).class_counts()
  assert sum(counts) == 1500 and len(counts) == 10
