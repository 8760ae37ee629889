"""One training step: the moving average, and steps that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from builders.setup import build
from builders.training import score_task
from configs.toy import two_moons
from training.averages import WarmingRate
from training.step import finite_step, moved_average, optimize, TrainState


def test_moving_average_warms_up():
  """Its rate is (1 + n) / (10 + n) at step n = 1, 2, ..., or ema_rate where that is less."""
  setup = build(two_moons.get_config('ve'))  # any network will do
  state = jax.jit(lambda: score_task(setup).init(setup.keys.key('init')))()
  state = state.replace(step=jnp.int32(7))
  x0 = jnp.zeros((4, 2))
  new, _ = jax.jit(
    lambda state: optimize(
      state, x0, jnp.full(4, 0.5), x0 + 1, jax.random.key(0),
      model=setup.model, objective=setup.objective, tx=setup.tx, averages=(WarmingRate(0.9),),
    )
  )(state)  # fmt: skip
  jax.tree.map(
    lambda e, old, p: np.testing.assert_allclose(e, 0.5 * old + 0.5 * p, rtol=1e-5, atol=1e-7),
    new.ema_params,
    state.ema_params,
    new.params,
  )


def test_a_moving_average_of_100_000_steps_keeps_its_scale():
  """It is compared with float64; a constant, as the Fourier frequencies are, stays to the bit."""
  rate, n = 0.9999, 100_000
  constant = jnp.array([-51.7, 0.1, 1.0, 1.3e-8, 7.3], jnp.float32)
  values = 1.3 + 0.01 * np.random.default_rng(0).standard_normal(n).astype(np.float32)

  @jax.jit
  def averages(values):
    def step(average, value):
      return moved_average(average, {'W': constant, 'w': value}, 1 - rate), None

    return jax.lax.scan(step, {'W': constant, 'w': jnp.float32(0.4)}, values)[0]

  found = averages(values)
  expected = 0.4 * rate**n + (1 - rate) * (rate ** np.arange(n - 1.0, -1, -1) @ values)
  assert abs(found['w'] / expected - 1) < 5e-6  # weights that do not sum to 1: 1.7e-4
  np.testing.assert_array_equal(found['W'], constant)


@pytest.mark.parametrize('rate', [0.0, 0.5, 0.999])
def test_the_average_of_a_rate_of_0_is_the_parameters(rate):
  average, params = jnp.array([1e8, -3.0, 0.1]), jnp.array([0.3, 0.7, 1e-9])
  moved = moved_average(average, params, 1 - rate)
  if rate == 0:
    np.testing.assert_array_equal(moved, params)
  np.testing.assert_allclose(moved, rate * average + (1 - rate) * params, rtol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_but_their_number():
  def update(state, frozen, batch, rng):
    one = batch['data']
    step = state.replace(step=state.step + 1, params=state.params + 1 / one, opt_state=one)
    return step, {'loss': 1 / one, 'grad_norm': one}

  one = jnp.ones(())
  state = TrainState(jnp.int32(3), one, (one,), one)
  taken, measured = finite_step(update, state, None, {'data': 2 * one}, jax.random.key(0))
  assert measured['skipped'] == 0 and (taken.step, taken.params, taken.opt_state) == (4, 1.5, 2)
  for value in (0 * one, jnp.inf * one):
    left, measured = finite_step(update, state, None, {'data': value}, jax.random.key(0))
    assert measured['skipped'] == 1 and (left.step, left.params, left.opt_state) == (4, 1, 1)
