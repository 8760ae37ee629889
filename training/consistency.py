"""Consistency models: networks that jump along the probability flow to its end.

A consistency function f(x, t) is the same all along a path of the probability flow, and f(x, eps) =
x: so it is where the path ends. It is trained at neighbouring points of paths (Song et al. 2023,
https://arxiv.org/abs/2303.01469, Eq. 7): of x_t = alpha x_0 + sigma z and a point x_r at an earlier
time r,

  w d(f(x_t, t), f'(x_r, r)),

where no gradient goes through f', whose parameters are those of f or an average of them. Three ways
differ in where x_r comes from and how far it is:

  distillation  a step of a solver from x_t, with the score of a trained model, the teacher
                (Algorithm 2)
  training      the same x_0 and z: alpha_r x_0 + sigma_r z (Algorithm 3); improved by Song &
                Dhariwal 2023, https://arxiv.org/abs/2310.14189
  easy tuning   the same, from a trained model on: r comes close to t as training goes on
                (Geng et al. 2024, https://arxiv.org/abs/2406.14548)

All that depends on a time depends on the noise level s = sigma / alpha: in y = x / alpha every SDE
is EDM's, whose time is s.

Left out: losses in continuous time, and the distance of features (LPIPS).
"""

from collections.abc import Callable
import dataclasses
from functools import partial
import math
from typing import Unpack

import jax
from jax import Array
import jax.numpy as jnp
import optax

from data.codec import Codec
from models.score import Params, ScoreModel
from runtime.shapes import Data, Key, PerRow, Told
from sde_lib import expand, SDE
from training.averages import Average
from training.curricula import (
  Approaching,
  Constant,
  Curriculum,
  Doubling,
  Grid,
  Growing,
  LOG_NORMAL,
  NormalLaw,
)
from training.packing import unpacked
from training.step import (
  apply_gradients,
  Batch,
  gradient_in_parts,
  Metrics,
  seen_in_training,
  told_in_evaluation,
  TrainState,
)

# (x, t) -> x of the same shape: a consistency function, or a denoiser E[x_0 | x_t = x].
OfTime = Callable[[Data, PerRow], Data]


# How far two images are from each other.

Distance = Callable[[Data, Data], PerRow]


def l1(a: Data, b: Data) -> PerRow:
  """The mean of |a - b|."""
  return jnp.abs(_rows(a - b)).mean(-1)


def l2(a: Data, b: Data) -> PerRow:
  """The mean of (a - b)^2."""
  return jnp.square(_rows(a - b)).mean(-1)


def linf(a: Data, b: Data) -> PerRow:
  """The largest |a - b|."""
  return jnp.abs(_rows(a - b)).max(-1)


@dataclasses.dataclass(frozen=True)
class PseudoHuber:
  """sqrt(||a - b||^2 + c^2) - c, which outliers move less than a square.

  Attributes:
    c: 0.00054 sqrt(d) for data of d numbers, if it is 0 (https://arxiv.org/abs/2310.14189, Sec.
      3.3).
  """

  c: float = 0.0

  def __call__(self, a: Data, b: Data) -> PerRow:
    c = self.c or 0.00054 * math.sqrt(a[0].size)
    squares = jnp.square(_rows(a - b)).sum(-1)
    return squares / (jnp.sqrt(squares + c**2) + c)  # the same, without the difference


def _rows(x: Data) -> Array:
  return x.reshape(len(x), -1)


# By name, given c.
DISTANCES: dict[str, Callable[[float], Distance]] = {
  'l1': lambda c: l1,
  'l2': lambda c: l2,
  'linf': lambda c: linf,
  'pseudo_huber': PseudoHuber,
}

# How a pair counts, by name: (noise level s of the later time, how far it falls to the earlier).
WEIGHTS: dict[str, Callable[[PerRow, PerRow], PerRow]] = {
  'uniform': lambda s, gap: jnp.ones_like(s),
  'snr': lambda s, gap: 1 / s**2,
  'snrp1': lambda s, gap: 1 / s**2 + 1,
  'truncated_snr': lambda s, gap: jnp.maximum(1 / s**2, 1.0),
  'inverse_gap': lambda s, gap: 1 / gap,
}


# Where x_r comes from: (sde, denoiser of the teacher, x_0, z, x_t, t, r) -> x_r.

Previous = Callable[[SDE, OfTime | None, Data, Data, Data, PerRow, PerRow], Data]


def same_noise(
  sde: SDE, denoise: OfTime | None, x0: Data, z: Data, x: Data, t: PerRow, r: PerRow
) -> Data:
  """alpha_r x_0 + sigma_r z: what is known of the data stands for the score."""
  del denoise, x, t
  return perturbed(sde, x0, z, r)


def euler_step(
  sde: SDE, denoise: OfTime | None, x0: Data, z: Data, x: Data, t: PerRow, r: PerRow
) -> Data:
  """A step of Euler's method in s of dy/ds = (y - D) / s, with y = x / alpha: DDIM's."""
  return _flow_step(1, sde, denoise, x, t, r)


def heun_step(
  sde: SDE, denoise: OfTime | None, x0: Data, z: Data, x: Data, t: PerRow, r: PerRow
) -> Data:
  """A step of Heun's method of the same, with two evaluations of the teacher."""
  return _flow_step(2, sde, denoise, x, t, r)


def _flow_step(order: int, sde: SDE, denoise: OfTime | None, x: Data, t: PerRow, r: PerRow) -> Data:
  if denoise is None:
    raise ValueError('a step along the probability flow needs a teacher')
  alpha, end_alpha = expand(sde.alpha(t), x), expand(sde.alpha(r), x)
  s, end_s, gap = (expand(v, x) for v in noise_levels(sde, t, r))
  y = x / alpha
  slope = (y - denoise(x, t)) / s
  end = y - gap * slope
  if order == 2:
    end_slope = (end - denoise(end_alpha * end, r)) / end_s
    end = y - gap * (slope + end_slope) / 2
  return end_alpha * end


PREVIOUS: dict[str, Previous] = {'none': same_noise, 'euler': euler_step, 'heun': heun_step}


def perturbed(sde: SDE, x0: Data, z: Data, t: PerRow) -> Data:
  """x_t = alpha x_0 + sigma z."""
  alpha, sigma = sde.kernel(t)
  return expand(alpha, x0) * x0 + expand(sigma, x0) * z


def noise_levels(sde: SDE, t: PerRow, r: PerRow) -> tuple[PerRow, PerRow, PerRow]:
  """s = sigma / alpha at t, at r, and how far it falls from t to r, which keeps its digits."""
  s = jnp.exp(-sde.log_snr(t))
  fall = sde.log_snr_fall(r, t)
  return s, s * jnp.exp(-fall), -s * jnp.expm1(-fall)


# What is minimised, and the presets of the papers.


@dataclasses.dataclass(frozen=True)
class Consistency:
  """How a consistency model is trained.

  Attributes:
    curriculum: which pairs of times there are at a step, and how the target follows.
    previous: where the earlier point of a pair comes from.
    distance: between the ends of the two jumps.
    weight: how a pair counts.
  """

  curriculum: Curriculum
  previous: Previous
  distance: Distance
  weight: Callable[[PerRow, PerRow], PerRow]

  @property
  def sde(self) -> SDE:
    """The SDE."""
    return self.curriculum.sde

  @property
  def eps(self) -> float:
    """The time where the jumps end."""
    return self.curriculum.eps

  @property
  def target_averages(self) -> tuple[Average, ...]:
    """What a state keeps as the last of its averages: the target, if it is one."""
    return () if self.curriculum.target is None else (self.curriculum.target,)


def consistency_distillation(
  sde: SDE,
  eps: float,
  n: int = 18,
  solver: str = 'heun',
  distance: Distance = l2,
  weight: str = 'uniform',
  mu: float = 0.0,
  rho: float = 7.0,
) -> Consistency:
  """Distillation on a grid of n times (https://arxiv.org/abs/2303.01469, Algorithm 2)."""
  grid = Grid(sde, eps, Constant(n - 1, mu), rho)
  return Consistency(grid, PREVIOUS[solver], distance, WEIGHTS[weight])


def consistency_training(
  sde: SDE,
  eps: float,
  steps: int,
  start: int = 2,
  end: int = 150,
  mu: float = 0.9,
  distance: Distance = l2,
  weight: str = 'uniform',
  rho: float = 7.0,
) -> Consistency:
  """Training without a teacher, with an average for a target (its Algorithm 3)."""
  grid = Grid(sde, eps, Growing(steps, start, end, mu), rho)
  return Consistency(grid, same_noise, distance, WEIGHTS[weight])


def improved_training(
  sde: SDE,
  eps: float,
  steps: int,
  start: int = 10,
  end: int = 1280,
  law: NormalLaw = LOG_NORMAL,
  distance: Distance = PseudoHuber(),
  rho: float = 7.0,
) -> Consistency:
  """The improved techniques (https://arxiv.org/abs/2310.14189, Table 1)."""
  grid = Grid(sde, eps, Doubling(steps, start, end), rho, law)
  return Consistency(grid, same_noise, distance, WEIGHTS['inverse_gap'])


def easy_tuning(
  sde: SDE,
  eps: float,
  steps: int,
  q: float = 2.0,
  k: float = 8.0,
  b: float = 1.0,
  stages: int = 8,
  law: NormalLaw = LOG_NORMAL,
  distance: Distance = PseudoHuber(),
) -> Consistency:
  """Easy consistency tuning of a trained model (https://arxiv.org/abs/2406.14548)."""
  curriculum = Approaching(sde, eps, steps, q, k, b, stages, law)
  return Consistency(curriculum, same_noise, distance, WEIGHTS['inverse_gap'])


def consistency_loss(
  objective: Consistency,
  f: OfTime,
  target: OfTime,
  denoise: OfTime | None,
  x0: Data,
  t: PerRow,
  r: PerRow,
  z: Data,
) -> PerRow:
  """The loss of each example at given times and noise.

  Args:
    objective: how pairs are made, compared and weighed.
    f: the consistency function that is trained.
    target: f', through which no gradient goes.
    denoise: E[x_0 | x_t] of the teacher, if there is one.
    x0: data.
    t, r: the times of each pair, r < t.
    z: standard normal noise.
  """
  sde = objective.sde
  x_t = perturbed(sde, x0, z, t)
  x_r = objective.previous(sde, denoise, x0, z, x_t, t, r)
  s, _, gap = noise_levels(sde, t, r)
  end = jax.lax.stop_gradient(target(x_r, r))
  return objective.weight(s, gap) * objective.distance(f(x_t, t), end)


# Steps.


def train_step(
  state: TrainState,
  teacher: Params | None,
  batch: Batch,
  rng: Key,
  *,
  model: ScoreModel,
  codec: Codec,
  objective: Consistency,
  tx: optax.GradientTransformation,
  averages: tuple[Average, ...],
  grad_accum: int = 1,
) -> tuple[TrainState, Metrics]:
  """One optimiser step on a batch of data; random only in (rng, state.step).

  `averages` are those of the state: if the objective has a target, that is the last. The teacher
  has the network of the model, and is told the same.
  """
  rng_step = jax.random.fold_in(rng, state.step)
  rng_data, rng_t, rng_z, rng_dropout = jax.random.split(rng_step, 4)
  x0, told = seen_in_training(rng_step, rng_data, batch, model, codec)
  t, r = objective.curriculum.pairs(rng_t, state.step, len(x0))
  z = jax.random.normal(rng_z, x0.shape)
  return optimize(
    state, teacher, x0, t, r, z, rng_dropout,
    model=model, objective=objective, tx=tx, averages=averages, grad_accum=grad_accum, **told,
  )  # fmt: skip


def optimize(
  state: TrainState,
  teacher: Params | None,
  x0: Data,
  t: PerRow,
  r: PerRow,
  z: Data,
  rng_dropout: Key,
  *,
  model: ScoreModel,
  objective: Consistency,
  tx: optax.GradientTransformation,
  averages: tuple[Average, ...],
  grad_accum: int = 1,
  **told: Unpack[Told],
) -> tuple[TrainState, Metrics]:
  """The step of `train_step` once data x0, times t and r, noise z and what is told are drawn.

  Both jumps of a pair have the same dropout.
  """
  averaged = None if objective.curriculum.target is None else unpacked(state.averages[-1])

  def loss_fn(params: Params, part: tuple) -> tuple[Array, Metrics]:
    rng_dropout, x0, t, r, z, told = part
    f = jumps(model, params, objective.eps, rng_dropout, **told)
    target_params = params if averaged is None else averaged
    target = jumps(model, target_params, objective.eps, rng_dropout, **told)
    taught_by = None if teacher is None else model.bind(teacher, **told)
    denoise = None if taught_by is None else taught_by.denoised
    return consistency_loss(objective, f, target, denoise, x0, t, r, z).mean(), {}

  differentiate = gradient_in_parts(loss_fn, rng_dropout, (x0, t, r, z, told), grad_accum)
  return apply_gradients(state, differentiate, tx, averages)


def jumps(
  model: ScoreModel,
  params: Params,
  eps: float,
  dropout_rng: Key | None = None,
  **told: Unpack[Told],
) -> OfTime:
  """The consistency function of a network, (x, t) -> where the flow of x is at time eps."""
  return partial(_jump, model.bind(params, dropout_rng, **told), eps)


def _jump(score_fn, eps: float, x: Data, t: PerRow) -> Data:
  return score_fn.consistency(x, t, eps)


def eval_step(
  params: Params,
  batch: Batch,
  rng: Key,
  *,
  model: ScoreModel,
  codec: Codec,
  objective: Consistency,
) -> PerRow:
  """How far f is from itself, for each example: no teacher, dropout or flips.

  Pairs are those of the end of training, with the same noise at both times. Of distillation it is
  not the loss that is trained, but one that needs nothing but the data.
  """
  rng_data, rng_t, rng_z = jax.random.split(rng, 3)
  x0 = codec.for_evaluation(rng_data, batch['data'])
  last = jnp.asarray(objective.curriculum.last_step, jnp.int32)
  t, r = objective.curriculum.pairs(rng_t, last, len(x0))
  z = jax.random.normal(rng_z, x0.shape)
  f = jumps(model, params, objective.eps, **told_in_evaluation(batch, model, codec))
  untaught = dataclasses.replace(objective, previous=same_noise)
  return consistency_loss(untaught, f, f, None, x0, t, r, z)
