"""Layers as the released code and its libraries compute them, for benchmarks to compare with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import flax.linen as nn
import jax
from jax import Array
from jax.extend.core.primitives import conv_general_dilated_p
from jax.interpreters import mlir
import jax.numpy as jnp

from models import cpu_convolutions, layers, resample

# What JAX 0.10 hands to the library YNNPACK where no flag says otherwise; `start.py` does.
_LIBRARY = ('DOT', 'REDUCE', 'INDIVIDUAL_DOT', 'INDIVIDUAL_CONVOLUTION')
OPTIONS = {
  'xla_cpu_experimental_ynn_fusion_type': ','.join(f'LIBRARY_FUSION_TYPE_{x}' for x in _LIBRARY)
}


def _convolve(
  x: Array, kernel: Sequence[float], gain: float, up: int, stride: int, pad: tuple[int, int]
) -> Array:
  """FIR filtering by one convolution of all channels, with zeros between pixels on the way up."""
  taps = gain * jnp.array(kernel, x.dtype) / sum(kernel)
  weights = jnp.einsum('h,w,io->hwio', taps, taps, jnp.eye(x.shape[-1], dtype=x.dtype))
  return jax.lax.conv_general_dilated(
    x, weights, (stride, stride), (pad, pad), lhs_dilation=(up, up),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )  # fmt: skip


def upsample(x: Array, kernel: Sequence[float] | None) -> Array:
  """`resample.upsample`, for kernels of even length."""
  if kernel is None:
    return x.repeat(2, axis=1).repeat(2, axis=2)
  n = len(kernel) // 2
  return _convolve(x, kernel, 2.0, 2, 1, (n, n))


def filter_down(x: Array, kernel: Sequence[float], pad: int, stride: int) -> Array:
  """What downsampling is made of in `resample`."""
  return _convolve(x, kernel, 1.0, 1, stride, ((pad + 1) // 2, pad // 2))


def restore_lowering() -> None:
  """JAX's own lowering of convolutions, for what is compiled from now on."""
  rule = cpu_convolutions._conv_general_dilated_lower
  mlir.register_lowering(conv_general_dilated_p, rule, platform='cpu')


@contextmanager
def forms() -> Iterator[None]:
  """Networks that are traced and compiled here have these layers."""
  restore_lowering()
  try:
    with (
      mock.patch.object(resample, 'upsample', upsample),
      mock.patch.object(resample, '_filter', filter_down),
      mock.patch.object(layers, 'GroupNorm', nn.GroupNorm),
    ):
      yield
  finally:
    cpu_convolutions.register()
