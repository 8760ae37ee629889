"""Langevin dynamics with and without the Metropolis test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from controllable_generation import Known, Mask
from data import points
from data.points import Gaussian
from runtime.errors import UserError
from samplers.langevin import langevin_step, LangevinSampler, mala_state, mala_step
from sde_lib import VESDE

KEY = jax.random.key(0)
SDE = VESDE(1e-3, 2.0)  # next to no noise
VARIANCE = 0.5
DATA = Gaussian.of(jnp.zeros(2), VARIANCE * jnp.eye(2))


def check_variance(x, variance):
  """Within four standard errors of what n normal numbers have."""
  x = np.asarray(x).ravel()
  assert abs(x.var() / variance - 1) < 4 * np.sqrt(2 / len(x))


@pytest.mark.parametrize('h', [0.05, 0.3])
def test_the_bias_of_unadjusted_steps_is_known(h):
  """x' = (1 - h/v) x + sqrt(2 h) z has the variance 2 h / (1 - (1 - h/v)^2) = v / (1 - h/(2 v))."""
  sampler = LangevinSampler(SDE, 0.0, h, 200)
  x, nfe = sampler(KEY, DATA.score_fn(SDE), (5000, 2))
  assert nfe == 200
  check_variance(x, VARIANCE / (1 - h / (2 * VARIANCE)))


@pytest.mark.parametrize('h', [0.05, 0.3])
def test_adjusted_steps_have_no_bias(h):
  sampler = LangevinSampler(SDE, 0.0, h, 200, adjusted=True)
  x, nfe = sampler(KEY, DATA.score_fn(SDE), (5000, 2))
  assert nfe == 201  # one at the start
  check_variance(x, VARIANCE)


def test_small_steps_are_mostly_taken():
  x, t = DATA.sample(KEY, 4000), jnp.zeros(4000)
  score_fn = DATA.score_fn(SDE)
  state = mala_state(score_fn, x, t)
  shares = [float(mala_step(KEY, score_fn, state, t, h)[1].mean()) for h in (0.01, 0.3, 1.0)]
  assert shares[0] > 0.98 and 0.5 < shares[1] < shares[0] and shares[2] < shares[1]


def test_adjusted_steps_are_reversible():
  """p(x) k(x -> y) is symmetric: in equilibrium, moves over a point go both ways as often."""
  data = points.Mixture(jnp.array([0.3, 0.7]), jnp.array([[-1.0], [1.0]]), jnp.array([0.5, 0.4]))
  x = data.sample(KEY, 60_000)
  t, score_fn = jnp.zeros(len(x)), data.score_fn(SDE)
  (y, score, log_p), _ = mala_step(jax.random.key(1), score_fn, mala_state(score_fn, x, t), t, 0.4)
  np.testing.assert_allclose(score, score_fn(y, t), rtol=1e-5, atol=1e-5)  # of where it is now
  np.testing.assert_allclose(log_p, score_fn.log_density(y, t), rtol=1e-5, atol=1e-5)
  x, y = np.asarray(x)[:, 0], np.asarray(y)[:, 0]
  for between in (-0.8, 0.0, 0.9):
    up, down = ((x < between) & (y > between)).sum(), ((x > between) & (y < between)).sum()
    assert min(up, down) > 100 and abs(up - down) < 4 * np.sqrt(up + down)


def test_a_step_is_that_of_the_formula():
  x, score, z = jax.random.normal(KEY, (3, 4, 2))
  moved, mean = langevin_step(x, score, 0.2, z)
  np.testing.assert_allclose(mean, x + 0.2 * score, rtol=1e-6)
  np.testing.assert_allclose(moved, mean + np.sqrt(0.4) * z, rtol=1e-6)


def test_samples_are_watched_and_can_be_held():
  seen, known = [], Mask(jnp.array([1.0, 0.0]))
  y = jnp.broadcast_to(jnp.array([0.7, 0.0]), (6, 2))
  x, _ = LangevinSampler(SDE, 0.0, 0.05, 30)(
    KEY, DATA.score_fn(SDE), (6, 2), constraint=Known(y, known, SDE),
    observe=lambda fraction, x: seen.append((fraction, x)),
  )  # fmt: skip
  np.testing.assert_allclose(x[:, 0], 0.7, atol=5e-3)  # the noise at eps is 1e-3
  assert seen[-1][0] == 1.0 and len(seen) > 10 and float(x[:, 1].std()) > 0.1
  np.testing.assert_array_equal(seen[-1][1], x)


def test_what_the_metropolis_test_cannot_do_is_said():
  sampler = LangevinSampler(SDE, 0.0, 0.1, 3, adjusted=True)
  with pytest.raises(UserError, match='log-density'):
    sampler(KEY, lambda x, t: -x, (2, 2))
  with pytest.raises(UserError, match='takes no constraint'):
    sampler(KEY, DATA.score_fn(SDE), (2, 2), constraint=lambda rng, update, t: update)
  with pytest.raises(ValueError, match='above 0'):
    LangevinSampler(SDE, 0.0, 0.0, 3)
