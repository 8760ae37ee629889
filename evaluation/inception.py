"""The Inception-v3 of FID: TensorFlow's graph of December 2015, with 1008 classes.

Szegedy et al. (2016, https://arxiv.org/abs/1512.00567), as trained for that graph and carried over
to PyTorch by https://github.com/mseitzer/pytorch-fid and https://github.com/toshas/torch-fidelity,
which published numbers rest on. Batch normalisation is part of the convolutions, see
`inception_weights`; modules have the names of the PyTorch file.
"""

from typing import Any

from flax import linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

SIZE = 299  # rows and columns that the network sees
FEATURES, CLASSES = 2048, 1008


def resize_as_tf1(x: Array, size: int) -> Array:
  """Bilinear resizing of x [B, H, W, C] to [B, size, size, C] as TensorFlow 1 had it.

  Row i of the result is row i H / size of x, corners not aligned and pixels not centred, between
  two rows interpolated, beyond the last the last. No antialiasing.
  """
  return _resize_axis(_resize_axis(x, 2, size), 1, size)


def _resize_axis(x: Array, axis: int, size: int) -> Array:
  n = x.shape[axis]
  # In float32, as TensorFlow: where a product is a whole number, rounding picks the pixel.
  where = np.arange(size, dtype=np.float32) * np.float32(n / size)
  low = where.astype(np.int32)
  weight = np.expand_dims(where - low, [a for a in range(x.ndim) if a != axis])
  below, above = (jnp.take(x, i, axis) for i in (low, np.minimum(low + 1, n - 1)))
  return below + (above - below) * weight


def preprocess(images: Array) -> Array:
  """uint8 images [B, H, W, 3 or 1], grey ones in all three channels -> [B, 299, 299, 3]."""
  x = (resize_as_tf1(images.astype(jnp.float32), SIZE) - 128) / 128
  return jnp.broadcast_to(x, (*x.shape[:-1], 3))


def average_pool(x: Array) -> Array:
  """Means over 3x3 pixels, at the border over those that are there."""
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _max_pool(x: Array) -> Array:
  return nn.max_pool(x, (3, 3), padding='SAME')


def _halve(x: Array) -> Array:
  return nn.max_pool(x, (3, 3), strides=(2, 2))


Conv = tuple[str, int, int, int]  # name, features, height and width of the kernel


def _convs(x: Array, *convs: Conv, halve: bool = False) -> Array:
  """Convolutions of the module around the call, each with its ReLU; the last halves the image."""
  for i, (name, features, height, width) in enumerate(convs):
    last = halve and i == len(convs) - 1
    conv = nn.Conv(
      features,
      (height, width),
      strides=2 if last else 1,
      padding='VALID' if last else 'SAME',
      precision=jax.lax.Precision.HIGHEST,  # or TPUs and newer GPUs round to 8 or 11 bits
      name=name,
    )
    x = nn.relu(conv(x))
  return x


def _join(*branches: Array) -> Array:
  return jnp.concatenate(branches, axis=-1)


class BlockA(nn.Module):
  """Kernels up to 5x5, at 35x35 pixels."""

  pool: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    double = ('branch3x3dbl_1', 64, 1, 1), ('branch3x3dbl_2', 96, 3, 3)
    return _join(
      _convs(x, ('branch1x1', 64, 1, 1)),
      _convs(x, ('branch5x5_1', 48, 1, 1), ('branch5x5_2', 64, 5, 5)),
      _convs(x, *double, ('branch3x3dbl_3', 96, 3, 3)),
      _convs(average_pool(x), ('branch_pool', self.pool, 1, 1)),
    )


class BlockB(nn.Module):
  """35x35 to 17x17 pixels."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    double = ('branch3x3dbl_1', 64, 1, 1), ('branch3x3dbl_2', 96, 3, 3)
    return _join(
      _convs(x, ('branch3x3', 384, 3, 3), halve=True),
      _convs(x, *double, ('branch3x3dbl_3', 96, 3, 3), halve=True),
      _halve(x),
    )


class BlockC(nn.Module):
  """Kernels of 7x7 pixels in two factors, at 17x17 pixels."""

  width: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    n = self.width
    double = ('branch7x7dbl_1', n, 1, 1), ('branch7x7dbl_2', n, 7, 1), ('branch7x7dbl_3', n, 1, 7)
    return _join(
      _convs(x, ('branch1x1', 192, 1, 1)),
      _convs(x, ('branch7x7_1', n, 1, 1), ('branch7x7_2', n, 1, 7), ('branch7x7_3', 192, 7, 1)),
      _convs(x, *double, ('branch7x7dbl_4', n, 7, 1), ('branch7x7dbl_5', 192, 1, 7)),
      _convs(average_pool(x), ('branch_pool', 192, 1, 1)),
    )


class BlockD(nn.Module):
  """17x17 to 8x8 pixels."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    seven = ('branch7x7x3_1', 192, 1, 1), ('branch7x7x3_2', 192, 1, 7), ('branch7x7x3_3', 192, 7, 1)
    return _join(
      _convs(x, ('branch3x3_1', 192, 1, 1), ('branch3x3_2', 320, 3, 3), halve=True),
      _convs(x, *seven, ('branch7x7x3_4', 192, 3, 3), halve=True),
      _halve(x),
    )


class BlockE(nn.Module):
  """At 8x8 pixels; the last one takes maxima, not means, a slip of that graph which FID keeps."""

  last: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    three = _convs(x, ('branch3x3_1', 384, 1, 1))
    double = _convs(x, ('branch3x3dbl_1', 448, 1, 1), ('branch3x3dbl_2', 384, 3, 3))
    return _join(
      _convs(x, ('branch1x1', 320, 1, 1)),
      _convs(three, ('branch3x3_2a', 384, 1, 3)),
      _convs(three, ('branch3x3_2b', 384, 3, 1)),
      _convs(double, ('branch3x3dbl_3a', 384, 1, 3)),
      _convs(double, ('branch3x3dbl_3b', 384, 3, 1)),
      _convs(_max_pool(x) if self.last else average_pool(x), ('branch_pool', 192, 1, 1)),
    )


class InceptionV3(nn.Module):
  """uint8 images [B, H, W, 3 or 1] -> pool_3, float32 [B, 2048]."""

  @nn.compact
  def __call__(self, images: Array) -> Array:
    x = preprocess(images)
    x = _convs(x, ('Conv2d_1a_3x3', 32, 3, 3), halve=True)
    x = _convs(x, ('Conv2d_2a_3x3', 32, 3, 3))[:, 1:-1, 1:-1]  # without padding
    x = _halve(_convs(x, ('Conv2d_2b_3x3', 64, 3, 3)))
    x = _convs(x, ('Conv2d_3b_1x1', 80, 1, 1), ('Conv2d_4a_3x3', 192, 3, 3))[:, 1:-1, 1:-1]
    x = _halve(x)
    for name, pool in (('Mixed_5b', 32), ('Mixed_5c', 64), ('Mixed_5d', 64)):
      x = BlockA(pool, name=name)(x)
    x = BlockB(name='Mixed_6a')(x)
    for name, width in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
      x = BlockC(width, name=f'Mixed_{name}')(x)
    x = BlockD(name='Mixed_7a')(x)
    x = BlockE(last=False, name='Mixed_7b')(x)
    x = BlockE(last=True, name='Mixed_7c')(x)
    return x.mean((1, 2))


def logits(params: Any, pool_3: np.ndarray, bias: bool = False) -> np.ndarray:
  """Logits of the 1008 classes [B, 1008] from pool_3 [B, 2048].

  The Inception score has been computed without the bias from the start, so that is the default.
  """
  return pool_3 @ params['fc']['kernel'] + (params['fc']['bias'] if bias else 0)
