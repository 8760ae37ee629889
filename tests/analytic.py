"""What takes chance out of the tests: a score that is known exactly, and noise that is given."""

from collections.abc import Iterable, Iterator
import contextlib

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import pytest

from data.points import Gaussian, Mixture
from sde_lib import SDE

FOUR = 4.0


TWO_MODES = Mixture(
  weights=jnp.array([0.3, 0.7]),
  means=jnp.array([[1.0, 0.5], [-0.6, -0.4]]),
  stds=jnp.array([0.35, 0.25]),
)


def given(data: Gaussian, matrix: np.ndarray, y: np.ndarray, noise_std: float) -> Gaussian:
  """The data where matrix [D, D] times x plus noise was measured to be y, of the data's shape."""
  cov, away = np.float64(data.cov()), np.float64(y).ravel() - matrix @ np.float64(data.mu).ravel()
  measured = matrix @ cov @ matrix.T + noise_std**2 * np.eye(len(cov))
  gain = cov @ matrix.T @ np.linalg.pinv(measured, hermitian=True, rcond=1e-9)
  mu = data.mu + (gain @ away).reshape(data.mu.shape)
  return Gaussian.of(jnp.float32(mu), jnp.float32(cov - gain @ matrix @ cov))


def gaussian(mean: Array, std: float) -> Mixture:
  """A single Gaussian N(mean, std^2 I)."""
  return Mixture(jnp.ones(1), jnp.asarray(mean)[None], jnp.asarray([std]))


def moments(sde: SDE, mean: float, std: float, t: Array) -> tuple[Array, Array]:
  """Mean and variance of p_t for data N(mean, std^2)."""
  alpha, sigma = sde.alpha(t), sde.sigma(t)
  return alpha * mean, (alpha * std) ** 2 + sigma**2


@contextlib.contextmanager
def given_noise(arrays: Iterable[Array]) -> Iterator[list[Array]]:
  """Lets `jax.random.normal` hand out the arrays, in order; yields those not yet used.

  Nothing is compiled meanwhile, so every draw of a program takes the next array.
  """
  rest = list(arrays)

  def normal(key, shape=(), dtype=None):
    z = rest.pop(0)
    assert z.shape == tuple(shape), f'a draw of {shape} where the noise is {z.shape}'
    return z

  with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
    patch.setattr(jax.random, 'normal', normal)
    yield rest


def check_moments(x: Array, data: Mixture | Gaussian, bias: float) -> None:
  """Mean, covariance and weight of the first mode, with biases relative to their natural scales.

  These are the standard deviation for means, the largest variance for covariances, 1 for weights.
  On top of the bias come FOUR standard errors of the Monte-Carlo estimate.
  """
  x = np.asarray(x, np.float64)
  cov, root = data.cov(), np.sqrt(len(x))
  away = x - data.mean()
  np.testing.assert_array_less(
    np.abs(away.mean(0)), FOUR * away.std(0) / root + bias * np.sqrt(cov.max())
  )
  products = away[:, :, None] * away[:, None]
  error = np.abs(products.mean(0) - cov)
  np.testing.assert_array_less(error, FOUR * products.std(0) / root + bias * cov.max())
  if isinstance(data, Mixture) and len(data.weights) > 1:
    share = first_mode(data, x)
    error = np.abs(share.mean() - np.asarray(data.weights)[0])
    assert error <= FOUR * share.std() / root + bias


def first_mode(data: Mixture, x: np.ndarray) -> np.ndarray:
  """p(k = 0 | x_0 = x) [B]."""
  weights, means, stds = (np.asarray(v, np.float64) for v in (data.weights, data.means, data.stds))
  squares = np.square(x[:, None] - means).sum(-1)
  log_odds = np.log(weights) - x.shape[1] * np.log(stds) - squares / 2 / stds**2
  return 1 / (1 + np.exp(log_odds[:, 1] - log_odds[:, 0]))
