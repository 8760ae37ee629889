"""The reverse SDE with step sizes of its own for every sample.

Jolicoeur-Martineau et al. 2021, "Gotta Go Fast When Generating Data with Score-Based Models",
https://arxiv.org/abs/2105.14080, Algorithms 1 and 2.

There, a step that is rejected is repeated with new noise. But steps are rejected for their noise,
so that what is accepted is no longer normal: in two dimensions variances come out 20 to 40 % too
large, the tighter the tolerance the worse. Here every sample has one Brownian path, which all its
steps follow, and the error falls with the tolerance.
"""

import dataclasses
from functools import partial

import flax
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Int

from runtime.shapes import Data, Key, PerRow
from samplers import base
from samplers.base import Constraint, Observer
from sde_lib import check_eps, expand, ScoreFn, SDE

FIRST_STEP = 0.01  # of T
SAFETY = 0.9  # theta in the paper
EXPONENT = 0.9  # r: the next step is theta h error^-r
SEGMENT = 10  # steps between two looks at how far the samples are
MAX_STEPS = 10_000
LEVELS = 16  # halvings of [0, T] that the Brownian paths are resolved to
# Of a step size. A path is so rough that another last bit of a time, which the compiler and the
# number of devices decide, would come back 256 times as large at the next step.
MANTISSA_BITS = 7


@dataclasses.dataclass(frozen=True)
class AdaptiveSDESampler:
  """Euler-Maruyama, checked and improved by a second evaluation at the end of the step.

  The two differ by an error whose root mean square over a sample, relative to max(atol, rtol
  max(|x'|, |x'_before|)), must not exceed one; else the step is tried again, shorter. The mean of
  both, of higher order, goes on ("extrapolation"). One step of Tweedie's formula follows with
  `noise_removal`.

  The number of score evaluations is that of the batch, so of its slowest sample: two a step.

  Attributes:
    sde: the forward SDE.
    eps: the smallest time, to which it is solved from T.
    rtol: relative tolerance; the paper has 0.01 to 0.5.
    atol: absolute tolerance; the paper has one of 256 levels, 1 / 256 for data in [0, 1] and
      2 / 256 for data in [-1, 1].
    noise_removal: denoise at the end.
  """

  sde: SDE
  eps: float
  rtol: float = 0.05
  atol: float = 1 / 256
  noise_removal: bool = True

  def __post_init__(self) -> None:
    check_eps(self.sde, self.eps)

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
    """See `samplers.base.Sampler`.

    Raises:
      FloatingPointError: if a sample takes more than `MAX_STEPS` steps, or is not finite.
    """
    sde, eps = self.sde, self.eps
    score_fn, constraint = base.as_pytree(score_fn), base.as_pytree(constraint)
    rng_prior, rng_steps = jax.random.split(rng)
    x = base.draw_prior(sde, rng_prior, shape, sharding)
    state, latest = _start(self, x), sde.T
    while latest > eps:
      state, latest, mean = _segment(self, score_fn, constraint, rng_steps, state)
      if stuck := int(_count_stuck(self, state)):
        raise FloatingPointError(
          f'{stuck} of {len(x)} samples of adaptive_sde are not finite after {int(state.steps)} '
          f'steps, at t = {float(latest):.3g}: the score has values that are not; try a checkpoint '
          'of earlier'
        )
      if observe and latest > eps:
        observe((sde.T - float(mean)) / (sde.T - eps), state.x)
      if latest > eps and state.steps >= MAX_STEPS:
        raise FloatingPointError(
          f'adaptive_sde took {MAX_STEPS} steps and is only at t = {float(latest):.3g}; raise '
          'sampling.sde_rtol and sampling.sde_atol'
        )
    x, nfe = state.x, 2 * int(state.steps)
    if self.noise_removal:
      last = jax.random.fold_in(rng_steps, MAX_STEPS)
      x, nfe = base.tweedie(sde, eps, score_fn, constraint, last, x), nfe + 1
    base.show_samples(observe, x)
    return x, nfe


@flax.struct.dataclass
class State:
  """Where every sample is."""

  x: Data
  t: PerRow
  h: PerRow  # the next step sizes
  low: Data  # x' of the last accepted step
  w: Data  # the Brownian path at time t
  steps: Int[Array, '']  # of the batch


@partial(jax.jit, static_argnums=0)
def _start(sampler, x):
  t = jnp.full(x.shape[:1], sampler.sde.T)
  return State(
    x, t, jnp.full_like(t, FIRST_STEP * sampler.sde.T), x, 0 * x, jnp.zeros((), jnp.int32)
  )


@partial(jax.jit, static_argnums=0)
def _segment(sampler, score_fn, constraint, rng, state):
  eps, last = sampler.eps, state.steps + SEGMENT
  rsde = sampler.sde.reverse(score_fn)
  rng_path, rng_constraint = jax.random.split(rng)

  def step(state: State) -> State:
    x, t, h = state.x, state.t, state.h
    end, dt = jnp.where(h < t - eps, t - h, eps), expand(h, x)
    w = _brownian_paths(rng_path, x, sampler.sde.T, sampler.sde.T - end)

    def euler_maruyama(at: Data, t: PerRow) -> Data:
      drift, diffusion = rsde.sde(at, t)
      return x - dt * drift + expand(diffusion, x) * (w - state.w)

    low = euler_maruyama(x, t)
    high = (low + euler_maruyama(low, end)) / 2
    size = jnp.maximum(jnp.abs(low), jnp.abs(state.low))
    error = _root_mean_square((low - high) / jnp.maximum(sampler.atol, sampler.rtol * size))
    accept = (t > eps) & (error <= 1)
    rng = jax.random.fold_in(rng_constraint, state.steps)
    high, _ = base.constrain(constraint, rng, (high, high), end)
    t = jnp.where(accept, end, t)
    h = jax.lax.reduce_precision(SAFETY * h * error**-EXPONENT, 8, MANTISSA_BITS)
    h = jnp.minimum(h, t - eps)
    keep = expand(accept, x)
    x, low, w = (
      jnp.where(keep, new, old) for new, old in ((high, x), (low, state.low), (w, state.w))
    )
    return State(x, t, h, low, w, state.steps + 1)

  state = jax.lax.while_loop(lambda s: (s.t > eps).any() & (s.steps < last), step, state)
  return state, state.t.max(), state.t.mean()


@partial(jax.jit, static_argnums=0)
def _count_stuck(sampler, state):
  """How many samples are not finite, or come no further: the error of their step was not finite."""
  found = jnp.isfinite(state.x).reshape(len(state.x), -1).all(1)
  goes_on = (state.t <= sampler.eps) | (jnp.isfinite(state.h) & (state.h > 0))
  return (~(found & goes_on)).sum()


def _brownian_paths(rng: Key, x: Data, T: float, s: PerRow) -> Data:
  """Each sample's own Brownian path over [0, T], at times s.

  Levy's construction: given both ends of an interval, its middle is normal around their mean with
  a quarter of the interval's length as variance. Every middle has its key, so that a time is
  always given the same value. Between two points that are T / 2^LEVELS apart the path is straight.
  """

  def path(rng: Array, s: Array) -> Array:
    def halve(level: Array | int, interval: tuple[Array, ...]) -> tuple[Array, ...]:
      node, first, length, left, right = interval
      noise = jax.random.normal(jax.random.fold_in(rng, node), x.shape[1:])
      middle = (left + right + jnp.sqrt(length) * noise) / 2
      late = s >= first + length / 2
      left, right = jnp.where(late, middle, left), jnp.where(late, right, middle)
      return 2 * node + late, first + late * length / 2, length / 2, left, right

    end = jnp.sqrt(T) * jax.random.normal(jax.random.fold_in(rng, 0), x.shape[1:])
    whole = jnp.int32(1), jnp.float32(0), jnp.float32(T), jnp.zeros_like(end), end
    _, first, length, left, right = jax.lax.fori_loop(0, LEVELS, halve, whole)
    return left + (s - first) / length * (right - left)

  return jax.vmap(path)(jax.random.split(rng, len(x)), s)


def _root_mean_square(x: Data) -> PerRow:
  """Of each sample."""
  return jnp.sqrt(jnp.square(x).reshape(x.shape[0], -1).mean(-1))
