"""Energy-based models, trained by contrastive divergence (Du & Mordatch 2019).

p(x) = exp(-E(x)) / Z has the gradient of log-likelihood E_p[dE/dparams] - E_data[dE/dparams]
(Hinton 2002); the samples of p come from a few steps of Langevin dynamics, which begin where
earlier ones ended: in a replay buffer. https://arxiv.org/abs/1903.08689
"""

import dataclasses

import flax
import jax
from jax import Array
import jax.numpy as jnp
import optax

from data.codec import Codec
from losses import Objective
from models.score import Params, ScoreModel
from samplers.langevin import langevin_step
from sde_lib import expand, ScoreFn
from training import step as training_step
from training.averages import Average
from training.packing import unpacked
from training.step import apply_gradients, Batch, Metrics, TrainState


@flax.struct.dataclass
class EBMState(TrainState):
  """With the samples that Langevin dynamics goes on from."""

  replay: Array  # [buffer size, ...]


@dataclasses.dataclass(frozen=True)
class ContrastiveDivergence:
  """How negative samples are drawn.

  Attributes:
    n_steps: of Langevin dynamics.
    step_size: of it; see `langevin.langevin_step`.
    buffer_size: how many samples are kept; at least a batch.
    restart: the share of them that begin anew from the prior of the SDE.
    regularization: of the squared energies, which holds them near zero.
  """

  n_steps: int = 20
  step_size: float = 0.01
  buffer_size: int = 10_000
  restart: float = 0.05
  regularization: float = 0.01

  def sample(self, rng: Array, score_fn: ScoreFn, x: Array, t: Array) -> Array:
    """Langevin dynamics from x [B, ...] at times t [B]."""

    def step(x: Array, rng: Array) -> tuple[Array, None]:
      z = jax.random.normal(rng, x.shape)
      return langevin_step(x, score_fn(x, t), self.step_size, z)[0], None

    return jax.lax.scan(step, x, jax.random.split(rng, self.n_steps))[0]


def init_state(
  rng: Array,
  model: ScoreModel,
  tx: optax.GradientTransformation,
  shape: tuple[int, ...],
  divergence: ContrastiveDivergence,
  n_averages: int = 1,
) -> EBMState:
  """The state before the first step, for data of `shape` [B, ...], with a buffer of noise."""
  state = training_step.init_state(rng, model, tx, shape, n_averages)
  rng_replay = jax.random.fold_in(rng, 1)
  replay = model.sde.prior_sampling(rng_replay, (divergence.buffer_size, *shape[1:]))
  return EBMState(state.step, state.params, state.averages, state.opt_state, replay)


def train_step(
  state: EBMState,
  batch: Batch,
  rng: Array,
  *,
  model: ScoreModel,
  codec: Codec,
  objective: Objective,
  divergence: ContrastiveDivergence,
  tx: optax.GradientTransformation,
  averages: tuple[Average, ...],
) -> tuple[EBMState, Metrics]:
  """One optimiser step on a batch of data and one of samples; random only in (rng, state.step).

  The loss is E(x+) - E(x-) + regularization (E(x+)^2 + E(x-)^2), for data x+ with the noise of the
  objective's one time and samples x-, through whose making no gradient goes.
  """
  rngs = jax.random.split(jax.random.fold_in(rng, state.step), 6)
  x0 = codec.for_training(rngs[0], batch['data'])
  t = objective.times(rngs[1], len(x0))  # one level of noise
  alpha, std = (expand(v, x0) for v in objective.kernels.kernel(t))
  positive = alpha * x0 + std * jax.random.normal(rngs[1], x0.shape)

  chosen = jax.random.choice(rngs[2], len(state.replay), (len(x0),), replace=False)
  anew = jax.random.bernoulli(rngs[3], divergence.restart, t.shape)
  start = jnp.where(
    expand(anew, x0), model.sde.prior_sampling(rngs[4], x0.shape), state.replay[chosen]
  )
  negative = divergence.sample(rngs[5], model.bind(unpacked(state.params)), start, t)

  def loss_fn(params: Params) -> tuple[Array, Metrics]:
    score_fn = model.bind(params)
    of_data, of_samples = score_fn.energy(positive, t), score_fn.energy(negative, t)
    gap = of_data.mean() - of_samples.mean()
    squares = (jnp.square(of_data) + jnp.square(of_samples)).mean()
    return gap + divergence.regularization * squares, {'energy_gap': gap}

  differentiate = jax.value_and_grad(loss_fn, has_aux=True)
  state, metrics = apply_gradients(state, differentiate, tx, averages)
  return dataclasses.replace(state, replay=state.replay.at[chosen].set(negative)), metrics
