"""Predictors, correctors, and the samplers that are made of them.

`PCSampler` is the predictor-corrector sampler (Algorithm 1 of https://arxiv.org/abs/2011.13456);
`ODESampler` solves the probability flow ODE with a black-box solver (Sec. 4.3). Both are called
with (rng, score_fn, shape) and return the samples and the number of score evaluations. Both run
on the device, in compiled segments between which they report how far they are.
"""

from collections.abc import Callable
import dataclasses
from functools import cache, partial
from typing import Protocol

import flax
import jax
from jax import Array
import jax.numpy as jnp

import ode
from ode import Progress
from sde_lib import expand, ReverseSDE, ScoreFn, SDE

Update = tuple[Array, Array]  # the new x, and its mean before noise was added

SEGMENTS = 100  # that a run of the predictor-corrector sampler is cut into


class Predictor(Protocol):
  """Moves x from time t to t - dt."""

  nfe: int  # score evaluations of one update

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array, dt: float) -> Update:
    """One step of the reverse process for x [B, ...] at times t [B]."""


class Corrector(Protocol):
  """Moves x towards p_t, at a fixed time t."""

  nfe: int  # score evaluations of one update

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array) -> Update:
    """Some steps of MCMC for x [B, ...] at times t [B]."""


@dataclasses.dataclass(frozen=True)
class EulerMaruyama:
  """x' = x - drift dt + diffusion sqrt(dt) z, with the reverse SDE's drift and diffusion."""

  nfe = 1

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array, dt: float) -> Update:
    drift, diffusion = rsde.sde(x, t)
    x_mean = x - drift * dt
    z = jax.random.normal(rng, x.shape)
    return x_mean + expand(diffusion, x) * jnp.sqrt(dt) * z, x_mean


@dataclasses.dataclass(frozen=True)
class ReverseDiffusion:
  """x' = x - f(x) + G z: the reverse process, discretised as the forward one is (Appendix E)."""

  nfe = 1

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array, dt: float) -> Update:
    del dt  # the chain has its own step
    f, G = rsde.discretize(x, t)
    x_mean = x - f
    return x_mean + expand(G, x) * jax.random.normal(rng, x.shape), x_mean


@dataclasses.dataclass(frozen=True)
class AncestralSampling:
  """The ancestral step of the chain: DDPM's (Eq. 4), and its counterparts (Appendix F)."""

  nfe = 1

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array, dt: float) -> Update:
    del dt  # the chain has its own step
    x_mean, std = rsde.forward.ancestral(x, t, rsde.score_fn(x, t))
    return x_mean + expand(std, x) * jax.random.normal(rng, x.shape), x_mean


@dataclasses.dataclass(frozen=True)
class NoPredictor:
  """Leaves x where it is: samplers of correctors alone, such as annealed Langevin dynamics."""

  nfe = 0

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array, dt: float) -> Update:
    del rng, rsde, t, dt
    return x, x


@dataclasses.dataclass(frozen=True)
class Langevin:
  """Langevin dynamics whose steps keep the signal-to-noise ratio `snr` (Algorithms 4 and 5).

  Norms are means over the whole batch, wherever its parts lie.
  """

  snr: float
  n_steps: int

  @property
  def nfe(self) -> int:
    return self.n_steps

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array) -> Update:
    alpha = rsde.forward.langevin_alpha(t)

    def step_size(score: Array, z: Array) -> Array:
      return 2 * alpha * (self.snr * _mean_norm(z) / _mean_norm(score)) ** 2

    return _langevin_steps(rng, rsde.score_fn, x, t, step_size, self.n_steps)


@dataclasses.dataclass(frozen=True)
class AnnealedLangevin:
  """Annealed Langevin dynamics of NCSN: the step size is 2 alpha (snr std)^2.

  From Algorithm 1 of Song & Ermon 2019, https://arxiv.org/abs/1907.05600.
  """

  snr: float
  n_steps: int

  @property
  def nfe(self) -> int:
    return self.n_steps

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array) -> Update:
    size = 2 * rsde.forward.langevin_alpha(t) * (self.snr * rsde.forward.sigma(t)) ** 2
    return _langevin_steps(rng, rsde.score_fn, x, t, lambda score, z: size, self.n_steps)


@dataclasses.dataclass(frozen=True)
class NoCorrector:
  """Leaves x as it is: samplers of predictors alone."""

  nfe = 0

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array) -> Update:
    del rng, rsde, t
    return x, x


PREDICTORS: dict[str, Callable[[], Predictor]] = {
  'euler_maruyama': EulerMaruyama,
  'reverse_diffusion': ReverseDiffusion,
  'ancestral_sampling': AncestralSampling,
  'none': NoPredictor,
}
CORRECTORS: dict[str, Callable[[float, int], Corrector]] = {
  'langevin': Langevin,
  'ald': AnnealedLangevin,
  'none': lambda snr, n_steps: NoCorrector(),
}


def _mean_norm(x: Array) -> Array:
  """The mean over the batch of the Euclidean norms."""
  return jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=-1).mean()


def _langevin_steps(
  rng: Array,
  score_fn: ScoreFn,
  x: Array,
  t: Array,
  step_size: Callable[[Array, Array], Array],
  n_steps: int,
) -> Update:
  """`n_steps` of x' = x + h s(x, t) + sqrt(2 h) z, with h = step_size(s, z) [B]."""

  def step(carry: Update, rng: Array) -> tuple[Update, None]:
    x, _ = carry
    score, z = score_fn(x, t), jax.random.normal(rng, x.shape)
    h = expand(step_size(score, z), x)
    x_mean = x + h * score
    return (x_mean + jnp.sqrt(2 * h) * z, x_mean), None

  return jax.lax.scan(step, (x, x), jax.random.split(rng, n_steps))[0]


class Sampler(Protocol):
  """Draws samples."""

  def __call__(
    self,
    rng: Array,
    score_fn: ScoreFn,
    shape: tuple[int, ...],
    *,
    sharding: jax.sharding.Sharding | None = None,
    progress: Progress | None = None,
  ) -> tuple[Array, int]:
    """Draws samples of `shape` [B, ...].

    Args:
      rng: the key that the samples are a function of, however they are cut or sharded.
      score_fn: the score; compiled code is reused if it is a pytree, as `ScoreModel.bind` gives.
      shape: shape of the batch of samples.
      sharding: where to put the samples; by default where JAX would.
      progress: called with the fraction that is done, 0 to 1.

    Returns:
      The samples, and the number of score evaluations that each took.
    """


@dataclasses.dataclass(frozen=True)
class PCSampler:
  """The predictor-corrector sampler (Algorithm 1): sde.N steps from time T to sde.eps.

  As in the released code, at every time the corrector comes first, and then the predictor.

  Attributes:
    sde: the forward SDE; its N is the number of steps, its eps the last time.
    predictor: moves from one time to the next.
    corrector: improves x at each time.
    probability_flow: let the predictor follow the probability flow ODE.
    noise_removal: return the mean of the last predictor step instead of its sample; a sampler
      without a predictor takes one step of Tweedie's formula.
  """

  sde: SDE
  predictor: Predictor
  corrector: Corrector
  probability_flow: bool = False
  noise_removal: bool = True

  def __call__(
    self,
    rng: Array,
    score_fn: ScoreFn,
    shape: tuple[int, ...],
    *,
    sharding: jax.sharding.Sharding | None = None,
    progress: Progress | None = None,
  ) -> tuple[Array, int]:
    score_fn, n = _as_pytree(score_fn), self.sde.N
    rng_prior, rng_steps = jax.random.split(rng)
    x = x_mean = _prior(self.sde, rng_prior, shape, sharding)
    length = -(-n // SEGMENTS)
    for start in range(0, n, length):
      stop, previous = min(start + length, n), x
      x, x_mean = _pc_segment(self, score_fn, rng_steps, x, x_mean, start, stop)
      if progress:
        # The next segment is under way while the last one is waited for.
        jax.block_until_ready(previous)
        progress(start / n)
    if progress:
      jax.block_until_ready(x)
      progress(1.0)
    nfe = n * (self.predictor.nfe + self.corrector.nfe)
    if not self.noise_removal:
      return x, nfe
    if self.predictor.nfe:
      return x_mean, nfe
    return _tweedie(self.sde, score_fn, x), nfe + 1


@partial(jax.jit, static_argnums=0)
def _pc_segment(sampler, score_fn, rng, x, x_mean, start, stop):
  sde = sampler.sde
  rsde = sde.reverse(score_fn, sampler.probability_flow)
  times = jnp.linspace(sde.T, sde.eps, sde.N)
  dt = (sde.T - sde.eps) / (sde.N - 1)

  def step(i: Array, carry: Update) -> Update:
    x, _ = carry
    rng_corrector, rng_predictor = jax.random.split(jax.random.fold_in(rng, i))
    t = jnp.full(x.shape[:1], times[i])
    x, _ = sampler.corrector.update_fn(rng_corrector, rsde, x, t)
    return sampler.predictor.update_fn(rng_predictor, rsde, x, t, dt)

  return jax.lax.fori_loop(start, stop, step, (x, x_mean))


@dataclasses.dataclass(frozen=True)
class ODESampler:
  """Solves the probability flow ODE (Eq. 13) from T to sde.eps with adaptive steps.

  With `noise_removal`, one reverse diffusion step without noise at eps follows, as in the
  released code.
  """

  sde: SDE
  rtol: float = 1e-5
  atol: float = 1e-5
  noise_removal: bool = True

  def __call__(
    self,
    rng: Array,
    score_fn: ScoreFn,
    shape: tuple[int, ...],
    *,
    sharding: jax.sharding.Sharding | None = None,
    progress: Progress | None = None,
  ) -> tuple[Array, int]:
    sde, score_fn = self.sde, _as_pytree(score_fn)
    x = _prior(sde, rng, shape, sharding)
    x, nfe = ode.integrate(
      ProbabilityFlow(score_fn, sde), x, sde.T, sde.eps,
      rtol=self.rtol, atol=self.atol, progress=progress,
    )  # fmt: skip
    if not self.noise_removal:
      return x, nfe
    return _remove_noise(sde, score_fn, x), nfe + 1


@flax.struct.dataclass
class ProbabilityFlow:
  """The drift (x [B, ...], t []) of the probability flow ODE, as a pytree of its arrays."""

  score_fn: ScoreFn
  sde: SDE = flax.struct.field(pytree_node=False)

  def __call__(self, x: Array, t: Array) -> Array:
    rsde = self.sde.reverse(self.score_fn, probability_flow=True)
    return rsde.sde(x, jnp.broadcast_to(t, x.shape[:1]))[0]


def _as_pytree(score_fn: ScoreFn) -> ScoreFn:
  """A plain function, made into what jitted code accepts as an argument."""
  plain = jax.tree_util.all_leaves([score_fn])
  return jax.tree_util.Partial(score_fn) if plain else score_fn


def _prior(sde: SDE, rng: Array, shape: tuple[int, ...], sharding) -> Array:
  return _draw(sde, sharding)(rng, shape)


@cache  # or every run would compile it again
def _draw(sde: SDE, sharding) -> Callable[[Array, tuple[int, ...]], Array]:
  return jax.jit(sde.prior_sampling, static_argnums=1, out_shardings=sharding)


@partial(jax.jit, static_argnums=0)
def _tweedie(sde, score_fn, x):
  return sde.reverse(score_fn).denoise(x, jnp.full(x.shape[:1], sde.eps))


@partial(jax.jit, static_argnums=0)
def _remove_noise(sde, score_fn, x):
  f, _ = sde.reverse(score_fn).discretize(x, jnp.full(x.shape[:1], sde.eps))
  return x - f
