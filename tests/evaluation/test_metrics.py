"""Distances between sets of features: closed forms, brute force, and what must not matter."""

import math

import jax
import numpy as np
import pytest

from evaluation import metrics
from evaluation.metrics import Moments
from runtime.errors import UserError

MESH = jax.sharding.Mesh(np.array(jax.devices()), ('data',))


def normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape)


def test_moments_do_not_depend_on_how_the_features_are_split():
  """Also where the mean is a million standard deviations from zero."""
  x = normal(0, 1000, 7) @ normal(1, 7, 7) + 1e6
  for cuts in ([], [1], [500], [1, 2, 990]):
    first, *rest = (Moments.of(part) for part in np.split(x, cuts))
    total = sum(rest, first)
    assert total.n == 1000
    np.testing.assert_allclose(total.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(total.cov, np.cov(x.T), rtol=1e-8, atol=1e-8)


def random_cov(seed: int, d: int, rank: int) -> np.ndarray:
  half = normal(seed, d, rank)
  return half @ half.T


def frechet(mean1, cov1, mean2, cov2) -> float:
  return metrics.frechet_distance(*map(np.asarray, (mean1, cov1, mean2, cov2)))


def test_the_frechet_distance_of_gaussians_that_commute():
  """|m1 - m2|^2 + sum (s1 - s2)^2 along common axes of standard deviations s1 and s2."""
  axes, _ = np.linalg.qr(normal(0, 5, 5))
  s1, s2 = np.array([1.0, 2.0, 0.5, 0.0, 3.0]), np.array([0.5, 2.0, 0.0, 1.0, 1e-6])
  found = frechet(np.zeros(5), (axes * s1**2) @ axes.T, np.ones(5), (axes * s2**2) @ axes.T)
  assert found == pytest.approx(5 + ((s1 - s2) ** 2).sum(), rel=1e-7)


@pytest.mark.parametrize('rank', [1, 10, 60])
def test_the_frechet_distance_is_one(rank):
  """Zero from itself, symmetric, and the triangle holds for its root; also for singular ones."""
  d = 60
  gaussians = [(normal(10 + i, d), random_cov(i, d, rank)) for i in range(3)]
  scale = d * rank
  assert abs(frechet(*gaussians[0], *gaussians[0])) < 1e-9 * scale
  there, back = frechet(*gaussians[0], *gaussians[1]), frechet(*gaussians[1], *gaussians[0])
  assert there == pytest.approx(back, rel=1e-9)
  via = [math.sqrt(frechet(*gaussians[i], *gaussians[j])) for i, j in ((0, 2), (2, 1))]
  assert math.sqrt(there) <= sum(via)


def test_the_frechet_distance_does_not_see_rotations():
  turn, _ = np.linalg.qr(normal(5, 8, 8))
  (m1, c1), (m2, c2) = ((normal(i, 8), random_cov(i, 8, 8)) for i in (0, 1))
  turned = frechet(turn @ m1, turn @ c1 @ turn.T, turn @ m2, turn @ c2 @ turn.T)
  assert frechet(m1, c1, m2, c2) == pytest.approx(turned, rel=1e-9)


def test_the_inception_score_of_sure_and_of_unsure_guesses():
  """K classes, each as often and sure: K. All rows alike: 1. Sure of one class a part: 1, too."""
  sure = 1e3 * np.eye(5)[np.arange(100) % 5]
  assert metrics.inception_score(sure) == pytest.approx((5, 0))
  assert metrics.inception_score(np.tile(normal(0, 5), (100, 1))) == pytest.approx((1, 0))
  in_order = sure[np.argsort(np.arange(100) % 5, kind='stable')]
  assert metrics.inception_score(in_order, splits=5) == pytest.approx((1, 0))
  with pytest.raises(UserError, match='at least 10 samples; got 9'):
    metrics.inception_score(sure[:9])


def test_the_inception_score_is_the_information_about_the_class():
  """exp of H(y) - E H(y | x), here for p(y | x) = (q, 1 - q) or (1 - q, q), equally often."""
  q = 0.9
  logits = np.log([[q, 1 - q], [1 - q, q]] * 50)
  expected = math.exp(math.log(2) + q * math.log(q) + (1 - q) * math.log(1 - q))
  assert metrics.inception_score(logits)[0] == pytest.approx(expected)


def test_the_kernel_distance_is_unbiased():
  """In one dimension the kernel's mean is a sum over moments, which normals have in closed form."""

  def moments(mean: float, std: float) -> list[float]:
    return [1, mean, mean**2 + std**2, mean**3 + 3 * mean * std**2]

  binomials, n = [1, 3, 3, 1], 4
  differences = np.subtract(moments(0.3, 1.2), moments(0, 1))
  expected = (np.array(binomials) * differences**2).sum()
  found = [
    metrics.kernel_distance(0.3 + 1.2 * normal(2 * i, n, 1), normal(2 * i + 1, n, 1), 1)[0]
    for i in range(3000)
  ]
  error = np.std(found) / math.sqrt(len(found))
  # With the diagonals there would be E k(x, x) / n and E k(y, y) / n more.
  squares = np.stack([0.3 + 1.2 * normal(0, 100_000), normal(1, 100_000)]) ** 2
  bias = ((squares + 1) ** 3).mean(1).sum() / n
  assert abs(np.mean(found) - expected) < 4 * error < bias / 2


def test_the_kernel_distance_by_hand():
  x, y = normal(0, 6, 3), normal(1, 6, 3) + 0.5

  def kernel(a: np.ndarray, b: np.ndarray) -> float:
    return (a @ b / 3 + 1) ** 3

  pairs = [(i, j) for i in range(6) for j in range(6)]
  within = [kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j]
  expected = np.mean(within) - 2 * np.mean([kernel(x[i], y[j]) for i, j in pairs])
  value, spread = metrics.kernel_distance(x, y, subsets=3)
  assert value == pytest.approx(expected) and spread < 1e-12


def brute_force(x: np.ndarray, y: np.ndarray, k: int) -> float:
  """The share of x in the union of balls around y."""
  apart = np.linalg.norm(y[:, None] - y, axis=-1)
  radius = np.sort(apart, axis=1)[:, k]
  return (np.linalg.norm(x[:, None] - y, axis=-1) <= radius).any(1).mean()


@pytest.mark.parametrize(('n', 'm'), [(700, 300), (50, 1100)])
def test_precision_and_recall_by_brute_force(n, m):
  """For numbers of rows below and above what is compared at once."""
  samples, data = 0.8 * normal(0, n, 4), normal(1, m, 4) + 100
  samples += 100.3
  for k in (1, 3):
    found = metrics.precision_recall(samples, data, MESH, k)
    np.testing.assert_allclose(
      found, [brute_force(samples, data, k), brute_force(data, samples, k)]
    )
  with pytest.raises(UserError, match='more than 50 samples and images'):
    metrics.precision_recall(samples[:50], data, MESH, 50)


def test_precision_and_recall_of_what_is_left_out_and_what_is_made_up():
  ring = np.stack(
    [np.cos(np.arange(400) * math.tau / 400), np.sin(np.arange(400) * math.tau / 400)], 1
  )
  half, elsewhere = ring[:200], ring + 10
  assert metrics.precision_recall(ring, ring, MESH) == (1, 1)
  precision, recall = metrics.precision_recall(half, ring, MESH)
  assert precision == 1 and recall == pytest.approx(0.5, abs=0.02)
  assert metrics.precision_recall(elsewhere, ring, MESH) == (0, 0)
