"""The techniques of NCSNv2, against what they claim and against its published choices."""

import math

import jax
import numpy as np
import pytest

from data.noise_scales import (
  BLOCK,
  geometric_ratio,
  largest_distance,
  num_scales,
  recommend,
  step_size,
  variance_ratio,
)
from runtime.errors import UserError


def test_the_largest_distance_is_that_of_all_pairs():
  """Also over blocks, and far from the origin, where squares cancel."""
  x = 100 + np.random.RandomState(0).normal(size=(BLOCK + 50, 2, 3)).astype(np.float32)
  flat = x.reshape(len(x), -1).astype(np.float64)
  pairs = [np.linalg.norm(flat - point, axis=1).max() for point in flat]
  np.testing.assert_allclose(largest_distance(x), max(pairs), rtol=1e-5)


@pytest.mark.parametrize('dim', [64, 3072])
def test_half_of_the_noise_is_typical_of_the_level_below(dim):
  """Norms of N(0, (gamma sigma)^2 I) within 3 standard deviations, sigma / sqrt(2), of the level's.

  Proposition 2 approximates norms by a Gaussian of that width and takes gamma's own width there.
  """
  ratio = geometric_ratio(dim)
  norm = np.linalg.norm(np.random.RandomState(0).normal(size=(4000, dim)), axis=1)
  band = np.abs(norm * ratio - math.sqrt(dim)) < 3 * ratio / math.sqrt(2)
  # 50 % but for the asymmetry of norms, which falls as 1 / sqrt(dim), and 0.8 % of chance.
  assert abs(band.mean() - 0.5) < 0.032 + 0.5 / math.sqrt(dim)


@pytest.mark.parametrize(
  ('pixels', 'sigma_max', 'levels', 'n_steps', 'epsilon'),
  [(32, 50, 232, 5, 6.2e-6), (64, 90, 500, 5, 3.3e-6), (128, 190, 1086, 3, 1.8e-6)],
  ids=['CIFAR-10', 'CelebA', 'bedroom'],
)
def test_the_published_choices_are_near(pixels, sigma_max, levels, n_steps, epsilon):
  """Their numbers of levels are those of an overlap of 0.567, not 0.5; ours are 6 % fewer."""
  dim = 3 * pixels**2
  ours = num_scales(sigma_max, 0.01, geometric_ratio(dim))
  assert abs(ours / levels - 1) < 0.07
  ratio = (sigma_max / 0.01) ** (1 / (levels - 1))
  np.testing.assert_allclose(step_size(0.01, ratio, n_steps), epsilon, rtol=0.03)


@pytest.mark.parametrize('n_steps', [1, 5, 100])
def test_the_variance_is_that_of_langevin_dynamics(n_steps):
  """On data at a point, whose score at a level is -x / sigma^2: the dynamics is linear."""
  sigma_min, ratio, sigma = 0.01, 1.3, 0.7
  epsilon = 0.1 * sigma_min**2
  step = epsilon * (sigma / sigma_min) ** 2
  variance = (ratio * sigma) ** 2
  for _ in range(n_steps):
    variance = (1 - step / sigma**2) ** 2 * variance + 2 * step
  found = variance_ratio(epsilon, sigma_min, ratio, n_steps)
  np.testing.assert_allclose(found, variance / sigma**2, rtol=1e-9)


def test_the_step_size_is_the_best():
  best = step_size(0.02, 1.05, 5)
  away = [abs(variance_ratio(f * best, 0.02, 1.05, 5) - 1) for f in (0.9, 1.0, 1.1)]
  assert away[1] < away[0] and away[1] < away[2]


def test_data_that_do_not_differ_are_told():
  with pytest.raises(UserError, match=r'distance between two of 3 examples is 0, not above'):
    recommend(np.ones((3, 4)))


def test_a_recommendation_holds_together():
  x = np.asarray(jax.random.uniform(jax.random.key(0), (300, 8, 8, 1)))
  choice = recommend(x, sigma_min=0.02, n_steps=3)
  assert choice.sigma_max == largest_distance(x) and choice.ratio <= geometric_ratio(64)
  reached = choice.sigma_min * choice.ratio ** (choice.num_scales - 1)
  np.testing.assert_allclose(reached, choice.sigma_max, rtol=1e-6)
  # A step 2 (snr sigma)^2 at sigma_min is epsilon.
  np.testing.assert_allclose(2 * (choice.snr * 0.02) ** 2, choice.epsilon, rtol=1e-6)
