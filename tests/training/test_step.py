"""One training step: the moving average, and steps that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np

from builders.setup import build
from builders.training import score_task
from configs.toy import two_moons
from training.step import finite_step, optimize, TrainState


def test_moving_average_warms_up():
  """Its rate is (1 + n) / (10 + n) at step n = 1, 2, ..., or ema_rate where that is less."""
  setup = build(two_moons.get_config('ve'))  # any network will do
  state = jax.jit(lambda: score_task(setup).init(setup.keys.key('init')))()
  state = state.replace(step=jnp.int32(7))
  x0 = jnp.zeros((4, 2))
  new, _ = jax.jit(
    lambda state: optimize(
      state, x0, jnp.full(4, 0.5), x0 + 1, jax.random.key(0),
      model=setup.model, objective=setup.objective, tx=setup.tx, ema_rate=0.9, ema_warmup=True,
    )
  )(state)  # fmt: skip
  jax.tree.map(
    lambda e, old, p: np.testing.assert_allclose(e, 0.5 * old + 0.5 * p, rtol=1e-5, atol=1e-7),
    new.ema_params,
    state.ema_params,
    new.params,
  )


def test_a_step_that_is_not_finite_changes_nothing_but_their_number():
  def update(state, frozen, batch, rng):
    step = state.replace(step=state.step + 1, params=state.params + 1 / batch, opt_state=batch)
    return step, {'loss': 1 / batch, 'grad_norm': batch}

  one = jnp.ones(())
  state = TrainState(jnp.int32(3), one, (one,), one)
  taken, measured = finite_step(update, state, None, 2 * one, None)
  assert measured['skipped'] == 0 and (taken.step, taken.params, taken.opt_state) == (4, 1.5, 2)
  for batch in (0 * one, jnp.inf * one):
    left, measured = finite_step(update, state, None, batch, None)
    assert measured['skipped'] == 1 and (left.step, left.params, left.opt_state) == (4, 1, 1)
