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

import abc
from collections.abc import Callable
import dataclasses
from functools import partial
import math

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from data.codec import Codec
from models.score import Params, ScoreModel
from runtime.shapes import Data, Key, Labels, PerRow
from samplers.time_grids import in_float64
from sde_lib import expand, SDE
from training.averages import Average, ConstantRate
from training.packing import unpacked
from training.step import apply_gradients, Batch, gradient_in_parts, Metrics, TrainState

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


# Which times make a pair, at which step: all that a schedule changes.


@dataclasses.dataclass(frozen=True)
class Curriculum(abc.ABC):
  """What changes while training goes on: the pairs of times, and the rate of the target.

  Attributes:
    sde: whose times they are.
    eps: the earliest, where f(x, eps) = x.
  """

  sde: SDE
  eps: float

  @abc.abstractmethod
  def pairs(self, rng: Key, step: Array, n: int) -> tuple[PerRow, PerRow]:
    """Draws n times t, and r < t of each, for the step number `step`, from 0 on."""

  @property
  def target(self) -> Average | None:
    """The average of the parameters that f' has; None if they are those of f."""
    return None

  @property
  def last_step(self) -> int:
    """A step from which on pairs are as they will stay."""
    return 0

  def levels(self) -> tuple[float, float]:
    """The noise levels s of T and eps."""
    first, last = np.exp(-in_float64(self.sde.log_snr, np.array([self.sde.T, self.eps])))
    return float(first), float(last)

  def time_of_level(self, s: PerRow) -> PerRow:
    """The time of a noise level, within [eps, T] whatever the rounding."""
    return jnp.clip(self.sde.time_of_log_snr(-jnp.log(s)), self.eps, self.sde.T)


@dataclasses.dataclass(frozen=True)
class Counts(abc.ABC):
  """How many intervals the grid of times has at a step."""

  @abc.abstractmethod
  def __call__(self, step: Array) -> Array:
    """The number of intervals, int32 []; of times it is one more."""

  @property
  def target(self) -> Average | None:
    """See `Curriculum.target`."""
    return None

  @property
  def last_step(self) -> int:
    """See `Curriculum.last_step`."""
    return 0


@dataclasses.dataclass(frozen=True)
class Constant(Counts):
  """Always the same.

  Attributes:
    n: intervals.
    mu: the share that the average of the target keeps in a step; 0 for no average.
  """

  n: int = 17
  mu: float = 0.0

  def __call__(self, step: Array) -> Array:
    return jnp.full_like(step, self.n)

  @property
  def target(self) -> Average | None:
    return ConstantRate(self.mu) if self.mu else None


@dataclasses.dataclass(frozen=True)
class Growing(Counts):
  """From `start` to `end` intervals, whose squares grow evenly, and an average that slows down.

  n = ceil(sqrt(k / K ((end + 1)^2 - start^2) + start^2) - 1) at step k of K, at least 1, and mu =
  exp(start log(mu) / n) (https://arxiv.org/abs/2303.01469, Appendix C). Beyond K it goes on so.

  Attributes:
    steps: K.
    start, end: s_0 and s_1.
    mu: mu_0, that of n = start.
  """

  steps: int
  start: int = 2
  end: int = 150
  mu: float = 0.9

  def __call__(self, step: Array) -> Array:
    growth = step / self.steps * ((self.end + 1) ** 2 - self.start**2)
    n = jnp.ceil(jnp.sqrt(growth + self.start**2) - 1)
    return jnp.maximum(n, 1).astype(jnp.int32)

  @property
  def target(self) -> Average | None:
    return GrowingAverage(self)

  @property
  def last_step(self) -> int:
    return self.steps


@dataclasses.dataclass(frozen=True)
class GrowingAverage(Average):
  """The average of the target, with mu of the number of intervals before the step."""

  counts: Growing

  def weight(self, n: Array) -> Array | float:
    rate = self.counts.start * math.log(self.counts.mu)
    return -jnp.expm1(rate / self.counts(n - 1).astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Doubling(Counts):
  """min(start 2^floor(k / K'), end) intervals at step k (https://arxiv.org/abs/2310.14189, Eq. 11).

  K' = floor(K / (log2 floor(end / start) + 1)), so that each number has the same share of K steps.

  Attributes:
    steps: K.
    start, end: s_0 and s_1.
  """

  steps: int
  start: int = 10
  end: int = 1280

  def __call__(self, step: Array) -> Array:
    most = math.ceil(math.log2(self.end / self.start))
    doublings = jnp.minimum(step // self._every, max(0, most))
    return jnp.minimum(self.start * 2**doublings, self.end).astype(jnp.int32)

  @property
  def _every(self) -> int:
    return max(1, int(self.steps / (math.log2(max(1, self.end // self.start)) + 1)))

  @property
  def last_step(self) -> int:
    return self.steps


@dataclasses.dataclass(frozen=True)
class NormalLaw:
  """log s is normal, within the levels of a curriculum."""

  mean: float = -1.1
  std: float = 2.0

  def __call__(self, rng: Key, n: int, low: float, high: float) -> PerRow:
    """Draws n levels between two."""
    lowest, highest = ((math.log(level) - self.mean) / self.std for level in (low, high))
    normal = jax.random.truncated_normal(rng, lowest, highest, (n,))
    return jnp.clip(jnp.exp(self.mean + self.std * normal), low, high)


@dataclasses.dataclass(frozen=True)
class Grid(Curriculum):
  """Neighbours of a grid of times, equally spaced in s^(1 / rho) from T down to eps.

  Attributes:
    counts: how many intervals there are at a step.
    rho: of the spacing.
    law: of the noise level that lies in the interval between the two, as Eq. 10 of
      https://arxiv.org/abs/2310.14189 has it; None if all intervals are drawn alike.
  """

  counts: Counts
  rho: float = 7.0
  law: NormalLaw | None = None

  @property
  def target(self) -> Average | None:
    return self.counts.target

  @property
  def last_step(self) -> int:
    return self.counts.last_step

  def pairs(self, rng: Key, step: Array, n: int) -> tuple[PerRow, PerRow]:
    count = self.counts(step)
    i = jnp.minimum(jnp.floor(self._places(rng, n) * count), count - 1)
    return self.time(i, count), self.time(i + 1, count)

  def time(self, i: Array, count: Array) -> PerRow:
    """The time i = 0 ... count of the grid of so many intervals; the first is T, the last eps."""
    first, last = self._ends
    s = (first + i / count * (last - first)) ** self.rho
    inner = self.time_of_level(s)
    return jnp.where(i == 0, self.sde.T, jnp.where(i == count, self.eps, inner))

  def _places(self, rng: Key, n: int) -> PerRow:
    """Draws n places between the ends of the grid, from 0 to 1."""
    if self.law is None:
      return jax.random.uniform(rng, (n,))
    first, last = self._ends
    high, low = self.levels()
    return (first - self.law(rng, n, low, high) ** (1 / self.rho)) / (first - last)

  @property
  def _ends(self) -> tuple[float, float]:
    first, last = self.levels()
    return first ** (1 / self.rho), last ** (1 / self.rho)


@dataclasses.dataclass(frozen=True)
class Approaching(Curriculum):
  """r comes close to t in stages (https://arxiv.org/abs/2406.14548, Sec. 3.2 and Appendix A).

  In noise levels it is r = t (1 - q^-a (1 + k / (1 + exp(b t)))) in stage a = 1, 2, ..., and at
  least eps. In the first stages, r of a small t is eps, where f' is the data: that is the loss of a
  denoiser, which the model that training begins with has been trained for.

  Attributes:
    steps: of the whole training.
    q, k, b: of the formula above.
    stages: how many there are, of equally many steps.
    law: of the noise level t.
  """

  steps: int
  q: float = 2.0
  k: float = 8.0
  b: float = 1.0
  stages: int = 8
  law: NormalLaw = NormalLaw()

  @property
  def last_step(self) -> int:
    return self.steps - 1

  def pairs(self, rng: Key, step: Array, n: int) -> tuple[PerRow, PerRow]:
    high, low = self.levels()
    # Some way above eps: there is nothing to learn where t = r.
    t = self.time_of_level(self.law(rng, n, low * 1.001, high))
    stage = jnp.minimum(step // max(1, self.steps // self.stages), self.stages - 1) + 1
    s = jnp.exp(-self.sde.log_snr(t))
    share = self.q ** -stage.astype(jnp.float32) * (1 + self.k * jax.nn.sigmoid(-self.b * s))
    return t, self.time_of_level(jnp.maximum(s * (1 - share), low))


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
  law: NormalLaw = NormalLaw(),
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
  law: NormalLaw = NormalLaw(),
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
  has the network of the model, and sees the same labels.
  """
  rng_step = jax.random.fold_in(rng, state.step)
  rng_data, rng_t, rng_z, rng_dropout = jax.random.split(rng_step, 4)
  labels = None
  if model.num_classes:
    rng_labels = jax.random.fold_in(rng_step, 4)
    labels = codec.training_labels(rng_labels, batch['label'], model.num_classes)
  x0 = codec.for_training(rng_data, batch['data'])
  t, r = objective.curriculum.pairs(rng_t, state.step, len(x0))
  z = jax.random.normal(rng_z, x0.shape)
  return optimize(
    state, teacher, x0, t, r, z, rng_dropout, labels,
    model=model, objective=objective, tx=tx, averages=averages, grad_accum=grad_accum,
  )  # fmt: skip


def optimize(
  state: TrainState,
  teacher: Params | None,
  x0: Data,
  t: PerRow,
  r: PerRow,
  z: Data,
  rng_dropout: Key,
  labels: Labels | None = None,
  *,
  model: ScoreModel,
  objective: Consistency,
  tx: optax.GradientTransformation,
  averages: tuple[Average, ...],
  grad_accum: int = 1,
) -> tuple[TrainState, Metrics]:
  """The step of `train_step` once data x0, times t and r, noise z and labels are drawn.

  Both jumps of a pair have the same dropout.
  """
  averaged = None if objective.curriculum.target is None else unpacked(state.averages[-1])

  def loss_fn(params: Params, part: tuple) -> tuple[Array, Metrics]:
    rng_dropout, x0, t, r, z, labels = part
    f = jumps(model, params, objective.eps, rng_dropout, labels)
    target_params = params if averaged is None else averaged
    target = jumps(model, target_params, objective.eps, rng_dropout, labels)
    denoise = None if teacher is None else model.bind(teacher, labels=labels).denoised
    return consistency_loss(objective, f, target, denoise, x0, t, r, z).mean(), {}

  parts = (x0, t, r, z, labels)
  differentiate = gradient_in_parts(loss_fn, rng_dropout, parts, grad_accum)
  return apply_gradients(state, differentiate, tx, averages)


def jumps(
  model: ScoreModel,
  params: Params,
  eps: float,
  dropout_rng: Key | None = None,
  labels: Labels | None = None,
) -> OfTime:
  """The consistency function of a network, (x, t) -> where the flow of x is at time eps."""
  return partial(_jump, model.bind(params, dropout_rng, labels), eps)


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
  f = jumps(model, params, objective.eps, labels=batch['label'] if model.num_classes else None)
  untaught = dataclasses.replace(objective, previous=same_noise)
  return consistency_loss(untaught, f, f, None, x0, t, r, z)
