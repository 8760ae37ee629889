"""What takes chance out of the tests: a score that is known exactly, and noise that is given."""

from collections.abc import Iterable, Iterator
import contextlib

import flax
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import pytest

from sde_lib import expand, SDE

FOUR = 4.0


@flax.struct.dataclass
class Mixture:
  """p(x_0) = sum_k weights[k] N(means[k], stds[k]^2 I), on data of any shape."""

  weights: Array  # [K]
  means: Array  # [K, ...]
  stds: Array  # [K]

  def score_fn(self, sde: SDE) -> 'Score':
    """The score of the data after diffusion by `sde`."""
    return Score(self, sde)

  def mean(self) -> np.ndarray:
    """The mean [...] of the data."""
    return np.tensordot(np.asarray(self.weights), np.asarray(self.means), 1)

  def cov(self) -> np.ndarray:
    """The covariance [D, D] of the data, flattened."""
    weights, stds = np.asarray(self.weights), np.asarray(self.stds)
    means = np.asarray(self.means).reshape(len(weights), -1)
    centred = means - weights @ means
    return (weights * centred.T) @ centred + (weights @ stds**2) * np.eye(means.shape[1])


@flax.struct.dataclass
class Score:
  """grad_x log p_t(x) of a mixture; a pytree of the mixture's arrays."""

  data: Mixture
  sde: SDE = flax.struct.field(pytree_node=False)

  def __call__(self, x: Array, t: Array) -> Array:
    alpha, sigma = self.sde.alpha(t)[:, None], self.sde.sigma(t)[:, None]
    variance = (alpha * self.data.stds) ** 2 + sigma**2  # [B, K]
    away = expand(alpha, x[:, None]) * self.data.means - x[:, None]  # [B, K, ...]
    squares = jnp.square(away).reshape(*away.shape[:2], -1)
    logits = jnp.log(self.data.weights) - 0.5 * squares.shape[-1] * jnp.log(variance)
    share = jax.nn.softmax(logits - 0.5 * squares.sum(-1) / variance)  # p(k | x_t = x)
    return (expand(share / variance, away) * away).sum(1)


@flax.struct.dataclass
class Gaussian:
  """N(mean, cov) on data of any shape, with any covariance of the D flattened dimensions."""

  mu: Array  # [...]
  sigma: Array  # [D, D]
  weights = (1.0,)  # it is a mixture of one

  def score_fn(self, sde: SDE) -> 'GaussianScore':
    """The score of the data after diffusion by `sde`."""
    return GaussianScore(self.mu, *jnp.linalg.eigh(self.sigma), sde)

  def mean(self) -> np.ndarray:
    return np.asarray(self.mu)

  def cov(self) -> np.ndarray:
    return np.asarray(self.sigma)

  def given(self, matrix: np.ndarray, y: np.ndarray, noise_std: float) -> 'Gaussian':
    """The data where matrix [D, D] times x plus noise was measured to be y, of the data's shape."""
    cov, away = np.float64(self.sigma), np.float64(y).ravel() - matrix @ np.float64(self.mu).ravel()
    measured = matrix @ cov @ matrix.T + noise_std**2 * np.eye(len(cov))
    gain = cov @ matrix.T @ np.linalg.pinv(measured, hermitian=True, rcond=1e-9)
    mu = self.mu + (gain @ away).reshape(self.mu.shape)
    return Gaussian(jnp.float32(mu), jnp.float32(cov - gain @ matrix @ cov))


@flax.struct.dataclass
class GaussianScore:
  """grad_x log p_t(x) of a Gaussian; a pytree of its arrays."""

  mu: Array  # [...]
  variances: Array  # [D], along the directions
  directions: Array  # [D, D]
  sde: SDE = flax.struct.field(pytree_node=False)

  def __call__(self, x: Array, t: Array) -> Array:
    alpha, sigma = self.sde.alpha(t)[:, None], self.sde.sigma(t)[:, None]
    away = (x - expand(alpha[:, 0], x) * self.mu).reshape(x.shape[0], -1) @ self.directions
    along = away / (alpha**2 * self.variances + sigma**2)
    return -(along @ self.directions.T).reshape(x.shape)


TWO_MODES = Mixture(
  weights=jnp.array([0.3, 0.7]),
  means=jnp.array([[1.0, 0.5], [-0.6, -0.4]]),
  stds=jnp.array([0.35, 0.25]),
)


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


def check_moments(x: Array, data: Mixture, bias: float) -> None:
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
  if len(data.weights) > 1:
    share = first_mode(data, x)
    error = np.abs(share.mean() - np.asarray(data.weights)[0])
    assert error <= FOUR * share.std() / root + bias


def first_mode(data: Mixture, x: np.ndarray) -> np.ndarray:
  """p(k = 0 | x_0 = x) [B]."""
  weights, means, stds = (np.asarray(v, np.float64) for v in (data.weights, data.means, data.stds))
  squares = np.square(x[:, None] - means).sum(-1)
  log_odds = np.log(weights) - x.shape[1] * np.log(stds) - squares / 2 / stds**2
  return 1 / (1 + np.exp(log_odds[:, 1] - log_odds[:, 0]))
