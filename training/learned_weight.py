"""A weight of noise levels that is learned beside the network: u(sigma) of EDM2.

Where the loss of a level of noise is L(sigma), what is minimised is

  E[L(sigma) / e^u(sigma) + u(sigma)]

(Karras et al. 2023, https://arxiv.org/abs/2312.02696, Sec. 2.2, after Kendall et al. 2018). For a
network as it is, the best e^u is the mean of L(sigma): so the network sees every level on the same
scale all the time, whatever else its weight is. u is linear in Fourier features of log(sigma /
alpha) / 4. It serves training alone: it is in no average, and no sampler and no evaluation knows
it.
"""

import dataclasses
import math
from typing import Any

import flax
import jax
from jax import Array
import jax.numpy as jnp
import optax

from models.score import ScoreModel
from runtime.shapes import Features, Key, PerRow
from training import step as training_step
from training.step import Batch, Metrics, TrainState

_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, lie evenly


@flax.struct.dataclass
class WeightedState(TrainState):
  """With the coefficients of u, and the state of their own optimiser."""

  weight: Array  # [features]
  weight_opt_state: Any


@dataclasses.dataclass(frozen=True)
class LearnedWeight:
  """u, and how it is learned.

  Attributes:
    tx: the optimiser of its coefficients.
    n_features: how many there are.
  """

  tx: optax.GradientTransformation
  n_features: int = 128

  def features(self, log_noise: PerRow) -> Features:
    """sqrt(2) cos(2 pi (f x + phi)) of x = log(sigma / alpha) / 4.

    EDM2 draws f from a normal law and phi from a uniform one. Here they are quantiles of these laws
    instead: nothing random has to be kept.
    """
    i = jnp.arange(self.n_features, dtype=jnp.float32)
    f = jax.scipy.special.ndtri((i + 0.5) / self.n_features)
    turns = log_noise[:, None] / 4 * f + i * _GOLDEN % 1
    return math.sqrt(2) * jnp.cos(2 * math.pi * turns)

  def u(self, weight: Array, log_noise: PerRow) -> PerRow:
    """u at log(sigma / alpha); 0 before the first step."""
    return (self.features(log_noise) * weight).sum(-1)

  def loss(self, weight: Array, log_noise: PerRow, each: PerRow) -> Array:
    """The mean of L / e^u + u over examples whose losses are L."""
    u = self.u(weight, log_noise)
    return (each * jnp.exp(-u) + u).mean()


def init_state(
  rng: Key,
  model: ScoreModel,
  tx: optax.GradientTransformation,
  shape: tuple[int, ...],
  learned: LearnedWeight,
  n_averages: int = 1,
) -> WeightedState:
  """The state before the first step, for data of `shape`, a batch's: all levels weigh the same."""
  state = training_step.init_state(rng, model, tx, shape, n_averages)
  weight = jnp.zeros(learned.n_features)
  return WeightedState(
    state.step, state.params, state.averages, state.opt_state, weight, learned.tx.init(weight)
  )


def train_step(
  state: WeightedState, batch: Batch, rng: Key, *, learned: LearnedWeight, **choices: Any
) -> tuple[WeightedState, Metrics]:
  """`training.step.train_step`, whose `choices` it takes, with the loss weighed by e^-u.

  The metric 'loss' is that of the objective, as it is without u; 'weighted_loss' has u.
  """
  kernels = choices['objective'].kernels

  def weighted(each: PerRow, t: PerRow) -> tuple[Array, Metrics]:
    alpha, sigma = kernels.kernel(t)
    log_noise, fixed = jnp.log(sigma / alpha), jax.lax.stop_gradient(each)
    gradient = jax.grad(learned.loss)(state.weight, log_noise, fixed)
    loss = learned.loss(state.weight, log_noise, each)
    return loss, {'loss': each.mean(), 'weighted_loss': loss, 'weight_gradient': gradient}

  following, metrics = training_step.train_step(state, batch, rng, reduce=weighted, **choices)
  gradient = metrics.pop('weight_gradient')
  updates, opt_state = learned.tx.update(gradient, state.weight_opt_state, state.weight)
  weight = optax.apply_updates(state.weight, updates)
  return dataclasses.replace(following, weight=weight, weight_opt_state=opt_state), metrics
