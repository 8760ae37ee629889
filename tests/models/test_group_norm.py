"""GroupNorm with its activation: the plain formula, its derivatives, and what GPUs are given."""

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import lowered
import numpy as np
import pytest

from models.barriers import apart, stored
from models.layers import ACTIVATIONS, GroupNorm

KEYS = jax.random.split(jax.random.key(0), 6)
X = 3 + 2 * jax.random.normal(KEYS[0], (2, 4, 6, 8))
PARAMS = {'scale': jax.random.normal(KEYS[1], (8,)), 'bias': jax.random.normal(KEYS[2], (8,))}


def ours(x: Array, params: dict[str, Array], act: str = 'swish') -> Array:
  return GroupNorm(4, act=ACTIVATIONS[act]).apply({'params': params}, x)


def plain(x: Array, params: dict[str, Array], act: str = 'swish') -> Array:
  return ACTIVATIONS[act](nn.GroupNorm(4).apply({'params': params}, x))


@pytest.mark.parametrize('act', ACTIVATIONS)
def test_value_and_gradients(act):
  weight = jax.random.normal(KEYS[3], X.shape)

  def loss(f):
    return lambda x, params: (weight * f(x, params, act)).sum()

  np.testing.assert_allclose(ours(X, PARAMS, act), plain(X, PARAMS, act), atol=2e-5)
  grads = [jax.grad(loss(f), (0, 1))(X, PARAMS) for f in (ours, plain)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), *grads)


def test_derivatives_of_every_kind():
  """Forwards, over a batch of directions, and of second order both ways."""
  v = jax.random.normal(KEYS[4], X.shape)

  def derivatives(f):
    def along(x):
      return jax.jvp(lambda x: f(x, PARAMS), [x], [v])[1]

    grad = jax.grad(lambda x: jnp.sin(f(x, PARAMS)).sum())
    several = jax.vmap(lambda v: jax.jvp(lambda x: f(x, PARAMS), [X], [v])[1])
    return (
      along(X),
      several(jnp.stack([v, 2 * v])),
      jax.jvp(grad, [X], [v])[1],
      jax.grad(lambda x: (along(x) ** 2).sum())(X),
    )

  for a, b in zip(derivatives(ours), derivatives(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


def test_low_precision_is_rounded_once():
  """In bfloat16 statistics, affine map and activation are those of float32, as are their sums."""
  low = X.astype(jnp.bfloat16)
  exact = plain(low.astype(jnp.float32), PARAMS)
  np.testing.assert_array_equal(
    ours(low, PARAMS), ours(low.astype(jnp.float32), PARAMS).astype(low.dtype)
  )
  np.testing.assert_allclose(ours(low, PARAMS).astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)
  grads = [
    jax.grad(lambda p, f=f, x=x: f(x, p).astype(jnp.float32).sum())(PARAMS)
    for f, x in ((ours, low), (plain, low.astype(jnp.float32)))
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *grads)


def test_barriers_of_each_platform():
  """What is stored is so on CPUs and GPUs, its gradient on CPUs; what is apart is so on GPUs."""

  def barriers(f, platform: str) -> int:
    return lowered.lower(f, platform, jnp.ones(3)).count('stablehlo.optimization_barrier')

  def gradient(f):
    return lambda x: jax.vjp(f, x)[1](x)[0]

  counts = {
    platform: [barriers(f, platform) for f in (stored, gradient(stored), apart, gradient(apart))]
    for platform in ('cpu', 'cuda', 'tpu')
  }
  assert counts == {'cpu': [1, 1, 0, 0], 'cuda': [1, 0, 1, 1], 'tpu': [0, 0, 0, 0]}
