"""Score matching: what is asked of a score, at which times, with which weight.

The denoising score matching loss of the continuous SDEs (Eq. 7 of
https://arxiv.org/abs/2011.13456), of SMLD (Eq. 1) and of DDPM (Eq. 3) is one formula: they differ
in the times that they draw and in the kernel alpha, std that perturbs the data, not in what they
minimise. Its forerunners, explicit, implicit and sliced score matching, ask for the same score.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float
import optax

from runtime.shapes import Data, Key, PerRow, StepPerRow
from sde_lib import Chain, check_eps, expand, ScoreFn, SDE

# (score_fn, x, t, key) -> loss, whose expectation over x ~ p_t is least at the score of p_t.
Matching = Callable[[ScoreFn, Data, PerRow, Key], PerRow]


# The times that training draws.


@runtime_checkable
class TimeLaw(Protocol):
  """A distribution of training times."""

  def __call__(self, rng: Key, n: int) -> PerRow:
    """Draws n times."""

  def quantile(self, u: PerRow) -> PerRow:
    """The time below which the share u of the law lies: uniform u in [0, 1) gives its times."""


@dataclasses.dataclass(frozen=True)
class UniformTimes:
  """Uniform over [eps, T]: all times of an SDE."""

  eps: float = 1e-5
  T: float = 1.0

  def __post_init__(self) -> None:
    if not 0 <= self.eps < self.T:
      raise ValueError(f'training times need 0 <= eps < T = {self.T}; got eps = {self.eps}')

  def __call__(self, rng: Key, n: int) -> PerRow:
    return jax.random.uniform(rng, (n,), minval=self.eps, maxval=self.T)

  def quantile(self, u: PerRow) -> PerRow:
    return jnp.clip(self.eps + u * (self.T - self.eps), self.eps, self.T)


@dataclasses.dataclass(frozen=True)
class ChainTimes:
  """Uniform over the N times of a chain, of which those below eps are taken as eps."""

  chain: Chain
  eps: float = 0.0

  def __call__(self, rng: Key, n: int) -> PerRow:
    return self._time(jax.random.randint(rng, (n,), 0, self.chain.N))

  def quantile(self, u: PerRow) -> PerRow:
    N = self.chain.N
    return self._time(jnp.clip(jnp.floor(u * N), 0, N - 1).astype(jnp.int32))

  def _time(self, i: StepPerRow) -> PerRow:
    times = self.chain.time(i)
    return jnp.maximum(times, self.eps) if self.eps else times


@dataclasses.dataclass(frozen=True)
class OneTime:
  """Always the same time: one level of noise."""

  t: float

  def __call__(self, rng: Key, n: int) -> PerRow:
    del rng
    return jnp.full(n, self.t)

  def quantile(self, u: PerRow) -> PerRow:
    return jnp.full_like(u, self.t)


@dataclasses.dataclass(frozen=True)
class LogNormalTimes:
  """log(sigma / alpha) is normal: EDM's law of noise levels.

  Karras et al. 2022, https://arxiv.org/abs/2206.00364, Table 1. For flow matching it is the
  logit-normal law of t (Esser et al. 2024, https://arxiv.org/abs/2403.03206, Sec. 3.1), since
  sigma / alpha = t / (1 - t) there.

  Attributes:
    sde: whose times they are.
    mean, std: of log(sigma / alpha).
    eps: times outside of [eps, T] move to its ends.
  """

  sde: SDE
  mean: float = -1.2
  std: float = 1.2
  eps: float = 1e-5

  def __post_init__(self) -> None:
    check_eps(self.sde, self.eps)

  def __call__(self, rng: Key, n: int) -> PerRow:
    return self._time(jax.random.normal(rng, (n,)))

  def quantile(self, u: PerRow) -> PerRow:
    return self._time(jax.scipy.special.ndtri(u))

  def _time(self, normal: PerRow) -> PerRow:
    log_noise = self.mean + self.std * normal
    return jnp.clip(self.sde.time_of_log_snr(-log_noise), self.eps, self.sde.T)


@dataclasses.dataclass(frozen=True)
class LikelihoodTimes:
  """p(t) proportional to g^2 / sigma^2 on [eps, T]: the log-SNR is uniform.

  g^2 / sigma^2 = d log(sigma^2) / dt - 2 f = -2 dlambda / dt with lambda = log(alpha / sigma),
  whatever the SDE is. So the weight of likelihood between eps and t is 2 (lambda(eps) - lambda(t)),
  and a quantile is `time_of_log_snr` of a number between the two ends. Song et al. 2021,
  https://arxiv.org/abs/2101.09258, Sec. 4.3, have it for VP and sub-VP, by bisection.

  Attributes:
    sde: whose times they are.
    eps: the smallest time.

  Raises:
    ValueError: unless 0 <= eps < T, and some noise is there at eps.
  """

  sde: SDE
  eps: float = 1e-5

  def __post_init__(self) -> None:
    check_eps(self.sde, self.eps)
    if not math.isfinite(self._log_snr(self.eps)):
      raise ValueError(
        f'{type(self.sde).__name__} has no noise at eps = {self.eps}, where the weight of '
        'likelihood is infinite: eps must be larger'
      )

  def __call__(self, rng: Key, n: int) -> PerRow:
    return self.quantile(jax.random.uniform(rng, (n,)))

  def quantile(self, u: PerRow) -> PerRow:
    first, last = self._log_snr(self.eps), self._log_snr(self.sde.T)
    times = self.sde.time_of_log_snr(first - u * (first - last))
    return jnp.clip(times, self.eps, self.sde.T)

  @property
  def total(self) -> float:
    """Z: the integral of g^2 / sigma^2 from eps to T."""
    return 2 * (self._log_snr(self.eps) - self._log_snr(self.sde.T))

  def density(self, t: PerRow) -> PerRow:
    """p(t) = g^2 / (sigma^2 Z)."""
    return jnp.square(self.sde.diffusion_coef(t) / self.sde.sigma(t)) / self.total

  def _log_snr(self, t: float) -> float:
    with jax.ensure_compile_time_eval():
      return float(self.sde.log_snr(jnp.float32(t)))


@dataclasses.dataclass(frozen=True)
class Stratified:
  """The times of a law, spread evenly: its quantiles at (u + i / n) mod 1 for the i-th of n.

  u is uniform, and so is each of these by itself: a mean over the batch has the same expectation,
  and less variance (Kingma et al. 2021, https://arxiv.org/abs/2107.00630, Appendix I.1). The batch
  is that of all devices and of all parts of it.
  """

  law: TimeLaw

  def __call__(self, rng: Key, n: int) -> PerRow:
    return self.law.quantile((jax.random.uniform(rng) + jnp.arange(n) / n) % 1)

  def quantile(self, u: PerRow) -> PerRow:
    return self.law.quantile(u)


# Which noise goes with which data: (x_0, z) -> z in another order.
Coupling = Callable[[Data, Data], Data]


def independent(x0: Data, z: Data) -> Data:
  """Each x_0 has the noise that was drawn for it."""
  del x0
  return z


@dataclasses.dataclass(frozen=True)
class OptimalTransport:
  """Within a group of rows, the order of the noise whose sum of ||z - x_0||^2 is least.

  Minibatch optimal transport (Tong et al. 2023, https://arxiv.org/abs/2302.00482, Sec. 3.2.3;
  Pooladian et al. 2023, https://arxiv.org/abs/2304.14772). Paths from noise to data then cross
  less, so that x' = E[z - x_0 | x_t] is straighter. Over all rows the noise is normal as before, as
  it is the same noise; but it says something of its x_0, so that -E[z | x_t] / sigma is no longer
  the score of p_t. What is learned leads along the probability flow, and serves nothing else.

  A group is the same whatever devices there are. The assignment is exact, and takes time that grows
  with the cube of a group.

  Attributes:
    group: rows that are ordered together; what is left over at the end of a batch is one more.
  """

  group: int

  def __call__(self, x0: Data, z: Data) -> Data:
    whole = len(x0) // self.group * self.group
    parts = ((x0[:whole], z[:whole], self.group), (x0[whole:], z[whole:], len(x0) - whole))
    return jnp.concatenate([_assigned(*part) for part in parts if len(part[0])])


def _assigned(x0: Data, z: Data, size: int) -> Data:
  """z, ordered within groups of `size` rows."""
  groups = (-1, size, *x0.shape[1:])
  return jax.vmap(_nearest)(x0.reshape(groups), z.reshape(groups)).reshape(z.shape)


def _nearest(x0: Data, z: Data) -> Data:
  """z in the order whose sum of squared distances to x0 is least."""
  n = len(x0)
  # ||z||^2 and ||x_0||^2 count the same in every order.
  cost = -jnp.matmul(z.reshape(n, -1), x0.reshape(n, -1).T, precision='highest')
  rows, columns = optax.assignment.hungarian_algorithm(cost)
  return z[jnp.zeros_like(rows).at[columns].set(rows)]


# How a time counts: (sde, t, alpha, sigma) -> w, the factor of sigma times the
# error of the score, which is the error of the predicted noise z. As sigma times it is alpha times
# the error of the predicted data, 1 means a squared error of the data that counts SNR = (alpha /
# sigma)^2.
Weight = Callable[[SDE, PerRow, PerRow, PerRow], PerRow]


def by_variance(sde: SDE, t: PerRow, alpha: PerRow, sigma: PerRow) -> PerRow:
  """The squared error of the score counts sigma(t)^2: for samples (Sec. 3.3)."""
  del sde, t, alpha
  return jnp.ones_like(sigma)


def by_likelihood(sde: SDE, t: PerRow, alpha: PerRow, sigma: PerRow) -> PerRow:
  """It counts g(t)^2, for likelihood (https://arxiv.org/abs/2101.09258)."""
  del alpha
  return sde.diffusion_coef(t) / sigma


def by_velocity(sde: SDE, t: PerRow, alpha: PerRow, sigma: PerRow) -> PerRow:
  """The squared error of E[z - x_0 | x_t] counts 1: flow matching's weight."""
  del sde, t
  return 1 + sigma / alpha


@dataclasses.dataclass(frozen=True)
class ByUnitLoss:
  """EDM's weight: the loss of F = 0 is 1 in each dimension, at every level of noise.

  The squared error of the data counts (s^2 + sigma_data^2) / (s sigma_data)^2, s = sigma / alpha
  (https://arxiv.org/abs/2206.00364, Table 1).
  """

  sigma_data: float = 0.5

  def __call__(self, sde: SDE, t: PerRow, alpha: PerRow, sigma: PerRow) -> PerRow:
    del sde, t
    return jnp.hypot(sigma / alpha / self.sigma_data, 1.0)


@dataclasses.dataclass(frozen=True)
class ByMinSNR:
  """The squared error of the data counts min(SNR, gamma).

  Hang et al. 2023, https://arxiv.org/abs/2303.09556, Sec. 3.4, where gamma = 5.
  """

  gamma: float = 5.0

  def __call__(self, sde: SDE, t: PerRow, alpha: PerRow, sigma: PerRow) -> PerRow:
    del sde, t
    return jnp.minimum(1.0, math.sqrt(self.gamma) * sigma / alpha)


@dataclasses.dataclass(frozen=True)
class BySoftMinSNR:
  """The squared error of the data counts SNR gamma / (SNR + gamma), min-SNR without its corner.

  Crowson et al. 2024, https://arxiv.org/abs/2401.11605, Sec. 4.2.
  """

  gamma: float = 5.0

  def __call__(self, sde: SDE, t: PerRow, alpha: PerRow, sigma: PerRow) -> PerRow:
    del sde, t
    return jax.lax.rsqrt(1 + jnp.square(alpha / sigma) / self.gamma)


@dataclasses.dataclass(frozen=True)
class BySigmoid:
  """That of the noise counts sigmoid(bias - lambda) dlambda / dt, with lambda = log SNR.

  Kingma & Gao 2023, https://arxiv.org/abs/2303.00848: in their terms the weight of lambda, whatever
  the SDE is, if times are uniform. -dlambda / dt is g^2 / sigma^2, the weight of likelihood.
  """

  bias: float = 2.0

  def __call__(self, sde: SDE, t: PerRow, alpha: PerRow, sigma: PerRow) -> PerRow:
    share = jax.nn.sigmoid(self.bias - 2 * sde.log_snr(t))
    return jnp.sqrt(share) * by_likelihood(sde, t, alpha, sigma)


@dataclasses.dataclass(frozen=True)
class ImportanceSampled:
  """Another weight, where times are drawn by the law of likelihood in place of uniformly.

  It is divided by the root of the law's density relative to the uniform one: the loss keeps its
  expectation, not its variance. The weight of likelihood becomes the constant (Z / (T - eps))^1/2.
  """

  weight: Weight
  times: LikelihoodTimes

  def __call__(self, sde: SDE, t: PerRow, alpha: PerRow, sigma: PerRow) -> PerRow:
    span = self.times.sde.T - self.times.eps
    return self.weight(sde, t, alpha, sigma) * jax.lax.rsqrt(span * self.times.density(t))


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised.

  Attributes:
    kernels: of an SDE, or of its chain: what perturbs the data.
    times: the law that training times are drawn from.
    weight: how a time counts.
    matching: what is asked of the score at x_t, or None for denoising score matching.
    coupling: which noise goes with which data.
    reduce_mean: the mean over dimensions, or half the sum, the released code's scale.
  """

  kernels: SDE | Chain
  times: TimeLaw = UniformTimes()
  weight: Weight = by_variance
  matching: Matching | None = None
  coupling: Coupling = independent
  reduce_mean: bool = False


# What may be asked of a score at x and times t; each is a loss of every row.


def explicit_score_matching(
  true_score_fn: ScoreFn, score_fn: ScoreFn, x: Data, t: PerRow
) -> PerRow:
  """1/2 ||s(x) - grad log p(x)||^2, where the true score is known (Hyvarinen 2005, Eq. 2).

  https://jmlr.org/papers/v6/hyvarinen05a.html. The others have this expectation but for a constant.
  """
  return 0.5 * _square(score_fn(x, t) - true_score_fn(x, t))


def implicit_score_matching(score_fn: ScoreFn, x: Data, t: PerRow) -> PerRow:
  """tr(ds/dx) + 1/2 ||s(x)||^2, integrated by parts (Hyvarinen 2005, Theorem 1).

  The trace is exact, and costs one derivative for each dimension.
  """
  axes = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, 1, *x.shape[1:])

  def along(axis: Float[Array, ' 1 *d']) -> tuple[Data, PerRow]:
    v = jnp.broadcast_to(axis, x.shape)
    score, slope = jax.jvp(lambda x: score_fn(x, t), [x], [v])
    return score, _dot(v, slope)

  scores, slopes = jax.vmap(along)(axes)
  return slopes.sum(0) + 0.5 * _square(scores[0])


def sliced_score_matching(score_fn: ScoreFn, x: Data, t: PerRow, v: Data) -> PerRow:
  """v^T (ds/dx) v + 1/2 (v^T s)^2 for random directions v, E[v v^T] = I.

  SSM of Song et al. 2019, https://arxiv.org/abs/1905.07088.
  """
  score, slope = jax.jvp(lambda x: score_fn(x, t), [x], [v])
  return _dot(v, slope) + 0.5 * jnp.square(_dot(v, score))


def hutchinson_score_matching(score_fn: ScoreFn, x: Data, t: PerRow, v: Data) -> PerRow:
  """v^T (ds/dx) v + 1/2 ||s||^2: implicit score matching with Hutchinson's estimate of the trace.

  Of less variance than `sliced_score_matching` (SSM-VR of the same paper).
  """
  score, slope = jax.jvp(lambda x: score_fn(x, t), [x], [v])
  return _dot(v, slope) + 0.5 * _square(score)


MATCHINGS: dict[str, Matching] = {
  'ism': lambda score_fn, x, t, rng: implicit_score_matching(score_fn, x, t),
  'ssm': lambda score_fn, x, t, rng: sliced_score_matching(score_fn, x, t, _signs(rng, x)),
  'ssm_vr': lambda score_fn, x, t, rng: hutchinson_score_matching(score_fn, x, t, _signs(rng, x)),
}


def _signs(rng: Key, x: Data) -> Data:
  return jax.random.rademacher(rng, x.shape, x.dtype)


def _dot(u: Data, v: Data) -> PerRow:
  return (u * v).reshape(len(u), -1).sum(-1)


def _square(x: Data) -> PerRow:
  return _dot(x, x)


def score_matching_loss(
  objective: Objective, score_fn: ScoreFn, x0: Data, t: PerRow, z: Data, rng: Key
) -> PerRow:
  """The loss of each example at given times and noise, of any kind.

  What is asked of the score at x_t = alpha x_0 + sigma z is weighed by sigma^2, as in `dsm_loss`,
  which so is this loss of `explicit_score_matching`, but for a constant at each time.

  Args:
    objective, score_fn, x0, t, z: as in `dsm_loss`.
    rng: the key of random directions.
  """
  if objective.matching is None:
    return dsm_loss(objective, score_fn, x0, t, z)
  alpha, sigma = objective.kernels.kernel(t)
  x = expand(alpha, x0) * x0 + expand(sigma, x0) * z
  weight = sigma * objective.weight(objective.kernels.forward, t, alpha, sigma)
  loss = weight**2 * objective.matching(score_fn, x, t, rng)
  return 2 / x0[0].size * loss if objective.reduce_mean else loss


def dsm_loss(objective: Objective, score_fn: ScoreFn, x0: Data, t: PerRow, z: Data) -> PerRow:
  """The denoising score matching loss of each example at given times and noise (Eq. 7).

  w^2 ||sigma s(x_t, t) + z||^2 with x_t = alpha x_0 + sigma z: the squared error of the score, but
  for a constant, times sigma^2 and the square of the weight w.

  Args:
    objective: which kernels, weight and reduction over dimensions.
    score_fn: the score that is trained.
    x0: data.
    t: their times.
    z: standard normal noise.
  """
  alpha, sigma = objective.kernels.kernel(t)
  x = expand(alpha, x0) * x0 + expand(sigma, x0) * z
  weight = objective.weight(objective.kernels.forward, t, alpha, sigma)
  residual = expand(weight, x0) * (expand(sigma, x0) * score_fn(x, t) + z)
  squares = jnp.square(residual).reshape(x0.shape[0], -1)
  return squares.mean(-1) if objective.reduce_mean else 0.5 * squares.sum(-1)
