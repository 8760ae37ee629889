"""What is packed is what training sees of the originals, and never half there."""

from concurrent.futures import ThreadPoolExecutor
import errno
import itertools
import json
import os
from pathlib import Path
import resource

from ml_collections import ConfigDict, FrozenConfigDict
import numpy as np
from PIL import Image
import pytest

from builders.data import check_data, load_source, pack
from configs.vp.photos import get_config
from data import packed, packing
from data.batches import train_batches
from data.packed import CARD, PLAN
from runtime.errors import Failure, UserError

N, HELD_OUT = 60, 7


@pytest.fixture(scope='module')
def originals(tmp_path_factory) -> Path:
  """Images of two classes, of any size and mode, some held out."""
  root, rng = tmp_path_factory.mktemp('originals'), np.random.default_rng(0)
  for split, n in (('train', N), ('test', HELD_OUT)):
    for i in range(n):
      shape = (int(rng.integers(8, 20)), int(rng.integers(8, 20)), 3)
      file = root / split / ('cat', 'dog')[i % 3 > 0] / f'{i:03d}.png'
      file.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file)
  return root


def config_of(path: Path, **fields) -> FrozenConfigDict:
  config = get_config('32')
  config.data.image_size, config.data.path, config.model.num_classes = 8, str(path), 2
  config.data.update(fields)
  return FrozenConfigDict(config)


def packed_config(path: Path, **fields) -> FrozenConfigDict:
  return config_of(path, dataset='packed', **fields)


@pytest.fixture(scope='module')
def folder(originals, tmp_path_factory) -> Path:
  """What they are packed to, in four shards."""
  out = tmp_path_factory.mktemp('packed') / 'out'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(packing, 'SHARD_BYTES', N * 8 * 8 * 3 // 4)
    pack(config_of(originals), str(out))
  return out


def damaged(folder: Path, copy: Path, name: str, change) -> Path:
  """A copy, of which the bytes of one file are changed; removed, if to nothing."""
  copy.mkdir()
  for file in folder.iterdir():
    data = file.read_bytes()
    if file.name == name:
      data = change(bytearray(data))
    if data is not None:
      (copy / file.name).write_bytes(data)
  return copy


@pytest.mark.parametrize('num_channels', [1, 2, 3, 4])
def test_a_run_sees_the_same_batches(originals, tmp_path, num_channels):
  """In the same order, with the same labels, whatever the shards are."""
  fields = {'num_channels': num_channels, 'fit': 'pad'}
  pack(config_of(originals, **fields), str(tmp_path / 'out'))
  for split, n in (('train', N), ('test', HELD_OUT)):
    before = load_source(config_of(originals, **fields), split)
    after = load_source(packed_config(tmp_path / 'out', **fields), split)
    assert len(after) == n and after.class_names == before.class_names
    assert after.class_counts() == before.class_counts()
    batches = [itertools.islice(train_batches(s, 16, seed=3), 12) for s in (before, after)]
    for one, other in zip(*batches, strict=True):
      assert {*one} == {*other} == {'data', 'label'}
      for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name])


def test_images_without_classes(tmp_path):
  for i in range(5):
    Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / f'{i}.png')
  config = ConfigDict(config_of(tmp_path))
  config.model.num_classes = 0
  pack(FrozenConfigDict(config), str(tmp_path / 'out'))
  config.data.dataset, config.data.path = 'packed', str(tmp_path / 'out')
  source = load_source(FrozenConfigDict(config), 'test')  # the training images, as none is held out
  assert not source.class_names and source.class_counts() is None
  assert {*source.batch(np.array([4, 0, 4]))} == {'data'}
  assert source.batch(np.array([4, 0, 4]))['data'][:, 0, 0, 0].tolist() == [160, 0, 160]


def test_threads_read_any_images_at_the_same_time(folder, originals):
  source = load_source(packed_config(folder), 'train')
  whole = load_source(config_of(originals), 'train').batch(np.arange(N))['data']
  with ThreadPoolExecutor(8) as pool:
    rows = [np.random.default_rng(i).integers(0, N, 32) for i in range(64)]
    for asked, batch in zip(rows, pool.map(source.batch, rows), strict=True):
      np.testing.assert_array_equal(batch['data'], whole[asked])


def test_the_card_says_what_is_there(folder):
  card = json.loads((folder / CARD).read_text())
  assert (card['image_size'], card['num_channels'], card['fit']) == (8, 3, 'crop')
  assert card['classes'] == ['cat', 'dog'] and card['images'] == {'train': N, 'test': HELD_OUT}
  assert len(card['splits']['train']['shards']) == 4 and not (folder / PLAN).exists()
  assert card['splits']['train']['class_counts'] == [20, 40]
  assert not [file for file in folder.iterdir() if file.suffix == '.part']


def test_the_fingerprint_is_of_the_images(folder, originals, tmp_path):
  """Not of their shards, nor of where they lie; another image, order or label gives another."""
  here = load_source(packed_config(folder), 'train')
  pack(config_of(originals), str(tmp_path / 'one'))
  assert load_source(packed_config(tmp_path / 'one'), 'train').fingerprint() == here.fingerprint()
  prints = {here.fingerprint(), load_source(packed_config(folder), 'test').fingerprint()}
  pack(config_of(originals, fit='stretch'), str(tmp_path / 'other'))
  prints.add(load_source(packed_config(tmp_path / 'other'), 'train').fingerprint())
  assert len(prints) == 3 and all(prints)


def test_check_data_reads_what_is_packed(folder):
  train, test = check_data(packed_config(folder))
  assert train.lines[0] == f'{N} images' and test.lines[0] == f'{HELD_OUT} images'
  assert not train.damaged + test.damaged


def test_packing_goes_on_with_the_first_shard_that_is_missing(
  originals, folder, tmp_path, monkeypatch
):
  """Stopped at any shard, it ends with the same bytes, and reads no image twice."""
  monkeypatch.setattr(packing, 'SHARD_BYTES', N * 8 * 8 * 3 // 4)
  write_shard, out, decoded = packing._write_shard, tmp_path / 'out', []

  def stopped(path, read, numbers, bar):
    decoded.append(path.name)
    if len(decoded) == 1:
      raise KeyboardInterrupt
    if len(decoded) in (4, 5):
      path.with_name(f'.{path.name}.part').write_bytes(b'half')
      raise KeyboardInterrupt
    return write_shard(path, read, numbers, bar)

  monkeypatch.setattr(packing, '_write_shard', stopped)
  for _ in range(3):
    with pytest.raises(KeyboardInterrupt):
      pack(config_of(originals), str(out))
    with pytest.raises(UserError, match='not at its end; repeat'):
      load_source(packed_config(out), 'train')
  with pytest.raises(UserError, match='fit is crop there and pad now; choose another folder'):
    pack(config_of(originals, fit='pad'), str(out))
  pack(config_of(originals), str(out))
  first, third = decoded[0], decoded[3]
  assert decoded[:6] == [first, first, decoded[2], third, third, third]
  assert len({*decoded}) == len(decoded) - 3
  for file in folder.glob('*.array_record'):
    assert (out / file.name).read_bytes() == file.read_bytes()
  n = len(decoded)
  pack(config_of(originals), str(out))  # all is there
  assert len(decoded) == n


def test_a_full_disk_costs_a_line_and_no_shard(originals, tmp_path, monkeypatch):
  """What is written in C++ fails with words alone."""

  class Full:
    def __init__(self, *_):
      pass

    def write(self, _):
      raise RuntimeError(f'write() failed: {os.strerror(errno.ENOSPC)}; writing x; at byte 0')

  from array_record.python import array_record_module

  with monkeypatch.context() as patch:
    patch.setattr(array_record_module, 'ArrayRecordWriter', Full)
    with pytest.raises(Failure, match=r'No space left on device.*repeat the command'):
      pack(config_of(originals), str(tmp_path / 'out'))
  assert not [*(tmp_path / 'out').glob('*.array_record')]
  pack(config_of(originals), str(tmp_path / 'out'))


def test_a_file_that_cannot_be_written_is_told(tmp_path):
  """By array_record itself, past a limit that the system sets."""
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
  try:
    with pytest.raises(OSError, match='File too large'), packing._writer(tmp_path / 'x') as write:
      for _ in range(200):
        write(bytes(3000))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'image_size': 16}, 'image_size is 16, and the images .* were packed with 8; set it to that'),
    ({'num_channels': 1}, 'num_channels is 1, and the images .* were packed with 3'),
    ({'fit': 'pad'}, 'fit = pad, and the images .* were packed with crop'),
  ],
)
def test_another_config_is_refused(folder, fields, message):
  with pytest.raises(UserError, match=message):
    load_source(packed_config(folder, **fields), 'train')


FIRST = 'train-00000-of-00004.array_record'


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    (FIRST, lambda data: None, f'{FIRST} is missing; bring it'),
    (FIRST, lambda data: data[: len(data) // 2], r'has \d+ bytes, not \d+: it is damaged'),
    (FIRST, lambda data: data[:400] + bytes([data[400] ^ 1]) + data[401:], f'{FIRST} is damaged'),
    (FIRST, lambda data: bytes(len(data)), f'{FIRST} is damaged'),
    (CARD, lambda data: None, 'has no dataset.json'),
    (CARD, lambda data: data[:100], 'dataset.json is damaged'),
    (CARD, lambda data: b'{"image_size": 8}', 'dataset.json is damaged'),
  ],
)
def test_what_is_damaged_costs_a_line(folder, tmp_path, name, change, message):
  copy = damaged(folder, tmp_path / 'copy', name, change)
  with pytest.raises(UserError, match=message) as raised:
    load_source(packed_config(copy), 'train').batch(np.arange(N))
  assert '\n' not in str(raised.value)


def test_a_shard_that_vanishes_while_it_is_read(folder, tmp_path):
  copy = damaged(folder, tmp_path / 'copy', '', None)
  source = load_source(packed_config(copy), 'test')
  for file in copy.glob('test*'):
    file.unlink()
  with pytest.raises(UserError, match='is missing'):
    source.batch(np.arange(HELD_OUT))


@pytest.mark.parametrize('make', [lambda p: None, lambda p: p.mkdir()])
def test_no_packed_images(tmp_path, make):
  make(tmp_path / 'p')
  with pytest.raises(UserError, match=r'not a folder|has no dataset.json'):
    packed.open_packed(str(tmp_path / 'p'))
