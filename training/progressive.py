"""Progressive distillation: a student of N steps learns what two steps of its teacher each do.

Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, Algorithm 2. The teacher takes 2N steps of
DDIM on a time grid, the student every other one of its times. Between times s < t, with
e^-h = alpha_t sigma_s / (sigma_t alpha_s), a step of DDIM with a denoised value D is

  x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D.

Two of them, from t to u to s with D_1 = D(x_t, t) and D_2 = D(x_u, u), are one with the value

  D = (e^-h_2 (1 - e^-h_1) D_1 + (1 - e^-h_2) D_2) / (1 - e^-(h_1 + h_2)),

a mean of both: Eq. 43 there, without its differences of numbers that are almost the same. It is
what the student's own denoised value at x_t is to be. Then the student is the teacher of the next
stage, with half as many steps.

The network must give a denoised value where no signal is left, which a predicted noise divided by
alpha does not (Sec. 4): outputs v, edm, flow and denoised do.
"""

from collections.abc import Callable
import dataclasses
from functools import cached_property

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Int
import numpy as np
import optax

from data.codec import Codec
from models.score import Params, ScoreModel
from runtime.shapes import Data, Key, PerRow, Told
from samplers.base import GridSampler
from samplers.multistep import DDIM
from samplers.time_grids import finite_log_snr, in_float64, Spacing, TimeGrid
from sde_lib import expand, SDE
from training.averages import Average
from training.step import (
  apply_gradients,
  Batch,
  gradient_in_parts,
  Metrics,
  seen_in_training,
  told_in_evaluation,
  TrainState,
)

Denoiser = Callable[[Data, PerRow], Data]  # (x, t) -> the denoised value

OUTPUTS = ('v', 'edm', 'flow', 'denoised')  # that are a denoised value at every level of noise


@dataclasses.dataclass(frozen=True)
class Halving:
  """One stage: a student of `num_steps` steps, a teacher of twice as many.

  Attributes:
    sde: of both.
    num_steps: of the student, from time T to eps.
    eps: the last time, where the noise that is left can't be seen.
    spacing: of the times.
    reduce_mean: the loss is the mean over dimensions, or half the sum.

  Raises:
    ValueError: if the SDE has no noise left at eps.
  """

  sde: SDE
  num_steps: int
  eps: float
  spacing: Spacing
  reduce_mean: bool = True

  def __post_init__(self) -> None:
    finite_log_snr(self.sde, self.times)

  @property
  def grid(self) -> TimeGrid:
    """The times between which the student takes its steps: one more than there are steps."""
    return TimeGrid(self.num_steps + 1, self.eps, self.spacing)

  def sampler(self, eta: float = 0.0) -> GridSampler:
    """Takes the student's steps; the last one ends at eps."""
    return GridSampler(self.sde, DDIM(eta), self.grid, noise_removal=False)

  @cached_property
  def times(self) -> np.ndarray:
    """The times of the teacher, descending, float64 [2 N + 1]."""
    return TimeGrid(2 * self.num_steps + 1, self.eps, self.spacing).times(self.sde)

  @cached_property
  def steps(self) -> dict[str, np.ndarray]:
    """Numbers of each step of the student, float32 [N], made in float64.

    't' and 'u' are the times that the teacher is asked at. It comes to u as keep x + move D_1; the
    target is D_2 + share (D_1 - D_2).
    """
    alpha, sigma = in_float64(self.sde.alpha, self.times), in_float64(self.sde.sigma, self.times)
    h = np.diff(finite_log_snr(self.sde, self.times))
    first, second = h[::2], h[1::2]
    numbers = {
      't': self.times[:-1:2],
      'u': self.times[1::2],
      'keep': sigma[1::2] / sigma[:-1:2],
      'move': -alpha[1::2] * np.expm1(-first),
      'share': np.exp(-second) * np.expm1(-first) / np.expm1(-first - second),
    }
    return {name: values.astype(np.float32) for name, values in numbers.items()}

  def noised(self, x0: Data, i: Int[Array, ' b'], z: Data) -> Data:
    """x_t where the student's steps i begin."""
    alpha, sigma = self.sde.kernel(jnp.asarray(self.steps['t'])[i])
    return expand(alpha, x0) * x0 + expand(sigma, x0) * z

  def target(self, teacher: Denoiser, x: Data, i: Int[Array, ' b']) -> Data:
    """The denoised value with which one step from x goes where two of the teacher do."""
    of_rows = {name: jnp.asarray(values)[i] for name, values in self.steps.items()}
    first = teacher(x, of_rows['t'])
    on_the_way = expand(of_rows['keep'], x) * x + expand(of_rows['move'], x) * first
    second = teacher(on_the_way, of_rows['u'])
    return second + expand(of_rows['share'], x) * (first - second)

  def loss(
    self, student: Denoiser, teacher: Denoiser, x0: Data, i: Int[Array, ' b'], z: Data
  ) -> PerRow:
    """max(SNR, 1) ||target - D(x_t, t)||^2 of each example, where the student's steps i begin.

    The weight is the truncated SNR (Eq. 9): the larger one of the squared errors of x_0 and z.

    Args:
      student, teacher: (x, t) -> the denoised value.
      x0: data.
      i: of the student's steps, from 0 at time T.
      z: standard normal noise.
    """
    x, t = self.noised(x0, i, z), jnp.asarray(self.steps['t'])[i]
    error = student(x, t) - jax.lax.stop_gradient(self.target(teacher, x, i))
    squares = jnp.square(error).reshape(len(x0), -1)
    of_dimensions = squares.mean(-1) if self.reduce_mean else 0.5 * squares.sum(-1)
    return jnp.exp(jnp.maximum(2 * self.sde.log_snr(t), 0.0)) * of_dimensions


def train_step(
  state: TrainState,
  teacher: Params,
  batch: Batch,
  rng: Key,
  *,
  model: ScoreModel,
  codec: Codec,
  objective: Halving,
  tx: optax.GradientTransformation,
  averages: tuple[Average, ...],
  grad_accum: int = 1,
) -> tuple[TrainState, Metrics]:
  """One optimiser step on a batch of images; random only in (rng, state.step)."""
  rng_step = jax.random.fold_in(rng, state.step)
  rng_data, rng_i, rng_z, rng_dropout = jax.random.split(rng_step, 4)
  x0, told = seen_in_training(rng_step, rng_data, batch, model, codec)
  i = jax.random.randint(rng_i, (len(x0),), 0, objective.num_steps)
  z = jax.random.normal(rng_z, x0.shape)

  def loss_fn(params: Params, part: tuple[Key, Data, Array, Data, Told]) -> tuple[Array, Metrics]:
    rng_dropout, x0, i, z, told = part
    student, taught_by = model.bind(params, rng_dropout, **told), model.bind(teacher, **told)
    return objective.loss(student.denoised, taught_by.denoised, x0, i, z).mean(), {}

  differentiate = gradient_in_parts(loss_fn, rng_dropout, (x0, i, z, told), grad_accum)
  return apply_gradients(state, differentiate, tx, averages)


def eval_step(
  params: Params,
  teacher: Params,
  batch: Batch,
  rng: Key,
  *,
  model: ScoreModel,
  codec: Codec,
  objective: Halving,
) -> PerRow:
  """The loss of each example of a batch at random steps, without dropout or flips."""
  rng_data, rng_i, rng_z = jax.random.split(rng, 3)
  x0 = codec.for_evaluation(rng_data, batch['data'])
  i = jax.random.randint(rng_i, (len(x0),), 0, objective.num_steps)
  z = jax.random.normal(rng_z, x0.shape)
  told = told_in_evaluation(batch, model, codec)
  student, taught_by = (model.bind(p, **told) for p in (params, teacher))
  return objective.loss(student.denoised, taught_by.denoised, x0, i, z)
