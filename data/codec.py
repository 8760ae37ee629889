"""Between data as they are stored, and what a network sees of them.

    codec = ImageCodec((32, 32, 3), centered=True, random_flip=True)
    x0 = codec.for_training(rng, images)    # uint8 [B, 32, 32, 3] to floats in [-1, 1]
    images = codec.to_stored(samples)       # and back

What is diffused is x_0 as a network sees it. So the range of x, the width of a level in a
likelihood, and how samples are shown, are asked of the codec. What is stored and what is seen may
differ in shape as well: `pixel_shape` and `model_shape`.
"""

import abc
import dataclasses
import math
from typing import TypeVar

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from sde_lib import expand
from workdir.pictures import ImageGrids, Pictures, PointDensities

LEVELS = 256  # of a pixel

AnyArray = TypeVar('AnyArray', np.ndarray, Array)


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
  """What data are, as they are stored and as a network sees them.

  Attributes:
    pixel_shape: of one example as it is stored.
    label_dropout: the share of training labels that the null label replaces.
  """

  pixel_shape: tuple[int, ...]
  label_dropout: float = dataclasses.field(default=0.0, kw_only=True)

  @property
  def model_shape(self) -> tuple[int, ...]:
    """Of one example as a network sees it."""
    return self.pixel_shape

  @property
  def dim(self) -> int:
    """How many numbers one example is for a network."""
    return math.prod(self.model_shape)

  @property
  @abc.abstractmethod
  def low(self) -> float:
    """The least value that a network sees of data."""

  @property
  @abc.abstractmethod
  def high(self) -> float:
    """The largest."""

  @property
  @abc.abstractmethod
  def centre(self) -> float:
    """A value in the middle of data, around which their contrast is measured."""

  @property
  @abc.abstractmethod
  def unit(self) -> float:
    """What 1 in stored data, or all the way from black to white, is for a network."""

  @property
  @abc.abstractmethod
  def level_width(self) -> float:
    """The width of a level of stored data for a network; 1 where there are no levels."""

  @property
  @abc.abstractmethod
  def pictures(self) -> Pictures:
    """How stored data are shown."""

  @abc.abstractmethod
  def scaled(self, data: AnyArray) -> AnyArray:
    """Stored data [B, ...] as a network sees them, nothing random about it."""

  @abc.abstractmethod
  def between_levels(self, data: Array, u: Array) -> Array:
    """Stored data [B, ...] as a network sees them, u in [0, 1) of the way to the next level."""

  @abc.abstractmethod
  def dequantized(self, rng: Array, data: Array) -> Array:
    """Stored data [B, ...], or one example, as a network sees them, spread over their levels."""

  @abc.abstractmethod
  def for_training(self, rng: Array, data: Array) -> Array:
    """Stored data [B, ...] as a network is trained on them: flipped and dequantised, if at all."""

  @abc.abstractmethod
  def for_evaluation(self, rng: Array, data: Array) -> Array:
    """The same, but never flipped."""

  def condition(self, images: Array) -> Array:
    """What networks see of condition images, uint8 [B, H, W, C]: floats in [-1, 1].

    Whatever data are scaled to; they are neither dequantised nor noised.
    """
    return images.astype(jnp.float32) / 127.5 - 1

  def training_condition(self, rng: Array, images: Array) -> Array:
    """The same for training: flipped where `for_training` flips data, by the same key."""
    del rng
    return self.condition(images)

  def training_labels(self, rng: Array, labels: Array, null: int) -> Array:
    """Labels [B], each replaced by the null label with probability `label_dropout`.

    A network that is trained so knows the score of every class and that of all together, which is
    what classifier-free guidance needs (Algorithm 1 of https://arxiv.org/abs/2207.12598).
    """
    return jnp.where(jax.random.bernoulli(rng, self.label_dropout, labels.shape), null, labels)

  def to_stored(self, x: np.ndarray) -> np.ndarray:
    """Samples [N, ...] of a network as a dataset has them; what `scaled` made comes back.

    Raises:
      FloatingPointError: if some are not finite.
    """
    if not np.isfinite(x).all():
      broken = (~np.isfinite(x.reshape(len(x), -1)).all(1)).sum()
      raise FloatingPointError(
        f'{broken} of {len(x)} samples are not finite; try another sampler, more steps '
        '(config.sampling.num_steps), or a checkpoint of earlier'
      )
    return self._finite_to_stored(x)

  @abc.abstractmethod
  def _finite_to_stored(self, x: np.ndarray) -> np.ndarray:
    """`to_stored` of finite samples."""


@dataclasses.dataclass(frozen=True)
class ImageCodec(Codec):
  """Images, stored as uint8 [B, H, W, C] with levels 0 to 255.

  Attributes:
    centered: a network sees them in [-1, 1], not in [0, 1].
    random_flip: mirror every other training image.
    uniform_dequantization: spread the 256 levels of a pixel over [0, 1), to train and to evaluate.
    nearest_level: samples become the nearest level, not the one below.
  """

  centered: bool = False
  random_flip: bool = False
  uniform_dequantization: bool = False
  nearest_level: bool = False

  @property
  def low(self) -> float:
    return -1.0 if self.centered else 0.0

  @property
  def high(self) -> float:
    return 1.0

  @property
  def centre(self) -> float:
    return (self.low + self.high) / 2

  @property
  def unit(self) -> float:
    return self.high - self.low

  @property
  def level_width(self) -> float:
    return self.unit / LEVELS

  @property
  def pictures(self) -> Pictures:
    return ImageGrids()

  def scaled(self, data: AnyArray) -> AnyArray:
    return self._from_unit_interval(data.astype(np.float32) / 255)

  def between_levels(self, data: Array, u: Array) -> Array:
    return self._from_unit_interval((data.astype(jnp.float32) + u) / LEVELS)

  def dequantized(self, rng: Array, data: Array) -> Array:
    return self.between_levels(data, level_noise(rng, data))

  def for_training(self, rng: Array, data: Array) -> Array:
    return self.for_evaluation(rng, self._flipped(rng, data))

  def for_evaluation(self, rng: Array, data: Array) -> Array:
    return self.dequantized(rng, data) if self.uniform_dequantization else self.scaled(data)

  def training_condition(self, rng: Array, images: Array) -> Array:
    return self.condition(self._flipped(rng, images))

  def _flipped(self, rng: Array, images: Array) -> Array:
    if not self.random_flip:
      return images
    rng_flip, _ = jax.random.split(rng)
    mirrored = jax.random.bernoulli(rng_flip, shape=images.shape[:1])
    return jnp.where(expand(mirrored, images), images[:, :, ::-1], images)

  def _from_unit_interval(self, x: AnyArray) -> AnyArray:
    return 2 * x - 1 if self.centered else x

  def _finite_to_stored(self, x: np.ndarray) -> np.ndarray:
    levels = 255 * ((x + 1) / 2 if self.centered else x)
    half = 0.5 if self.nearest_level else 0.0
    stored = np.clip(levels + half, 0, 255).astype(np.uint8)
    # What is known of an image is on a level, where truncation would go by rounding errors.
    nearest = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return np.where(self.scaled(nearest) == x, nearest, stored)


def level_noise(rng: Array, data: Array) -> Array:
  """Uniform noise in [0, 1) for each value of data, of a key that also decides on flips."""
  _, rng_level = jax.random.split(rng)
  return jax.random.uniform(rng_level, data.shape)


@dataclasses.dataclass(frozen=True)
class PointCodec(Codec):
  """Points, stored as float32 [B, d]: a network sees them as they are."""

  @property
  def low(self) -> float:
    return -math.inf

  @property
  def high(self) -> float:
    return math.inf

  @property
  def centre(self) -> float:
    return 0.0

  @property
  def unit(self) -> float:
    return 1.0

  @property
  def level_width(self) -> float:
    return 1.0

  @property
  def pictures(self) -> Pictures:
    return PointDensities()

  def scaled(self, data: AnyArray) -> AnyArray:
    return data

  def between_levels(self, data: Array, u: Array) -> Array:
    return data

  def dequantized(self, rng: Array, data: Array) -> Array:
    return data

  def for_training(self, rng: Array, data: Array) -> Array:
    return data

  def for_evaluation(self, rng: Array, data: Array) -> Array:
    return data

  def _finite_to_stored(self, x: np.ndarray) -> np.ndarray:
    return x
