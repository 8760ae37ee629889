"""NCSNv2's choice of noise levels and of steps for given data (Song & Ermon 2020).

Techniques 1, 2 and 4 of https://arxiv.org/abs/2006.09011; the third is the conditioning of its
networks on sigma, the fifth a moving average of the parameters (config.model.ema_rate).
"""

import dataclasses
import math

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from runtime.errors import UserError

BLOCK = 1000  # rows whose distances are computed at a time


@dataclasses.dataclass(frozen=True)
class NoiseScales:
  """What NCSNv2 recommends for data.

  Attributes:
    sigma_max: the largest noise level.
    sigma_min: the smallest.
    ratio: gamma, of neighbouring noise levels.
    num_scales: how many levels there are.
    epsilon: the step size of annealed Langevin dynamics at sigma_min.
    snr: the same for `sampling.AnnealedLangevin`, whose steps are 2 (snr sigma)^2.
  """

  sigma_max: float
  sigma_min: float
  ratio: float
  num_scales: int
  epsilon: float
  snr: float


def recommend(x: np.ndarray, sigma_min: float = 0.01, n_steps: int = 5) -> NoiseScales:
  """The noise levels for data x [n, ...], and the step for `n_steps` Langevin steps at each.

  Raises:
    UserError: if no two of the data are further apart than sigma_min.
  """
  dim = math.prod(x.shape[1:])
  sigma_max = largest_distance(x)
  if sigma_max <= sigma_min:
    raise UserError(
      f'the largest distance between two of {len(x)} examples is {sigma_max:.4g}, not above '
      f'config.model.sigma_min = {sigma_min:g}; noise levels take data that differ'
    )
  n = num_scales(sigma_max, sigma_min, geometric_ratio(dim))
  ratio = (sigma_max / sigma_min) ** (1 / (n - 1))
  epsilon = step_size(sigma_min, ratio, n_steps)
  snr = math.sqrt(epsilon / 2) / sigma_min
  return NoiseScales(sigma_max, sigma_min, ratio, n, epsilon, snr)


def largest_distance(x: np.ndarray) -> float:
  """The largest Euclidean distance between two points of x [n, ...] (Technique 1).

  With so much noise, samples can get from any point of the data to any other.
  """
  flat = np.asarray(x, np.float32).reshape(len(x), -1)
  flat = flat - flat.mean(0)  # squares of what is small lose fewer digits
  blocks = [flat[i : i + BLOCK] for i in range(0, len(flat), BLOCK)]
  squares = [_largest_square(u, v) for i, u in enumerate(blocks) for v in blocks[: i + 1]]
  return float(np.sqrt(max(squares)))


@jax.jit
def _largest_square(u: Array, v: Array) -> Array:
  products = jnp.matmul(u, v.T, precision='highest')
  squares = jnp.square(u).sum(1)[:, None] - 2 * products + jnp.square(v).sum(1)
  return jnp.maximum(squares, 0.0).max()


def geometric_ratio(dim: int) -> float:
  """gamma with Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma) = 0.5.

  Then the norms of noise at a level are often typical of the level below (Technique 2). At most 2:
  in few dimensions any ratio would do.
  """

  def overlap(ratio: float) -> float:
    away = math.sqrt(2 * dim) * (ratio - 1)
    return _phi(away + 3 * ratio) - _phi(away - 3 * ratio)

  low, high = 1.0, 2.0
  for _ in range(60):  # the overlap falls as the ratio grows
    middle = (low + high) / 2
    low, high = (middle, high) if overlap(middle) > 0.5 else (low, middle)
  return high


def num_scales(sigma_max: float, sigma_min: float, ratio: float) -> int:
  """How many levels of a geometric sequence, at least 2, are at most a factor `ratio` apart."""
  return max(2, 1 + math.ceil(math.log(sigma_max / sigma_min) / math.log(ratio)))


def variance_ratio(
  epsilon: float | np.ndarray, sigma_min: float, ratio: float, n_steps: int
) -> float | np.ndarray:
  """s_T^2 / sigma_i^2, the variance that n_steps = T steps leave at a level, beside its own.

  They begin with samples of the level above, with the variance gamma^2 sigma_i^2 (Proposition 3):

    (1 - e)^(2 T) (gamma^2 - 2 e / (1 - (1 - e)^2)) + 2 e / (1 - (1 - e)^2),
    e = epsilon / sigma_min^2.
  """
  e = epsilon / sigma_min**2
  rest = 2 / (2 - e)  # 2 e / (1 - (1 - e)^2)
  return (1 - e) ** (2 * n_steps) * (ratio**2 - rest) + rest


def step_size(sigma_min: float, ratio: float, n_steps: int) -> float:
  """The smallest epsilon that makes `variance_ratio` 1, or comes nearest to that (Technique 4)."""
  e = np.geomspace(1e-6, 1.0, 100_001)
  away = np.abs(variance_ratio(e * sigma_min**2, sigma_min, ratio, n_steps) - 1)
  return float(e[np.argmin(away)]) * sigma_min**2


def _phi(x: float) -> float:
  """The standard normal distribution function."""
  return 0.5 * math.erfc(-x / math.sqrt(2))
