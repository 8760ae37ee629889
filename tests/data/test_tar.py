"""Images in tar shards: found by their headers, read at random; what is damaged is named."""

import io
from pathlib import Path
import tarfile

import numpy as np
from PIL import Image
import pytest

from data import tar
from data.images import Images
from data.sources import load
from runtime.errors import UserError


def png(value: int) -> bytes:
  stream = io.BytesIO()
  Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, 'png')
  return stream.getvalue()


def write(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w', format=format) as archive:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return path


def numbered(first: int, n: int, classes: int = 0) -> dict[str, bytes]:
  """Image i is filled with i, and of class i modulo `classes`."""
  members = {}
  for i in range(first, first + n):
    if classes and i % 2:  # before or after its image
      members[f'{i:04d}.cls'] = str(i % classes).encode()
    members[f'{i:04d}.png'] = png(i)
    members[f'{i:04d}.json'] = b'{}'
    if classes and not i % 2:
      members[f'{i:04d}.cls'] = f'{i % classes}\n'.encode()
  return members


def opened(path: Path, split: str = 'train', **fields) -> Images:
  return load('tar', split, image_size=4, num_channels=3, path=str(path), **fields)


def values(source: Images) -> list[int]:
  return source.gather(np.arange(len(source)))[:, 0, 0, 0].tolist()


@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_and_labels_in_order(tmp_path, format):
  write(tmp_path / 'b.tar', numbered(5, 4, classes=3), format)
  long = {f'{"long/" * 30}ä.png': png(4), f'{"long/" * 30}ä.cls': b'1'}  # takes a header of its own
  write(tmp_path / 'a.tar', numbered(0, 4, classes=3) | (long if format else {}), format)
  source = opened(tmp_path)
  expected = [0, 1, 2, 3, *([4] if format else []), 5, 6, 7, 8]
  assert values(source) == expected and source.class_names == ('0', '1', '2')
  np.testing.assert_array_equal(source.batch(np.array([2, 0, 1]))['label'], [2, 0, 1])
  assert source.class_counts() == [expected and sum(i % 3 == c for i in expected) for c in range(3)]


@pytest.mark.parametrize(
  ('train', 'test'),
  [
    ('train/0.tar', 'val/0.tar'),
    ('set-train-{0}.tar', 'set-val-0.tar'),
    ('Training.tar', 'dev.tar'),
  ],
)
def test_splits_by_folder_or_name(tmp_path, train, test):
  write(tmp_path / train, numbered(0, 3))
  write(tmp_path / test, numbered(3, 2))
  assert values(opened(tmp_path)) == [0, 1, 2] and values(opened(tmp_path, 'test')) == [3, 4]
  assert not opened(tmp_path).class_names


def test_held_out_by_a_word(tmp_path):
  write(tmp_path / 'a-1.tar', numbered(0, 3))
  write(tmp_path / 'b-1.tar', numbered(3, 2))
  assert values(opened(tmp_path, 'test', held_out='b')) == [3, 4]
  assert values(opened(tmp_path, held_out='b')) == [0, 1, 2]
  assert values(opened(tmp_path, 'test')) == [0, 1, 2, 3, 4]  # nothing is held out
  assert values(opened(tmp_path / 'a-*.tar')) == [0, 1, 2]
  with pytest.raises(UserError, match="word 'c' does not exist"):
    opened(tmp_path, held_out='c')


def test_names_of_classes(tmp_path):
  write(tmp_path / 'a.tar', numbered(0, 4, classes=2))
  (tmp_path / 'classnames.txt').write_text('cat\ndog\nnewt\n')
  assert opened(tmp_path).class_names == ('cat', 'dog', 'newt')
  (tmp_path / 'classnames.txt').write_text('cat\n')
  with pytest.raises(UserError, match='has 1 names, and the labels go up to 1'):
    opened(tmp_path)


def test_what_a_scan_keeps_is_no_object_an_image(tmp_path, monkeypatch):
  """tarfile keeps its members, which a shard of a million has no room for."""
  most, next_of = [], tarfile.TarFile.next

  def counted(self):
    most.append(len(vars(self)['members']))
    return next_of(self)

  monkeypatch.setattr(tarfile.TarFile, 'next', counted)
  members = tar.read_tars(str(write(tmp_path / 'a.tar', numbered(0, 50, classes=2)))).train
  assert len(most) > 150 and max(most) <= 1
  assert sum(
    a.nbytes for a in (members.shards, members.offsets, members.sizes, members.labels)
  ) == (50 * 24)


def flip(data: bytes, at: int) -> bytes:
  return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda d: flip(d, 0), 'cannot be read as a tar'),
    (lambda d: flip(d, 2 * 2 * 512 + 1), 'is damaged at byte|cannot be read as a tar'),
    (lambda d: d[: 3 * 512 - 100], 'is damaged at byte 1024'),
    (lambda d: d[:600], 'cut off|cannot be read as a tar'),
    (lambda d: d[:512], 'cut off|cannot be read as a tar'),
    (lambda d: b'', 'cannot be read as a tar'),
  ],
)
def test_a_damaged_shard_is_named(tmp_path, change, message):
  path = write(tmp_path / 'a.tar', numbered(0, 6), tarfile.USTAR_FORMAT)
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(UserError, match=message) as raised:
    opened(tmp_path)
  assert 'a.tar' in str(raised.value)


@pytest.mark.parametrize(
  ('members', 'message'),
  [
    ({}, 'no images in'),
    ({'a.txt': b'1'}, 'no images in'),
    ({'a.png': png(1), 'b.png': png(2), 'b.cls': b'0'}, '1 of 2 images have no .cls .* a.png'),
    ({'a.png': png(1), 'a.cls': b'-1'}, "a.cls must hold the number of a class.*got '-1'"),
    ({'a.png': png(1), 'a.cls': b'cat'}, 'a.cls must hold the number of a class'),
    ({'a.png': png(1), 'a.jpg': png(2)}, 'two images of one name'),
    ({'a.png': png(1)[:40]}, 'a.tar, a.png cannot be read as an image'),
  ],
)
def test_a_mistake_costs_a_line(tmp_path, members, message):
  write(tmp_path / 'a.tar', members)
  with pytest.raises(UserError, match=message):
    opened(tmp_path)


def test_no_shards(tmp_path):
  with pytest.raises(UserError, match='no tar shards at'):
    opened(tmp_path)
  (tmp_path / 'a.tar.gz').write_bytes(b'')
  with pytest.raises(UserError, match=r'a.tar.gz is compressed'):
    opened(tmp_path)
