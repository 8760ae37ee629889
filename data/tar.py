"""Tar shards of images, as WebDataset has them, read at random.

    train-0000.tar: 000001.jpg 000001.cls 000002.jpg 000002.cls ...

Members of one name, up to its first dot, belong together: an image, and its class as a number in
`.cls`. Others, such as `.json` and `.txt`, are passed over. The headers are read once, when the
dataset is opened; what is kept of an image is 24 bytes: its shard, place, size and label. Names of
classes may stand in `classnames.txt` beside the shards, one a line.

Subfolders train/ and test/ (val/, ...), or these words in the names of the shards, are the splits.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import glob
import io
import logging
import os
from pathlib import Path
import re
import tarfile
from typing import BinaryIO

import numpy as np
from PIL import Image

from data import deep
from data.folder import HELD_OUT, is_image_name, shown, TRAIN
from data.images import spread
from data.records import Records
from runtime.errors import unknown, UserError

logger = logging.getLogger('score_sde')

_NAMES = 'classnames.txt'
_LARGEST_LABEL = 10  # bytes of a .cls, at most


@dataclasses.dataclass(frozen=True)
class Members:
  """The images of a split, and where they are.

  Attributes:
    files: the shards.
    shards: of each image, int32 [N].
    offsets: of its first byte there, int64 [N].
    sizes: in bytes, int64 [N].
    labels: int32 [N], -1 without.
  """

  files: tuple[Path, ...]
  shards: np.ndarray
  offsets: np.ndarray
  sizes: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.shards)

  def open(self, i: int) -> Image.Image:
    """Image i, not yet loaded."""
    with open(self.files[self.shards[i]], 'rb') as shard:
      shard.seek(int(self.offsets[i]))
      return Image.open(io.BytesIO(shard.read(int(self.sizes[i]))))

  def where(self, i: int) -> str:
    """The shard and the name of image i."""
    file, offset = self.files[self.shards[i]], int(self.offsets[i])
    try:
      with open(file, 'rb') as shard:
        shard.seek(offset - tarfile.BLOCKSIZE)
        header = tarfile.TarInfo.frombuf(shard.read(tarfile.BLOCKSIZE), 'utf-8', 'backslashreplace')
        return f'{shown(file)}, {shown(header.name)}'
    except (OSError, tarfile.HeaderError):
      return f'{shown(file)}, byte {offset}'


@dataclasses.dataclass(frozen=True)
class Tars:
  """What tar shards hold.

  Attributes:
    path: of all of them.
    train: the images to train on.
    test: those held out; None if there are none.
    class_names: of both; empty without labels.
  """

  path: str
  train: Members
  test: Members | None
  class_names: tuple[str, ...]

  def records(self, split: str) -> Records:
    """The images of train or of test."""
    of_training = split == 'test' and self.test is None
    if of_training:
      logger.warning('%s: no shards are held out: testing on the training images.', self.path)
    held_out = self.test or self.train
    chosen = held_out if split == 'test' else self.train
    parts = [part for part in (self.train, self.test) if part]
    labels = chosen.labels if self.class_names else np.zeros(len(chosen), np.int32)
    return Records(
      len(chosen),
      lambda i: (chosen.open(i), int(labels[i])),
      chosen.where,
      None,
      self.class_names,
      lambda i: int(labels[i]),
      chosen.files,
      upright=True,
      of_training=of_training,
      all_splits=lambda: [
        functools.partial(part.open, i) for part in parts for i in spread(len(part), deep.LOOKED_AT)
      ],
    )


def read_tars(path: str, held_out: str = '') -> Tars:
  """What is in tar shards: those of a folder and below it, of a glob pattern, or one.

  Args:
    path: of them.
    held_out: the word in the paths of the shards of the test split; empty for the usual ones.

  Raises:
    UserError: if there are none, or no images in them, or one is damaged.
  """
  root, files = _shards(path)
  train, test = _splits(root, files, held_out)
  parts = [_scan(shards) for shards in (train, test) if shards]
  for part, shards in zip(parts, (train, test), strict=False):
    if not len(part):
      raise UserError(f'no images in {shown(shards[0])}' + (' and others' if shards[1:] else ''))
  labels = [part.labels for part in parts]
  unlabelled = sum(int((of_part < 0).sum()) for of_part in labels)
  if 0 < unlabelled < sum(map(len, labels)):
    part = next(part for part in parts if (part.labels < 0).any())
    where = part.where(int(np.flatnonzero(part.labels < 0)[0]))
    raise UserError(
      f'{unlabelled} of {sum(map(len, labels))} images have no .cls beside them, such as {where}; '
      'give all of them a class, or none'
    )
  names = () if unlabelled else _class_names(root, 1 + max(int(p.max()) for p in labels))
  return Tars(path, parts[0], parts[1] if len(parts) > 1 else None, names)


def _shards(path: str) -> tuple[Path, list[Path]]:
  """The folder of all, and all, in the same order on every machine."""
  root = Path(path).expanduser()
  if path and os.path.isdir(root):
    folder, files = root, [file for file in root.rglob('*') if file.is_file()]
  else:
    folder, files = root.parent, [Path(file) for file in glob.glob(str(root))] if path else []
  packed = [file for file in files if re.search(r'\.(tar\.\w+|t[gbx]z2?)$', file.name, re.I)]
  tars = [file for file in files if file.suffix.lower() == '.tar' and file.name[0] != '.']
  if packed and not tars:
    raise UserError(
      f'{shown(packed[0])} is compressed, so that no image can be read by itself; unpack the '
      'shards to plain .tar'
    )
  if not tars:
    raise UserError(
      f'no tar shards at --config.data.path={path!r}; name a .tar, a folder of them, or a pattern'
    )
  return folder, sorted(tars, key=lambda file: file.as_posix())


def _splits(root: Path, files: list[Path], held_out: str) -> tuple[list[Path], list[Path]]:
  """The shards to train on, and those held out, if any."""
  words = {file: _words(file, root) for file in files}
  if held_out and not any(held_out.casefold() in found for found in words.values()):
    raise unknown('config.data.held_out: word', held_out, set.union(*words.values()))
  names = {held_out.casefold()} if held_out else {*HELD_OUT}
  test = [file for file in files if words[file] & names]
  named = [file for file in files if words[file] & {*TRAIN} and file not in test]
  train = [file for file in files if file not in test]
  if test and (named or held_out) and train:
    left_out = [] if held_out else [file for file in train if file not in named]
    if left_out:
      logger.warning('left out: %d shards of no split, such as %s', len(left_out), left_out[0])
    return (train if held_out else named), test
  if test:
    raise UserError(
      f'{shown(test[0])} seems to be held out, and no shard has train in its name; give the others '
      'such names, or name all with a pattern in --config.data.path'
      if train
      else f'{shown(root)} has shards that are held out alone, such as {shown(test[0])}'
    )
  return files, []


def _words(file: Path, root: Path) -> set[str]:
  inside = file.relative_to(root).with_suffix('').as_posix().casefold()
  return {word for word in re.split(r'[^a-z]+', inside) if word}


def _scan(files: Sequence[Path]) -> Members:
  """Where the images are in shards, by the headers of all their members."""
  shards, offsets, sizes, labels = ([np.zeros(0, kind)] for kind in ('i4', 'i8', 'i8', 'i4'))
  for k, file in enumerate(files):
    found = np.fromiter(_images_of(file), [('offset', 'i8'), ('size', 'i8'), ('label', 'i4')])
    shards.append(np.full(len(found), k, 'i4'))
    for all_of_it, name in ((offsets, 'offset'), (sizes, 'size'), (labels, 'label')):
      all_of_it.append(found[name])
  return Members(tuple(files), *map(np.concatenate, (shards, offsets, sizes, labels)))


def _images_of(file: Path) -> Iterator[tuple[int, int, int]]:
  """Offset, size and label, or -1, of each image of a shard."""
  key, image, label = '', None, -1
  for name, offset, size, read in _members(file):
    folder, _, base = name.rpartition('/')
    stem, _, ending = base.partition('.')
    if f'{folder}/{stem}' != key:
      if image:
        yield *image, label
      key, image, label = f'{folder}/{stem}', None, -1
    if ending.lower() == 'cls':
      label = _label(read(_LARGEST_LABEL + 1), f'{shown(file)}, {shown(name)}')
    elif is_image_name(f'.{ending}'):
      if image:
        raise UserError(f'{shown(file)} has two images of one name, such as {shown(name)}')
      image = offset, size
  if image:
    yield *image, label


def _label(data: bytes, where: str) -> int:
  text = data.decode('ascii', 'replace').strip()
  if len(data) > _LARGEST_LABEL or not text.isdecimal():
    raise UserError(f'{where} must hold the number of a class, from 0 on; got {text[:40]!r}')
  return int(text)


def _members(file: Path) -> Iterator[tuple[str, int, int, '_Read']]:
  """Name, offset, size and contents of each plain member of a tar, one at a time in memory.

  Raises:
    UserError: if it is damaged or cut off; tarfile passes over what follows a bad header.
  """
  try:
    end = file.stat().st_size
    with open(file, 'rb') as stream, tarfile.open(fileobj=stream, mode='r:') as archive:
      while (member := archive.next()) is not None:
        kept: list[tarfile.TarInfo] = vars(archive)['members']
        kept.clear()  # it would keep all of them
        if member.offset_data + member.size > end:
          raise UserError(f'{shown(file)} is cut off in {shown(member.name)}; copy it again')
        if member.isreg() and not member.issparse() and not _is_hidden(member.name):
          offset = member.offset_data
          yield member.name, offset, member.size, _Read(stream, offset, member.size)
      stream.seek(archive.offset)
      if any(stream.read(tarfile.BLOCKSIZE)):
        raise UserError(f'{shown(file)} is damaged at byte {archive.offset}; copy it again')
  except tarfile.TarError as error:
    raise UserError(f'{shown(file)} cannot be read as a tar ({error}); copy it again') from None


def _is_hidden(name: str) -> bool:
  return name.rpartition('/')[2].startswith('.')


@dataclasses.dataclass(frozen=True)
class _Read:
  """`read(n)` is the first n bytes of a member."""

  stream: BinaryIO
  offset: int
  size: int

  def __call__(self, n: int) -> bytes:
    self.stream.seek(self.offset)
    return self.stream.read(min(n, self.size))


def _class_names(root: Path, n: int) -> tuple[str, ...]:
  """Those in `classnames.txt`, or else numbers.

  Raises:
    UserError: if there are fewer names than classes.
  """
  file = root / _NAMES
  if not file.exists():
    return tuple(map(str, range(n)))
  names = file.read_text(encoding='utf-8', errors='backslashreplace').splitlines()
  names = [name.strip() for name in names if name.strip()]
  if len(names) < n:
    raise UserError(f'{shown(file)} has {len(names)} names, and the labels go up to {n - 1}')
  return tuple(names)
