"""Images as they are stored, and how they become those of a dataset."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import errno
import functools
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

from data import deep
from data.decoding import Decoder
from data.folder import shown
from data.images import spread
from runtime.errors import Failure, UserError

logger = logging.getLogger('score_sde')

_AT_A_TIME = 1024  # images whose reading waits for a thread

# Of a file that was there when its folder was listed: its disk or network is lost, or the machine
# is short of something.
OUT_OF_REACH = (
  errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO,
  errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
  errno.ECONNRESET, errno.ECONNABORTED, errno.EREMOTEIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Records:
  """Images as they are stored, in any size and mode.

  Attributes:
    length: how many there are.
    read: (i) -> image i, opened and not yet loaded, and its label, 0 where there are none.
    where: (i) -> the name of image i in an error message.
    fit: the geometry of a dataset that has its own; None: the decoder's.
    class_names: of the labels, if there are any.
    upright: images are turned as their EXIF says.
    label: (i) -> its label alone, if that takes no time.
    files: of the user that the images are in, if they are: of all, whichever are left out.
    file: (i) -> the file that holds image i and nothing else, if there is one of each.
    of_training: though another split was asked for, as there is no other.
    all_splits: () -> what opens each image, of all splits if they are at hand.
  """

  length: int
  read: Callable[[int], tuple[Image.Image, int]]
  where: Callable[[int], str]
  fit: Callable[[Image.Image, int], Image.Image] | None
  class_names: Sequence[str] = ()
  label: Callable[[int], int] | None = None
  files: Sequence[Path] = ()
  file: Callable[[int], Path] | None = None
  upright: bool = False
  of_training: bool = False
  all_splits: Callable[[], Sequence[Callable[[], Image.Image]]] | None = None

  def opened(self, i: int) -> Image.Image:
    return self.read(i)[0]

  def only(self, kept: Sequence[int]) -> 'Records':
    """These of the images."""
    label, file = self.label, self.file
    return dataclasses.replace(
      self,
      length=len(kept),
      read=lambda i: self.read(kept[i]),
      where=lambda i: self.where(kept[i]),
      label=None if label is None else lambda i: label(kept[i]),
      file=None if file is None else lambda i: file(kept[i]),
    )


@dataclasses.dataclass(frozen=True)
class Reader:
  """`reader(i)` is image i as a network's dataset has it, uint8 [size, size, C], and its label."""

  records: Records
  decoder: Decoder
  size: int
  usual: deep.Usual  # of images of more than 8 bits

  @classmethod
  def of(cls, records: Records, decoder: Decoder, size: int, where: str) -> 'Reader':
    def images() -> Sequence[Callable[[], Image.Image]]:
      if records.all_splits:
        return records.all_splits()
      looked_at = spread(records.length, deep.LOOKED_AT)
      return [functools.partial(records.opened, i) for i in looked_at]

    return cls(records, decoder, size, deep.Usual(images, shown(where)))

  def __call__(self, i: int) -> tuple[np.ndarray, int]:
    return self.decoded(i)[0]

  def decoded(self, i: int) -> tuple[tuple[np.ndarray, int], Image.Image]:
    """The same, and the image as it was opened.

    Raises:
      UserError: if it is damaged, or is none.
      Failure: if it cannot be reached any more.
    """
    records = self.records
    try:
      image, label = records.read(i)
      with image:
        pixels = self.decoder.pixels(image, self.size, self.usual, records.fit, records.upright)
      return (pixels, int(label)), image
    except UserError as error:
      raise UserError(f'{records.where(i)}: {error}') from error
    except Exception as error:  # Pillow, protobuf and array_record each have a dozen
      if isinstance(error, FileNotFoundError) and _has_entries(os.path.dirname(error.filename)):
        raise UserError(
          f'{records.where(i)} cannot be read: it is not there any more; put it back, and repeat '
          'the command: it goes on'
        ) from error
      if isinstance(error, MemoryError) or getattr(error, 'errno', None) in OUT_OF_REACH:
        reason = getattr(error, 'strerror', '') or 'out of memory'
        raise Failure(
          f'{records.where(i)} cannot be read any more ({reason}); see to that, for example '
          'connect its disk again, and repeat the command: it goes on'
        ) from error
      raise UserError(
        f'{records.where(i)} cannot be read as an image ({error}); replace or remove it, or leave '
        'out all such with --config.data.skip_damaged'
      ) from error

  def readable(self) -> list[int]:
    """The numbers of the images that can be read, all of which are; the others are logged.

    Raises:
      UserError: if there are none, or a class has none.
    """
    damaged: list[tuple[int, str]] = []
    n = self.records.length

    def check(i: int) -> None:
      try:
        self(i)
      except UserError as error:
        damaged.append((i, str(error)))

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
      for begin in range(0, n, _AT_A_TIME):  # all at once would be as many objects
        deque(pool.map(check, range(begin, min(begin + _AT_A_TIME, n))), maxlen=0)
    lost = {i for i, _ in damaged}
    kept = [i for i in range(self.records.length) if i not in lost]
    if damaged:
      first = min(damaged)[1]
      if not kept:
        raise UserError(f'none of {self.records.length} images can be read; the first: {first}')
      logger.warning(
        'left out: %d of %d images, which cannot be read, such as: %s',
        len(damaged), self.records.length, first.partition('; replace')[0],
      )  # fmt: skip
      self._check_classes(lost, kept)
    return kept

  def _check_classes(self, lost: set[int], kept: list[int]) -> None:
    if (label := self.records.label) and (names := self.records.class_names):
      gone = {label(i) for i in lost} - {label(i) for i in kept}
      if gone:
        raise UserError(f'of class {names[min(gone)]} no image can be read; replace them')


def _has_entries(folder: str) -> bool:
  """Whether a folder is there, and is not the empty one that an unmounted disk leaves behind."""
  try:
    with os.scandir(folder) as entries:
      return any(entries)
  except OSError:
    return False
