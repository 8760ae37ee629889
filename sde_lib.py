"""Forward SDEs with Gaussian transition kernels, and their time reversals.

Each SDE is dx = f(t) x dt + g(t) dw on t in [0, T], T = 1, with the perturbation kernel
p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I). Its discretisation is a Markov chain over the N
points t_i = i / (N - 1) T, i = 0 ... N - 1: SMLD for the VE SDE, DDPM for the VP SDE.
Training and sampling stop short of t = 0, at `eps`.

Shapes: x is [B, ...], any data shape; t is [B]. Scalars per example broadcast against x by
`expand`. Equation numbers are those of Song et al. 2021, https://arxiv.org/abs/2011.13456.
"""

import abc
from collections.abc import Callable
import dataclasses
import math

import jax
from jax import Array
import jax.numpy as jnp

ScoreFn = Callable[[Array, Array], Array]  # (x [B, ...], t [B]) -> grad_x log p_t(x), like x


def expand(v: Array, x: Array) -> Array:
  """Gives per-example values v [B] the singleton axes that they need to broadcast to x [B, ...]."""
  return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))


@dataclasses.dataclass(frozen=True)
class SDE(abc.ABC):
  """A forward SDE; subclasses say what `alpha`, `sigma`, `drift_coef` and `diffusion_coef` are.

  They also have a field `N`, with a default.
  """

  eps: float = dataclasses.field(default=0.0, kw_only=True)  # smallest time in use

  @property
  @abc.abstractmethod
  def N(self) -> int:
    """The number of steps of the chain."""

  @property
  def T(self) -> float:
    """The final time, where x_T follows the prior."""
    return 1.0

  @property
  def prior_std(self) -> float:
    """Standard deviation of the prior p_T."""
    return 1.0

  @abc.abstractmethod
  def alpha(self, t: Array) -> Array:
    """alpha(t) [B]: how much of x_0 is left at time t."""

  @abc.abstractmethod
  def sigma(self, t: Array) -> Array:
    """sigma(t) [B]: standard deviation of the noise in x_t given x_0."""

  @abc.abstractmethod
  def drift_coef(self, t: Array) -> Array:
    """f(t) [B], where the drift is f(t) x."""

  @abc.abstractmethod
  def diffusion_coef(self, t: Array) -> Array:
    """g(t) [B]."""

  def log_snr(self, t: Array) -> Array:
    """lambda(t) = log(alpha(t) / sigma(t)) [B]: half the logarithm of the signal-to-noise ratio.

    It falls as t grows; it is infinite at t = 0 if no noise is left there.
    """
    return jnp.log(self.alpha(t)) - jnp.log(self.sigma(t))

  def time_of_log_snr(self, log_snr: Array) -> Array:
    """The time t [B] at which `log_snr(t)` has the given value [B]: its inverse.

    By default found by bisection in [0, T], to rounding; SDEs that know a formula override it.
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
      early, late = bounds
      middle = (early + late) / 2
      above = self.log_snr(middle) > log_snr  # then t is later
      return jnp.where(above, middle, early), jnp.where(above, late, middle)

    bounds = jnp.zeros_like(log_snr), jnp.full_like(log_snr, self.T)
    early, late = jax.lax.fori_loop(0, 60, halve, bounds)
    return (early + late) / 2

  # Continuous time.

  def sde(self, x: Array, t: Array) -> tuple[Array, Array]:
    """Drift [B, ...] and diffusion [B] of the forward SDE (Eq. 5)."""
    return expand(self.drift_coef(t), x) * x, self.diffusion_coef(t)

  def marginal_prob(self, x: Array, t: Array) -> tuple[Array, Array]:
    """Mean [B, ...] and standard deviation [B] of p(x_t | x_0 = x) (Appendix C)."""
    return expand(self.alpha(t), x) * x, self.sigma(t)

  def prior_sampling(self, rng: Array, shape: tuple[int, ...]) -> Array:
    """Draws x_T of the given shape."""
    return self.prior_std * jax.random.normal(rng, shape)

  def prior_logp(self, z: Array) -> Array:
    """Log-density [B] of z [B, ...] under the prior, in nats."""
    logp = jax.scipy.stats.norm.logpdf(z, scale=self.prior_std)
    return logp.reshape(z.shape[0], -1).sum(-1)

  def reverse(self, score_fn: ScoreFn, probability_flow: bool = False) -> 'ReverseSDE':
    """The time reversal of this SDE, or its probability flow ODE."""
    return ReverseSDE(self, score_fn, probability_flow)

  # The chain of N steps.

  def index(self, t: Array) -> Array:
    """The chain's step i [B], in 0 ... N - 1, that is nearest to time t; the inverse of `time`."""
    return self._clip(jnp.round(t / self.T * (self.N - 1)))

  def sampling_index(self, t: Array) -> Array:
    """The chain's step i [B] that a sampler takes at time t in [eps, T].

    The times are stretched over the chain's indices, so that a sampler with N steps from T to
    eps visits every index once, whatever N and eps are.
    """
    return self._clip(jnp.round((t - self.eps) / (self.T - self.eps) * (self.N - 1)))

  def time(self, i: Array) -> Array:
    """t_i [B], the time of step i."""
    return i / (self.N - 1) * self.T

  def chain_marginal(self, i: Array) -> tuple[Array, Array]:
    """alpha and sigma [B] of the chain's kernel p(x_i | x_0); by default the SDE's at t_i."""
    return self.alpha(self.time(i)), self.sigma(self.time(i))

  def kernel(self, t: Array, continuous: bool) -> tuple[Array, Array]:
    """alpha and sigma [B] of the SDE's perturbation kernel at t, or of the chain's nearest it."""
    if continuous:
      return self.alpha(t), self.sigma(t)
    return self.chain_marginal(self.index(t))

  def discretize(self, x: Array, t: Array) -> tuple[Array, Array]:
    """f [B, ...] and G [B] of the step x_{i+1} = x_i + f_i(x_i) + G_i z_i (Appendix E).

    By default an Euler-Maruyama step of length 1 / N.
    """
    drift, diffusion = self.sde(x, t)
    return drift / self.N, diffusion / math.sqrt(self.N)

  def ancestral(self, x: Array, t: Array, score: Array) -> tuple[Array, Array]:
    """Mean [B, ...] and standard deviation [B] of the ancestral step from x_i to x_{i-1}.

    It is the posterior p(x_{i-1} | x_i, x_0) with x_0 estimated from the score (Appendix F).
    """
    i = self.sampling_index(t)
    alpha_t, sigma_t = self.alpha(self.time(i)), self.sigma(self.time(i))
    # The step from i = 0 ends in clean data.
    alpha_s = jnp.where(i > 0, self.alpha(self.time(i - 1)), 1.0)
    sigma_s = jnp.where(i > 0, self.sigma(self.time(i - 1)), 0.0)
    ratio = alpha_t / alpha_s
    variance = sigma_t**2 - (ratio * sigma_s) ** 2  # of p(x_t | x_s)
    mean = (x + expand(variance, x) * score) / expand(ratio, x)
    # At i = 0 the sub-VP chain has sigma_t = 0 already, and nothing is left to do.
    return mean, jnp.where(i > 0, jnp.sqrt(variance) * sigma_s / sigma_t, 0.0)

  def langevin_alpha(self, t: Array) -> Array:
    """alpha_i [B] in the step size of a Langevin corrector (Algorithms 4 and 5)."""
    return jnp.ones_like(t)

  def _clip(self, i: Array) -> Array:
    return jnp.clip(i, 0, self.N - 1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class ReverseSDE:
  """The reverse-time SDE (Eq. 6), or the probability flow ODE (Eq. 13), of `forward`."""

  forward: SDE
  score_fn: ScoreFn
  probability_flow: bool = False

  def sde(self, x: Array, t: Array) -> tuple[Array, Array]:
    """Drift [B, ...] and diffusion [B] of the reverse process; dt is negative."""
    drift, diffusion = self.forward.sde(x, t)
    return self._reverse(x, t, drift, diffusion)

  def discretize(self, x: Array, t: Array) -> tuple[Array, Array]:
    """f and G of the step x_i = x_{i+1} - f_{i+1}(x_{i+1}) + G_{i+1} z_{i+1} (Appendix E)."""
    f, G = self.forward.discretize(x, t)
    return self._reverse(x, t, f, G)

  def denoise(self, x: Array, t: Array) -> Array:
    """E[x_0 | x_t = x], [B, ...], by Tweedie's formula (Efron 2011)."""
    alpha, sigma = (expand(v, x) for v in (self.forward.alpha(t), self.forward.sigma(t)))
    return (x + sigma**2 * self.score_fn(x, t)) / alpha

  def _reverse(self, x: Array, t: Array, f: Array, G: Array) -> tuple[Array, Array]:
    score = (0.5 if self.probability_flow else 1.0) * self.score_fn(x, t)
    return f - expand(G**2, x) * score, jnp.zeros_like(G) if self.probability_flow else G


@dataclasses.dataclass(frozen=True)
class VESDE(SDE):
  """The variance exploding SDE (Eq. 9): sigma(t) = sigma_min (sigma_max / sigma_min)^t.

  Its chain is SMLD, whose noise scales are the geometric sequence from sigma_min to sigma_max.
  """

  sigma_min: float = 0.01
  sigma_max: float = 50.0
  N: int = 1000

  def __post_init__(self) -> None:
    if not 0 < self.sigma_min < self.sigma_max:
      raise ValueError(
        f'VESDE needs 0 < sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}'
      )
    _check_times(self)

  @property
  def prior_std(self) -> float:
    return self.sigma_max

  @property
  def discrete_sigmas(self) -> Array:
    """The chain's noise scales [N], ascending."""
    return self.sigma(self.time(jnp.arange(self.N)))

  def alpha(self, t: Array) -> Array:
    return jnp.ones_like(t)

  def sigma(self, t: Array) -> Array:
    return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

  def log_snr(self, t: Array) -> Array:
    return -math.log(self.sigma_min) - t * math.log(self.sigma_max / self.sigma_min)

  def time_of_log_snr(self, log_snr: Array) -> Array:
    """t = -(lambda + log sigma_min) / log(sigma_max / sigma_min)."""
    return -(log_snr + math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)

  def drift_coef(self, t: Array) -> Array:
    return jnp.zeros_like(t)

  def diffusion_coef(self, t: Array) -> Array:
    return self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

  def discretize(self, x: Array, t: Array) -> tuple[Array, Array]:
    """SMLD's step (Eq. 8): G_i^2 = sigma_i^2 - sigma_{i-1}^2, with sigma_{-1} = 0."""
    i = self.sampling_index(t)
    log_ratio = math.log(self.sigma_max / self.sigma_min) / (self.N - 1)  # of neighbours
    kept = jnp.where(i > 0, -math.expm1(-2 * log_ratio), 1.0)
    return jnp.zeros_like(x), self.sigma(self.time(i)) * jnp.sqrt(kept)


@dataclasses.dataclass(frozen=True)
class _LinearBeta(SDE):
  """What VP and sub-VP share: beta(t) = beta_min + t (beta_max - beta_min), and the mean."""

  beta_min: float = 0.1
  beta_max: float = 20.0
  N: int = 1000

  def __post_init__(self) -> None:
    if not 0 < self.beta_min <= self.beta_max:
      raise ValueError(
        f'{type(self).__name__} needs 0 < beta_min <= beta_max; '
        f'got {self.beta_min} and {self.beta_max}'
      )
    _check_times(self)

  def beta(self, t: Array) -> Array:
    """beta(t) [B]."""
    return self.beta_min + t * (self.beta_max - self.beta_min)

  def log_alpha(self, t: Array) -> Array:
    """log alpha(t) [B]: -1/2 of the integral of beta from 0 to t (Appendix C)."""
    return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

  def time_of_log_alpha(self, log_alpha: Array) -> Array:
    """The time t [B] at which `log_alpha` has the given value [B].

    The root of a quadratic equation, in the form that does not subtract.
    """
    b, c = 0.5 * self.beta_min, -log_alpha
    return 2 * c / (b + jnp.sqrt(b**2 + c * (self.beta_max - self.beta_min)))

  def alpha(self, t: Array) -> Array:
    return jnp.exp(self.log_alpha(t))

  def drift_coef(self, t: Array) -> Array:
    return -0.5 * self.beta(t)

  @property
  def discrete_betas(self) -> Array:
    """The chain's beta_i [N]: beta(t_i) / N (Appendix B).

    Raises:
      ValueError: if N <= beta_max, where 1 - beta_i would not stay positive.
    """
    if self.beta_max >= self.N:
      raise ValueError(
        f'the chain of {type(self).__name__} needs more steps than beta_max, or 1 - beta_i turns '
        f'negative; got N = {self.N} and beta_max = {self.beta_max}'
      )
    return jnp.linspace(self.beta_min / self.N, self.beta_max / self.N, self.N)

  def langevin_alpha(self, t: Array) -> Array:
    return 1.0 - self.discrete_betas[self.sampling_index(t)]


@dataclasses.dataclass(frozen=True)
class VPSDE(_LinearBeta):
  """The variance preserving SDE (Eq. 11): alpha^2 + sigma^2 = 1. Its chain is DDPM."""

  @property
  def alphas_cumprod(self) -> Array:
    """The chain's alpha_i^2 [N]: product of 1 - beta_j for j <= i."""
    return jnp.exp(jnp.cumsum(jnp.log1p(-self.discrete_betas)))

  def sigma(self, t: Array) -> Array:
    # expm1 keeps the digits that 1 - exp(.) loses near t = 0.
    return jnp.sqrt(-jnp.expm1(2 * self.log_alpha(t)))

  def log_snr(self, t: Array) -> Array:
    return self.log_alpha(t) - 0.5 * jnp.log(-jnp.expm1(2 * self.log_alpha(t)))

  def time_of_log_snr(self, log_snr: Array) -> Array:
    """From alpha^2 = 1 / (1 + exp(-2 lambda)), so that log alpha = -1/2 log1p(exp(-2 lambda))."""
    return self.time_of_log_alpha(-0.5 * jax.nn.softplus(-2 * log_snr))

  def diffusion_coef(self, t: Array) -> Array:
    return jnp.sqrt(self.beta(t))

  def index(self, t: Array) -> Array:
    """The last step of the chain that is not after time t [B].

    Sampling from T to eps asks the network of DDPM between two steps; x has then the noise of
    the earlier one, to which the released code's truncation leads too.
    """
    return self._clip(jnp.floor(t / self.T * (self.N - 1) + 1e-6 * self.N))  # of rounding errors

  def chain_marginal(self, i: Array) -> tuple[Array, Array]:
    log_alpha2 = jnp.cumsum(jnp.log1p(-self.discrete_betas))[i]
    return jnp.exp(0.5 * log_alpha2), jnp.sqrt(-jnp.expm1(log_alpha2))

  def discretize(self, x: Array, t: Array) -> tuple[Array, Array]:
    """DDPM's step (Eq. 10): x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z."""
    beta = self.discrete_betas[self.sampling_index(t)]
    shrink = jnp.expm1(0.5 * jnp.log1p(-beta))  # sqrt(1 - beta) - 1
    return expand(shrink, x) * x, jnp.sqrt(beta)

  def ancestral(self, x: Array, t: Array, score: Array) -> tuple[Array, Array]:
    """DDPM's ancestral step (Eq. 4), whose variance is beta_i, not the posterior's."""
    beta = self.discrete_betas[self.sampling_index(t)]
    mean = (x + expand(beta, x) * score) / expand(jnp.sqrt(1.0 - beta), x)
    return mean, jnp.sqrt(beta)


@dataclasses.dataclass(frozen=True)
class subVPSDE(_LinearBeta):
  """The sub-VP SDE (Eq. 12): the mean of the VP SDE and a variance that is never larger."""

  def sigma(self, t: Array) -> Array:
    return -jnp.expm1(2 * self.log_alpha(t))

  def log_snr(self, t: Array) -> Array:
    return self.log_alpha(t) - jnp.log(-jnp.expm1(2 * self.log_alpha(t)))

  def time_of_log_snr(self, log_snr: Array) -> Array:
    """From sigma / alpha = 1 / alpha - alpha = -2 sinh(log alpha) = exp(-lambda)."""
    return self.time_of_log_alpha(-jnp.arcsinh(0.5 * jnp.exp(-log_snr)))

  def diffusion_coef(self, t: Array) -> Array:
    return jnp.sqrt(-self.beta(t) * jnp.expm1(4 * self.log_alpha(t)))


def _check_times(sde: SDE) -> None:
  if sde.N < 2:
    raise ValueError(f'{type(sde).__name__} needs a grid of N >= 2 steps; got {sde.N}')
  if not 0 <= sde.eps < sde.T:
    raise ValueError(f'{type(sde).__name__} needs 0 <= eps < T = {sde.T}; got {sde.eps}')
