"""What images go with, which a network is told: a second array of a batch.

  source = conditions.beside(images)
  source.batch(np.arange(2))  # 'data' and 'condition', both uint8 [2, H, W, C]

It is one of these, always of the size of the images:

  FOLDER    the image of the same name in another folder: a sketch, a mask, a low resolution
  lowres:N  the image itself, means over N x N pixels, enlarged again
  gray      the image itself, without its colours

Images of files come to that size as data do: by `data.fit`, antialiased where they shrink and
bilinear where they grow. So a mask keeps its values where it has the size of the images.
"""

import abc
from collections.abc import Callable, Sequence
import dataclasses
import functools
import logging
import os
from pathlib import Path
import re
import unicodedata

import numpy as np
from PIL import Image

from data import geometry
from data.decoding import Decoder
from data.folder import fingerprint, image_files, shown
from data.images import Batch, Images, ImageSource, Source
from data.records import Reader, Records
from data.sources import refuse_one_value
from runtime.errors import UserError

logger = logging.getLogger('score_sde')

FIELD = 'config.data.condition'
GRAY = 'gray'
LOW_RESOLUTION = re.compile('lowres:([0-9]+)')
_ORIENTATION = 0x0112  # of EXIF; from 5 on it turns an image on its side


class Conditions(abc.ABC):
  """What each image goes with: an image of the same size."""

  @property
  @abc.abstractmethod
  def channels(self) -> int:
    """Of a condition."""

  @property
  @abc.abstractmethod
  def computed(self) -> bool:
    """Whether an image tells its condition."""

  @abc.abstractmethod
  def beside(self, images: Images, of_training: bool = False) -> Source:
    """Images, each with its condition.

    Raises:
      UserError: if some have none, or it cannot be read.
    """

  def files_of(self, images: Sequence[Path]) -> Records | None:
    """Those of images in files, as they are stored; None if they are computed.

    Raises:
      UserError: if some images have none.
    """
    del images
    return None

  @abc.abstractmethod
  def of_file(self, image: Image.Image) -> np.ndarray:
    """What an image that a user wants samples for is to a network, uint8 [H, W, channels]."""


@dataclasses.dataclass(frozen=True)
class Degraded(Conditions):
  """Conditions that are computed from the images.

  Attributes:
    decoder: makes images of files.
    size: of the images, in pixels.
  """

  decoder: Decoder
  size: int

  @property
  def computed(self) -> bool:
    return True

  @abc.abstractmethod
  def degraded(self, image: Image.Image) -> Image.Image:
    """The condition of an image of the data."""

  def beside(self, images: Images, of_training: bool = False) -> Source:
    del of_training
    return WithConditions(images, lambda batch, _: self._of_images(batch['data']), '')

  def _of_images(self, images: np.ndarray) -> np.ndarray:
    made = [np.asarray(self.degraded(_as_picture(image))) for image in images]
    return np.stack(made).reshape(*images.shape[:3], self.channels)


@dataclasses.dataclass(frozen=True)
class LowResolution(Degraded):
  """Means over squares of `factor` pixels; what is drawn for a file sees it at that resolution."""

  factor: int

  @property
  def channels(self) -> int:
    return self.decoder.num_channels

  def degraded(self, image: Image.Image) -> Image.Image:
    return geometry.stretch(image.reduce(self.factor), self.size)

  def of_file(self, image: Image.Image) -> np.ndarray:
    small = _as_picture(self.decoder.pixels(image, self.size // self.factor))
    return np.asarray(geometry.stretch(small, self.size)).reshape(self.size, self.size, -1)


@dataclasses.dataclass(frozen=True)
class Gray(Degraded):
  """The luminance of colours."""

  @property
  def channels(self) -> int:
    return 1

  def degraded(self, image: Image.Image) -> Image.Image:
    return image.convert('L')

  def of_file(self, image: Image.Image) -> np.ndarray:
    return dataclasses.replace(self.decoder, num_channels=1).pixels(image, self.size)


@dataclasses.dataclass(frozen=True)
class PairedFolder(Conditions):
  """Images of the same names in another folder, in the same subfolders; endings may differ.

  Attributes:
    folder: of the conditions.
    root: the folder of the images, `data.path`.
    decoder: makes pixels of the conditions.
    size: in pixels.
    skip_damaged: pairs are left out whose condition cannot be read; all are read to find them.
  """

  folder: str
  root: str
  decoder: Decoder
  size: int
  skip_damaged: bool = False

  @property
  def computed(self) -> bool:
    return False

  @property
  def channels(self) -> int:
    return self.decoder.num_channels

  def beside(self, images: Images, of_training: bool = False) -> Source:
    root, folder = self._folders
    records = self.files_of(images.files)
    read, kept = Reader.of(records, self.decoder, self.size, shown(folder)), None
    if of_training:
      _tell_unused(image_files(folder), folder, image_files(root), root)
    if self.skip_damaged:
      there_are = read.readable()
      kept = np.array(there_are)
      read = dataclasses.replace(read, records=records.only(there_are))
    conditions = ImageSource((self.size, self.size, self.channels), read.records.length, read)
    read(0)  # what is wrong with all of them shows now
    if of_training:
      try:
        refuse_one_value(conditions)
      except UserError as error:
        raise UserError(f'{FIELD} = {shown(folder)}: {error}') from None
    mark = fingerprint(str(folder), image_files(folder))
    return WithConditions(images, lambda _, numbers: conditions.gather(numbers), mark, kept)

  def of_file(self, image: Image.Image) -> np.ndarray:
    return self.decoder.pixels(image, self.size)

  def files_of(self, images: Sequence[Path]) -> Records:
    root, folder = self._folders
    there = _images_in(folder, root)
    # An image and its condition must have one shape to lie on each other, or else be stretched.
    aligned = self.decoder.fit != 'stretch'
    return _records(images, partners(images, root, there, folder), there, aligned)

  @property
  def _folders(self) -> tuple[Path, Path]:
    """Of the images, and of the conditions."""
    return Path(self.root).expanduser(), Path(self.folder).expanduser()


class WithConditions(Source):
  """Images, each with its condition."""

  def __init__(
    self,
    images: Images,
    conditions: Callable[[Batch, np.ndarray], np.ndarray],
    mark: str,
    kept: np.ndarray | None = None,
  ):
    """Conditions of a batch of images, or of their numbers, are uint8 [n, H, W, C].

    `mark` tells the files of the conditions from others, and `kept` are the images that there are,
    if not all.
    """
    self.images, self.class_names = images, images.class_names
    self._conditions, self._mark, self._kept = conditions, mark, kept

  def __len__(self) -> int:
    return len(self.images) if self._kept is None else len(self._kept)

  def batch(self, indices: np.ndarray) -> Batch:
    """'data', 'condition' and, if there are labels, 'label'."""
    images = self.images.batch(indices if self._kept is None else self._kept[indices])
    return images | {'condition': self._conditions(images, indices)}

  def class_counts(self) -> Sequence[int] | None:
    return self.images.class_counts() if self._kept is None else None

  def fingerprint(self) -> str:
    own = self.images.fingerprint()
    return f'{own}-{self._mark}' if self._mark else own


def partners(files: Sequence[Path], root: Path, there: Sequence[Path], folder: Path) -> list[Path]:
  """For each image below `root`, the one of `there`, below `folder`, that it goes with.

  That is the one of the same name, in the same subfolder; else the only one whose name differs by
  its ending alone.

  Raises:
    UserError: if an image has no such partner, or several, or shares one.
  """
  by_name = {_name(file, folder): file for file in there}
  by_stem = dict[str, list[Path]]()
  for file in there:
    by_stem.setdefault(_stem(file, folder), []).append(file)
  found, missing, image_of = list[Path](), list[Path](), dict[Path, Path]()
  for file in files:
    exact = by_name.get(_name(file, root))
    candidates = [exact] if exact else by_stem.get(_stem(file, root), [])
    if not candidates:
      missing.append(file)
      continue
    if len(candidates) > 1:
      names = ' and '.join(shown(other.name) for other in candidates)
      raise UserError(
        f'{FIELD}: {names} in {shown(candidates[0].parent)} both go with {shown(file)}; keep one, '
        'or give it the name of the image'
      )
    other = image_of.setdefault(candidates[0], file)
    if other != file:
      raise UserError(
        f'{FIELD}: {shown(candidates[0])} goes with {shown(other)} and {shown(file)}, whose names '
        'differ by their endings alone; rename one, and what it goes with'
      )
    found.append(candidates[0])
  if missing:
    wanted = shown(folder / missing[0].relative_to(root).with_suffix('')) + '.*'
    raise UserError(
      f'{FIELD}: {len(missing)} of {len(files)} images have no condition, such as '
      f'{shown(missing[0])}: {wanted} is not there; add it, or take the image away'
    )
  return found


def _images_in(folder: Path, root: Path) -> list[Path]:
  """The images of a folder of conditions."""
  if not folder.is_dir():
    raise UserError(
      f'{FIELD} = {str(folder)!r} is not a folder; name the one with an image for each in '
      'config.data.path, or take lowres:N, such as lowres:4, or gray'
    )
  real, own = (os.path.join(os.path.realpath(path), '') for path in (folder, root))
  if real.startswith(own):
    raise UserError(
      f'{FIELD} = {shown(folder)} lies in config.data.path = {shown(root)}, so that conditions '
      'would be among the images; put it beside that'
    )
  if not (there := image_files(folder)):
    raise UserError(f'{FIELD}: no images in {shown(folder)}')
  return there


def _tell_unused(there: Sequence[Path], folder: Path, images: Sequence[Path], root: Path) -> None:
  stems = {_stem(file, root) for file in images}
  unused = [file for file in there if _stem(file, folder) not in stems]
  if unused:
    named = shown(unused[0].relative_to(folder))
    logger.warning(
      '%s: left out: %d images that are no condition of any, such as %s',
      shown(folder), len(unused), named,
    )  # fmt: skip


def _name(file: Path, root: Path) -> str:
  """Below the root, the same whichever system it comes from."""
  return unicodedata.normalize('NFC', shown(file.relative_to(root).as_posix()))


def _stem(file: Path, root: Path) -> str:
  return _name(file.with_suffix(''), root)


def _records(
  images: Sequence[Path], paired: Sequence[Path], there: Sequence[Path], aligned: bool
) -> Records:
  def read(i: int) -> tuple[Image.Image, int]:
    condition = Image.open(paired[i])
    if aligned:
      with Image.open(images[i]) as image:
        _check_shape(_upright_size(image), _upright_size(condition), shown(images[i]))
    return condition, 0

  return Records(
    len(paired),
    read,
    lambda i: shown(paired[i]),
    fit=None,
    files=paired,
    upright=True,
    all_splits=lambda: [functools.partial(Image.open, file) for file in there],
  )


def _upright_size(image: Image.Image) -> tuple[int, int]:
  width, height = image.size
  return (height, width) if image.getexif().get(_ORIENTATION, 1) >= 5 else (width, height)


def _check_shape(image: tuple[int, int], condition: tuple[int, int], where: str) -> None:
  """Raises UserError unless one is the other at another resolution, up to a pixel of rounding."""
  (width, height), (large_width, large_height) = sorted([image, condition])
  off = abs(height - width * large_height / large_width)
  across = abs(width - height * large_width / large_height)
  if min(off, across) >= 1:
    sizes = ['x'.join(map(str, size)) for size in (condition, image)]
    raise UserError(
      f'has {sizes[0]} pixels, and its image {where} {sizes[1]}, which is another shape; crop both '
      'alike, or set --config.data.fit=stretch'
    )


def _as_picture(image: np.ndarray) -> Image.Image:
  """uint8 [H, W, C] as Pillow has it."""
  return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
