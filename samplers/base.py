"""What a sampler is, and what all samplers share: the loop on the device, and the last step.

A sampler runs on the device, in compiled segments between which an observer sees how far it is and
the samples there, and a run can be interrupted. Most fast samplers are a `Solver` that takes the
steps of a time grid, which `GridSampler` walks down.
"""

from collections.abc import Callable
import dataclasses
from functools import cache, partial
from typing import Any, overload, Protocol, runtime_checkable

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from runtime.shapes import Data, HostTimes, Key, PerRow, Time
from samplers.ode import Observer
from samplers.time_grids import TimeGrid
from sde_lib import check_eps, ScoreFn, SDE

Update = tuple[Data, Data]  # the new x, and its mean before noise was added

# (rng, update, t) -> update: makes x, and its mean, agree with what is known of them at time t.
# A pytree of its arrays, as the score is.
Constraint = Callable[[Key, Update, PerRow], Update]

Denoiser = Callable[[Data, Time], Data]  # (x, t) -> E[x_0 | x_t = x]
Coefficients = dict[str, Float[np.ndarray, ' steps ...']]  # between one time more
OfStep = dict[str, Float[Array, ' ...']]  # those of one step
Memory = Any  # what a solver takes along from step to step, a tree of arrays

SEGMENTS = 100  # that a run of a fixed number of steps is cut into


@runtime_checkable
class Sampler(Protocol):
  """Draws samples."""

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
    """Draws samples of `shape`, a batch's.

    Args:
      rng: the key that the samples are a function of, however they are cut or sharded.
      score_fn: the score; compiled code is reused if it is a pytree, as `ScoreModel.bind` gives.
      shape: shape of the batch of samples.
      sharding: where to put the samples; by default where JAX would.
      constraint: applied to x and its mean after every update, as inpainting needs.
      observe: called with the fraction that is done, and x there, between compiled segments; last
        with 1 and the samples. Collected, these are the trajectory.

    Returns:
      The samples, and the number of score evaluations that each took.
    """


@runtime_checkable
class Solver(Protocol):
  """Takes the steps of a time grid."""

  @property
  def nfe(self) -> int:
    """Score evaluations of one step."""

  def coefficients(self, sde: SDE, times: HostTimes) -> Coefficients:
    """The numbers that each of the steps between `times` needs."""

  def init(self, x: Data) -> Memory:
    """The memory before the first step."""

  def update(
    self, rng: Key, denoise: Denoiser, c: OfStep, x: Data, memory: Memory
  ) -> tuple[Update, Memory]:
    """One step for x, with its coefficients c."""


@dataclasses.dataclass(frozen=True)
class GridSampler:
  """Takes n - 1 steps of a solver from time T to eps, over a time grid of n times.

  With `noise_removal`, one step of Tweedie's formula follows, which is the first-order step of all
  these solvers to sigma = 0; then a solver with one evaluation a step takes n in all.
  """

  sde: SDE
  solver: Solver
  grid: TimeGrid
  noise_removal: bool = True

  def __post_init__(self) -> None:
    check_eps(self.sde, self.grid.eps)

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
    score_fn, constraint, steps = as_pytree(score_fn), as_pytree(constraint), self.grid.n - 1
    times = self.grid.times(self.sde)
    coefficients = {'t': times[:-1], 's': times[1:], **self.solver.coefficients(self.sde, times)}
    rng_prior, rng_steps = jax.random.split(rng)
    x = draw_prior(self.sde, rng_prior, shape, sharding)

    def advance(state: tuple[Array, Memory], start: int, stop: int) -> tuple[Array, Memory]:
      return _segment(self, score_fn, constraint, rng_steps, coefficients, state, start, stop)

    x, _ = in_segments(advance, (x, self.solver.init(x)), steps, observe)
    nfe = steps * self.solver.nfe
    if self.noise_removal:
      last = jax.random.fold_in(rng_steps, steps)
      x, nfe = tweedie(self.sde, self.grid.eps, score_fn, constraint, last, x), nfe + 1
    show_samples(observe, x)
    return x, nfe


@partial(jax.jit, static_argnums=0)
def _segment(sampler, score_fn, constraint, rng, coefficients, state, start, stop):
  rsde = sampler.sde.reverse(score_fn)

  def denoise(x: Array, t: Array) -> Array:
    return rsde.denoise(x, jnp.full(x.shape[:1], t))

  def step(i: Array | int, state: tuple[Array, Memory]) -> tuple[Array, Memory]:
    x, memory = state
    c = {name: jnp.asarray(values)[i] for name, values in coefficients.items()}
    rngs = jax.random.split(jax.random.fold_in(rng, i))
    update, memory = sampler.solver.update(rngs[0], denoise, c, x, memory)
    x, _ = constrain(constraint, rngs[1], update, jnp.full(x.shape[:1], c['s']))
    return x, memory

  return jax.lax.fori_loop(start, stop, step, state)


# The parts of samplers.


@overload
def as_pytree(function: Callable) -> Callable: ...
@overload
def as_pytree(function: None) -> None: ...
def as_pytree(function: Callable | None) -> Callable | None:
  """A plain function, made into what jitted code accepts as an argument."""
  plain = function is not None and jax.tree_util.all_leaves([function])
  return jax.tree_util.Partial(function) if plain else function


def draw_prior(sde: SDE, rng: Key, shape: tuple[int, ...], sharding) -> Data:
  """x_T of the given shape and sharding."""
  return _draw(sde, sharding)(rng, shape)


@cache  # or every run would compile it again
def _draw(sde: SDE, sharding) -> Callable[[Array, tuple[int, ...]], Array]:
  return jax.jit(sde.prior_sampling, static_argnums=1, out_shardings=sharding)


def in_segments(
  advance: Callable[[Any, int, int], Any], state: Any, n: int, observe: Observer | None
) -> Any:
  """The state (x, ...) after n steps, of which `advance(state, start, stop)` takes some.

  Between the segments, `observe` is called. Where the run is cut does not change the result.
  """
  length = -(-n // SEGMENTS)
  for start in range(0, n, length):
    previous, state = state, advance(state, start, min(start + length, n))
    if observe:
      # The next segment is under way while the last one is waited for.
      jax.block_until_ready(previous)
      observe(start / n, previous[0])
  return state


def show_samples(observe: Observer | None, x: Data) -> None:
  """Tells the observer, if any, that these are the samples."""
  if observe:
    observe(1.0, jax.block_until_ready(x))


def constrain(constraint: Constraint | None, rng: Key, update: Update, t: PerRow) -> Update:
  """The update as the constraint, if any, lets it be at times t."""
  return update if constraint is None else constraint(rng, update, t)


@partial(jax.jit, static_argnums=(0, 1))
def tweedie(sde, eps, score_fn, constraint, rng, x):
  """E[x_0 | x_eps = x], the last step of samplers; one score evaluation."""
  mean = sde.reverse(score_fn).denoise(x, jnp.full(x.shape[:1], eps))
  return constrain_clean(constraint, rng, mean)


def constrain_clean(constraint: Constraint | None, rng: Array, mean: Array) -> Array:
  """Denoised samples [B, ...], which are of time 0, as the constraint, if any, lets them be."""
  return constrain(constraint, rng, (mean, mean), jnp.zeros(mean.shape[:1]))[1]
