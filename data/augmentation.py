"""Augmentation that does not leak: images are transformed, and the network is told how.

Karras et al. 2022, https://arxiv.org/abs/2206.00364, Appendix F.2 and Table 6. Each kind of
transformation happens with a probability, with random parameters a_0 to a_7 (what does not happen
has those of 0):

  mirror image    a_0 from {0, 1}                     always drawn, so that it shows in every other
  upside down     a_1 from {0, 1}
  scaling         by 2^(a_2 / 5)                      a_2 normal
  rotation        by a_3                              a_3 uniform in [-pi, pi]
  anisotropy      by 2^(a_5 / 5) in the direction     a_4 uniform in [-pi, pi], a_5 normal
                  a_4, by 2^(-a_5 / 5) across
  translation     by a_6 W / 8, a_7 H / 8             a_6, a_7 normal

in this order. Nine labels say so to the network, and are all 0 for an image as it is. So it learns
images as they are from more of them, and is told zeros when it is sampled: what it draws is not
mirrored unless data are, nor turned.

All transformations but the first two are one affine map, and the image is resampled once: it is
upsampled twofold by a Lanczos filter, read there bilinearly at twice the resolution of the result,
and this is brought back to its size in least squares, which takes off what would alias. The paper
does the same with wavelet filters. Beyond its edges an image goes on as its mirror image. An image
to which nothing happens stays what it is, to the bit; one that is only mirrored or upside down has
its pixels in another order.
"""

import dataclasses
import functools
import math

import flax
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from runtime.precision import full_precision

LABELS = 9  # numbers that say what happened to an image
SCALE = ANISOTROPY = 2**0.2  # of one standard deviation
TRANSLATION = 1 / 8  # of the size of the image, the same
_LOBES = 3  # of the Lanczos filter
_MARGIN = 4  # pixels beyond the edges of the result, which bringing it back to its size reads


@flax.struct.dataclass
class Parameters:
  """What happens to each image of a batch, float32 [B]: a_0 to a_7 of the table above."""

  mirrored: Array
  upended: Array
  scaling: Array
  rotation: Array  # clockwise, as images are shown, where y points down
  direction: Array
  anisotropy: Array
  right: Array
  down: Array

  @property
  def labels(self) -> Array:
    """What the network is told, float32 [B, 9]: zeros for an image as it is."""
    rotation, direction = self.rotation, self.direction
    told = (
      self.mirrored, self.upended, self.scaling, jnp.cos(rotation) - 1, jnp.sin(rotation),
      self.anisotropy * jnp.cos(direction), self.anisotropy * jnp.sin(direction), self.right,
      self.down,
    )  # fmt: skip
    return jnp.stack(told, axis=-1)

  @property
  def resampled(self) -> Array:
    """Whether more happens to an image than another order of its pixels, bool [B]."""
    kinds = (self.scaling, self.rotation, self.anisotropy, self.right, self.down)
    return functools.reduce(jnp.logical_or, (a != 0 for a in kinds))


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """The whole of it.

  Attributes:
    probability: of each kind but mirror images: 0.12 in the paper for CIFAR-10, 0.15 for FFHQ and
      AFHQv2. At 0 nothing happens at all.
  """

  probability: float

  def __call__(self, rng: Array, images: Array) -> tuple[Array, Array]:
    """Images [B, H, W, C] after what happens to each, and labels [B, 9] that say so."""
    chosen = self.draw(rng, len(images))
    return transformed(images, chosen), chosen.labels

  def draw(self, rng: Array, n: int) -> Parameters:
    """What is to happen to n images."""
    names = [field.name for field in dataclasses.fields(Parameters)]
    rng_happens, *rngs = jax.random.split(rng, 1 + len(names))
    key = dict(zip(names, rngs, strict=True))
    happens = jax.random.bernoulli(rng_happens, self.probability, (5, n))

    def coin(name: str) -> Array:
      return jax.random.bernoulli(key[name], shape=(n,)).astype(jnp.float32)

    def normal(name: str) -> Array:
      return jax.random.normal(key[name], (n,))

    def angle(name: str) -> Array:
      return jax.random.uniform(key[name], (n,), minval=-math.pi, maxval=math.pi)

    return Parameters(
      mirrored=coin('mirrored') * (self.probability > 0),
      upended=coin('upended') * happens[0],
      scaling=normal('scaling') * happens[1],
      rotation=angle('rotation') * happens[2],
      direction=angle('direction') * happens[3],
      anisotropy=normal('anisotropy') * happens[3],
      right=normal('right') * happens[4],
      down=normal('down') * happens[4],
    )


def transformed(images: Array, chosen: Parameters) -> Array:
  """Images [B, H, W, C] after what happens to each."""

  def those(which: Array) -> Array:
    return (which != 0)[:, None, None, None]

  images = jnp.where(those(chosen.mirrored), images[:, :, ::-1], images)
  images = jnp.where(those(chosen.upended), images[:, ::-1], images)
  moved = resample(images, origins(chosen, images.shape[1], images.shape[2]))
  return jnp.where(those(chosen.resampled), moved, images)


def origins(chosen: Parameters, height: int, width: int) -> Array:
  """The inverse of the affine maps of all kinds but the first two, float32 [B, 3, 3].

  It takes a place (x, y, 1) of the result to where it comes from. Places are counted in pixels, x
  to the right and y down, from the centre of the image.
  """
  translate = _translation(-TRANSLATION * width * chosen.right, -TRANSLATION * height * chosen.down)
  turn, turn_back = _rotation(chosen.direction), _rotation(-chosen.direction)
  stretch = ANISOTROPY**-chosen.anisotropy
  shrink = SCALE**-chosen.scaling
  maps = (
    _scaling(shrink, shrink), _rotation(-chosen.rotation),
    turn, _scaling(stretch, 1 / stretch), turn_back, translate,
  )  # fmt: skip
  return functools.reduce(full_precision(jnp.matmul), maps)


def _rotation(angle: Array) -> Array:
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return _affine((cos, -sin, 0), (sin, cos, 0))


def _scaling(x: Array, y: Array) -> Array:
  return _affine((x, 0, 0), (0, y, 0))


def _translation(x: Array, y: Array) -> Array:
  return _affine((1, 0, x), (0, 1, y))


def _affine(*rows: tuple[Array | float, ...]) -> Array:
  """Matrices [B, 3, 3] of their first two rows."""
  numbers = jnp.broadcast_arrays(*(jnp.asarray(v, jnp.float32) for v in (*sum(rows, ()), 0, 0, 1)))
  return jnp.stack(numbers, axis=-1).reshape(-1, 3, 3)


@full_precision
def resample(images: Array, origin: Array) -> Array:
  """Images [B, H, W, C] where each place shows what lies at its `origins` [B, 3, 3]."""
  _, height, width, _ = images.shape
  (up, down), (across_up, across_down) = _filters(height), _filters(width)
  fine = jnp.einsum('ih,bhwc,jw->bijc', up, images, across_up)
  moved = jax.vmap(_read)(fine, origin)
  return jnp.einsum('hi,bijc,wj->bhwc', down, moved, across_down)


def _read(fine: Array, origin: Array) -> Array:
  """One image [2H, 2W, C], of two pixels where `origin` counts one, read bilinearly.

  The result has a margin, [2(H + 2M), 2(W + 2M), C].
  """
  height, width, _ = fine.shape
  y, x = ((jnp.arange(n) - (n - 1) / 2) / 2 for n in (height + 4 * _MARGIN, width + 4 * _MARGIN))
  place = jnp.stack(jnp.broadcast_arrays(x, y[:, None], 1.0))
  there = jnp.einsum('ij,jhw->ihw', origin[:2], place)
  x, y = 2 * there[0] + (width - 1) / 2, 2 * there[1] + (height - 1) / 2
  left, top = jnp.floor(x), jnp.floor(y)
  pixels = fine.reshape(height * width, -1)

  def corner(i: int, j: int) -> Array:
    row, column = _folded(top + i, height), _folded(left + j, width)
    share = jnp.abs(1 - i - (y - top)) * jnp.abs(1 - j - (x - left))
    pixel = pixels.at[row * width + column].get(mode='promise_in_bounds')
    return share[..., None] * pixel

  return corner(0, 0) + corner(0, 1) + corner(1, 0) + corner(1, 1)


def _folded(i: Array, n: int) -> Array:
  """Numbers of pixels, of which n are there: the image goes on as its mirror image."""
  i = i.astype(jnp.int32) % (2 * n)
  return jnp.where(i < n, i, 2 * n - 1 - i)


@functools.cache
def _filters(n: int) -> tuple[np.ndarray, np.ndarray]:
  """Upsampling [2n, n] of a row of n pixels; its inverse [n, 2(n + 2M)] of one with a margin.

  It is the inverse in least squares, which takes what upsampling makes of a row back to that row,
  and leaves out what no row makes. Brightness stays: the weights of each pixel sum to 1.
  """
  down = np.linalg.pinv(_upsampling(n + 2 * _MARGIN))[_MARGIN : _MARGIN + n]
  return _upsampling(n).astype(np.float32), down.astype(np.float32)


def _upsampling(n: int) -> np.ndarray:
  """[2n, n]."""
  up = np.zeros((2 * n, n))
  for i in range(2 * n):
    place = (i + 0.5) / 2 - 0.5  # in pixels of the row
    pixels = math.floor(place) + np.arange(1 - _LOBES, 1 + _LOBES)
    away = place - pixels
    weights = np.sinc(away) * np.sinc(away / _LOBES)
    folded = pixels % (2 * n)
    np.add.at(up[i], np.where(folded < n, folded, 2 * n - 1 - folded), weights / weights.sum())
  return up
