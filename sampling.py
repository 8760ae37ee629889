"""Predictors, correctors, and the samplers that are made of them.

`PCSampler` is the predictor-corrector sampler (Algorithm 1 of https://arxiv.org/abs/2011.13456);
`ODESampler` solves the probability flow ODE with a black-box solver (Sec. 4.3). Later samplers are
in samplers/, and what a sampler is, in samplers/base.py.
"""

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Protocol

import flax
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from runtime.errors import UserError
from runtime.precision import full_precision
from samplers import base, ode, time_grids
from samplers.base import Constraint, Observer, Update
from samplers.langevin import langevin_step
from samplers.time_grids import Grid
from sde_lib import expand, ReverseSDE, ScoreFn, SDE


class Predictor(Protocol):
  """Moves x from time t to t - dt."""

  nfe: int  # score evaluations of one update
  own_steps: bool  # takes the steps of the SDE's chain, whatever dt is

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array, dt: Array) -> Update:
    """One step of the reverse process for x [B, ...] at times t [B]."""


class Corrector(Protocol):
  """Moves x towards p_t, at a fixed time t."""

  @property
  def nfe(self) -> int:
    """Score evaluations of one update."""

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array) -> Update:
    """Some steps of MCMC for x [B, ...] at times t [B]."""


@dataclasses.dataclass(frozen=True)
class EulerMaruyama:
  """x' = x - drift dt + diffusion sqrt(dt) z, with the reverse SDE's drift and diffusion."""

  nfe = 1
  own_steps = False

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array, dt: Array) -> Update:
    drift, diffusion = rsde.sde(x, t)
    x_mean = x - drift * dt
    z = jax.random.normal(rng, x.shape)
    return x_mean + expand(diffusion, x) * jnp.sqrt(dt) * z, x_mean


@dataclasses.dataclass(frozen=True)
class ReverseDiffusion:
  """x' = x - f(x) + G z: the reverse process, discretised as the forward one is (Appendix E)."""

  nfe = 1
  own_steps = True

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array, dt: Array) -> Update:
    del dt
    f, G = rsde.discretize(x, t)
    x_mean = x - f
    return x_mean + expand(G, x) * jax.random.normal(rng, x.shape), x_mean


@dataclasses.dataclass(frozen=True)
class AncestralSampling:
  """The ancestral step of the chain: DDPM's (Eq. 4), and its counterparts (Appendix F)."""

  nfe = 1
  own_steps = True

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array, dt: Array) -> Update:
    del dt
    x_mean, std = rsde.forward.ancestral(x, t, rsde.score_fn(x, t))
    return x_mean + expand(std, x) * jax.random.normal(rng, x.shape), x_mean


@dataclasses.dataclass(frozen=True)
class NoPredictor:
  """Leaves x where it is: samplers of correctors alone, such as annealed Langevin dynamics."""

  nfe = 0
  own_steps = False

  def update_fn(self, rng: Array, rsde: ReverseSDE, x: Array, t: Array, dt: Array) -> Update:
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
    return langevin_step(x, score, expand(step_size(score, z), x), z), None

  return jax.lax.scan(step, (x, x), jax.random.split(rng, n_steps))[0]


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
    grid: the times; uniform for predictors that take the steps of the chain.
  """

  sde: SDE
  predictor: Predictor
  corrector: Corrector
  probability_flow: bool = False
  noise_removal: bool = True
  grid: Grid = time_grids.uniform

  def __post_init__(self) -> None:
    if self.predictor.own_steps and self.grid is not time_grids.uniform:
      raise ValueError(
        f'{type(self.predictor).__name__} takes the steps of the chain, which are uniform in t; '
        'other time grids are for the predictor euler_maruyama'
      )

  def __call__(
    self,
    rng: Array,
    score_fn: ScoreFn,
    shape: tuple[int, ...],
    *,
    sharding: jax.sharding.Sharding | None = None,
    constraint: Constraint | None = None,
    observe: Observer | None = None,
  ) -> tuple[Array, int]:
    n = self.sde.N
    score_fn, constraint = base.as_pytree(score_fn), base.as_pytree(constraint)
    rng_prior, rng_steps = jax.random.split(rng)
    x = base.draw_prior(self.sde, rng_prior, shape, sharding)
    times = self.grid(self.sde, n)
    dts = -np.diff(times)
    dts = np.append(dts, dts[-1])  # the last step, from eps, leads to clean data

    def advance(state: Update, start: int, stop: int) -> Update:
      return _pc_segment(self, score_fn, constraint, rng_steps, times, dts, state, start, stop)

    x, x_mean = base.in_segments(advance, (x, x), n, observe)
    nfe = n * (self.predictor.nfe + self.corrector.nfe)
    if self.noise_removal and self.predictor.nfe:
      x = x_mean
    elif self.noise_removal:
      last = jax.random.fold_in(rng_steps, n)
      x, nfe = base.tweedie(self.sde, score_fn, constraint, last, x), nfe + 1
    base.show_samples(observe, x)
    return x, nfe


@partial(jax.jit, static_argnums=0)
def _pc_segment(sampler, score_fn, constraint, rng, times, dts, state, start, stop):
  rsde = sampler.sde.reverse(score_fn, sampler.probability_flow)

  def step(i: Array, state: Update) -> Update:
    x, _ = state
    rngs = jax.random.split(jax.random.fold_in(rng, i), 4)
    t = jnp.full(x.shape[:1], times[i])
    update = sampler.corrector.update_fn(rngs[0], rsde, x, t)
    x, _ = base.constrain(constraint, rngs[2], update, t)
    update = sampler.predictor.update_fn(rngs[1], rsde, x, t, dts[i])
    # As in the released code, what is known is put at time t after the predictor too.
    return base.constrain(constraint, rngs[3], update, t)

  return jax.lax.fori_loop(start, stop, step, state)


@dataclasses.dataclass(frozen=True)
class ODESampler:
  """Solves the probability flow ODE (Eq. 13) from T to sde.eps with adaptive steps.

  With `noise_removal`, one reverse diffusion step without noise at eps follows, as in the
  released code. `solver` is a key of `ode.SOLVERS`.
  """

  sde: SDE
  rtol: float = 1e-5
  atol: float = 1e-5
  noise_removal: bool = True
  solver: str = 'dopri5'

  def __call__(
    self,
    rng: Array,
    score_fn: ScoreFn,
    shape: tuple[int, ...],
    *,
    sharding: jax.sharding.Sharding | None = None,
    constraint: Constraint | None = None,
    observe: Observer | None = None,
  ) -> tuple[Array, int]:
    if constraint is not None:
      raise UserError('the sampler ode takes no constraint; choose another config.sampling.method')
    sde, score_fn = self.sde, base.as_pytree(score_fn)
    x = base.draw_prior(sde, rng, shape, sharding)
    until_end = observe and (lambda fraction, x: fraction < 1 and observe(fraction, x))
    x, nfe = ode.integrate(
      ProbabilityFlow(score_fn, sde), x, sde.T, sde.eps,
      rtol=self.rtol, atol=self.atol, solver=self.solver, observe=until_end,
    )  # fmt: skip
    if self.noise_removal:
      x, nfe = _remove_noise(sde, score_fn, x), nfe + 1
    base.show_samples(observe, x)
    return x, nfe


@flax.struct.dataclass
class ProbabilityFlow:
  """The drift (x [B, ...], t []) of the probability flow ODE, as a pytree of its arrays."""

  score_fn: ScoreFn
  sde: SDE = flax.struct.field(pytree_node=False)

  def __call__(self, x: Array, t: Array) -> Array:
    rsde = self.sde.reverse(self.score_fn, probability_flow=True)
    return rsde.sde(x, jnp.broadcast_to(t, x.shape[:1]))[0]


@partial(jax.jit, static_argnums=0)
@full_precision  # as the solution that it follows
def _remove_noise(sde, score_fn, x):
  f, _ = sde.reverse(score_fn).discretize(x, jnp.full(x.shape[:1], sde.eps))
  return x - f
