"""Convolutions on CPUs: their values in any layout, and that derivatives in loops are quick."""

from functools import partial
import re

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import pytest

from models import cpu_convolutions

cpu_convolutions.register()  # what is tested
LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def by_definition(x: np.ndarray, w: np.ndarray, stride: int) -> np.ndarray:
  """A 'VALID' convolution of NHWC by HWIO, term by term."""
  size = [(n - k) // stride + 1 for n, k in zip(x.shape[1:3], w.shape[:2], strict=True)]
  y = np.zeros((len(x), *size, w.shape[-1]))
  for i, j in np.ndindex(*w.shape[:2]):
    rows, columns = (
      slice(o, o + stride * (n - 1) + 1, stride) for o, n in ((i, size[0]), (j, size[1]))
    )
    y += np.einsum('bhwi,io->bhwo', x[:, rows, columns], w[i, j])
  return y


def arrays(*shapes: tuple[int, ...]) -> list[Array]:
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('layout', [LAYOUT, ('NCHW', 'OIHW', 'NCHW'), ('CWHN', 'IOWH', 'HNWC')])
def test_values_do_not_depend_on_the_layout(layout, stride):
  x, w = arrays((2, 7, 6, 3), (3, 2, 3, 4))
  where = [['NHWC'.index(c) for c in spec] for spec in (layout[0], layout[2])]
  weights = ['HWIO'.index(c) for c in layout[1]]
  convolve = jax.jit(
    partial(
      jax.lax.conv_general_dilated,
      window_strides=(stride, stride),
      padding='VALID',
      dimension_numbers=layout,
    )
  )
  y = convolve(x.transpose(where[0]), w.transpose(weights))
  expected = by_definition(np.asarray(x), np.asarray(w), stride).transpose(where[1])
  np.testing.assert_allclose(y, expected, atol=1e-5)


def convolution(x: Array, w: Array, stride: int = 1) -> Array:
  return jax.lax.conv_general_dilated(x, w, (stride, stride), 'SAME', dimension_numbers=LAYOUT)


@pytest.mark.parametrize('stride', [1, 2])
def test_derivatives_forwards_and_backwards_agree(stride):
  x, w, dx, dw = arrays((2, 8, 8, 3), (3, 3, 3, 4), (2, 8, 8, 3), (3, 3, 3, 4))
  f = partial(convolution, stride=stride)

  @jax.jit
  def both(x, w, dx, dw):
    y, forwards = jax.jvp(f, (x, w), (dx, dw))
    gradients = jax.vjp(f, x, w)[1](y)
    # Of second order: the derivative along (dx, dw) of the gradients.
    _, second = jax.jvp(lambda x, w: jax.vjp(f, x, w)[1](y), (x, w), (dx, dw))
    return y, forwards, gradients, second

  y, forwards, (by_x, by_w), (second_x, second_w) = both(x, w, dx, dw)
  # A convolution is linear in x and in w.
  np.testing.assert_allclose(forwards, f(dx, w) + f(x, dw), atol=1e-4)
  np.testing.assert_allclose((y * forwards).sum(), (by_x * dx).sum() + (by_w * dw).sum(), rtol=1e-5)
  np.testing.assert_allclose((second_x * dx).sum(), (y * f(dx, dw)).sum(), rtol=1e-4)
  np.testing.assert_allclose((second_w * dw).sum(), (y * f(dx, dw)).sum(), rtol=1e-4)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='is about XLA:CPU')
def test_gradients_in_a_loop_have_the_layout_that_is_quick():
  x, w = arrays((2, 8, 8, 3), (3, 3, 3, 3))

  def loop(x, w):
    def step(carry, _):
      gradients = jax.grad(lambda x, w: jnp.square(convolution(x, w)).sum(), (0, 1))(*carry)
      return jax.tree.map(lambda a, g: a - 1e-3 * g, carry, gradients), None

    return jax.lax.scan(step, (x, w), length=3)[0]

  program = jax.jit(loop).lower(x, w).compile().as_text()
  layouts = re.findall(r' convolution\(.*?dim_labels=([\w>\-]+)', program)
  assert len(layouts) == 3
  assert set(layouts) == {'b01f_01io->b01f'}
