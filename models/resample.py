"""Resampling of images [B, H, W, C] by a factor of two: plain, or filtered (FIR).

FIR resampling follows StyleGAN2 (https://arxiv.org/abs/1912.04958): zeros are inserted or pixels
dropped, and a separable low-pass filter such as (1, 3, 3, 1) removes the aliases. Here the filter
runs as a few shifted, weighted sums along each axis; going up, one sum per output phase, so the
inserted zeros are never made. The values are those of the zero-stuffed convolution.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from models.layers import conv, default_init
from runtime.shapes import Images, Maps


def _taps(kernel: Sequence[float], gain: float) -> list[float]:
  """A 1-D filter of total weight `gain`, reversed for use as a correlation."""
  k = np.asarray(kernel, np.float64)
  return (gain * k / k.sum())[::-1].tolist()


def _pad(x: Array, axis: int, before: int, after: int) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (before, after)
  return jnp.pad(x, widths)


def _down_axis(x: Array, taps: list[float], axis: int, pad: tuple[int, int], stride: int) -> Array:
  size = (x.shape[axis] + sum(pad) - len(taps)) // stride + 1
  x = _pad(x, axis, *pad)
  last = (size - 1) * stride + 1
  terms = (w * jax.lax.slice_in_dim(x, m, m + last, stride, axis) for m, w in enumerate(taps))
  return sum(terms)  # type: ignore[return-value]  # of at least one, so never 0 itself


def _up_axis(x: Array, taps: list[float], axis: int) -> Array:
  size = x.shape[axis]
  # Output 2 i + r sees the inserted-zero signal from position 2 i + r - before onwards; the
  # even positions of that signal are x, the others nothing.
  before = (len(taps) - 1) // 2 + 1
  reach = len(taps) // 2 + 1
  x = _pad(x, axis, reach, reach)
  phases = [
    sum(
      w * jax.lax.slice_in_dim(x, start, start + size, axis=axis)
      for m, w in enumerate(taps)
      if (r + m - before) % 2 == 0
      for start in [reach + (r + m - before) // 2]
    )
    for r in range(2)
  ]
  y = jnp.stack(phases, axis=axis + 1)
  return y.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


def _filter(x: Array, kernel: Sequence[float], pad: int, stride: int) -> Array:
  """Both axes filtered at unit gain, after `pad` zeros in all, the odd one before."""
  taps, widths = _taps(kernel, gain=1.0), ((pad + 1) // 2, pad // 2)
  return _down_axis(_down_axis(x, taps, 1, widths, stride), taps, 2, widths, stride)


def upsample(x: Images, kernel: Sequence[float] | None) -> Maps:
  """Twice as many rows and columns; without a kernel, every pixel becomes a 2x2 square."""
  if kernel is None:
    return x.repeat(2, axis=1).repeat(2, axis=2)
  taps = _taps(kernel, gain=2.0)
  return _up_axis(_up_axis(x, taps, 1), taps, 2)


def downsample(x: Images, kernel: Sequence[float] | None) -> Maps:
  """Half as many rows and columns; without a kernel, every 2x2 square becomes its mean."""
  if kernel is None:
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
  return _filter(x, kernel, pad=len(kernel) - 2, stride=2)


class FIRConv(nn.Module):
  """A 3x3 convolution fused with FIR resampling, `up` or down."""

  features: int
  up: bool
  kernel: Sequence[float]

  @nn.compact
  def __call__(self, x: Images) -> Maps:
    weight = self.param('weight', default_init(), (3, 3, x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    if self.up:
      # One pixel more on each side of the upsampled image, so that the convolution sees the
      # filter's tails beyond the border rather than zeros.
      x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
      x, stride = upsample(x, self.kernel)[:, 1:-1, 1:-1], 1
    else:
      x, stride = _filter(x, self.kernel, pad=len(self.kernel), stride=1), 2
    y = jax.lax.conv_general_dilated(
      x,
      weight.astype(x.dtype),
      (stride, stride),
      'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return y + bias.astype(x.dtype)


class Upsample(nn.Module):
  """Doubles the resolution, with a 3x3 convolution if `with_conv`; FIR if a kernel is given."""

  features: int
  with_conv: bool
  fir_kernel: Sequence[float] | None

  @nn.compact
  def __call__(self, x: Images) -> Maps:
    if self.with_conv and self.fir_kernel is not None:
      return FIRConv(self.features, True, self.fir_kernel, name='Conv2d_0')(x)
    x = upsample(x, self.fir_kernel)
    return conv(x, self.features) if self.with_conv else x


class Downsample(nn.Module):
  """Halves the resolution, with a 3x3 convolution if `with_conv`; FIR if a kernel is given."""

  features: int
  with_conv: bool
  fir_kernel: Sequence[float] | None

  @nn.compact
  def __call__(self, x: Images) -> Maps:
    if self.with_conv and self.fir_kernel is not None:
      return FIRConv(self.features, False, self.fir_kernel, name='Conv2d_0')(x)
    if self.with_conv:
      return conv(x, self.features, stride=2)
    return downsample(x, self.fir_kernel)
