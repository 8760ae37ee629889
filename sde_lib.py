"""Forward SDEs with Gaussian transition kernels, their time reversals, and their chains.

An SDE dx = f(t) x dt + g(t) dw on t in [0, T] whose perturbation kernel is
p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I) is known by alpha and sigma alone:

  f = d log(alpha) / dt,    g^2 = d(sigma^2) / dt - 2 f sigma^2

(Sarkka & Solin 2019, Sec. 6.1). So a new SDE is two functions. It knows no number of steps, and no
smallest time: those are a sampler's, or a training's.

Models may also be trained on the N noise scales of a `Chain`: SMLD for the VE SDE, DDPM for the VP
SDE. Its steps are at the times t_i = i / (N - 1) T, i = 0 ... N - 1.

The types are those of `runtime.shapes`; numbers per row broadcast against data by `expand`.
Equation numbers are those of Song et al. 2021, https://arxiv.org/abs/2011.13456.
"""

import abc
from collections.abc import Callable
import dataclasses
import math

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Shaped

from runtime.shapes import Data, Key, PerRow, PerStep, PerTime, StepPerRow, Steps, Times

ScoreFn = Callable[[Data, PerRow], Data]  # (x, t) -> grad_x log p_t(x)


def expand(v: Shaped[Array, ' ...'], x: Shaped[Array, ' ...']) -> Shaped[Array, ' ...']:
  """Gives v, numbers per row, the axes of length 1 that they need to broadcast against x."""
  return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))


def check_eps(sde: 'SDE', eps: float) -> None:
  """Raises ValueError unless eps, the smallest time in use, lies in [0, T)."""
  if not 0 <= eps < sde.T:
    raise ValueError(f'{type(sde).__name__} needs 0 <= eps < T = {sde.T}; got eps = {eps}')


@dataclasses.dataclass(frozen=True)
class SDE(abc.ABC):
  """A forward SDE; subclasses say what `alpha` and `sigma` are, and what else they know exactly."""

  @property
  def T(self) -> float:
    """The final time, where x_T follows the prior."""
    return 1.0

  @property
  def prior_std(self) -> float:
    """Standard deviation of the prior p_T: by default sigma(T)."""
    with jax.ensure_compile_time_eval():
      return float(self.sigma(jnp.float32(self.T)))

  @abc.abstractmethod
  def alpha(self, t: Times) -> PerTime:
    """alpha(t): how much of x_0 is left at time t."""

  @abc.abstractmethod
  def sigma(self, t: Times) -> PerTime:
    """sigma(t): standard deviation of the noise in x_t given x_0."""

  def drift_coef(self, t: Times) -> PerTime:
    """f(t), where the drift is f(t) x: by default d log(alpha) / dt by differentiation."""
    return _derivative(lambda t: jnp.log(self.alpha(t)), t)

  def diffusion_coef(self, t: Times) -> PerTime:
    """g(t): by default from d(sigma^2) / dt - 2 f sigma^2, by differentiation."""
    growth = _derivative(lambda t: jnp.square(self.sigma(t)), t)
    g2 = growth - 2 * self.drift_coef(t) * jnp.square(self.sigma(t))
    return jnp.sqrt(jnp.maximum(g2, 0.0))  # a rounding may fall below

  def log_snr(self, t: Times) -> PerTime:
    """lambda(t) = log(alpha(t) / sigma(t)): half the logarithm of the signal-to-noise ratio.

    It falls as t grows; it is infinite at t = 0 if no noise is left there.
    """
    return jnp.log(self.alpha(t)) - jnp.log(self.sigma(t))

  def log_snr_fall(self, s: Times, t: Times) -> PerTime:
    """lambda(s) - lambda(t): how far the log-SNR falls from time s to a later time t.

    By default the difference, which loses the digits that neighbouring times have in common; SDEs
    that know a formula override it. It is infinite from s = 0 on, if no noise is left there.
    """
    return self.log_snr(s) - self.log_snr(t)

  def time_of_log_snr(self, log_snr: PerTime) -> Times:
    """The time t at which `log_snr(t)` has the given value: its inverse.

    By default found by bisection in [0, T], to rounding; SDEs that know a formula override it.
    """

    def halve(_: object, bounds: tuple[Times, Times]) -> tuple[Times, Times]:
      early, late = bounds
      middle = (early + late) / 2
      above = self.log_snr(middle) > log_snr  # then t is later
      return jnp.where(above, middle, early), jnp.where(above, late, middle)

    bounds = jnp.zeros_like(log_snr), jnp.full_like(log_snr, self.T)
    early, late = jax.lax.fori_loop(0, 60, halve, bounds)
    return (early + late) / 2

  @property
  def forward(self) -> 'SDE':
    """The SDE itself, as a `Chain` has one."""
    return self

  def sde(self, x: Data, t: PerRow) -> tuple[Data, PerRow]:
    """Drift and diffusion of the forward SDE (Eq. 5)."""
    return expand(self.drift_coef(t), x) * x, self.diffusion_coef(t)

  def kernel(self, t: Times) -> tuple[PerTime, PerTime]:
    """alpha and sigma of the perturbation kernel p(x_t | x_0)."""
    return self.alpha(t), self.sigma(t)

  def marginal_prob(self, x: Data, t: PerRow) -> tuple[Data, PerRow]:
    """Mean and standard deviation of p(x_t | x_0 = x) (Appendix C)."""
    return expand(self.alpha(t), x) * x, self.sigma(t)

  def prior_sampling(self, rng: Key, shape: tuple[int, ...]) -> Data:
    """Draws x_T of the given shape."""
    return self.prior_std * jax.random.normal(rng, shape)

  def prior_logp(self, z: Data) -> PerRow:
    """Log-density of z under the prior, in nats."""
    logp = jax.scipy.stats.norm.logpdf(z, scale=self.prior_std)
    return logp.reshape(z.shape[0], -1).sum(-1)

  def prior_cross_entropy(self, mean: Data, std: PerRow) -> PerRow:
    """E[-log p_T(x)] for x ~ N(mean, std^2 I), in nats."""
    dim, variance = math.prod(mean.shape[1:]), self.prior_std**2
    squares = jnp.square(mean).reshape(len(mean), -1).sum(-1) + dim * std**2
    return 0.5 * (dim * math.log(2 * math.pi * variance) + squares / variance)

  def reverse(self, score_fn: ScoreFn, probability_flow: bool = False) -> 'ReverseSDE':
    """The time reversal of this SDE, or its probability flow ODE."""
    return ReverseSDE(self, score_fn, probability_flow)

  def probability_flow(self, score_fn: ScoreFn, x: Data, t: PerRow) -> Data:
    """dx/dt of the probability flow ODE (Eq. 13), at x and times t."""
    return self.reverse(score_fn, probability_flow=True).sde(x, t)[0]

  def chain(self, N: int) -> 'Chain':
    """Its chain of N steps, by default the one that Euler-Maruyama steps make."""
    return Chain(self, N)


def _derivative(function: Callable[[Times], PerTime], t: Times) -> PerTime:
  """The derivative of an elementwise function at t."""
  return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]


@dataclasses.dataclass(frozen=True)
class ReverseSDE:
  """The reverse-time SDE (Eq. 6), or the probability flow ODE (Eq. 13), of `forward`."""

  forward: SDE
  score_fn: ScoreFn
  probability_flow: bool = False

  def sde(self, x: Data, t: PerRow) -> tuple[Data, PerRow]:
    """Drift and diffusion of the reverse process; dt is negative."""
    return self.of_forward(x, t, *self.forward.sde(x, t))

  def of_forward(self, x: Data, t: PerRow, f: Data, G: PerRow) -> tuple[Data, PerRow]:
    """Drift and diffusion of the reversal of what has the drift f and diffusion G.

    They are f - G^2 s(x, t) and G, or f - G^2 s(x, t) / 2 and 0 of the probability flow. That is so
    in continuous time, and for a step x_{i+1} = x_i + f_i(x_i) + G_i z_i (Appendix E).
    """
    score = (0.5 if self.probability_flow else 1.0) * self.score_fn(x, t)
    return f - expand(G**2, x) * score, jnp.zeros_like(G) if self.probability_flow else G

  def denoise(self, x: Data, t: PerRow) -> Data:
    """E[x_0 | x_t = x] by Tweedie's formula (Efron 2011)."""
    alpha, sigma = (expand(v, x) for v in (self.forward.alpha(t), self.forward.sigma(t)))
    return (x + sigma**2 * self.score_fn(x, t)) / alpha


@dataclasses.dataclass(frozen=True)
class Chain:
  """The chain of N steps that an SDE is discretised to, whose kernels models are trained on.

  This one is made of Euler-Maruyama steps of length T / N; SMLD and DDPM are chains of their own.
  """

  sde: SDE
  N: int = 1000

  def __post_init__(self) -> None:
    if self.N < 2:
      raise ValueError(f'a chain of {type(self.sde).__name__} needs N >= 2 steps; got {self.N}')

  @property
  def forward(self) -> SDE:
    """Its SDE."""
    return self.sde

  @property
  def is_released(self) -> bool:
    """Whether published samples were drawn with these steps."""
    return False

  @property
  def has_kernels(self) -> bool:
    """Whether p(x_i | x_0) is of its own making: models are then read at its steps alone.

    If not, it is the SDE's at t_i, and clean data at i = 0, where nothing can be learned.
    """
    return False

  @property
  def can_be_taken(self) -> bool:
    """Whether these steps exist; if not, `check` says why."""
    return True

  def check(self) -> None:
    """Raises ValueError if these steps do not exist."""

  def index(self, t: Times) -> Steps:
    """The step i, in 0 ... N - 1, that is nearest to time t; the inverse of `time`."""
    return self._clip(jnp.round(t / self.sde.T * (self.N - 1)))

  def time(self, i: Steps) -> Times:
    """t_i, the time of step i."""
    return i / (self.N - 1) * self.sde.T

  def marginal(self, i: Steps) -> tuple[PerTime, PerTime]:
    """alpha and sigma of the kernel p(x_i | x_0); by default the SDE's at t_i."""
    return self.sde.kernel(self.time(i))

  def kernel(self, t: Times) -> tuple[PerTime, PerTime]:
    """alpha and sigma of the kernel p(x_i | x_0) of the step i at time t."""
    return self.marginal(self.index(t))

  def discretize(self, x: Data, t: PerRow, i: StepPerRow) -> tuple[Data, PerRow]:
    """f and G of the step x_{i+1} = x_i + f_i(x_i) + G_i z_i (Appendix E).

    By default an Euler-Maruyama step of length T / N.

    Args:
      x: at this step.
      t: the time of a sampler at this step; in [0, T] as the chain's own times are, or in [eps, T].
        SMLD and DDPM do not read it.
      i: the step.
    """
    del i
    drift, diffusion = self.sde.sde(x, t)
    T = self.sde.T
    return T * drift / self.N, math.sqrt(T) * diffusion / math.sqrt(self.N)

  def ancestral(self, x: Data, score: Data, i: StepPerRow) -> tuple[Data, PerRow]:
    """Mean and standard deviation of the ancestral step from x_i to x_{i-1}.

    It is the posterior p(x_{i-1} | x_i, x_0) with x_0 estimated from the score (Appendix F). The
    step from i = 0 ends in clean data.
    """
    alpha_t, sigma_t = self.sde.kernel(self.time(i))
    alpha_s = jnp.where(i > 0, self.sde.alpha(self.time(i - 1)), 1.0)
    sigma_s = jnp.where(i > 0, self.sde.sigma(self.time(i - 1)), 0.0)
    ratio = alpha_t / alpha_s
    variance = sigma_t**2 - (ratio * sigma_s) ** 2  # of p(x_t | x_s)
    mean = (x + expand(variance, x) * score) / expand(ratio, x)
    # At i = 0 the sub-VP chain has sigma_t = 0 already, and nothing is left to do.
    return mean, jnp.where(i > 0, jnp.sqrt(variance) * sigma_s / sigma_t, 0.0)

  def langevin_alpha(self, i: Steps) -> PerTime:
    """alpha_i in the step size of a Langevin corrector (Algorithms 4 and 5)."""
    return jnp.ones(jnp.shape(i))

  def _clip(self, i: PerTime) -> Steps:
    return jnp.clip(i, 0, self.N - 1).astype(jnp.int32)


# The variance exploding SDE, and SMLD.


@dataclasses.dataclass(frozen=True)
class VESDE(SDE):
  """The variance exploding SDE (Eq. 9): sigma(t) = sigma_min (sigma_max / sigma_min)^t."""

  sigma_min: float = 0.01
  sigma_max: float = 50.0

  def __post_init__(self) -> None:
    if not 0 < self.sigma_min < self.sigma_max:
      raise ValueError(
        f'VESDE needs 0 < sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}'
      )

  @property
  def prior_std(self) -> float:
    return self.sigma_max

  def alpha(self, t: Times) -> PerTime:
    return jnp.ones_like(t)

  def sigma(self, t: Times) -> PerTime:
    return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

  def log_snr(self, t: Times) -> PerTime:
    return -math.log(self.sigma_min) - t * math.log(self.sigma_max / self.sigma_min)

  def log_snr_fall(self, s: Times, t: Times) -> PerTime:
    return (t - s) * math.log(self.sigma_max / self.sigma_min)

  def time_of_log_snr(self, log_snr: PerTime) -> Times:
    """t = -(lambda + log sigma_min) / log(sigma_max / sigma_min)."""
    return -(log_snr + math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)

  def drift_coef(self, t: Times) -> PerTime:
    return jnp.zeros_like(t)

  def diffusion_coef(self, t: Times) -> PerTime:
    return self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

  def chain(self, N: int) -> 'SMLD':
    return SMLD(self, N)


@dataclasses.dataclass(frozen=True)
class SMLD(Chain):
  """Score matching with Langevin dynamics: noise scales in geometric sequence from sigma_min on."""

  sde: VESDE

  @property
  def is_released(self) -> bool:
    return True

  @property
  def has_kernels(self) -> bool:
    return True

  @property
  def discrete_sigmas(self) -> PerStep:
    """The noise scales, ascending."""
    return self.sde.sigma(self.time(jnp.arange(self.N)))

  def discretize(self, x: Data, t: PerRow, i: StepPerRow) -> tuple[Data, PerRow]:
    """SMLD's step (Eq. 8): G_i^2 = sigma_i^2 - sigma_{i-1}^2, with sigma_{-1} = 0."""
    del t
    log_ratio = math.log(self.sde.sigma_max / self.sde.sigma_min) / (self.N - 1)  # of neighbours
    kept = jnp.where(i > 0, -math.expm1(-2 * log_ratio), 1.0)
    return jnp.zeros_like(x), self.sde.sigma(self.time(i)) * jnp.sqrt(kept)


# The variance preserving SDEs, and DDPM.


@dataclasses.dataclass(frozen=True)
class _LinearBeta(SDE):
  """What VP and sub-VP share: beta(t) = beta_min + t (beta_max - beta_min), and the mean."""

  beta_min: float = 0.1
  beta_max: float = 20.0

  def __post_init__(self) -> None:
    if not 0 < self.beta_min <= self.beta_max:
      raise ValueError(
        f'{type(self).__name__} needs 0 < beta_min <= beta_max; '
        f'got {self.beta_min} and {self.beta_max}'
      )

  @property
  def prior_std(self) -> float:
    return 1.0

  def beta(self, t: Times) -> PerTime:
    """beta(t)."""
    return self.beta_min + t * (self.beta_max - self.beta_min)

  def log_alpha(self, t: Times) -> PerTime:
    """log alpha(t): -1/2 of the integral of beta from 0 to t (Appendix C)."""
    return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

  def log_alpha_fall(self, s: Times, t: Times) -> PerTime:
    """log(alpha(s) / alpha(t)), without a difference of nearly equal numbers."""
    return (t - s) * (0.5 * self.beta_min + 0.25 * (t + s) * (self.beta_max - self.beta_min))

  def _log_variance_growth(self, s: Times, t: Times) -> PerTime:
    """log of (1 - alpha(t)^2) / (1 - alpha(s)^2), likewise."""
    log_alpha2 = 2 * self.log_alpha(s)
    kept = jnp.exp(log_alpha2) / -jnp.expm1(log_alpha2)
    return jnp.log1p(-kept * jnp.expm1(-2 * self.log_alpha_fall(s, t)))

  def time_of_log_alpha(self, log_alpha: PerTime) -> Times:
    """The time t at which `log_alpha` has the given value.

    The root of a quadratic equation, in the form that does not subtract.
    """
    b, c = 0.5 * self.beta_min, -log_alpha
    return 2 * c / (b + jnp.sqrt(b**2 + c * (self.beta_max - self.beta_min)))

  def alpha(self, t: Times) -> PerTime:
    return jnp.exp(self.log_alpha(t))

  def drift_coef(self, t: Times) -> PerTime:
    return -0.5 * self.beta(t)

  def chain(self, N: int) -> '_LinearBetaChain':
    return _LinearBetaChain(self, N)


@dataclasses.dataclass(frozen=True)
class VPSDE(_LinearBeta):
  """The variance preserving SDE (Eq. 11): alpha^2 + sigma^2 = 1."""

  def sigma(self, t: Times) -> PerTime:
    # expm1 keeps the digits that 1 - exp(.) loses near t = 0.
    return jnp.sqrt(-jnp.expm1(2 * self.log_alpha(t)))

  def log_snr(self, t: Times) -> PerTime:
    return self.log_alpha(t) - 0.5 * jnp.log(-jnp.expm1(2 * self.log_alpha(t)))

  def log_snr_fall(self, s: Times, t: Times) -> PerTime:
    return self.log_alpha_fall(s, t) + 0.5 * self._log_variance_growth(s, t)

  def time_of_log_snr(self, log_snr: PerTime) -> Times:
    """From alpha^2 = 1 / (1 + exp(-2 lambda)), so that log alpha = -1/2 log1p(exp(-2 lambda))."""
    return self.time_of_log_alpha(-0.5 * jax.nn.softplus(-2 * log_snr))

  def diffusion_coef(self, t: Times) -> PerTime:
    return jnp.sqrt(self.beta(t))

  def chain(self, N: int) -> 'DDPM':
    return DDPM(self, N)


@dataclasses.dataclass(frozen=True)
class subVPSDE(_LinearBeta):
  """The sub-VP SDE (Eq. 12): the mean of the VP SDE and a variance that is never larger."""

  def sigma(self, t: Times) -> PerTime:
    return -jnp.expm1(2 * self.log_alpha(t))

  def log_snr(self, t: Times) -> PerTime:
    return self.log_alpha(t) - jnp.log(-jnp.expm1(2 * self.log_alpha(t)))

  def log_snr_fall(self, s: Times, t: Times) -> PerTime:
    return self.log_alpha_fall(s, t) + self._log_variance_growth(s, t)

  def time_of_log_snr(self, log_snr: PerTime) -> Times:
    """From sigma / alpha = 1 / alpha - alpha = -2 sinh(log alpha) = exp(-lambda)."""
    return self.time_of_log_alpha(-jnp.arcsinh(0.5 * jnp.exp(-log_snr)))

  def diffusion_coef(self, t: Times) -> PerTime:
    return jnp.sqrt(-self.beta(t) * jnp.expm1(4 * self.log_alpha(t)))


@dataclasses.dataclass(frozen=True)
class _LinearBetaChain(Chain):
  """What the chains of VP and sub-VP share: beta_i = beta(t_i) / N."""

  sde: _LinearBeta

  @property
  def is_released(self) -> bool:
    return True

  @property
  def can_be_taken(self) -> bool:
    return self.sde.beta_max < self.N

  def check(self) -> None:
    """Raises ValueError if N <= beta_max, where 1 - beta_i would not stay positive."""
    if not self.can_be_taken:
      raise ValueError(
        f'the chain of {type(self.sde).__name__} needs more steps than beta_max, or 1 - beta_i '
        f'turns negative; got N = {self.N} and beta_max = {self.sde.beta_max}'
      )

  @property
  def discrete_betas(self) -> PerStep:
    """beta_i (Appendix B). Raises what `check` does."""
    self.check()
    return jnp.linspace(self.sde.beta_min / self.N, self.sde.beta_max / self.N, self.N)

  def langevin_alpha(self, i: Steps) -> PerTime:
    return 1.0 - self.discrete_betas[i]


@dataclasses.dataclass(frozen=True)
class DDPM(_LinearBetaChain):
  """Denoising diffusion probabilistic models: x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z."""

  sde: VPSDE

  @property
  def has_kernels(self) -> bool:
    return True

  @property
  def alphas_cumprod(self) -> PerStep:
    """alpha_i^2: product of 1 - beta_j for j <= i."""
    return jnp.exp(jnp.cumsum(jnp.log1p(-self.discrete_betas)))

  def index(self, t: Times) -> Steps:
    """The last step of the chain that is not after time t.

    Sampling from T to eps asks the network of DDPM between two steps; x has then the noise of
    the earlier one, to which the released code's truncation leads too.
    """
    place = t / self.sde.T * (self.N - 1)
    # The time of a step, rounded, may lie before it; that is relative, so that 0.999 stays 0.
    return self._clip(jnp.floor(place * (1 + 2 * jnp.finfo(place.dtype).eps)))

  def marginal(self, i: Steps) -> tuple[PerTime, PerTime]:
    log_alpha2 = jnp.cumsum(jnp.log1p(-self.discrete_betas))[i]
    return jnp.exp(0.5 * log_alpha2), jnp.sqrt(-jnp.expm1(log_alpha2))

  def discretize(self, x: Data, t: PerRow, i: StepPerRow) -> tuple[Data, PerRow]:
    """DDPM's step (Eq. 10)."""
    del t
    beta = self.discrete_betas[i]
    shrink = jnp.expm1(0.5 * jnp.log1p(-beta))  # sqrt(1 - beta) - 1
    return expand(shrink, x) * x, jnp.sqrt(beta)

  def ancestral(self, x: Data, score: Data, i: StepPerRow) -> tuple[Data, PerRow]:
    """DDPM's ancestral step (Eq. 4), whose variance is beta_i, not the posterior's."""
    beta = self.discrete_betas[i]
    mean = (x + expand(beta, x) * score) / expand(jnp.sqrt(1.0 - beta), x)
    return mean, jnp.sqrt(beta)


# What came after: EDM's choice of time, and the straight paths of flow matching.


@dataclasses.dataclass(frozen=True)
class EDMSDE(SDE):
  """The SDE of EDM: alpha = 1 and sigma(t) = t. Time is the standard deviation of the noise.

  Karras et al. 2022, https://arxiv.org/abs/2206.00364, Table 1: there sigma lies in [0.002, 80],
  of which 0.002 is the sampler's eps.
  """

  sigma_max: float = 80.0

  def __post_init__(self) -> None:
    if not self.sigma_max > 0:
      raise ValueError(f'EDMSDE needs sigma_max > 0; got {self.sigma_max}')

  @property
  def T(self) -> float:
    return self.sigma_max

  def alpha(self, t: Times) -> PerTime:
    return jnp.ones_like(t)

  def sigma(self, t: Times) -> PerTime:
    return t

  def log_snr_fall(self, s: Times, t: Times) -> PerTime:
    return jnp.log1p((t - s) / s)

  def time_of_log_snr(self, log_snr: PerTime) -> Times:
    return jnp.exp(-log_snr)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(SDE):
  """Straight paths between data and noise: alpha = 1 - t and sigma = t, on [0, T].

  Flow matching (Lipman et al. 2022, https://arxiv.org/abs/2210.02747) and rectified flow (Liu et
  al. 2022, https://arxiv.org/abs/2209.03003): the probability flow is x' = E[z - x_0 | x_t = x].

  At t = 1 nothing is left of the data: the log-SNR and the drift of the SDE are infinite there,
  though x' is not. So T lies before it; of x_0 a thousandth is then left.
  """

  t_max: float = 0.999

  def __post_init__(self) -> None:
    if not 0 < self.t_max < 1:
      raise ValueError(f'RectifiedFlow needs 0 < t_max < 1; got {self.t_max}')

  @property
  def T(self) -> float:
    return self.t_max

  def alpha(self, t: Times) -> PerTime:
    return 1 - t

  def sigma(self, t: Times) -> PerTime:
    return t

  def log_snr_fall(self, s: Times, t: Times) -> PerTime:
    return jnp.log1p((t - s) / (s * (1 - t)))

  def time_of_log_snr(self, log_snr: PerTime) -> Times:
    return jax.nn.sigmoid(-log_snr)

  def probability_flow(self, score_fn: ScoreFn, x: Data, t: PerRow) -> Data:
    """E[z - x_0 | x_t = x], asked of scores that know it: the score is infinite at t = 0."""
    velocity = getattr(score_fn, 'noise_minus_data', None)
    return velocity(x, t) if velocity else super().probability_flow(score_fn, x, t)
