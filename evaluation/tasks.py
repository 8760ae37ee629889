"""What is known of an image, where the rest is to be drawn, and how samples are made to agree.

A task says what is measured of an image: all but what is to be painted, its grey values, or a
smaller or blurred version of it. A conditioning turns the score of all images, and a measurement,
into what a sampler needs.
"""

import abc
from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import TypeVar

from jax import Array
import jax.numpy as jnp
import numpy as np
from PIL import Image

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
from data import masks
from data.codec import Codec
from data.decoding import Decoder
from data.folder import image_files, shown
from evaluation.known_levels import with_block_means
from runtime.errors import UserError
from samplers.base import Constraint
from sde_lib import ScoreFn, SDE

Decoded = TypeVar('Decoded')


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
  def measure(
    self, files: list[Path], codec: Codec, decoder: Decoder
  ) -> tuple[np.ndarray, Operator]:
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

  def measure(
    self, files: list[Path], codec: Codec, decoder: Decoder
  ) -> tuple[np.ndarray, Operator]:
    mask = masks.load(self.mask)
    size, _, _ = codec.pixel_shape
    images, of_each = [], []
    for file in files:
      whole = read_image(file, lambda image: decoder.colours(image, size))
      pixels, known = masks.known_pixels(whole, mask, decoder, size)
      images.append(pixels)
      of_each.append(known)
    known = np.all(of_each, axis=0)[..., None].astype(np.float32)
    return known * codec.scaled(np.stack(images)), Mask(known)

  def keep_known(
    self, stored: np.ndarray, levels: np.ndarray, known: np.ndarray, operator: Operator
  ) -> np.ndarray:
    where = np.asarray(operator(jnp.ones(stored.shape[1:]))) > 0
    return np.where(where, np.rint(known).astype(np.uint8), stored)


@dataclasses.dataclass(frozen=True)
class Colorize(Task):
  """The mean of the three colours is known."""

  def measure(
    self, files: list[Path], codec: Codec, decoder: Decoder
  ) -> tuple[np.ndarray, Operator]:
    if codec.pixel_shape[-1] != 3:
      raise UserError('config.sampling.task = colorize needs a model of colour images')
    return _read_all(files, codec, decoder).mean(-1, keepdims=True).repeat(3, axis=-1), Gray()

  def keep_known(
    self, stored: np.ndarray, levels: np.ndarray, known: np.ndarray, operator: Operator
  ) -> np.ndarray:
    return with_block_means(levels, known, (1, 1, stored.shape[-1]))


@dataclasses.dataclass(frozen=True)
class SuperResolve(Task):
  """The means over blocks of `factor` x `factor` pixels are known."""

  factor: int

  def measure(
    self, files: list[Path], codec: Codec, decoder: Decoder
  ) -> tuple[np.ndarray, Operator]:
    factor, size = self.factor, codec.pixel_shape[0]
    if factor < 2 or size % factor:
      raise UserError(
        f'config.sampling.factor = {factor} must be at least 2 and divide config.data.image_size = '
        f'{size}'
      )
    small = _read_all(files, codec, decoder, size // factor)
    return small.repeat(factor, axis=1).repeat(factor, axis=2), BlockMean(factor)

  def keep_known(
    self, stored: np.ndarray, levels: np.ndarray, known: np.ndarray, operator: Operator
  ) -> np.ndarray:
    return with_block_means(levels, known, (self.factor, self.factor, 1))


@dataclasses.dataclass(frozen=True)
class Deblur(Task):
  """The image is known, blurred by a Gaussian of standard deviation `blur_std` pixels."""

  blur_std: float

  def measure(
    self, files: list[Path], codec: Codec, decoder: Decoder
  ) -> tuple[np.ndarray, Operator]:
    return _read_all(files, codec, decoder), GaussianBlur(self.blur_std)

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
    decoder: how files become images of the network.
  """

  task: Task
  path: str
  conditioning: Conditioning
  decoder: Decoder

  def read(self, codec: Codec) -> Inputs:
    """Reads the images, and measures what is known.

    Raises:
      UserError: if there are none, or one cannot be read, or the task does not go with them.
    """
    files = input_files(self.path, 'config.sampling.input')
    y, operator = self.task.measure(files, codec, self.decoder)
    return Inputs(names_of(files), y, operator)

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


def input_files(path: str, field: str) -> list[Path]:
  """The image that a path names, or those in a folder; `field` is where the user named it.

  Raises:
    UserError: if there are none.
  """
  where = Path(path).expanduser()
  if path and where.is_file():
    return [where]
  files = image_files(where) if path and where.is_dir() else []
  if not files:
    raise UserError(f'{field}={path!r} is neither an image nor a folder of images')
  return files


def names_of(files: list[Path]) -> list[str]:
  """Names of files for what is made of them, each another one."""
  stems = [file.stem for file in files]
  return stems if len(set(stems)) == len(stems) else [f'{i}_{s}' for i, s in enumerate(stems)]


def _read_all(
  files: list[Path], codec: Codec, decoder: Decoder, size: int | None = None
) -> np.ndarray:
  """Files as a network sees them, float32 [K, size, size, C], by default of its own size."""
  size = size or codec.pixel_shape[0]
  return codec.scaled(
    np.stack([read_image(file, lambda image: decoder.pixels(image, size)) for file in files])
  )


def read_image(file: Path, decode: Callable[[Image.Image], Decoded]) -> Decoded:
  """What is made of an image file.

  Raises:
    UserError: if it cannot be read.
  """
  try:
    with Image.open(file) as image:
      return decode(image)
  except Exception as error:  # Pillow has a dozen
    raise UserError(f'{shown(file)} cannot be read as an image ({error})') from None
