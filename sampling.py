"""Predictors, correctors, and the samplers that are made of them.

`PCSampler` is the predictor-corrector sampler (Algorithm 1 of https://arxiv.org/abs/2011.13456);
`ODESampler` solves the probability flow ODE with a black-box solver (Sec. 4.3). Later samplers are
in samplers/, and what a sampler is, in samplers/base.py.
"""

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Protocol, runtime_checkable

import flax
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int

from runtime.errors import UserError
from runtime.precision import products_at
from runtime.shapes import Data, Key, PerRow, Time
from samplers import base, ode, time_grids
from samplers.base import Constraint, Observer, Update
from samplers.langevin import langevin_step
from samplers.steps import ChainStep, GridStep, Step
from samplers.time_grids import TimeGrid
from sde_lib import Chain, check_eps, expand, ReverseSDE, ScoreFn, SDE


@runtime_checkable
class Predictor(Protocol):
  """Moves x from one time of a grid to the next."""

  nfe: int  # score evaluations of one update

  def update_fn(self, rng: Key, rsde: ReverseSDE, x: Data, step: Step) -> Update:
    """One step of the reverse process for x, from times step.t."""


@runtime_checkable
class Corrector(Protocol):
  """Moves x towards p_t, at the time t where a step begins."""

  @property
  def nfe(self) -> int:
    """Score evaluations of one update."""

  def update_fn(self, rng: Key, rsde: ReverseSDE, x: Data, step: Step) -> Update:
    """Some steps of MCMC for x at times step.t."""


@dataclasses.dataclass(frozen=True)
class EulerMaruyama:
  """x' = x - drift dt + diffusion sqrt(dt) z, with the reverse SDE's drift and diffusion."""

  nfe = 1

  def update_fn(self, rng: Key, rsde: ReverseSDE, x: Data, step: Step) -> Update:
    drift, diffusion = rsde.sde(x, step.t)
    x_mean = x - drift * expand(step.dt, x)
    z = jax.random.normal(rng, x.shape)
    return x_mean + expand(diffusion, x) * expand(jnp.sqrt(step.dt), x) * z, x_mean


@dataclasses.dataclass(frozen=True)
class ReverseDiffusion:
  """x' = x - f(x) + G z: the reverse process, discretised as the forward one is (Appendix E)."""

  nfe = 1

  def update_fn(self, rng: Key, rsde: ReverseSDE, x: Data, step: Step) -> Update:
    f, G = rsde.of_forward(x, step.t, *step.discretize(x))
    x_mean = x - f
    return x_mean + expand(G, x) * jax.random.normal(rng, x.shape), x_mean


@dataclasses.dataclass(frozen=True)
class AncestralSampling:
  """Draws from p(x_s | x_t, x_0): DDPM's ancestral step (Eq. 4) and its kin (Appendix F)."""

  nfe = 1

  def update_fn(self, rng: Key, rsde: ReverseSDE, x: Data, step: Step) -> Update:
    x_mean, std = step.ancestral(x, rsde.score_fn(x, step.t))
    return x_mean + expand(std, x) * jax.random.normal(rng, x.shape), x_mean


@dataclasses.dataclass(frozen=True)
class NoPredictor:
  """Leaves x where it is: samplers of correctors alone, such as annealed Langevin dynamics."""

  nfe = 0

  def update_fn(self, rng: Key, rsde: ReverseSDE, x: Data, step: Step) -> Update:
    del rng, rsde, step
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

  def update_fn(self, rng: Key, rsde: ReverseSDE, x: Data, step: Step) -> Update:
    alpha = step.langevin_alpha

    def step_size(score: Data, z: Data) -> PerRow:
      return 2 * alpha * (self.snr * _mean_norm(z) / _mean_norm(score)) ** 2

    return _langevin_steps(rng, rsde.score_fn, x, step.t, step_size, self.n_steps)


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

  def update_fn(self, rng: Key, rsde: ReverseSDE, x: Data, step: Step) -> Update:
    size = 2 * step.langevin_alpha * (self.snr * rsde.forward.sigma(step.t)) ** 2
    return _langevin_steps(rng, rsde.score_fn, x, step.t, lambda score, z: size, self.n_steps)


@dataclasses.dataclass(frozen=True)
class NoCorrector:
  """Leaves x as it is: samplers of predictors alone."""

  nfe = 0

  def update_fn(self, rng: Key, rsde: ReverseSDE, x: Data, step: Step) -> Update:
    del rng, rsde, step
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


def _mean_norm(x: Data) -> Float[Array, '']:
  """The mean over the batch of the Euclidean norms."""
  return jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=-1).mean()


def _langevin_steps(
  rng: Key,
  score_fn: ScoreFn,
  x: Data,
  t: PerRow,
  step_size: Callable[[Data, Data], PerRow],
  n_steps: int,
) -> Update:
  """`n_steps` of x' = x + h s(x, t) + sqrt(2 h) z, with h = step_size(s, z)."""

  def step(carry: Update, rng: Key) -> tuple[Update, None]:
    x, _ = carry
    score, z = score_fn(x, t), jax.random.normal(rng, x.shape)
    return langevin_step(x, score, expand(step_size(score, z), x), z), None

  return jax.lax.scan(step, (x, x), jax.random.split(rng, n_steps))[0]


@dataclasses.dataclass(frozen=True)
class PCSampler:
  """The predictor-corrector sampler (Algorithm 1) over the n times of a grid, from T to eps.

  As in the released code, at every time the corrector comes first, and then the predictor. The
  last step, from eps, ends in clean data by Tweedie's formula, x_0 = (x + sigma^2 s(x)) / alpha.

  On the grid of N equal steps that a model was trained with, published samples were drawn by the
  steps of its chain, the last one too: that is what `chain` is for.

  Attributes:
    sde: the forward SDE.
    predictor: moves from one time to the next.
    corrector: improves x at each time.
    grid: the times.
    probability_flow: let the predictor follow the probability flow ODE.
    noise_removal: take the last step; with a chain, return the mean of its last step instead of a
      sample, or take Tweedie's if there is no predictor.
    chain: whose released steps are taken; None for the steps of any grid.

  Raises:
    ValueError: for times that are not the chain's, or steps that it cannot take.
  """

  sde: SDE
  predictor: Predictor
  corrector: Corrector
  grid: TimeGrid
  probability_flow: bool = False
  noise_removal: bool = True
  chain: Chain | None = None

  def __post_init__(self) -> None:
    check_eps(self.sde, self.grid.eps)
    if self.chain is None:
      return
    self.chain.check()
    own = self.chain.sde == self.sde and self.grid.n == self.chain.N
    if not own or self.grid.spacing is not time_grids.uniform:
      raise ValueError(
        f'the chain of {self.chain.N} steps of {self.chain.sde} has as many times, uniform in t; '
        f'got {self.grid} of {self.sde}'
      )

  def __call__(
    self,
    rng: Key,
    score_fn: ScoreFn,
    shape: tuple[int, ...],
    *,
    sharding: jax.sharding.Sharding | None = None,
    constraint: Constraint | None = None,
    observe: Observer | None = None,
  ) -> tuple[Data, int]:
    score_fn, constraint = base.as_pytree(score_fn), base.as_pytree(constraint)
    rng_prior, rng_steps = jax.random.split(rng)
    x = base.draw_prior(self.sde, rng_prior, shape, sharding)
    times = self.grid.times(self.sde)
    steps: Step
    if self.chain:
      steps, n = ChainStep.of_chain(self.chain, times), self.grid.n
    else:
      steps, n = GridStep.of_grid(self.sde, times), self.grid.n - 1

    def advance(state: Update, start: int, stop: int) -> Update:
      return _pc_segment(self, score_fn, constraint, rng_steps, steps, state, start, stop)

    x, x_mean = base.in_segments(advance, (x, x), n, observe)
    nfe = n * (self.predictor.nfe + self.corrector.nfe)
    if not self.chain:
      x = _correct_at_eps(self, score_fn, constraint, rng_steps, steps, x)
      nfe += self.corrector.nfe
    if self.noise_removal and self.chain and self.predictor.nfe:
      last = jax.random.fold_in(rng_steps, self.grid.n)
      x = _constrain_clean(constraint, last, x_mean)
    elif self.noise_removal:
      last = jax.random.fold_in(rng_steps, self.grid.n)
      x, nfe = base.tweedie(self.sde, self.grid.eps, score_fn, constraint, last, x), nfe + 1
    base.show_samples(observe, x)
    return x, nfe


@partial(jax.jit, static_argnums=0)
def _pc_segment(sampler, score_fn, constraint, rng, steps, state, start, stop):
  rsde = sampler.sde.reverse(score_fn, sampler.probability_flow)

  def take(i: Array | int, state: Update) -> Update:
    x, _ = state
    rngs = jax.random.split(jax.random.fold_in(rng, i), 4)
    step = _step_of_each(steps, i, x)
    update = sampler.corrector.update_fn(rngs[0], rsde, x, step)
    x, _ = base.constrain(constraint, rngs[2], update, step.t)
    update = sampler.predictor.update_fn(rngs[1], rsde, x, step)
    return base.constrain(constraint, rngs[3], update, step.known_at)

  return jax.lax.fori_loop(start, stop, take, state)


_constrain_clean = jax.jit(base.constrain_clean)


@partial(jax.jit, static_argnums=0)
def _correct_at_eps(sampler, score_fn, constraint, rng, steps, x):
  """The corrector at the last time of a grid, of which no predictor step begins."""
  last = sampler.grid.n - 1
  rngs = jax.random.split(jax.random.fold_in(rng, last), 4)
  step = _step_of_each(steps, last, x)
  update = sampler.corrector.update_fn(rngs[0], sampler.sde.reverse(score_fn), x, step)
  return base.constrain(constraint, rngs[2], update, step.t)[0]


def _step_of_each(steps: Step, i: Int[Array, ''] | int, x: Data) -> Step:
  """Step i of n `steps`, for each row of x."""
  return jax.tree.map(lambda v: jnp.full(x.shape[:1], jnp.asarray(v)[i]), steps)


@dataclasses.dataclass(frozen=True)
class ODESampler:
  """Solves the probability flow ODE (Eq. 13) from T to eps with adaptive steps.

  With `noise_removal`, one step of Tweedie's formula follows; or, with a chain, the mean of its
  last reverse diffusion step, as in the released code. `solver` is a key of `ode.SOLVERS`.
  """

  sde: SDE
  eps: float
  rtol: float = 1e-5
  atol: float = 1e-5
  noise_removal: bool = True
  solver: str = 'dopri5'
  chain: Chain | None = None

  def __post_init__(self) -> None:
    check_eps(self.sde, self.eps)
    if self.chain:
      self.chain.check()

  def __call__(
    self,
    rng: Key,
    score_fn: ScoreFn,
    shape: tuple[int, ...],
    *,
    sharding: jax.sharding.Sharding | None = None,
    constraint: Constraint | None = None,
    observe: Observer | None = None,
  ) -> tuple[Data, int]:
    if constraint is not None:
      raise UserError('the sampler ode takes no constraint; choose another config.sampling.method')
    sde, score_fn = self.sde, base.as_pytree(score_fn)
    x = base.draw_prior(sde, rng, shape, sharding)
    until_end = observe and (lambda fraction, x: fraction < 1 and observe(fraction, x))
    x, nfe = ode.integrate(
      ProbabilityFlow(score_fn, sde), x, sde.T, self.eps,
      rtol=self.rtol, atol=self.atol, solver=self.solver, observe=until_end,
    )  # fmt: skip
    if self.noise_removal:
      nfe += 1
      with products_at('highest'):  # as the solution that it follows
        if self.chain:
          x = _mean_of_last_chain_step(self.chain, self.eps, score_fn, x)
        else:
          x = base.tweedie(sde, self.eps, score_fn, None, rng, x)
    base.show_samples(observe, x)
    return x, nfe


@flax.struct.dataclass
class ProbabilityFlow:
  """The drift of the probability flow ODE, as a pytree of its arrays."""

  score_fn: ScoreFn
  sde: SDE = flax.struct.field(pytree_node=False)

  def __call__(self, x: Data, t: Time) -> Data:
    return self.sde.probability_flow(self.score_fn, x, jnp.broadcast_to(t, x.shape[:1]))


@partial(jax.jit, static_argnums=(0, 1))
def _mean_of_last_chain_step(chain, eps, score_fn, x):
  t, i = jnp.full(x.shape[:1], eps), jnp.zeros(x.shape[:1], jnp.int32)
  f, _ = chain.sde.reverse(score_fn).of_forward(x, t, *chain.discretize(x, t, i))
  return x - f
