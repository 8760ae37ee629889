"""Langevin dynamics, whose stationary distribution has the given score.

  x' = x + h s(x) + sqrt(2 h) z

is a step of the diffusion dx = s(x) dt + sqrt(2) dw; its finite length leaves a bias of order h,
which a Metropolis test takes away (MALA, Roberts & Tweedie 1996).
"""

import dataclasses
from functools import partial

import jax
from jax import Array
import jax.numpy as jnp

from errors import UserError
import sampler_lib
from sampler_lib import Constraint, Observer, Update
from sde_lib import expand, ScoreFn, SDE


def langevin_step(x: Array, score: Array, h: Array, z: Array) -> Update:
  """x + h s(x) + sqrt(2 h) z for x [B, ...], h that broadcasts to it, and noise z; and its mean."""
  x_mean = x + h * score
  return x_mean + jnp.sqrt(2 * h) * z, x_mean


@dataclasses.dataclass(frozen=True)
class LangevinSampler:
  """Langevin dynamics at one level of noise, that of time sde.eps, from the prior of the SDE.

  How a score model was sampled before there were many levels of noise: it must cross from mode to
  mode by itself. With `adjusted`, a step is taken or not by the Metropolis-Hastings rule, which
  takes a score that knows its `log_density(x, t)`: that of an energy, or of `toy_data`.

  Attributes:
    sde: its prior is the start, its eps the time of the score.
    step_size: h above, in units of the data squared.
    n_steps: how many steps.
    adjusted: with a Metropolis test (MALA) or without (ULA).
  """

  sde: SDE
  step_size: float
  n_steps: int
  adjusted: bool = False

  def __post_init__(self) -> None:
    if not self.step_size > 0:
      raise ValueError(f'Langevin dynamics needs a step size above 0; got {self.step_size}')

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
    if constraint is not None and self.adjusted:
      raise UserError('the sampler mala takes no constraint; choose another config.sampling.method')
    if self.adjusted and not hasattr(score_fn, 'log_density'):
      raise ValueError('mala needs a score that has a log_density')
    score_fn, constraint = sampler_lib.as_pytree(score_fn), sampler_lib.as_pytree(constraint)
    rng_prior, rng_steps = jax.random.split(rng)
    x = sampler_lib.draw_prior(self.sde, rng_prior, shape, sharding)

    def advance(state: tuple[Array], start: int, stop: int) -> tuple[Array]:
      return _segment(self, score_fn, constraint, rng_steps, state, start, stop)

    (x,) = sampler_lib.in_segments(advance, (x,), self.n_steps, observe)
    sampler_lib.show_samples(observe, x)
    return x, self.n_steps * (2 if self.adjusted else 1)


@partial(jax.jit, static_argnums=0)
def _segment(sampler, score_fn, constraint, rng, state, start, stop):
  def step(i: Array, state: tuple[Array]) -> tuple[Array]:
    (x,) = state
    rngs = jax.random.split(jax.random.fold_in(rng, i))
    t = jnp.full(x.shape[:1], sampler.sde.eps)
    if sampler.adjusted:
      return (mala_step(rngs[0], score_fn, x, t, sampler.step_size)[0],)
    z = jax.random.normal(rngs[0], x.shape)
    update = langevin_step(x, score_fn(x, t), sampler.step_size, z)
    return (sampler_lib.constrain(constraint, rngs[1], update, t)[0],)

  return jax.lax.fori_loop(start, stop, step, state)


def mala_step(rng: Array, score_fn: ScoreFn, x: Array, t: Array, h: float) -> tuple[Array, Array]:
  """A Langevin step that is taken with probability min(1, p(y) q(x | y) / (p(x) q(y | x))).

  q(y | x) = N(y; x + h s(x), 2 h I) is what proposes y. That leaves p as it is, whatever h.

  Args:
    rng: a key.
    score_fn: a score with a method `log_density(x, t)` [B], up to a constant.
    x: [B, ...].
    t: [B].
    h: the step size.

  Returns:
    The new x, and which examples took the step, bool [B]. It takes two score evaluations.
  """
  rng_z, rng_u = jax.random.split(rng)
  score = score_fn(x, t)
  y, _ = langevin_step(x, score, h, jax.random.normal(rng_z, x.shape))

  def log_q(to: Array, origin: Array, score: Array) -> Array:
    away = (to - origin - h * score).reshape(len(x), -1)
    return -jnp.square(away).sum(-1) / (4 * h)

  log_ratio = score_fn.log_density(y, t) - score_fn.log_density(x, t)
  log_ratio += log_q(x, y, score_fn(y, t)) - log_q(y, x, score)
  taken = jnp.log(jax.random.uniform(rng_u, x.shape[:1])) < log_ratio
  return jnp.where(expand(taken, x), y, x), taken
