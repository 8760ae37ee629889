"""Convolutions that XLA:CPU computes quickly inside loops.

XLA:CPU has quick code for convolutions of one layout, images NHWC by weights HWIO, and rewrites
others to that layout; but not inside loops, where they take 15 to 50 times longer. The gradients of
convolutions have other layouts. So here JAX lowers all of them to that one, for CPUs, whatever made
them: derivatives of any kind and order are what they always were.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.extend.core.primitives import conv_general_dilated_p
from jax.interpreters import mlir

_conv_general_dilated_lower: Callable[..., Any] | None
try:
  from jax._src.lax.convolution import _conv_general_dilated_lower
except ImportError:  # it is not public; where it has another name, loops are slow, and right
  _conv_general_dilated_lower = None


def register() -> None:
  """Makes this how JAX lowers convolutions for CPUs."""
  if _conv_general_dilated_lower is not None:
    mlir.register_lowering(conv_general_dilated_p, _lower, platform='cpu')


def _lower(ctx: Any, x: Any, w: Any, *, dimension_numbers: Any, **choices: Any) -> Any:
  """Lowers a convolution to one of the canonical layout, between transpositions."""
  n = len(dimension_numbers.lhs_spec)
  of_x, of_w, of_y = dimension_numbers  # which axes are batch, channels, space; out, in, space
  axes = {
    'x': (of_x[0], *of_x[2:], of_x[1]),
    'w': (*of_w[2:], of_w[1], of_w[0]),
    'y': (of_y[0], *of_y[2:], of_y[1]),
  }
  if all(order == tuple(range(n)) for order in axes.values()):
    choices |= {'dimension_numbers': dimension_numbers, 'expand_complex_convolutions': True}
    assert _conv_general_dilated_lower is not None  # or this were not registered
    return _conv_general_dilated_lower(ctx, x, w, **choices)
  space = tuple(range(1, n - 1))
  canonical = jax.lax.ConvDimensionNumbers(
    (0, n - 1, *space), (n - 1, n - 2, *range(n - 2)), (0, n - 1, *space)
  )

  def convolve(x: Array, w: Array) -> Array:
    x, w = x.transpose(axes['x']), w.transpose(axes['w'])
    y = conv_general_dilated_p.bind(x, w, dimension_numbers=canonical, **choices)
    return y.transpose([axes['y'].index(axis) for axis in range(n)])

  return mlir.lower_fun(convolve, multiple_results=False)(ctx, x, w)
