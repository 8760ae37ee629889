"""Samples of consistency models: in one jump from noise to data, or in a few.

Algorithm 1 of Song et al. 2023, https://arxiv.org/abs/2303.01469: after each jump to data, noise is
added up to the next time, from which the next jump leads. With a constraint it is their Algorithm
4, which puts what is known of the data in its place after each jump.
"""

from collections.abc import Callable
import dataclasses
from functools import partial
import itertools
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from runtime.errors import UserError
from runtime.shapes import Data, Key
from samplers.base import (
  as_pytree,
  constrain,
  constrain_clean,
  Constraint,
  draw_prior,
  show_samples,
)
from samplers.ode import Observer
from samplers.time_grids import in_float64
from sde_lib import check_eps, ScoreFn, SDE


@dataclasses.dataclass(frozen=True)
class ConsistencySampler:
  """Jumps from time T, and then from each of `times`.

  What it is given for a score must know `consistency(x, t, eps)` and be a pytree of its arrays, as
  `models.score.ModelScore` is.

  Attributes:
    sde: the SDE.
    eps: where the jumps end, as in training.
    times: of the jumps after the first, falling, between T and eps; none for one jump.
    low, high: where data lie; what leaves these bounds is cut.

  Raises:
    ValueError: unless the times fall.
    UserError: when it is called with a score that knows no jumps.
  """

  sde: SDE
  eps: float
  times: tuple[float, ...] = ()
  low: float = -math.inf
  high: float = math.inf

  def __post_init__(self) -> None:
    check_eps(self.sde, self.eps)
    ends = (self.sde.T, *self.times, self.eps)
    if any(not later < earlier for earlier, later in itertools.pairwise(ends)):
      raise ValueError(
        f'the times of jumps must fall between T = {self.sde.T} and eps = {self.eps}; got '
        f'{tuple(self.times)}'
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
    if not hasattr(score_fn, 'consistency'):
      raise UserError('jumps are those of a consistency model; this is a score, guided or not')
    constraint, n = as_pytree(constraint), 1 + len(self.times)
    rng_prior, rng_steps = jax.random.split(rng)
    x = draw_prior(self.sde, rng_prior, shape, sharding)
    x = _begun(self.sde, constraint, jax.random.fold_in(rng_steps, n), x)
    levels = self._levels()
    for i in range(n):
      if observe:
        observe(i / n, jax.block_until_ready(x))
      of_step = {name: np.float32(values[i]) for name, values in levels.items()}
      rng_step = jax.random.fold_in(rng_steps, i)
      x, clean = _jumped(self, score_fn, constraint, rng_step, of_step, x)
    show_samples(observe, clean)
    return clean, n

  def _levels(self) -> dict[str, np.ndarray]:
    """Each time of a jump, and alpha and the standard deviation of the noise of the one after it.

    From x at eps to time t leads x_t = alpha_t / alpha_eps x + sigma_t sqrt(1 - s_eps^2 / s_t^2) z,
    with s = sigma / alpha.
    """
    times = np.array([self.sde.T, *self.times])
    after = np.array([*self.times, self.eps])
    fall = in_float64(partial(_fall, self.sde, self.eps), after)
    return {
      't': times,
      'end_alpha': np.broadcast_to(in_float64(self.sde.alpha, np.array(self.eps)), times.shape),
      'alpha': in_float64(self.sde.alpha, after),
      'added': in_float64(self.sde.sigma, after) * np.sqrt(-np.expm1(-2 * fall)),
    }


def _fall(sde: SDE, eps: float, t: Array) -> Array:
  return sde.log_snr_fall(jnp.full_like(t, eps), t)


@partial(jax.jit, static_argnums=0)
def _begun(sde, constraint, rng, x):
  """The prior, with what is known at the noise level of T."""
  return constrain(constraint, rng, (x, x), jnp.full(x.shape[:1], sde.T))[0]


@partial(jax.jit, static_argnums=0)
def _jumped(sampler, score_fn, constraint, rng, c, x):
  """The data at the end of a jump, and x at the time of the next one."""
  jump: Callable[..., Any] = score_fn.consistency
  rng_known, rng_noise = jax.random.split(rng)
  end = jump(x, jnp.full(x.shape[:1], c['t']), sampler.eps)
  clean = jnp.clip(end / c['end_alpha'], sampler.low, sampler.high)
  clean = constrain_clean(constraint, rng_known, clean)
  return c['alpha'] * clean + c['added'] * jax.random.normal(rng_noise, x.shape), clean
