"""Exact likelihoods and encodings through the probability flow ODE (Sec. 4.3, Appendix D).

The ODE carries data at time eps to the prior at time T, one to one; how it changes volume on its
way gives the density of the data. Drift and divergence share one evaluation of the network and
its pullback.

The reverse SDE has a likelihood of its own, of which a bound is known that asks for the score at
random times alone, without an ODE and, in one of its forms, without derivatives.
"""

import dataclasses
from functools import partial
import math
from typing import Protocol

import flax
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Shaped
import numpy as np

from losses import hutchinson_score_matching, LikelihoodTimes
from runtime.errors import unknown
from runtime.precision import full_precision
from runtime.shapes import Data, Key, PerRow, Time
from samplers import ode
from samplers.base import as_pytree
from samplers.ode import Observer
from sampling import ProbabilityFlow
from sde_lib import check_eps, expand, ScoreFn, SDE

KeyOrKeys = Key | Shaped[Array, ' b']
Probes = Float[Array, 'n b *d']
Logp = Float[Array | np.ndarray, '*n b']  # also after it was fetched, in float64

_DRAW = {'rademacher': jax.random.rademacher, 'gaussian': jax.random.normal}
PROBES = (*_DRAW, 'exact')
FORMS = ('dsm', 'ssm')  # of the bound


class LogDensity(Protocol):
  """What estimates log p(x_0), or a bound on it, several times over."""

  def estimates(
    self, rng: KeyOrKeys, score_fn: ScoreFn, x0: Data
  ) -> tuple[Float[Array, 'n b'], int]:
    """n estimates for each x0, whose mean is that of all; and the evaluations of the score."""


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """log p(x_0), from the instantaneous change of variables (Eq. 39, Chen et al. 2018).

  log p_0(x(0)) = log p_T(x(T)) + int_0^T div f(x(t), t) dt along dx/dt = f(x, t), the probability
  flow, begun at eps. The divergence is the Skilling-Hutchinson estimate (Eq. 40), the mean of
  v^T (df/dx) v over probes v with E[v v^T] = I, which stay what they are along the way; or the
  exact trace, one pullback for each dimension.

  The whole batch takes the same adaptive steps, whose error is bounded in the root mean square;
  so a value depends on the rest of its batch, within the tolerance. Steps of its own for each image
  would mostly make that smaller, but in float32 not zero, and the slowest image may take half as
  many evaluations again as the batch does.

  Attributes:
    sde: the forward SDE.
    eps: the time that the data are taken to be at; 1e-5 in the released code.
    rtol, atol: relative and absolute tolerance of the solver.
    probe: one of `PROBES`.
    n_probes: how many probes are averaged; not read for the exact trace.

  Raises:
    UserError: for a probe that there is not.
    ValueError: unless 0 <= eps < T.
  """

  sde: SDE
  eps: float = 1e-5
  rtol: float = 1e-5
  atol: float = 1e-5
  probe: str = 'rademacher'
  n_probes: int = 1

  def __post_init__(self) -> None:
    if self.probe not in PROBES:
      raise unknown('probe', self.probe, PROBES)
    check_eps(self.sde, self.eps)

  def __call__(
    self, rng: KeyOrKeys, score_fn: ScoreFn, x0: Data, observe: Observer | None = None
  ) -> tuple[PerRow, Data, int]:
    """Evaluates the log-density of x0.

    Args:
      rng: the key of the probes; or keys, one for each of x0, whose probes are then the same
        in any batch.
      score_fn: the score; compiled code is reused if it is a pytree, as `ScoreModel.bind` gives.
      x0: the data, scaled as the network sees them.
      observe: told the fraction that is done, and (x, log-density so far) there.

    Returns:
      log p(x0) in nats, the latent x(T), and the number of evaluations of score and pullback.
    """
    each, z, nfe = self._of_probes(rng, score_fn, x0, observe)
    return each.mean(0), z, nfe

  def estimates(
    self, rng: KeyOrKeys, score_fn: ScoreFn, x0: Data
  ) -> tuple[Float[Array, 'n b'], int]:
    """log p(x0) by each probe: they share the flow, which does not depend on them."""
    each, _, nfe = self._of_probes(rng, score_fn, x0)
    return each, nfe

  def _of_probes(
    self, rng: KeyOrKeys, score_fn: ScoreFn, x0: Data, observe: Observer | None = None
  ) -> tuple[Float[Array, 'n b'], Data, int]:
    flow = ProbabilityFlow(as_pytree(score_fn), self.sde)
    state, probes = _begin(rng, x0, self.probe, self.n_probes)
    (z, changes), nfe = ode.integrate(
      VolumeChange(flow, probes), state, self.eps, self.sde.T,
      rtol=self.rtol, atol=self.atol, observe=observe,
    )  # fmt: skip
    return self.sde.prior_logp(z) + changes, z, nfe


@flax.struct.dataclass
class VolumeChange:
  """The drift of x and of int div f dt, as a pytree of its arrays.

  Of the latter there is one for each probe; or one in all, the trace, where the state has one.
  """

  flow: ProbabilityFlow
  probes: Probes

  def __call__(
    self, state: tuple[Data, Float[Array, 'n b']], t: Time
  ) -> tuple[Data, Float[Array, 'n b']]:
    drift, pullback = jax.vjp(lambda x: self.flow(x, t), state[0])
    (products,) = jax.vmap(pullback)(self.probes)
    traces = (products * self.probes).reshape(*self.probes.shape[:2], -1).sum(-1)
    return drift, traces if len(traces) == len(state[1]) else traces.mean(0, keepdims=True)


@partial(jax.jit, static_argnums=(2, 3))  # makes arrays that reach all processes
def _begin(rng, x0, probe, n):
  changes = 0 * x0.reshape(len(x0), -1)[:, 0]  # on the devices that x0 is on
  changes = jnp.broadcast_to(changes, (1 if probe == 'exact' else n, len(x0)))
  return (x0, changes), draw_probes(rng, x0, probe, n)


def draw_probes(rng: KeyOrKeys, x: Data, probe: str, n: int) -> Probes:
  """n probes for x; for the exact trace the D axes, each sqrt(D) long.

  The key is split in one for each row, unless they are given.
  """
  if probe == 'exact':
    dim = math.prod(x.shape[1:])
    axes = math.sqrt(dim) * jnp.eye(dim, dtype=x.dtype).reshape(dim, 1, *x.shape[1:])
    return jnp.broadcast_to(axes, (dim, *x.shape))
  rngs = _keys(rng, x)
  return jax.vmap(lambda rng: _DRAW[probe](rng, (n, *x.shape[1:]), x.dtype), out_axes=1)(rngs)


@dataclasses.dataclass(frozen=True)
class LikelihoodBound:
  """A lower bound on log p(x_0) of the reverse SDE, so an upper one on bits/dim, without an ODE.

  Song, Durkan, Murray & Ermon 2021, https://arxiv.org/abs/2101.09258, Theorem 3:

    -log p(x_0) <= E[-log pi(x_T)] - D log alpha(T)
                   + 1/2 int_eps^T (g / sigma)^2 E[||sigma s + z||^2 - ||z||^2] dt
                   + 1/2 E[||sigma s + z||^2 - ||z||^2] at t = eps

  with x_t = alpha x_0 + sigma z. The terms are the prior, whose expectation is known; the drift,
  whose divergence D f integrates to D log alpha; denoising; and the reconstruction of x_0 from
  x_eps by Tweedie's mean, with standard deviation sigma / alpha (their offset). If the score is
  exact, what is missing to log p(x_0) is only what x_T is not quite the prior, and what the last
  step is not quite Gaussian.

  In the form 'ssm' the expectation under the integral is E[2 sigma^2 v^T (ds/dx) v + ||sigma s||^2]
  for probes v of signs: the same by parts, with a derivative and without a regression on z.

  Times are drawn in proportion to (g / sigma)^2 (`LikelihoodTimes`), so that what is averaged is Z
  times a half of the bracket. To that, ||z||^2 - D is added as often as takes away most of the
  variance for data of standard deviation `sigma_data` around 0; its expectation is 0.

  Attributes:
    sde: the forward SDE.
    eps: the smallest time that the score is asked for.
    form: one of `FORMS`.
    n_times: for each x_0.
    n_groups: these are drawn in so many independent groups, each stratified; what differs between
      groups gives the standard error.
    sigma_data: of the control variate.

  Raises:
    UserError: for a form that there is not.
    ValueError: unless 0 < eps < T, and n_times is a multiple of n_groups, at least 2.
  """

  sde: SDE
  eps: float = 1e-5
  form: str = 'dsm'
  n_times: int = 100
  n_groups: int = 10
  sigma_data: float = 0.5

  def __post_init__(self) -> None:
    if self.form not in FORMS:
      raise unknown('form of the bound', self.form, FORMS)
    if self.n_groups < 2 or self.n_times < 1 or self.n_times % self.n_groups:
      raise ValueError(
        f'the times of a bound need at least 2 groups of one size; got {self.n_times} times in '
        f'{self.n_groups} groups'
      )
    LikelihoodTimes(self.sde, self.eps)

  def __call__(
    self, rng: KeyOrKeys, score_fn: ScoreFn, x0: Data, observe: Observer | None = None
  ) -> tuple[PerRow, PerRow, int]:
    """The bound on log p(x0) in nats, its standard error, and the evaluations of the score.

    Args:
      rng: a key; or keys, one for each of x0, whose bound is then the same in any batch.
      score_fn: the score; compiled code is reused if it is a pytree, as `ScoreModel.bind` gives.
      x0: the data, scaled as the network sees them.
      observe: told the fraction that is done, and (x0, the bounds of groups so far).
    """
    each, nfe = self._of_groups(rng, score_fn, x0, observe)
    return each.mean(0), each.std(0, ddof=1) / math.sqrt(self.n_groups), nfe

  def estimates(
    self, rng: KeyOrKeys, score_fn: ScoreFn, x0: Data
  ) -> tuple[Float[Array, 'n b'], int]:
    """The bound by each group of times, with noise of its own."""
    return self._of_groups(rng, score_fn, x0)

  def _of_groups(
    self, rng: KeyOrKeys, score_fn: ScoreFn, x0: Data, observe: Observer | None = None
  ) -> tuple[Float[Array, 'n b'], int]:
    score_fn, strata = as_pytree(score_fn), self.n_times // self.n_groups
    rngs, groups = _keys(rng, x0), []
    for group in range(self.n_groups):
      lost = _ends(self, score_fn, x0, rngs, group)
      for i in range(strata):
        lost = lost + _of_stratum(self, score_fn, x0, rngs, group, i)
      groups.append(-lost)
      if observe:
        observe((group + 1) / self.n_groups, (x0, groups))
    return jnp.stack(groups), self.n_times + self.n_groups

  def bracket(self, score_fn: ScoreFn, x0: Data, t: PerRow, z: Data, v: Data) -> PerRow:
    """||sigma s + z||^2 - ||z||^2, or what stands for it, at given times and noise.

    `v` are the probes of the form 'ssm'.
    """
    alpha, sigma = self.sde.kernel(t)
    x = expand(alpha, x0) * x0 + expand(sigma, x0) * z
    # sigma s + z is about kept z, and sigma s about (kept - 1) z, where data are of sigma_data.
    kept = 1 / (1 + jnp.square(sigma / alpha / self.sigma_data))
    surplus = _squares(z) - math.prod(x0.shape[1:])  # 0 on average
    if self.form == 'ssm':
      trace = 2 * sigma**2 * hutchinson_score_matching(score_fn, x, t, v)
      return trace - (1 - kept) ** 2 * surplus
    error = _squares(expand(sigma, x0) * score_fn(x, t) + z)
    return error - _squares(z) + (1 - kept**2) * surplus


def _squares(x: Data) -> PerRow:
  return jnp.square(x).reshape(len(x), -1).sum(-1)


def _keys(rng: KeyOrKeys, x: Data) -> Shaped[Array, ' b']:
  return rng if rng.ndim else jax.random.split(rng, len(x))


@partial(jax.jit, static_argnums=0)
@full_precision
def _ends(bound, score_fn, x0, rngs, group):
  """What the prior, the drift and the reconstruction from x_eps take from log p(x0)."""
  sde, ones = bound.sde, jnp.ones(len(x0), x0.dtype)
  alpha, sigma = sde.kernel(sde.T * ones)
  prior = sde.prior_cross_entropy(expand(alpha, x0) * x0, sigma)
  z, v, _ = _noise(rngs, group, -1, x0)
  denoising = dataclasses.replace(bound, form='dsm')  # whatever the form of what is between
  last = denoising.bracket(score_fn, x0, bound.eps * ones, z, v)
  return prior - math.prod(x0.shape[1:]) * jnp.log(alpha) + 0.5 * last


@partial(jax.jit, static_argnums=0)
@full_precision
def _of_stratum(bound, score_fn, x0, rngs, group, i):
  """The share of the i-th time of a group in what the way from eps to T takes."""
  law, strata = LikelihoodTimes(bound.sde, bound.eps), bound.n_times // bound.n_groups
  z, v, u = _noise(rngs, group, i, x0)
  t = law.quantile((u + i / strata) % 1)
  return 0.5 * law.total / strata * bound.bracket(score_fn, x0, t, z, v)


def _noise(rngs, group, i, x0):
  """Of each row: normal noise, signs, and what is added to the strata of its group."""

  def of_row(rng):
    rng_group = jax.random.fold_in(rng, group)
    rng_z, rng_v = jax.random.split(jax.random.fold_in(rng_group, 1 + i))
    shape = x0.shape[1:]
    z, v = jax.random.normal(rng_z, shape), jax.random.rademacher(rng_v, shape, x0.dtype)
    return z, v, jax.random.uniform(rng_group)

  return jax.vmap(of_row)(rngs)


def bits_per_dim(logp: Logp, dim: int, level_width: float) -> Logp:
  """Negative log-likelihood in bits per dimension of data that have levels.

  The density per level is smaller than that of the scaled data by the width of a level, in each of
  the `dim` dimensions, which adds -log2 of it. The 256 levels of a pixel are 1/256 wide in [0, 1],
  which makes 8 bits, and 2/256 in [-1, 1], which makes 7; see `Codec.level_width`.
  """
  return -logp / (dim * math.log(2)) - math.log2(level_width)


@jax.jit
def importance_weighted(
  logp: Float[Array, 'k n b'], log_q: Float[Array, 'k b']
) -> Float[Array, 'n b']:
  """log P of images by K samples of the noise between their levels, each with its density log q.

  With p(x) the density per level at x = y + u, and u of the law q, the mean over K of p(x) / q(u)
  has the expectation P(y), so that of its logarithm is a lower bound on log P(y), which more
  samples tighten; for K = 1 it is log p - log q (Burda et al. 2016,
  https://arxiv.org/abs/1509.00519). Uniform noise has log q = 0.

  Of each log p there are n estimates, by n probes or draws that all K samples have in common. Their
  mean is what counts as log p; the n results, whose mean that gives, differ as the estimates
  of the samples do, weighted by p / q. Noise of the estimates that is the same for all K drops out
  of the weights. What is not raises the result, by half of its variance at most.
  """
  if len(log_q) == 1:
    return logp[0] - log_q[0]
  mean = logp.mean(1)
  weights = jax.nn.softmax(mean - log_q, axis=0)
  whole = jax.nn.logsumexp(mean - log_q, axis=0) - math.log(len(log_q))
  return whole + (weights[:, None] * (logp - mean[:, None])).sum(0)


def encode(
  sde: SDE,
  score_fn: ScoreFn,
  x0: Data,
  eps: float = 1e-5,
  rtol: float = 1e-5,
  atol: float = 1e-5,
) -> tuple[Data, int]:
  """The latent x(T) of data x0, taken to be x(eps), and the score evaluations.

  It is unique to them (Sec. 4.3).
  """
  flow = ProbabilityFlow(as_pytree(score_fn), sde)
  return ode.integrate(flow, x0, eps, sde.T, rtol=rtol, atol=atol)


def decode(
  sde: SDE,
  score_fn: ScoreFn,
  z: Data,
  eps: float = 1e-5,
  rtol: float = 1e-5,
  atol: float = 1e-5,
) -> tuple[Data, int]:
  """The data x(eps) of latents z, and the number of score evaluations."""
  flow = ProbabilityFlow(as_pytree(score_fn), sde)
  return ode.integrate(flow, z, sde.T, eps, rtol=rtol, atol=atol)


def interpolate(z0: Data, z1: Data, weight: PerRow) -> Data:
  """Spherical interpolation between latents z0 and z1, with a weight of z1.

  Latents are almost Gaussian, of almost the same norm; between them on a straight line there are
  none. Scaling latents by less than one lowers the paper's temperature (Appendix D.4, Fig. 6).
  """
  flat0, flat1 = (z.reshape(z.shape[0], -1) for z in (z0, z1))
  norms = jnp.linalg.norm(flat0, axis=-1) * jnp.linalg.norm(flat1, axis=-1)
  angle = jnp.arccos(jnp.clip((flat0 * flat1).sum(-1) / norms, -1.0, 1.0))
  # sin(w a) / sin(a), which is w for latents in the same direction.
  share0, share1 = (
    w * jnp.sinc(w * angle / jnp.pi) / jnp.sinc(angle / jnp.pi) for w in (1 - weight, weight)
  )
  return expand(share0, z0) * z0 + expand(share1, z1) * z1
