"""Parameters are trained side by side in a few arrays; nobody else sees it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from builders.setup import build
from builders.training import score_task
from configs.toy import two_moons
import run_lib
from runtime.devices import Devices
from training import loop
from training.packing import (
  pack_like,
  Packed,
  packed,
  SMALL,
  STACKED,
  unpacked,
)
from training.step import finite_step, TrainState


@pytest.fixture
def as_on_gpus(monkeypatch):
  monkeypatch.setattr(Devices, 'platform', 'gpu')


def of_small_and_stacked():
  """A config whose network has parameters that are joined, and others that are stacked."""
  config = two_moons.get_config()
  config.model.nf = 72
  assert config.model.nf**2 > SMALL
  return config


def state_of(params):
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return TrainState(jnp.int32(5), params, (params, params), tx.init(params))


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_small_arrays_are_one_vector():
  """Small arrays of float32, in the order of the leaves; others stay where they are."""
  params = {
    'large': jnp.zeros(SMALL + 1),
    'small': {'full': jnp.ones(SMALL), 'scalar': jnp.float32(2), 'matrix': jnp.full((2, 3), 3.0)},
    'half': jnp.zeros(3, jnp.bfloat16),
    'empty': jnp.zeros((0, 4)),
  }
  state = state_of(params)
  joined = packed(state, SMALL)
  of_opt = [x for x in jax.tree.leaves(joined, is_leaf=_is_packed) if _is_packed(x)]
  assert len(of_opt) == 1 + 2 + 2  # parameters, two averages, two moments
  assert joined.params.small.shape == (SMALL + 1 + 6,)
  assert not joined.params.stacks
  assert joined.params.rest['large'] is params['large']
  assert joined.params.rest['half'] is params['half']
  np.testing.assert_array_equal(joined.params.small, [1] * SMALL + [3] * 6 + [2])
  assert_same(unpacked(joined), state)
  assert_same(unpacked(joined.params), params)
  assert_same(joined.ema_params, params)
  assert_same(packed(joined, SMALL), joined)  # twice is once
  assert_same(unpacked(pack_like(joined.params, params)), params)


def test_large_arrays_of_one_shape_are_stacked():
  """In the order of the leaves, whatever stands between; very large ones and halves stay."""
  kernels = jax.random.normal(jax.random.key(0), (2, 3, 3, 32, 16))
  matrices = jax.random.normal(jax.random.key(1), (2, 64, 72))  # as many numbers as a kernel
  params = {
    'a': kernels[0],
    'b': {'bias': jnp.ones(3), 'w': matrices[0]},
    'c': jnp.ones((STACKED // 4 + 1, 4)),
    'd': matrices[1],
    'e': jnp.ones(SMALL + 1, jnp.bfloat16),
    'f': kernels[1],
    'g': jnp.full((72, 64), 5.0),  # the only one
  }
  state = state_of(params)
  joined = packed(state, STACKED)
  of_kernels = jnp.moveaxis(kernels, -1, 1)  # outputs first
  for stack, expected in zip(
    joined.params.stacks, (of_kernels, matrices, params['g'][None]), strict=True
  ):
    np.testing.assert_array_equal(stack, expected)
  assert joined.params.rest['c'] is params['c'] and joined.params.rest['e'] is params['e']
  assert [x.shape for x in jax.tree.leaves(joined.params)].count((3,)) == 1  # the vector
  assert_same(unpacked(joined), state)
  assert_same(joined.ema_params, params)
  assert_same(unpacked(pack_like(joined.params, params)), params)


@pytest.mark.parametrize('params', [jnp.ones(3), {'w': jnp.ones(3)}, {'w': jnp.ones(2 * SMALL)}])
@pytest.mark.parametrize('largest', [SMALL, STACKED])
def test_one_array_is_left_alone(params, largest):
  state = state_of(params)
  assert packed(state, largest) is state
  assert pack_like(state.params, params) is params


def test_adam_is_the_same_to_the_bit():
  """All but the norm works number by number, however the numbers lie."""
  tx = optax.adamw(1e-3)
  params = {'a': jax.random.normal(jax.random.key(0), (3, 3, 32, 16)), 'b': jnp.ones((80, 90))}
  state = TrainState(jnp.int32(0), params, (params,), tx.init(params))
  grads = jax.tree.map(jnp.sin, params)

  @jax.jit
  def step(state, grads):
    updates, opt_state = tx.update(pack_like(state.params, grads), state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state

  assert_same(unpacked(step(packed(state, STACKED), grads)), step(state, grads))


def _is_packed(x):
  return isinstance(x, Packed)


def test_what_each_platform_joins(monkeypatch):
  """GPUs all arrays, TPUs the small ones, CPUs none."""
  setup = build(of_small_and_stacked())
  state = jax.eval_shape(score_task(setup).init, jax.random.key(0))

  def joined(platform):
    monkeypatch.setattr(Devices, 'platform', platform)
    params = jax.eval_shape(partial(loop.as_trained, devices=setup.devices), state).params
    return (bool(params.stacks), bool(jax.tree.leaves(params.rest))) if _is_packed(params) else None

  assert [joined(platform) for platform in ('cpu', 'tpu', 'gpu')] == [
    None,
    (False, True),
    (True, False),
  ]


def test_a_step_is_the_same_step(as_on_gpus):
  config = of_small_and_stacked()
  config.training.update(batch_size=4, skip_nonfinite=True, grad_accum=2)
  setup = build(config)
  task, key = score_task(setup), jax.random.key(0)
  start = jax.jit(task.init)(key)
  step = jax.jit(partial(finite_step, task.update))
  batch = {'data': jax.random.normal(key, (4, 2))}
  plain, measured = step(start, None, batch, key)
  joined, same = step(loop.as_trained(start, setup.devices), None, batch, key)
  assert (
    _is_packed(joined.params) and len(jax.tree.leaves(joined)) < len(jax.tree.leaves(plain)) / 2
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), measured, same)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), plain, unpacked(joined)
  )


def test_a_run_leaves_trees_behind_and_goes_on_from_them(as_on_gpus, tmp_path, monkeypatch):
  """A run that is packed, stopped and resumed has the checkpoints, and the end, of a plain one."""
  config = of_small_and_stacked()
  config.training.update(n_iters=4, snapshot_freq=2, eval_freq=2, log_freq=2, n_jitted_steps=2)
  config.training.update(snapshot_freq_for_preemption=2, snapshot_sampling=False, batch_size=8)
  with monkeypatch.context() as on_cpus:
    on_cpus.setattr(Devices, 'platform', 'cpu')
    run_lib.train(config, str(tmp_path / 'plain'))
  for config.training.n_iters in (2, 4):
    run_lib.train(config, str(tmp_path / 'packed'))
  names = [
    sorted(path.name for path in (tmp_path / run).glob('checkpoints/4/default/*.*'))
    for run in ('plain', 'packed')
  ]
  assert names[0] == names[1]
  ends = [run_lib.load(str(tmp_path / run))[1] for run in ('plain', 'packed')]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *ends)
