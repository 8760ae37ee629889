"""Packed images: shards of raw pixels in array_record, read at random in constant memory.

    images = open_packed('PACKED').images('train', 64, 3)
    images.batch(np.array([7, 1_200_000]))   # 'data' uint8 [2, 64, 64, 3], and 'label' int32 [2]

A folder holds `dataset.json`, which is the last to be written, and shards, such as
`train-00000-of-00012.array_record`. A record is a label, int32 of little endian, 0 without classes,
and the pixels, uint8 [H, W, C]: at the size that they are trained on, so that nothing is decoded.
What is in memory is the place of each record, which array_record keeps of the shards that it has
read from. `data.packing` writes them.
"""

from collections.abc import Sequence
import dataclasses
import errno
import json
import logging
import os
from pathlib import Path
import threading
from typing import Any

import numpy as np
from PIL import Image

from data import geometry
from data.decoding import MODES
from data.folder import shown
from data.images import Batch, Images
from data.records import OUT_OF_REACH, Records
from runtime.errors import Failure, UserError

logger = logging.getLogger('score_sde')

CARD, PLAN = 'dataset.json', 'packing.json'  # of what is packed, and of what is not yet
LABEL = np.dtype('<i4')
# Of records that are read at random: no more than is asked for, by the thread that asks.
_AT_RANDOM = {
  'options': 'readahead_buffer_size:0,max_parallelism:0',
  'file_reader_buffer_size': 2**15,
}
_AGAIN = 'bring it from where it was packed, or pack again (--mode pack) to another folder'


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of images.

  Attributes:
    name: of the file.
    images: how many.
    size: of the file, in bytes.
  """

  name: str
  images: int
  size: int


@dataclasses.dataclass(frozen=True)
class Split:
  """The shards of a split, in the order of its images.

  Attributes:
    shards: these.
    class_counts: how many images each class has; empty without labels.
    fingerprint: of all records, whatever shards they are in.
  """

  shards: tuple[Shard, ...]
  class_counts: tuple[int, ...]
  fingerprint: str

  @property
  def length(self) -> int:
    """How many images there are."""
    return sum(shard.images for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Packed:
  """What a folder of packed images holds.

  Attributes:
    folder: its path.
    image_size: side of the square images, in pixels.
    num_channels: of them.
    class_names: of the labels; empty without classes.
    fit: how images that were not square became so, crop, pad or stretch; 'own' of a dataset that
      has its own way.
    splits: train, and test if images are held out.
  """

  folder: Path
  image_size: int
  num_channels: int
  class_names: tuple[str, ...]
  fit: str
  splits: dict[str, Split]

  @property
  def shape(self) -> tuple[int, int, int]:
    """Of an image."""
    return self.image_size, self.image_size, self.num_channels

  def split(self, name: str) -> Split:
    """The split train, or the one held out; that is the former, with a warning, where none is."""
    if name not in self.splits:
      logger.warning('%s has no images held out: testing on the training images.', self.folder)
    return self.splits.get(name, self.splits['train'])

  def images(self, split: str, image_size: int, num_channels: int, fit: str = '') -> 'PackedImages':
    """The images of a split, train or test.

    Raises:
      UserError: if they are of another size, with other channels, or fitted otherwise; `fit` crop,
        which a config has where it says nothing, agrees with all. If a shard is missing or damaged.
    """
    for what, asked, packed in (
      ('image_size', image_size, self.image_size),
      ('num_channels', num_channels, self.num_channels),
    ):
      if asked != packed:
        raise UserError(
          f'config.data.{what} is {asked}, and the images in {shown(self.folder)} were packed with '
          f'{packed}; set it to that, or pack the originals again (--mode pack)'
        )
    if fit not in ('', 'crop', self.fit):
      raise UserError(
        f'config.data.fit = {fit}, and the images in {shown(self.folder)} were packed with '
        f'{self.fit}; leave it out, or pack the originals again (--mode pack)'
      )
    return PackedImages(self, split)

  def records(self, split: str) -> Records:
    """The same, as images that are stored in files are."""
    source = PackedImages(self, split)

    def read(i: int) -> tuple[Image.Image, int]:
      (pixels,), (label,) = source.read(np.array([i]))
      return Image.fromarray(pixels.squeeze(-1) if self.num_channels == 1 else pixels), label

    return Records(
      len(source),
      read,
      lambda i: f'{shown(self.folder)}, split {split}, image {i}',
      geometry.stored,
      source.class_names,
      of_training=split not in self.splits,
    )


def open_packed(path: str) -> Packed:
  """What a folder holds.

  Raises:
    UserError: if it is none of packed images, or the packing of it is not at its end.
  """
  folder = Path(path).expanduser()
  if not path or not os.path.isdir(folder):
    raise UserError(
      f'--config.data.path={path!r} is not a folder; name the one that --mode pack wrote'
    )
  card = folder / CARD
  if not card.exists():
    if (folder / PLAN).exists():
      raise UserError(
        f'the packing of {shown(folder)} is not at its end; repeat that --mode pack, which goes on'
      )
    raise UserError(
      f'{shown(folder)} has no {CARD}, so that it is not a folder of packed images; --mode pack '
      'makes one of any dataset'
    )
  try:
    packed = _parse(folder, json.loads(card.read_text()))
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{shown(card)} is damaged ({error!r}); {_AGAIN}') from None
  return packed


def _parse(folder: Path, value: Any) -> Packed:
  splits = {
    name: Split(
      tuple(Shard(**shard) for shard in split['shards']),
      tuple(split['class_counts']),
      split['fingerprint'],
    )
    for name, split in value['splits'].items()
  }
  packed = Packed(
    folder,
    value['image_size'],
    value['num_channels'],
    tuple(value['classes']),
    value['fit'],
    splits,
  )
  if packed.num_channels not in MODES or not splits['train'].length:
    raise ValueError('it has no images of 1 to 4 channels')
  return packed


class PackedImages(Images):
  """The images of a split. They are read when they are asked for, and none is kept."""

  def __init__(self, packed: Packed, split: str):
    """Looks whether all shards are there, and as large as they were.

    Raises:
      UserError: if not.
    """
    self._folder, self._split = packed.folder, packed.split(split)
    self.shape = packed.shape
    self.class_names = packed.class_names if self._split.class_counts else ()
    shards = self._split.shards
    self._ends = np.cumsum([shard.images for shard in shards])
    self._readers: list[Any] = [None] * len(shards)
    self._opening = threading.Lock()
    for shard in shards:
      file = packed.folder / shard.name
      try:
        size = os.stat(file).st_size
      except OSError as error:
        raise self._unreadable(file, error) from None
      if size != shard.size:
        raise UserError(
          f'{shown(file)} has {size} bytes, not {shard.size}: it is damaged; {_AGAIN}'
        )

  def __len__(self) -> int:
    return self._split.length

  def class_counts(self) -> Sequence[int] | None:
    return list(self._split.class_counts) or None

  def fingerprint(self) -> str:
    return self._split.fingerprint

  def batch(self, indices: np.ndarray) -> Batch:
    images, labels = self.read(indices)
    return {'data': images} | ({'label': labels} if self.num_classes else {})

  def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, *shape], and labels int32 [n], which are 0 without classes.

    Raises:
      UserError: if a shard is missing or damaged.
      Failure: if its disk cannot be reached.
    """
    at = LABEL.itemsize
    records = np.empty((len(indices), at + int(np.prod(self.shape))), np.uint8)
    shards = np.searchsorted(self._ends, indices, side='right')
    for k in np.unique(shards):
      rows = np.flatnonzero(shards == k)
      within = indices[rows] - (self._ends[k] - self._split.shards[k].images)
      for row, record in zip(rows, self._read_shard(int(k), within), strict=True):
        records[row] = np.frombuffer(record, np.uint8)
    labels = np.ascontiguousarray(records[:, :at]).view(LABEL)[:, 0].astype(np.int32)
    return np.ascontiguousarray(records[:, at:]).reshape(-1, *self.shape), labels

  def _read_shard(self, k: int, positions: np.ndarray) -> list[bytes]:
    from array_record.python import array_record_module

    shard = self._split.shards[k]
    file = self._folder / shard.name
    try:
      with self._opening:
        if (reader := self._readers[k]) is None:
          os.stat(file)  # of none, array_record says that it is empty
          reader = array_record_module.ArrayRecordReader(str(file), **_AT_RANDOM)
          if reader.num_records() != shard.images:
            raise ValueError(f'{reader.num_records()} images, not {shard.images}')
          self._readers[k] = reader
      return reader.read(positions.tolist())
    except (OSError, RuntimeError, ValueError, IndexError) as error:  # array_record has some
      raise self._unreadable(file, as_os_error(error) or error) from error

  def _unreadable(self, file: Path, error: Exception) -> Exception:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT and os.path.isdir(file.parent):
      return UserError(f'{shown(file)} is missing; {_AGAIN}')
    reason = ' '.join(str(error).split())[:200]
    if number in OUT_OF_REACH:
      return Failure(
        f'{shown(file)} cannot be read any more ({os.strerror(number)}); see to that, for example '
        'connect its disk again, and repeat the command: it goes on'
      )
    return UserError(f'{shown(file)} is damaged ({reason}); {_AGAIN}')


def as_os_error(error: Exception) -> OSError | None:
  """What the system said, of which array_record passes on the words alone."""
  said = str(error)
  for number in errno.errorcode:
    if f' {os.strerror(number)}' in f' {said}':
      return OSError(number, os.strerror(number))
  return None
