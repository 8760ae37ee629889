"""Layers are told where the rows of a batch lie, and compute what they always do."""

from functools import partial

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from models.dit import DiT
from models.rows import rows_stay
from runtime.devices import Devices, InParts

NET = DiT(patch_size=2, nf=16, num_layers=2, num_heads=2)
X, T = jax.random.normal(jax.random.key(0), (4, 4, 4, 2)), jnp.linspace(0.1, 1.0, 4)
ONE = Devices(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'fsdp')), InParts(1))


@partial(jax.jit, static_argnums=1)
def forward(params: dict, where: NamedSharding | None, x: jax.Array) -> jax.Array:
  with rows_stay(where, len(x)):
    return NET.apply({'params': params}, x, T, False)


@pytest.fixture(scope='module')
def params() -> dict:
  made = jax.eval_shape(lambda: NET.init(jax.random.key(1), X, T, False))['params']
  return jax.tree.map(lambda x: 0.2 * np.cos(np.arange(x.size, dtype='f')).reshape(x.shape), made)


def constraints(jaxpr: Jaxpr) -> list[tuple[tuple[int, ...], PartitionSpec]]:
  """Shapes of what is told where it lies, and where, in a program and in its loops."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'sharding_constraint':
      found.append((equation.outvars[0].aval.shape, equation.params['sharding'].spec))
    for inner in jaxprs_in_params(equation.params):
      found += constraints(inner)
  return found


def test_no_value_changes(params):
  np.testing.assert_array_equal(forward(params, ONE.rows, X), forward(params, None, X))


def test_layers_and_their_gradients_are_told_also_inside_the_loop_over_blocks(params):
  def loss(params: dict, where: NamedSharding | None) -> jax.Array:
    return forward(params, where, X).sum()

  told = constraints(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, ONE.rows).jaxpr)
  assert {spec for _, spec in told} == {PartitionSpec(('data', 'fsdp'))}
  shapes = [shape for shape, _ in told]
  # Of a block: queries, keys and values; what its perceptron has inside; forward and backward.
  assert shapes.count((4, 4, 48)) == shapes.count((4, 4, 64)) == 2
  assert all(shape[0] == len(X) for shape in shapes)
  assert not constraints(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, None).jaxpr)
