"""Moving averages: each against its sum written out; one that was not kept, from others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from builders.setup import build
from builders.training import make_averages, score_task
from configs.toy import two_moons
from runtime.errors import UserError
from training.averages import (
  Average,
  combination,
  ConstantRate,
  gamma_of,
  HalfLife,
  Power,
  WarmingRate,
)  # fmt: skip
from training.step import apply_gradients, moved_average, TrainState

N = 400
# A run's parameters [N, 3]: one that still moves, one that oscillates, one of noise.
STEPS = np.arange(1, N + 1)
TRAJECTORY = np.stack(
  [
    np.exp(-STEPS / 60),
    np.cos(STEPS / 40),
    1 + 0.3 * np.random.default_rng(0).standard_normal(N),
  ],
  axis=1,
).astype(np.float32)


def run(way: Average, values: np.ndarray) -> np.ndarray:
  """The average after each of the steps, from parameters that are far away before the first."""

  def step(average, at):
    n, value = at
    average = moved_average(average, value, way.weight(n))
    return average, average

  start = jnp.full(values.shape[1:], 7.0)
  return np.asarray(jax.lax.scan(step, start, (jnp.arange(1, len(values) + 1), values))[1])


@pytest.mark.parametrize(
  ('way', 'beta'),
  [
    (ConstantRate(0.9), lambda n: np.full(n.shape, 0.9)),
    (WarmingRate(0.9), lambda n: np.minimum(0.9, (1 + n) / (10 + n))),
    (HalfLife(640.0, 32, ramp_up=0), lambda n: np.full(n.shape, 0.5 ** (32 / 640))),
    (
      HalfLife(640.0, 32),
      lambda n: 0.5 ** (32 / np.maximum(np.minimum(640, 0.05 * 32 * (n - 1)), 1e-6)),
    ),
    (Power(0.1), lambda n: (1 - 1 / n) ** (gamma_of(0.1) + 1)),
    (Power(0.28), lambda n: (1 - 1 / n) ** (gamma_of(0.28) + 1)),
  ],
  ids=['constant', 'warming', 'half-life', 'ramp-up', 'power 0.1', 'power 0.28'],
)
def test_each_average_is_its_sum_written_out(way, beta):
  expected = np.full(3, 7.0)
  rates = beta(STEPS.astype(np.float64))
  for kept, value in zip(rates, TRAJECTORY.astype(np.float64), strict=True):
    expected = kept * expected + (1 - kept) * value
  np.testing.assert_allclose(run(way, TRAJECTORY)[-1], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('way', [HalfLife(640.0, 32), Power(0.05), Power(0.2)], ids=str)
def test_nothing_is_left_of_what_was_drawn_before_the_first_step(way):
  np.testing.assert_array_equal(run(way, TRAJECTORY)[0], TRAJECTORY[0])


def test_a_half_life_is_one():
  """What stood still until the last h images counts half."""
  values = np.repeat([[1.0], [0.0]], [N - 20, 20], axis=0).astype(np.float32)
  np.testing.assert_allclose(run(HalfLife(640.0, 32, 0), values)[-1], 0.5, rtol=1e-4)


@pytest.mark.parametrize('sigma_rel', [0.01, 0.05, 0.1, 0.15, 0.28])
def test_a_power_function_is_as_wide_as_it_says(sigma_rel):
  """The standard deviation of m / n under the weights m^gamma."""
  n = 1_000_000
  m = (np.arange(n) + 0.5) / n
  weights = m ** gamma_of(sigma_rel)
  weights /= weights.sum()
  width = np.sqrt(weights @ m**2 - (weights @ m) ** 2)
  np.testing.assert_allclose(width, sigma_rel, rtol=1e-6)


def test_known_exponents():
  """Those that the paper gives (Sec. 3.1)."""
  np.testing.assert_allclose([gamma_of(0.05), gamma_of(0.10)], [16.97, 6.94], atol=5e-3)


@pytest.mark.parametrize('sigma_rel', [0.0, -0.1, 0.29, 5.0])
def test_other_widths_are_refused(sigma_rel):
  with pytest.raises(ValueError, match=r'above 0 and below 0\.2887'):
    Power(sigma_rel)


def trajectory_averages(every: int) -> tuple[list[tuple[int, float]], np.ndarray]:
  """What a run keeps that takes snapshots of two averages: which they are, and what they are."""
  sigma_rels = (0.05, 0.10)
  runs = [run(Power(sigma_rel), TRAJECTORY) for sigma_rel in sigma_rels]
  kept = [(n, sigma_rel) for n in range(every, N + 1, every) for sigma_rel in sigma_rels]
  values = [runs[sigma_rels.index(sigma_rel)][n - 1] for n, sigma_rel in kept]
  return kept, np.stack(values)


@pytest.mark.parametrize('wanted', [0.03, 0.05, 0.075, 0.10, 0.15, 0.2])
def test_an_average_that_was_never_kept_is_solved_for(wanted):
  kept, values = trajectory_averages(every=10)
  coefficients, left = combination(kept, wanted, N)
  directly = run(Power(wanted), TRAJECTORY)[-1]
  assert left < 0.02 and abs(coefficients.sum() - 1) < 1e-12
  np.testing.assert_allclose(coefficients @ values, directly, atol=1e-3)


def test_few_snapshots_leave_an_error_that_is_told():
  kept, _ = trajectory_averages(every=N)
  assert combination(kept, 0.05, N)[1] < 1e-6  # it is there
  assert combination(kept, 0.2, N)[1] > 0.05


def test_a_state_has_as_many_averages_as_its_config():
  config = two_moons.get_config('ve')
  config.ema.half_life, config.ema.sigma_rels = 5e5, (0.05, 0.1)
  setup = build(config)
  ways = make_averages(setup.config)
  assert ways == (HalfLife(5e5, config.training.batch_size, 0.05), Power(0.05), Power(0.1))
  state = jax.eval_shape(lambda: score_task(setup).init(jax.random.key(0)))
  assert len(state.averages) == 3
  config.ema.sigma_rels = (0.4,)
  with pytest.raises(UserError, match=r'config\.ema\.sigma_rels.*got 0\.4'):
    score_task(build(config))


def test_each_average_moves_in_its_way():
  one = {'w': jnp.ones(2)}
  state = TrainState(jnp.int32(9), one, (one, one), ())
  away = {'w': jnp.full(2, 3.0)}

  def jump(grads, opt_state, params):  # an optimiser that sets the parameters to 3
    return jax.tree.map(lambda new, old: new - old, away, params), opt_state

  def differentiate(params):
    return (jnp.float32(0), {}), params

  tx = optax.GradientTransformation(lambda params: (), jump)
  new, _ = apply_gradients(state, differentiate, tx, (ConstantRate(0.75), Power(0.1)))
  np.testing.assert_allclose(new.averages[0]['w'], 1.5)
  share = 1 - 0.9 ** (gamma_of(0.1) + 1)  # of step 10
  np.testing.assert_allclose(new.averages[1]['w'], 1 + 2 * share, rtol=1e-5)
