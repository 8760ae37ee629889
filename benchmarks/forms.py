"""Layers in the forms that they might have, for whoever has a device to find out which pays there.

Each layer is in its first form the one that networks use. All forms of a layer compute the same, to
rounding, of the same images [B, H, W, C].
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from benchmarks import common, released
from models import layers, resample

Form = Callable[[Array], Array]

FIR = (1, 3, 3, 1)
LAYOUT = ('NHWC', 'HWIO', 'NHWC')


class NotHere(Exception):
  """This device has no such thing."""


def _depthwise(x: Array, taps: np.ndarray, up: bool) -> Array:
  """Resampled by two, along one axis or both, with a filter [h, w] of each channel by itself."""
  channels, factors = x.shape[-1], tuple(2 if n > 1 else 1 for n in taps.shape)
  kernel = jnp.tile(jnp.asarray(taps, x.dtype)[..., None, None], (1, 1, 1, channels))
  pad = [2 * ((n if up else n - 1) // 2,) for n in taps.shape]
  stride, dilation = ((1, 1), factors) if up else (factors, (1, 1))
  return jax.lax.conv_general_dilated(
    x, kernel, stride, pad, dilation, dimension_numbers=LAYOUT, feature_group_count=channels
  )


def _taps(up: bool) -> np.ndarray:
  return (2 if up else 1) * np.array(FIR) / sum(FIR)


def _fir_depthwise(x: Array, up: bool) -> Array:
  return _depthwise(x, np.outer(_taps(up), _taps(up)), up)


def _fir_separable(x: Array, up: bool) -> Array:
  """One axis after the other."""
  return _depthwise(_depthwise(x, _taps(up)[:, None], up), _taps(up)[None, :], up)


def _attend(attention: Callable[[Array, Array, Array], Array], x: Array) -> Array:
  """Of the pixels of an image to themselves, one head."""
  h = x.reshape(len(x), -1, x.shape[-1])
  return attention(h, h, h).reshape(x.shape)


def _of_library(implementation: str, q: Array, k: Array, v: Array) -> Array:
  if implementation == 'cudnn' and jax.default_backend() != 'gpu':
    raise NotHere('cuDNN is for NVIDIA GPUs')
  q, k, v = (h[:, :, None] for h in (q, k, v))  # a head
  return jax.nn.dot_product_attention(q, k, v, implementation=implementation)[:, :, 0]


def _normalize(norm: Callable[..., nn.Module], x: Array) -> Array:
  """GroupNorm as at its start, and swish."""
  module = norm(num_groups=max(1, min(x.shape[-1] // 4, 32)), epsilon=1e-6)
  ones = jnp.ones(x.shape[-1])
  return nn.swish(module.apply({'params': {'scale': ones, 'bias': 0 * ones}}, x)).astype(x.dtype)


def _kernel(channels_in: int, channels_out: int, dtype: jnp.dtype) -> Array:
  shape = (3, 3, channels_in, channels_out)
  weights = jax.random.normal(jax.random.key(1), shape) / np.sqrt(9 * channels_in)
  return weights.astype(dtype)


def _convolve(layout: str, x: Array) -> Array:
  """3x3, of as many channels; transposed to a layout and back where that is not NHWC."""
  kernel = _kernel(x.shape[-1], x.shape[-1], x.dtype)
  there, back = [('NHWC'.index(a) for a in layout), (layout.index(a) for a in 'NHWC')]
  numbers = (layout, 'HWIO', layout)
  y = jax.lax.conv_general_dilated(
    x.transpose(*there), kernel, (1, 1), 'SAME', dimension_numbers=numbers
  )
  return y.transpose(*back)


def _from_rgb(padded: int, x: Array) -> Array:
  """3x3, of the first three channels, with channels of zeros up to so many."""
  kernel, missing = _kernel(3, x.shape[-1], x.dtype), padded - 3
  x = jnp.pad(x[..., :3], [(0, 0)] * 3 + [(0, missing)])
  kernel = jnp.pad(kernel, [(0, 0), (0, 0), (0, missing), (0, 0)])
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=LAYOUT)


# By layer: its forms by name, and how many times fewer pixels along an axis it is measured with.
LAYERS: dict[str, tuple[dict[str, Form], int]] = {
  'FIR down': (
    {
      'shifts': partial(resample.downsample, kernel=FIR),
      'depthwise': partial(_fir_depthwise, up=False),
      'separable': partial(_fir_separable, up=False),
      'dense': partial(released.filter_down, kernel=FIR, pad=2, stride=2),
    },
    1,
  ),
  'FIR up': (
    {
      'shifts': partial(resample.upsample, kernel=FIR),
      'depthwise': partial(_fir_depthwise, up=True),
      'separable': partial(_fir_separable, up=True),
      'dense': partial(released.upsample, kernel=FIR),
    },
    2,
  ),
  'attention': (
    {
      'plain': partial(_attend, layers.attention),
      'xla': partial(_attend, partial(_of_library, 'xla')),
      'cudnn': partial(_attend, partial(_of_library, 'cudnn')),
    },
    2,
  ),
  'GroupNorm': (
    {'own': partial(_normalize, layers.GroupNorm), 'flax': partial(_normalize, nn.GroupNorm)},
    1,
  ),
  'convolution': ({'NHWC': partial(_convolve, 'NHWC'), 'NCHW': partial(_convolve, 'NCHW')}, 1),
  'RGB convolution': ({'3': partial(_from_rgb, 3), '8': partial(_from_rgb, 8)}, 1),
}


@partial(jax.jit, static_argnums=0)
def apply(form: Form, x: Array) -> Array:
  """The layer."""
  return form(x)


@partial(jax.jit, static_argnums=0)
def gradient(form: Form, x: Array) -> Array:
  """By x, of half the sum of squares of the layer; what training takes."""
  return jax.grad(lambda x: 0.5 * jnp.square(form(x).astype(jnp.float32)).sum())(x)


def measure(
  layer: str, form: str, shape: tuple[int, ...], dtype: str, seconds: float
) -> dict[str, float]:
  """Seconds of the layer and of its gradient, and the error beside the first form of the layer."""
  choices, fewer = LAYERS[layer]
  b, h, w, c = shape
  x = jax.random.normal(jax.random.key(0), (b, h // fewer, w // fewer, c), dtype)
  first, chosen = next(iter(choices.values())), choices[form]
  expected, found = (np.asarray(apply(f, x[:2]), np.float32) for f in (first, chosen))
  return {
    'layer': common.queued(lambda: apply(chosen, x), seconds),
    'gradient': common.queued(lambda: gradient(chosen, x), seconds),
    'error': float(np.abs(found - expected).max() / np.abs(expected).max()),
  }
