"""Moving averages of the parameters: how much of the parameters each step takes in.

After step n = 1, 2, ... an average is beta a + (1 - beta) theta. The ways differ in beta:

  ConstantRate  beta = rate, as in the released code
  WarmingRate   beta = min(rate, (1 + n) / (10 + n)), for short runs
  HalfLife      beta = 2^(-B / h) after steps of B images: what is h images old counts half
                (EDM, Karras et al. 2022, https://arxiv.org/abs/2206.00364, Appendix F.1)
  Power         beta = (1 - 1 / n)^(gamma + 1): theta_m counts as m^gamma, so that the average is
                always as wide as the same part of training, sigma_rel
                (EDM2, Karras et al. 2023, https://arxiv.org/abs/2312.02696, Sec. 3.1)

Averages of power functions at a few sigma_rel, kept at snapshots, tell any other one afterwards:
`combination` (Sec. 3.2).
"""

import abc
from collections.abc import Sequence
import dataclasses
import math

from jax import Array
import jax.numpy as jnp
import numpy as np

WIDEST = 1 / math.sqrt(12)  # the sigma_rel of gamma = 0, where all steps count the same


@dataclasses.dataclass(frozen=True)
class Average(abc.ABC):
  """A moving average."""

  @abc.abstractmethod
  def weight(self, n: Array) -> Array | float:
    """1 - beta of step n = 1, 2, ..., int32; not by subtracting in float32."""

  def share_of_first(self, steps: int) -> float:
    """How much of it, after so many steps, is what the parameters were before the first."""
    weights = np.asarray(self.weight(jnp.arange(1, steps + 1)), np.float64)
    return float(np.prod(1 - np.broadcast_to(weights, steps)))


@dataclasses.dataclass(frozen=True)
class ConstantRate(Average):
  """Keeps the share `rate` of itself; a rate of 0 is no average."""

  rate: float

  def weight(self, n: Array) -> Array | float:
    del n
    return 1 - self.rate


@dataclasses.dataclass(frozen=True)
class WarmingRate(Average):
  """Keeps (1 + n) / (10 + n) of itself, and at most `rate`."""

  rate: float

  def weight(self, n: Array) -> Array | float:
    return jnp.maximum(1 - self.rate, 9 / (10 + n))


@dataclasses.dataclass(frozen=True)
class HalfLife(Average):
  """Forgets half of itself within `images` images.

  Attributes:
    images: the half-life.
    batch_size: images of one step.
    ramp_up: the half-life is at most this share of the images that were seen before the step, so
      that little is left of the beginning; 0 for no such bound.
  """

  images: float
  batch_size: int
  ramp_up: float = 0.05

  def weight(self, n: Array) -> Array | float:
    life: Array | float = self.images
    if self.ramp_up:
      seen = (n - 1).astype(jnp.float32) * self.batch_size
      life = jnp.maximum(jnp.minimum(self.images, self.ramp_up * seen), 1e-6)
    return -jnp.expm1(-math.log(2) * self.batch_size / life)


@dataclasses.dataclass(frozen=True)
class Power(Average):
  """A power function of the step, whose standard deviation is `sigma_rel` of the steps so far.

  Raises:
    ValueError: unless 0 < sigma_rel < 1 / sqrt(12).
  """

  sigma_rel: float

  def __post_init__(self) -> None:
    gamma_of(self.sigma_rel)

  def weight(self, n: Array) -> Array | float:
    return -jnp.expm1((gamma_of(self.sigma_rel) + 1) * jnp.log1p(-1 / n))


def gamma_of(sigma_rel: float) -> float:
  """gamma of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

  The one positive root of gamma^3 + 7 gamma^2 + (16 - q) gamma + 12 - q, with q = sigma_rel^-2
  (Algorithm 2).

  Raises:
    ValueError: unless 0 < sigma_rel < 1 / sqrt(12), so that gamma > 0.
  """
  if not 0 < sigma_rel < WIDEST:
    raise ValueError(
      f'sigma_rel, the width of an average relative to training, must be above 0 and below '
      f'{WIDEST:.4f}; got {sigma_rel}'
    )
  q = sigma_rel**-2
  return float(np.roots([1, 7, 16 - q, 12 - q]).real.max())


def combination(
  kept: Sequence[tuple[int, float]], wanted: float, at: int
) -> tuple[np.ndarray, float]:
  """How to combine averages that were kept to the one that was not (Sec. 3.2, Algorithm 3).

  An average at step n is a sum of theta_m, m <= n, that count as (gamma + 1) / n (m / n)^gamma, as
  a function of continuous time. The coefficients give the one that is wanted with the least squared
  error of these functions: a linear system of their inner products.

  Args:
    kept: step and sigma_rel of each average that there is.
    wanted: sigma_rel of the one that is looked for.
    at: its step; averages of later steps are of no use.

  Returns:
    A coefficient of each that is kept, which sum to 1; and the error that is left, relative
    to the function that is wanted, from 0 to 1.

  Raises:
    ValueError: for a sigma_rel that there is not.
  """
  steps = np.array([step / at for step, _ in kept], np.float64)
  gammas = np.array([gamma_of(sigma_rel) for _, sigma_rel in kept], np.float64)
  gamma = np.array([gamma_of(wanted)])
  one = np.ones(1)
  gram = _inner(steps[:, None], gammas[:, None], steps, gammas)
  right = _inner(steps, gammas, one, gamma)
  # Neighbouring averages are almost the same: what rounding alone could tell is left out.
  scale = 1 / np.sqrt(np.diag(gram))
  solution = np.linalg.lstsq(gram * scale * scale[:, None], right * scale, rcond=1e-14)[0]
  coefficients = solution * scale
  coefficients /= coefficients.sum()  # so that what stands still, as Fourier frequencies, stays
  size = _inner(one, gamma, one, gamma)[0]
  left = size - 2 * coefficients @ right + coefficients @ gram @ coefficients
  return coefficients, math.sqrt(max(left, 0.0) / size)


def _inner(t: np.ndarray, a: np.ndarray, u: np.ndarray, b: np.ndarray) -> np.ndarray:
  """The integral of the functions that count at t with gamma a, and at u with gamma b.

  (a + 1) (b + 1) / (a + b + 1) min(t, u)^(a + b + 1) / (t^(a + 1) u^(b + 1)), in logarithms.
  """
  logs = (a + b + 1) * np.log(np.minimum(t, u)) - (a + 1) * np.log(t) - (b + 1) * np.log(u)
  return (a + 1) * (b + 1) / (a + b + 1) * np.exp(logs)
