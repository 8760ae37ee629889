"""GroupNorm with its activation: the plain formula, its derivatives, and what GPUs are given."""

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import lowered
import numpy as np
import pytest

from models.barriers import apart, as_made, stored
from models.layers import ACTIVATIONS, Conv, default_init, GroupNorm

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


@pytest.fixture(params=['cpu', 'cuda'])
def platform(request, monkeypatch):
  """That whose way to compute a sum is taken; the other is not traced."""

  def of_platform(*args, default, **others):
    return others.get(request.param, default)(*args)

  monkeypatch.setattr(jax.lax, 'platform_dependent', of_platform)


def test_what_is_added_is_normalised_with_the_rest(platform):
  """For a bias of all images, far from 0, and a vector of each: value, and all derivatives."""
  bias = 30 + 5 * jax.random.normal(KEYS[3], (8,))
  each = jax.random.normal(KEYS[4], (2, 8))
  v = jax.random.normal(KEYS[5], X.shape)

  def of_parts(x, bias, each, params):
    return GroupNorm(4, act=nn.swish).apply({'params': params}, x, bias, each)

  def of_sum(x, bias, each, params):
    return plain(x + bias + each[:, None, None], params)

  results = []
  for f in (of_parts, of_sum):
    grad = jax.grad(lambda *args, f=f: jnp.sin(f(*args)).sum(), (0, 1, 2, 3))
    along, second = jax.jvp(lambda x, grad=grad: grad(x, bias, each, PARAMS), [X], [v])
    results.append((f(X, bias, each, PARAMS), along, second))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *results)


def test_on_cpus_the_sum_is_what_it_was_to_the_bit():
  low = X.astype(jnp.bfloat16)
  bias = jax.random.normal(KEYS[3], (8,), jnp.bfloat16)
  each = jax.random.normal(KEYS[4], (2, 8), jnp.bfloat16)
  norm = GroupNorm(4, act=nn.swish)
  np.testing.assert_array_equal(
    jax.jit(norm.apply)({'params': PARAMS}, low, bias, each),
    jax.jit(norm.apply)({'params': PARAMS}, low + bias + each[:, None, None]),
  )


def test_a_convolution_is_that_of_flax():
  """Names, first parameters, and values to the bit."""
  ours = Conv(5, kernel=3, stride=2, init_scale=0.5)
  theirs = nn.Conv(5, (3, 3), (2, 2), kernel_init=default_init(0.5))
  params = theirs.init(KEYS[0], X)
  jax.tree.map(np.testing.assert_array_equal, ours.init(KEYS[0], X), params)
  params['params']['bias'] += jnp.arange(5)
  y, bias = ours.apply(params, X)
  np.testing.assert_array_equal(y + bias, theirs.apply(params, X))


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
    platform: [barriers(g, platform) for f in (stored, apart, as_made) for g in (f, gradient(f))]
    for platform in ('cpu', 'cuda', 'tpu')
  }
  assert counts == {'cpu': [1, 1, 0, 0, 0, 0], 'cuda': [1, 0, 1, 1, 1, 0], 'tpu': [0] * 6}
