"""Each image goes with its own condition: of the same name in another folder, or made of itself."""

from collections.abc import Callable
import functools
import itertools
from pathlib import Path
import tarfile

from etils import epath
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

from builders import continuity
from builders.data import check_data, load_source, pack
from builders.setup import build
from configs.vp.photos import get_config
from data.batches import eval_batches, train_batches
from data.images import Source
from runtime.errors import UserError
from workdir import artifacts

SIZE = 8


def config_of(folder: Path, **fields) -> ConfigDict:
  config = get_config()
  paths = {'path': str(folder / 'images'), 'condition': str(folder / 'drawn')}
  config.data.update({'image_size': SIZE, 'num_channels': 1, **paths, **fields})
  return config


def load(folder: Path, split: str = 'train', **fields) -> Source:
  return load_source(build(config_of(folder, **fields)).config, split)


def save(file: Path, value: int, size: tuple[int, int] = (SIZE, SIZE), mode: str = 'L') -> None:
  """An image that is `value` but for a pixel, so that not all of it is alike."""
  file.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.full(size[::-1], value, np.uint8)
  pixels[-1, -1] = 255 - value
  Image.fromarray(pixels).convert(mode).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """Images 10 i in two splits and two classes; their conditions are brighter by 100."""
  for i, name in enumerate(['train/a/x', 'train/a/y', 'train/b/x', 'test/a/x', 'test/b/z']):
    save(tmp_path / f'images/{name}.png', 10 * i)
    save(tmp_path / f'drawn/{name}.bmp', 100 + 10 * i)
  return tmp_path


def pairs(source: Source) -> set[tuple[int, int]]:
  batch = source.batch(np.arange(len(source)))
  corners = (batch[name][:, 0, 0, 0].tolist() for name in ('data', 'condition'))
  return set(zip(*corners, strict=True))


def refusal(act: Callable[[], object]) -> str:
  with pytest.raises(UserError) as caught:
    act()
  (line,) = str(caught.value).splitlines()
  return line


def test_pairs_stay_together_in_every_order(folder):
  """In training, in evaluation, in parts of processes, and with their classes."""
  source = load(folder)
  assert source.class_names == ('a', 'b') and len(source) == 3
  assert pairs(source) == {(0, 100), (10, 110), (20, 120)}
  assert pairs(load(folder, 'test')) == {(30, 130), (40, 140)}
  for p in range(2):
    own = {'process_index': p, 'process_count': 2}
    batches = itertools.islice(train_batches(source, 4, seed=1, **own), 4)
    for batch in itertools.chain(batches, eval_batches(source, 4, **own)):
      assert batch['condition'].dtype == np.uint8
      assert (batch['condition'][:, 0, 0] == batch['data'][:, 0, 0] + 100).all()
      assert (batch['label'] == (batch['data'][:, 0, 0, 0] >= 20)).all()


def test_conditions_come_to_the_size_and_the_channels_of_the_network(folder):
  """A low resolution is enlarged, what is larger shrinks; both lie on their image."""
  ramp = np.uint8(np.linspace(0, 255, 4)[None].repeat(4, 0))
  Image.fromarray(ramp).convert('RGB').save(folder / 'drawn/train/a/x.bmp')
  save(folder / 'drawn/train/a/y.bmp', 9, (32, 32), 'RGB')
  small, large, _ = load(folder, condition_channels=3).batch(np.arange(3))['condition']
  assert small.shape == (SIZE, SIZE, 3) and (np.diff(small[0, :, 0].astype(int)) >= 0).all()
  np.testing.assert_allclose(small[:, ::-1].astype(int), 255 - small.astype(int), atol=1)
  assert (large[:4] == 9).all()


def test_a_name_goes_before_an_ending(folder):
  """x.png and x.bmp are two images if both have a condition of their name."""
  save(folder / 'images/train/a/x.bmp', 50)
  assert 'goes with' in (line := refusal(lambda: load(folder))) and 'rename one' in line
  save(folder / 'drawn/train/a/x.png', 200)
  assert {(0, 200), (50, 100)} < pairs(load(folder))


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (lambda f: (f / 'drawn/train/a/y.bmp').unlink(), '1 of 3 images have no condition'),
    (lambda f: save(f / 'images/train/b/new.png', 5), 'b/new.* is not there; add it'),
    (lambda f: save(f / 'drawn/train/a/y.gif', 5), 'y.bmp and y.gif in'),
    (lambda f: save(f / 'drawn/train/a/x.bmp', 5, (8, 4)), 'another shape; crop both alike'),
    (lambda f: (f / 'drawn/train/a/x.bmp').write_bytes(b'no'), 'cannot be read as an image'),
  ],
)
def test_what_does_not_pair_is_told_in_a_line(folder, change, said):
  change(folder)
  assert said in refusal(lambda: load(folder))


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'condition': 'grey'}, "'grey' is not a folder; name the one"),
    ({'condition': '{}/images'}, 'lies in config.data.path'),
    ({'condition': '{}/images/test'}, 'lies in config.data.path'),
    ({'condition': '{}/empty'}, 'no images in'),
  ],
)
def test_a_folder_that_cannot_be_one_of_conditions_is_told(folder, fields, said):
  (folder / 'empty').mkdir()
  fields = {name: value.format(folder) for name, value in fields.items()}
  assert said in refusal(lambda: load(folder, **fields))


def test_stretched_pairs_may_have_two_shapes(folder):
  save(folder / 'drawn/train/a/x.bmp', 5, (8, 4))
  assert (0, 5) in pairs(load(folder, fit='stretch'))


def test_a_turned_image_lies_on_its_condition(folder):
  """The photograph is stored on its side, and says so; its condition is upright."""
  exif = Image.Exif()
  exif[0x0112] = 6
  upright = np.zeros((16, 8), np.uint8)
  upright[:8] = 255
  Image.fromarray(np.rot90(upright)).save(folder / 'images/train/a/x.png', exif=exif)
  Image.fromarray(upright).save(folder / 'drawn/train/a/x.bmp')
  batch = load(folder).batch(np.array([0]))
  np.testing.assert_array_equal(batch['data'], batch['condition'])


def test_a_damaged_half_takes_its_pair_along(folder, caplog):
  (folder / 'drawn/train/a/x.bmp').write_bytes(b'no')
  save(folder / 'images/train/b/bad.png', 5)
  save(folder / 'drawn/train/b/bad.png', 77)
  (folder / 'images/train/b/bad.png').write_bytes(b'no')
  source = load(folder, skip_damaged=True)
  assert pairs(source) == {(10, 110), (20, 120)}
  assert source.batch(np.array([1]))['label'] == [1]
  assert caplog.text.count('left out: 1 of') == 2


def test_conditions_of_no_image_are_left_out_and_told(folder, caplog):
  save(folder / 'drawn/train/a/more.png', 5)
  assert len(load(folder)) == 3 and '1 images that are no condition' in caplog.text
  caplog.clear()
  load(folder, 'test')
  assert 'no condition' not in caplog.text


def test_other_conditions_are_another_fingerprint(folder):
  before, moved = load(folder).fingerprint(), folder.rename(folder.parent / 'moved')
  assert load(moved).fingerprint() == before
  save(moved / 'drawn/test/b/more.png', 5)
  assert load(moved).fingerprint() != before


def test_a_run_goes_on_where_its_conditions_moved_and_not_with_others(folder, tmp_path, caplog):
  artifacts.write_json(epath.Path(tmp_path) / 'config.json', config_of(folder).to_dict())
  moved = build(config_of(folder, condition='elsewhere'))
  check = functools.partial(continuity._check_images, epath.Path(tmp_path))
  check(moved, 'images-conditions', 'images-conditions')
  line = refusal(lambda: check(moved, 'images-conditions', 'images-others'))
  assert 'config.data.condition = ' in line and "'elsewhere' holds other images" in line
  check(build(config_of(folder)), 'images-conditions', 'images-others')
  assert 'drawn are not those of before' in caplog.text


def test_the_whole_folder_is_checked_with_its_conditions(folder, caplog):
  caplog.set_level('INFO')
  *_, drawn, _ = check_data(build(config_of(folder)).config)
  assert drawn.split == 'conditions of train' and drawn.lines[0] == '3 images'
  (folder / 'drawn/test/a/x.bmp').write_bytes(b'no')
  assert '1 images in' in refusal(lambda: check_data(build(config_of(folder)).config))


def test_a_low_resolution_is_the_means_of_blocks():
  config = get_config()
  config.data.update(dataset='digits', image_size=8, num_channels=1, condition='lowres:4')
  batch = load_source(build(config).config, 'train').batch(np.arange(3))
  blocks = batch['data'].reshape(3, 2, 4, 2, 4, 1).mean((2, 4))
  # Enlarged fourfold, bilinearly, the corners keep the values of the blocks there.
  corners = batch['condition'][:, ::7, ::7]
  np.testing.assert_allclose(corners, blocks, atol=1)


def test_grey_is_the_luminance_of_colours(tmp_path):
  colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  (tmp_path / 'images').mkdir()
  Image.fromarray(colour).save(tmp_path / 'images/x.png')
  batch = load(tmp_path, num_channels=3, condition='gray').batch(np.array([0]))
  expected = colour @ np.array([0.299, 0.587, 0.114])
  assert batch['condition'].shape == (1, 8, 8, 1)
  np.testing.assert_allclose(batch['condition'][0, :, :, 0], expected, atol=1)


def test_what_is_in_no_files_of_its_own_has_no_pairs(folder):
  """Images in shards, which have their low resolution, but no folder of conditions."""
  for split in ('train', 'test'):
    (folder / 'shards' / split).mkdir(parents=True)
    with tarfile.open(folder / f'shards/{split}/0.tar', 'w') as shard:
      for i, file in enumerate(sorted((folder / 'images' / split).rglob('*.png'))):
        shard.add(file, f'{i}.png')
  fields = {'dataset': 'tar', 'path': str(folder / 'shards')}
  assert 'config.data.dataset = folder, and that is tar' in refusal(lambda: load(folder, **fields))
  assert len(load(folder, **fields, condition='lowres:4').batch(np.arange(3))['condition']) == 3


def test_packed_images_have_their_low_resolution_and_no_pairs(folder, tmp_path):
  config = config_of(folder, condition='lowres:4')
  pack(build(config).config, str(tmp_path / 'packed'))
  of_packed = load(folder, dataset='packed', path=str(tmp_path / 'packed'), condition='lowres:4')
  of_files = load(folder, condition='lowres:4')
  for name in ('data', 'condition'):
    np.testing.assert_array_equal(*(s.batch(np.arange(3))[name] for s in (of_packed, of_files)))
  assert 'packs images alone' in refusal(lambda: pack(build(config_of(folder)).config, 'x'))
