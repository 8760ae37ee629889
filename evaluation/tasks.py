"""What is known of an image, where the rest is to be drawn, and how samples are made to agree.

A task says what is measured of an image: all but what is to be painted, its grey values, or a
smaller or blurred version of it. A conditioning turns the score of all images, and a measurement,
into what a sampler needs.
"""

import abc
import dataclasses
from pathlib import Path

from jax import Array
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from controllable_generation import (
  BlockMean,
  BoundedMean,
  GaussianBlur,
  Gray,
  Known,
  Mask,
  Operator,
  PosteriorGuidance,
)
from data import geometry
from data.codec import Codec
from data.folder import image_files
from evaluation.known_levels import with_block_means
from runtime.errors import UserError
from samplers.base import Constraint
from sde_lib import ScoreFn, SDE


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What is known of the user's images.

  Attributes:
    names: of the images, each another one.
    y: what is measured of them, float32 [K, H, W, C], as a network sees images.
    operator: that measures it.
  """

  names: list[str]
  y: np.ndarray
  operator: Operator


class Task(abc.ABC):
  """What is known of images."""

  @abc.abstractmethod
  def measure(self, files: list[Path], codec: Codec) -> tuple[np.ndarray, Operator]:
    """What is measured of K files, float32 [K, H, W, C] as a network sees images, and how.

    Raises:
      UserError: if a file cannot be read, or the task does not go with the network's images.
    """

  @abc.abstractmethod
  def keep_known(
    self, stored: np.ndarray, levels: np.ndarray, known: np.ndarray, operator: Operator
  ) -> np.ndarray:
    """Stored samples, uint8 [N, H, W, C], of which the known part is that of the input exactly.

    Args:
      stored: the samples as the codec stores them, uint8 [N, H, W, C].
      levels: the samples before they were rounded, in levels of 0 to 255.
      known: what was measured, in levels, like `levels`.
      operator: that measured it.
    """


@dataclasses.dataclass(frozen=True)
class Inpaint(Task):
  """The pixels are known where the image `mask` is white."""

  mask: str

  def measure(self, files: list[Path], codec: Codec) -> tuple[np.ndarray, Operator]:
    place = Path(self.mask).expanduser()
    if not place.is_file():
      raise UserError(
        f'config.sampling.mask={self.mask!r} is not a file; name an image that is white where '
        'pixels are known, and black where they are to be painted'
      )
    mask = _read(place, codec.pixel_shape[0], 1) >= 128
    if mask.all() or not mask.any():
      colour = (
        'white, so that nothing is to be painted' if mask.all() else 'black: nothing is known'
      )
      raise UserError(f'the mask {self.mask} is all {colour}')
    known = mask.astype(np.float32)
    return known * _read_all(files, codec), Mask(known)

  def keep_known(
    self, stored: np.ndarray, levels: np.ndarray, known: np.ndarray, operator: Operator
  ) -> np.ndarray:
    where = np.asarray(operator(jnp.ones(stored.shape[1:]))) > 0
    return np.where(where, np.rint(known).astype(np.uint8), stored)


@dataclasses.dataclass(frozen=True)
class Colorize(Task):
  """The mean of the three colours is known."""

  def measure(self, files: list[Path], codec: Codec) -> tuple[np.ndarray, Operator]:
    if codec.pixel_shape[-1] != 3:
      raise UserError('config.sampling.task = colorize needs a model of colour images')
    return _read_all(files, codec).mean(-1, keepdims=True).repeat(3, axis=-1), Gray()

  def keep_known(
    self, stored: np.ndarray, levels: np.ndarray, known: np.ndarray, operator: Operator
  ) -> np.ndarray:
    return with_block_means(levels, known, (1, 1, stored.shape[-1]))


@dataclasses.dataclass(frozen=True)
class SuperResolve(Task):
  """The means over blocks of `factor` x `factor` pixels are known."""

  factor: int

  def measure(self, files: list[Path], codec: Codec) -> tuple[np.ndarray, Operator]:
    factor, size = self.factor, codec.pixel_shape[0]
    if factor < 2 or size % factor:
      raise UserError(
        f'config.sampling.factor = {factor} must be at least 2 and divide config.data.image_size = '
        f'{size}'
      )
    small = _read_all(files, codec, size // factor)
    return small.repeat(factor, axis=1).repeat(factor, axis=2), BlockMean(factor)

  def keep_known(
    self, stored: np.ndarray, levels: np.ndarray, known: np.ndarray, operator: Operator
  ) -> np.ndarray:
    return with_block_means(levels, known, (self.factor, self.factor, 1))


@dataclasses.dataclass(frozen=True)
class Deblur(Task):
  """The image is known, blurred by a Gaussian of standard deviation `blur_std` pixels."""

  blur_std: float

  def measure(self, files: list[Path], codec: Codec) -> tuple[np.ndarray, Operator]:
    return _read_all(files, codec), GaussianBlur(self.blur_std)

  def keep_known(
    self, stored: np.ndarray, levels: np.ndarray, known: np.ndarray, operator: Operator
  ) -> np.ndarray:
    return stored  # it is known but for noise


class Conditioning(abc.ABC):
  """How samples are made to agree with a measurement."""

  @property
  @abc.abstractmethod
  def exact(self) -> bool:
    """Whether there is no noise in what is known."""

  @abc.abstractmethod
  def condition(
    self, score_fn: ScoreFn, operator: Operator, y: Array, sde: SDE, codec: Codec
  ) -> tuple[ScoreFn, Constraint | None]:
    """The score, and the constraint if any, of images whose measurement is y [B, ...]."""


@dataclasses.dataclass(frozen=True)
class ByConstraint(Conditioning):
  """What is known is put at the noise level of every step (Appendix I)."""

  @property
  def exact(self) -> bool:
    return True

  def condition(
    self, score_fn: ScoreFn, operator: Operator, y: Array, sde: SDE, codec: Codec
  ) -> tuple[ScoreFn, Constraint | None]:
    return score_fn, Known(y, operator, sde)


@dataclasses.dataclass(frozen=True)
class ByPosterior(Conditioning):
  """The score of p(x | y), for measurements with noise; black to white is 1 to `noise_std`."""

  noise_std: float

  @property
  def exact(self) -> bool:
    return self.noise_std == 0

  def condition(
    self, score_fn: ScoreFn, operator: Operator, y: Array, sde: SDE, codec: Codec
  ) -> tuple[ScoreFn, Constraint | None]:
    guided = PosteriorGuidance(score_fn, operator, y, sde, self.noise_std * codec.unit)
    return BoundedMean(guided, sde, codec.low, codec.high), None


@dataclasses.dataclass(frozen=True)
class InverseProblem:
  """Images of which something is known, and the rest is wanted.

  Attributes:
    task: what is known of them.
    path: of an image file, or of a folder of them.
    conditioning: how samples are made to agree with it.
  """

  task: Task
  path: str
  conditioning: Conditioning

  def read(self, codec: Codec) -> Inputs:
    """Reads the images, and measures what is known.

    Raises:
      UserError: if there are none, or one cannot be read, or the task does not go with them.
    """
    files = _input_files(self.path)
    y, operator = self.task.measure(files, codec)
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [f'{i}_{s}' for i, s in enumerate(stems)]
    return Inputs(names, y, operator)

  def to_stored(self, x: np.ndarray, y: np.ndarray, operator: Operator, codec: Codec) -> np.ndarray:
    """Samples x [N, ...] as a dataset has them, of which exactly y is measured if it has no noise.

    Raises:
      FloatingPointError: if some are not finite.
    """
    stored = codec.to_stored(x)
    if not self.conditioning.exact:
      return stored
    levels, known = (255 * (v.astype(np.float64) - codec.low) / codec.unit for v in (x, y))
    return self.task.keep_known(stored, levels, known, operator)


def _input_files(path: str) -> list[Path]:
  where = Path(path).expanduser()
  if path and where.is_file():
    return [where]
  files = image_files(where) if path and where.is_dir() else []
  if not files:
    raise UserError(f'config.sampling.input={path!r} is neither an image nor a folder of images')
  return files


def _read_all(files: list[Path], codec: Codec, size: int | None = None) -> np.ndarray:
  """Files as a network sees them, float32 [K, size, size, C], by default of its own size."""
  own_size, _, channels = codec.pixel_shape
  return codec.scaled(np.stack([_read(file, size or own_size, channels) for file in files]))


def _read(file: Path, size: int, channels: int) -> np.ndarray:
  """A file as a dataset would have it: uint8 [size, size, channels]."""
  try:
    with Image.open(file) as image:
      pixels = geometry.convert(ImageOps.exif_transpose(image), channels)
    fitted = geometry.short_side_then_crop(pixels, size)
    return np.asarray(fitted).reshape(size, size, channels)
  except Exception as error:  # Pillow has a dozen
    raise UserError(f'{file} cannot be read as an image ({error})') from None
