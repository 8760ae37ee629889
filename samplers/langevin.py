"""Langevin dynamics, whose stationary distribution has the given score.

  x' = x + h s(x) + sqrt(2 h) z

is a step of the diffusion dx = s(x) dt + sqrt(2) dw; its finite length leaves a bias of order h,
which a Metropolis test takes away (MALA, Roberts & Tweedie 1996).
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool

from runtime.errors import UserError
from runtime.shapes import Data, Key, PerRow, PerRowExpanded
from samplers import base
from samplers.base import Constraint, Observer, Update
from sde_lib import check_eps, expand, ScoreFn, SDE


def langevin_step(x: Data, score: Data, h: PerRowExpanded | float, z: Data) -> Update:
  """x + h s(x) + sqrt(2 h) z for noise z; and its mean."""
  x_mean = x + h * score
  return x_mean + jnp.sqrt(2 * h) * z, x_mean


@dataclasses.dataclass(frozen=True)
class LangevinSampler:
  """Langevin dynamics at one level of noise, that of time eps, from the prior of the SDE.

  How a score model was sampled before there were many levels of noise: it must cross from mode to
  mode by itself. With `adjusted`, a step is taken or not by the Metropolis-Hastings rule, which
  takes a score that knows its `log_density(x, t)`: that of an energy, or of `data.points`.

  Attributes:
    sde: its prior is the start.
    eps: the time of the score.
    step_size: h above, in units of the data squared.
    n_steps: how many steps.
    adjusted: with a Metropolis test (MALA) or without (ULA).
  """

  sde: SDE
  eps: float
  step_size: float
  n_steps: int
  adjusted: bool = False

  def __post_init__(self) -> None:
    check_eps(self.sde, self.eps)
    if not self.step_size > 0:
      raise ValueError(f'Langevin dynamics needs a step size above 0; got {self.step_size}')

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
    if constraint is not None and self.adjusted:
      raise UserError('the sampler mala takes no constraint; choose another config.sampling.method')
    if self.adjusted and not hasattr(score_fn, 'log_density'):
      raise UserError(
        'the sampler mala needs a log-density, which energies have (config.model.output), without '
        'guidance; choose another config.sampling.method'
      )
    score_fn, constraint = base.as_pytree(score_fn), base.as_pytree(constraint)
    rng_prior, rng_steps = jax.random.split(rng)
    x = base.draw_prior(self.sde, rng_prior, shape, sharding)
    start = _mala_start(self, score_fn, x) if self.adjusted else (x,)
    segment = _mala_segment if self.adjusted else _segment

    def advance(state: tuple[Array, ...], start: int, stop: int) -> tuple[Array, ...]:
      return segment(self, score_fn, constraint, rng_steps, state, start, stop)

    x, *_ = base.in_segments(advance, start, self.n_steps, observe)
    base.show_samples(observe, x)
    return x, self.n_steps + (1 if self.adjusted else 0)


@partial(jax.jit, static_argnums=0)
def _segment(sampler, score_fn, constraint, rng, state, start, stop):
  def step(i: Array | int, state: tuple[Array]) -> tuple[Array]:
    (x,) = state
    rngs = jax.random.split(jax.random.fold_in(rng, i))
    t = jnp.full(x.shape[:1], sampler.eps)
    z = jax.random.normal(rngs[0], x.shape)
    update = langevin_step(x, score_fn(x, t), sampler.step_size, z)
    return (base.constrain(constraint, rngs[1], update, t)[0],)

  return jax.lax.fori_loop(start, stop, step, state)


@partial(jax.jit, static_argnums=0)
def _mala_start(sampler, score_fn, x):
  return mala_state(score_fn, x, jnp.full(x.shape[:1], sampler.eps))


@partial(jax.jit, static_argnums=0)
def _mala_segment(sampler, score_fn, constraint, rng, state, start, stop):
  del constraint  # None

  def step(i: Array | int, state: MALAState) -> MALAState:
    t = jnp.full(state.x.shape[:1], sampler.eps)
    return mala_step(jax.random.fold_in(rng, i), score_fn, state, t, sampler.step_size)[0]

  return jax.lax.fori_loop(start, stop, step, state)


class MALAState(NamedTuple):
  """Where a chain is, and what is known of it there."""

  x: Data
  score: Data
  log_p: PerRow  # up to a constant


def mala_state(score_fn: Any, x: Data, t: PerRow) -> MALAState:
  """The state at x and t, for a score with a method `log_density(x, t)`."""
  return MALAState(x, score_fn(x, t), score_fn.log_density(x, t))


def mala_step(
  rng: Key, score_fn: Any, state: MALAState, t: PerRow, h: float
) -> tuple[MALAState, Bool[Array, ' b']]:
  """A Langevin step that is taken with probability min(1, p(y) q(x | y) / (p(x) q(y | x))).

  q(y | x) = N(y; x + h s(x), 2 h I) is what proposes y. That leaves p as it is, whatever h.

  Args:
    rng: a key.
    score_fn: what made the state.
    state: of `mala_state`, or of the step before.
    t: where it is.
    h: the step size.

  Returns:
    The new state, and which examples took the step. It takes one score evaluation.
  """
  rng_z, rng_u = jax.random.split(rng)
  x = state.x
  y, _ = langevin_step(x, state.score, h, jax.random.normal(rng_z, x.shape))
  proposed = mala_state(score_fn, y, t)

  def log_q(to: Data, origin: MALAState) -> PerRow:
    away = (to - origin.x - h * origin.score).reshape(len(x), -1)
    return -jnp.square(away).sum(-1) / (4 * h)

  log_ratio = proposed.log_p - state.log_p + log_q(x, proposed) - log_q(y, state)
  taken = jnp.log(jax.random.uniform(rng_u, x.shape[:1])) < log_ratio
  return jax.tree.map(
    lambda new, old: jnp.where(expand(taken, new), new, old), proposed, state
  ), taken
