"""Layers that this code computes in its own way, beside the usual one.

One 3x3 convolution and its gradients, by itself and three times in a `lax.scan`, lowered as JAX
does and as `models/cpu_convolutions.py` does; twofold FIR upsampling, as a convolution of the image
with zeros between its pixels, which is the released form, and as `models/resample.py` has it;
GroupNorm and the activation after it, with Flax's layer and with ours; attention by
`jax.nn.dot_product_attention` and by ours.

  python -m benchmarks.layers [--json PATH]
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from benchmarks import common, released
from models import cpu_convolutions, layers, resample

SHAPE, FEATURES = (16, 32, 32, 32), 64  # of the 3x3 convolution; channels of the other layers
LAYOUT = ('NHWC', 'HWIO', 'NHWC')
TURNS = 3  # of the loop
FIR = (1, 3, 3, 1)
REPEATS = 11  # timed; the median counts


def convolve(x: Array, w: Array) -> Array:
  """The 3x3 convolution."""
  return jax.lax.conv_general_dilated(x, w, (1, 1), 'SAME', dimension_numbers=LAYOUT)


def by_input(x: Array, w: Array) -> Array:
  """Its gradient by the input, of the shape of x; x is also what comes back."""
  return jax.vjp(lambda x: convolve(x, w), x)[1](x)[0]


def by_weights(x: Array, w: Array) -> Array:
  """Its gradient by the weights, as a change of them; x is also what comes back."""
  return jax.vjp(lambda w: convolve(x, w), w)[1](x)[0]


def in_loop(function: Callable[[Array, Array], Array], xs: Array, w: Array) -> Array:
  """The function of w and each of xs [TURNS, ...], one after another."""
  return jax.lax.map(lambda x: function(x, w), xs)


def normalize_and_activate(
  norm: nn.Module, act: Callable[[Array], Array]
) -> Callable[[Array], Array]:
  """The layer with initial weights, then `act`."""
  weights = norm.init(jax.random.key(0), jnp.zeros((1, 1, 1, FEATURES)))
  return lambda x: act(norm.apply(weights, x))


def library_attention(q: Array, k: Array, v: Array) -> Array:
  """Of one head, by JAX's function."""
  return jax.nn.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]


def attend(attention: Callable[[Array, Array, Array], Array], x: Array) -> Array:
  """Attention among a quarter of the pixels of an image, of themselves."""
  h = x[:, ::2, ::2].reshape(len(x), -1, x.shape[-1])
  return attention(h, h, h)


def gradient(function: Callable[[Array], Array], x: Array) -> Array:
  """Of half the sum of squares of what the function gives, by x."""
  return jax.grad(lambda x: 0.5 * jnp.square(function(x)).sum())(x)


def measure() -> dict[str, dict[str, float]]:
  """Seconds of everything, in both ways."""
  rng_x, rng_w = jax.random.split(jax.random.key(0))
  xs = jax.random.normal(rng_x, (TURNS, *SHAPE))
  w = jax.random.normal(rng_w, (3, 3, SHAPE[-1], SHAPE[-1]))
  runs = {}
  for which, register in (
    ('by default', released.restore_lowering),
    ('here', cpu_convolutions.register),
  ):
    register()  # what is compiled from now on is lowered so
    for what, function in (
      ('3x3', convolve), ('3x3, gradient by input', by_input),
      ('3x3, gradient by weights', by_weights),
    ):  # fmt: skip
      alone = jax.jit(lambda x, w, function=function: function(x, w)).lower(xs[0], w).compile()
      loop = jax.jit(partial(in_loop, function)).lower(xs, w).compile()
      runs[what, which] = partial(alone, xs[0], w), 1
      runs[f'{what}, in a loop', which] = partial(loop, xs, w), TURNS
  x = jax.random.normal(rng_x, (*SHAPE[:-1], FEATURES))
  for what, which, function in (
    ('FIR upsampling', 'by default', partial(released.upsample, kernel=FIR)),
    ('FIR upsampling', 'here', partial(resample.upsample, kernel=FIR)),
    (
      'GroupNorm and swish',
      'by default',
      normalize_and_activate(nn.GroupNorm(FEATURES // 4), nn.swish),
    ),
    (
      'GroupNorm and swish',
      'here',
      normalize_and_activate(layers.GroupNorm(FEATURES // 4, act=nn.swish), layers.unchanged),
    ),
    ('attention of 16x16 pixels', 'by default', partial(attend, library_attention)),
    ('attention of 16x16 pixels', 'here', partial(attend, layers.attention)),
  ):
    runs[what, which] = partial(jax.jit(function), x), 1
    runs[f'{what}, with gradient', which] = partial(jax.jit(partial(gradient, function)), x), 1
  timed = common.timed({key: run for key, (run, _) in runs.items()}, REPEATS)
  results = {}
  for (what, which), (seconds, value) in timed.items():
    results.setdefault(what, {})[which] = seconds / runs[what, which][1]
    np.testing.assert_allclose(value, timed[what, 'by default'][1], rtol=1e-3, atol=1e-2)
  return results


def table(results: dict[str, dict[str, float]]) -> str:
  """What `measure` found, as text."""
  rows = []
  for what, row in results.items():
    before, after = row['by default'], row['here']
    rows.append([what, 1e3 * before, 1e3 * after, before / after])
  return common.table(['ms', 'by default', 'here', 'ratio'], rows)


def main() -> None:
  args = common.parser(__doc__).parse_args()
  results = measure()
  common.report(table(results), results, args.json)


if __name__ == '__main__':
  main()
