"""FIR resampling against the convolution that defines it, on images with zeros inserted."""

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from models.resample import downsample, FIRConv, upsample

KERNELS = [(1, 3, 3, 1), (1, 2, 1), (1, 2, 3, 4), (1, 4, 6, 4, 1), (1, 1)]
BALANCED = [(1, 3, 3, 1), (1, 2, 1), (1, 4, 6, 4, 1), (1, 1)]  # even and odd taps weigh the same
SHAPE = (2, 6, 8, 3)

every_kernel = pytest.mark.parametrize('kernel', KERNELS, ids=str)


def images(shape: tuple[int, ...] = SHAPE) -> jax.Array:
  return jax.random.normal(jax.random.key(0), shape)


def convolve(x: np.ndarray, kernel: np.ndarray, before: int, after: int) -> np.ndarray:
  """The true convolution of both axes of images with the outer product of a 1-D filter.

  Zeros are added on each side, or pixels taken away where their number is negative.
  """
  x = np.pad(x, [(0, 0), (max(before, 0), max(after, 0)), (max(before, 0), max(after, 0)), (0, 0)])
  ends = [slice(max(-before, 0), size - max(-after, 0)) for size in x.shape[1:3]]
  x = x[:, ends[0], ends[1]]
  filters = np.outer(kernel, kernel)[::-1, ::-1]
  height, width = (size - len(kernel) + 1 for size in x.shape[1:3])
  return sum(
    w * x[:, i : i + height, j : j + width] for (i, j), w in np.ndenumerate(filters)
  )  # fmt: skip


def insert_zeros(x: np.ndarray) -> np.ndarray:
  out = np.zeros((x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]))
  out[:, ::2, ::2] = x
  return out


def correlate(x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
  """The convolution of neural networks, without padding."""
  return np.asarray(
    jax.lax.conv_general_dilated(
      jnp.asarray(x, jnp.float32),
      jnp.asarray(weight),
      (stride, stride),
      'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision='highest',
    )
  )


def reference(x: jax.Array, kernel: tuple[int, ...], up: bool) -> np.ndarray:
  """StyleGAN2's upsample_2d and downsample_2d."""
  k = np.asarray(kernel, np.float64) / sum(kernel)
  pad = len(k) - 2
  if up:
    return convolve(insert_zeros(np.asarray(x)), 2 * k, (pad + 1) // 2 + 1, pad // 2)
  return convolve(np.asarray(x), k, (pad + 1) // 2, pad // 2)[:, ::2, ::2]


def reference_conv(x: jax.Array, kernel: tuple[int, ...], up: bool, weight) -> np.ndarray:
  """StyleGAN2's upsample_conv_2d and conv_downsample_2d: 3x3, with filter and stride 2."""
  k, size = np.asarray(kernel, np.float64) / sum(kernel), weight.shape[0]
  if up:
    pad = len(k) - 2 - (size - 1)
    zeros = insert_zeros(np.asarray(x))[:, :-1, :-1]
    full = np.pad(zeros, [(0, 0), (size - 1, size - 1), (size - 1, size - 1), (0, 0)])
    spread = correlate(full, weight, 1)  # the transposed convolution of stride 2
    return convolve(spread, 2 * k, (pad + 1) // 2 + 1, pad // 2 + 1)
  pad = len(k) - 2 + (size - 1)
  return correlate(convolve(np.asarray(x), k, (pad + 1) // 2, pad // 2), weight, 2)


@every_kernel
@pytest.mark.parametrize('up', [True, False])
def test_resampling_is_the_convolution(kernel, up):
  got = jax.jit(upsample if up else downsample, static_argnums=1)(images(), kernel)
  np.testing.assert_allclose(got, reference(images(), kernel, up), atol=1e-5)


@every_kernel
@pytest.mark.parametrize('up', [True, False])
def test_fused_convolution_is_the_convolution(kernel, up):
  """Filter and 3x3 convolution in one; the bias is added last."""
  layer = FIRConv(features=4, up=up, kernel=kernel)
  weight = jax.random.normal(jax.random.key(1), (3, 3, SHAPE[-1], 4))
  params = {'weight': weight, 'bias': jnp.arange(4.0)}
  got = jax.jit(layer.apply)({'params': params}, images())
  expected = reference_conv(images(), kernel, up, weight) + np.arange(4)
  np.testing.assert_allclose(got, expected, atol=1e-4)


def test_plain_resampling_repeats_and_averages():
  x = images()
  up = upsample(x, None)
  for row in range(2):
    for column in range(2):
      np.testing.assert_array_equal(up[:, row::2, column::2], x)
  blocks = [x[:, row::2, column::2] for row in range(2) for column in range(2)]
  np.testing.assert_allclose(downsample(x, None), sum(blocks) / 4, atol=1e-6)
  np.testing.assert_allclose(downsample(up, None), x, atol=1e-6)


@pytest.mark.parametrize('kernel', [*BALANCED, None], ids=str)
@pytest.mark.parametrize('resample', [upsample, downsample])
def test_constant_images_stay_constant_inside(kernel, resample):
  """Filters have unit gain; only the border, where zeros begin, may differ."""
  out = jax.jit(resample, static_argnums=1)(jnp.full((1, 16, 16, 2), 0.7), kernel)
  np.testing.assert_allclose(out[:, 3:-3, 3:-3], 0.7, rtol=1e-6)


@pytest.mark.parametrize('kernel', [(1, 3, 3, 1), (1, 2, 1)], ids=str)
@pytest.mark.parametrize('resample', [upsample, downsample])
def test_gradients(kernel, resample):
  """Forwards and backwards; resampling is linear."""
  check_linearised(lambda x: resample(x, kernel), images((1, 4, 4, 1)))


@pytest.mark.parametrize('up', [True, False])
def test_gradients_of_the_fused_convolution(up):
  layer = FIRConv(features=2, up=up, kernel=(1, 3, 3, 1))
  weight = jax.random.normal(jax.random.key(1), (3, 3, 2, 2))

  def apply(x, weight, bias):
    return layer.apply({'params': {'weight': weight, 'bias': bias}}, x)

  check_linearised(apply, images((1, 4, 4, 2)), weight, jnp.ones(2))


def check_linearised(f, *args: jax.Array) -> None:
  """Compares jvp and vjp with finite differences."""
  check_grads(jax.jit(f), args, order=1, modes=('fwd', 'rev'), atol=1e-2, rtol=1e-2)
