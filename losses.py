"""Denoising score matching, and the training step that minimises it.

The loss of the continuous SDEs (Eq. 7 of https://arxiv.org/abs/2011.13456), of SMLD (Eq. 1) and
of DDPM (Eq. 3) is one formula: they differ in the times that they draw and in the kernel
alpha, std that perturbs the data, not in what they minimise.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax
import jax
from jax import Array
import jax.numpy as jnp
import optax

from models.classifier import Classifier
from models.score import Params, ScoreModel
from sde_lib import expand, ScoreFn, SDE

Metrics = dict[str, Array]
Batch = dict[str, Array]  # 'image', uint8 [B, H, W, C]; 'label', int32 [B], where there are labels


@flax.struct.dataclass
class TrainState:
  """All that changes during training. There is no random key: those come from seed and step."""

  step: Array  # optimiser steps taken, int32 []
  params: Params
  ema_params: Params
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised, and over which data.

  Attributes:
    continuous: train at all times in [eps, T], or only at those of the chain.
    reduce_mean: the mean over dimensions, or half the sum, the released code's scale.
    likelihood_weighting: weigh times by g(t)^2, for likelihood, not by std^2, for samples.
    random_flip: mirror every other training image.
    uniform_dequantization: spread the 256 levels of a pixel over [0, 1).
    label_dropout: the share of training labels that the null label replaces.
  """

  continuous: bool = True
  reduce_mean: bool = False
  likelihood_weighting: bool = False
  random_flip: bool = False
  uniform_dequantization: bool = False
  label_dropout: float = 0.0


def sample_times(rng: Array, sde: SDE, n: int, continuous: bool) -> Array:
  """n training times [n], uniform over [eps, T] or over the chain's times."""
  if continuous:
    return jax.random.uniform(rng, (n,), minval=sde.eps, maxval=sde.T)
  return sde.time(jax.random.randint(rng, (n,), 0, sde.N))


def dsm_loss(
  sde: SDE, score_fn: ScoreFn, x0: Array, t: Array, z: Array, objective: Objective
) -> Array:
  """The denoising score matching loss of each example [B] at given times and noise (Eq. 7).

  ||std s(x_t, t) + z||^2 with x_t = alpha x_0 + std z, that is the squared error of the score
  times std^2; with likelihood weighting it is multiplied by g(t)^2 / std^2
  (https://arxiv.org/abs/2101.09258).

  Args:
    sde: the forward SDE.
    score_fn: the score that is trained.
    x0: data [B, ...].
    t: times [B].
    z: standard normal noise, like x0.
    objective: which kernel, weighting and reduction over dimensions.
  """
  alpha, std = (expand(v, x0) for v in sde.kernel(t, objective.continuous))
  residual = std * score_fn(alpha * x0 + std * z, t) + z
  if objective.likelihood_weighting:
    residual *= expand(sde.diffusion_coef(t), x0) / std
  squares = jnp.square(residual).reshape(x0.shape[0], -1)
  return squares.mean(-1) if objective.reduce_mean else 0.5 * squares.sum(-1)


def preprocess(rng: Array, images: Array, centered: bool, flip: bool, dequantize: bool) -> Array:
  """Images as stored, uint8 [B, H, W, C], to floats in [0, 1], or in [-1, 1] if `centered`."""
  rng_flip, rng_level = jax.random.split(rng)
  x = images.astype(jnp.float32)
  if flip:
    mirrored = jax.random.bernoulli(rng_flip, shape=x.shape[:1])
    x = jnp.where(expand(mirrored, x), x[:, :, ::-1], x)
  x = (x + jax.random.uniform(rng_level, x.shape)) / 256 if dequantize else x / 255
  return 2 * x - 1 if centered else x


def drop_labels(rng: Array, labels: Array, share: float, null: int) -> Array:
  """Labels [B] of which each is replaced by the null label with probability `share`.

  A network that is trained so knows the score of every class and that of all together, which is
  what classifier-free guidance needs (Algorithm 1 of https://arxiv.org/abs/2207.12598).
  """
  return jnp.where(jax.random.bernoulli(rng, share, labels.shape), null, labels)


def adam(
  *, lr: float, beta1: float, eps: float, weight_decay: float, warmup: int, grad_clip: float
) -> optax.GradientTransformation:
  """Adam as in the released code.

  The learning rate grows linearly from 0 over `warmup` steps; the global gradient norm is clipped
  at `grad_clip`, unless negative; weight decay is decoupled.
  """
  schedule = optax.linear_schedule(0.0, lr, warmup) if warmup > 0 else lr
  adam = optax.adamw(schedule, b1=beta1, b2=0.999, eps=eps, weight_decay=weight_decay)
  return optax.chain(optax.clip_by_global_norm(grad_clip), adam) if grad_clip >= 0 else adam


def init_state(
  rng: Array,
  model: ScoreModel | Classifier,
  tx: optax.GradientTransformation,
  shape: tuple[int, ...],
) -> TrainState:
  """The state before the first step, for data of `shape` [B, ...]."""
  params = model.init(rng, shape)
  ema_params = jax.tree.map(jnp.copy, params)  # its own buffers: the state's are donated
  return TrainState(jnp.zeros((), jnp.int32), params, ema_params, tx.init(params))


def train_step(
  state: TrainState,
  batch: Batch,
  rng: Array,
  *,
  model: ScoreModel,
  objective: Objective,
  tx: optax.GradientTransformation,
  ema_rate: float,
  ema_warmup: bool = False,
) -> tuple[TrainState, Metrics]:
  """One optimiser step on a batch of images; random only in (rng, state.step).

  The loss is the mean over the whole batch, wherever its parts lie.
  """
  rng_step = jax.random.fold_in(rng, state.step)
  rng_data, rng_t, rng_z, rng_dropout = jax.random.split(rng_step, 4)
  labels = None
  if model.num_classes:
    rng_labels = jax.random.fold_in(rng_step, 4)  # a fifth key; the four are what they always were
    labels = drop_labels(rng_labels, batch['label'], objective.label_dropout, model.num_classes)
  x0 = preprocess(
    rng_data,
    batch['image'],
    model.centered,
    objective.random_flip,
    objective.uniform_dequantization,
  )
  t = sample_times(rng_t, model.sde, x0.shape[0], objective.continuous)
  z = jax.random.normal(rng_z, x0.shape)
  return optimize(
    state, x0, t, z, rng_dropout, labels,
    model=model, objective=objective, tx=tx, ema_rate=ema_rate, ema_warmup=ema_warmup,
  )  # fmt: skip


def optimize(
  state: TrainState,
  x0: Array,
  t: Array,
  z: Array,
  rng_dropout: Array,
  labels: Array | None = None,
  *,
  model: ScoreModel,
  objective: Objective,
  tx: optax.GradientTransformation,
  ema_rate: float,
  ema_warmup: bool = False,
) -> tuple[TrainState, Metrics]:
  """The step of `train_step` once data x0 [B, ...], times t [B], noise z and labels are drawn."""

  def loss_fn(params: Params) -> tuple[Array, Metrics]:
    score_fn = model.bind(params, rng_dropout, labels)
    return dsm_loss(model.sde, score_fn, x0, t, z, objective).mean(), {}

  return apply_gradients(state, loss_fn, tx, ema_rate, ema_warmup)


def apply_gradients(
  state: TrainState,
  loss_fn: Callable[[Params], tuple[Array, Metrics]],
  tx: optax.GradientTransformation,
  ema_rate: float,
  ema_warmup: bool,
) -> tuple[TrainState, Metrics]:
  """A step of the optimiser down the loss, and one of the moving average of the parameters.

  Args:
    state: before the step.
    loss_fn: parameters -> the loss [], and what else to report of it.
    tx: the optimiser.
    ema_rate: what the moving average keeps of itself.
    ema_warmup: let that grow with the number n of steps taken, as (1 + n) / (10 + n), up to
      `ema_rate`.
  """
  (loss, measured), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  rate = jnp.minimum(ema_rate, (1 + state.step) / (10 + state.step)) if ema_warmup else ema_rate
  ema_params = optax.incremental_update(params, state.ema_params, 1 - rate)
  metrics = {'loss': loss, 'grad_norm': optax.tree.norm(grads), **measured}
  return TrainState(state.step + 1, params, ema_params, opt_state), metrics


def eval_step(
  params: Params, batch: Batch, rng: Array, *, model: ScoreModel, objective: Objective
) -> Array:
  """The loss of each image of a batch [B] at random times, without dropout or flips."""
  rng_data, rng_t, rng_z = jax.random.split(rng, 3)
  x0 = preprocess(rng_data, batch['image'], model.centered, False, objective.uniform_dequantization)
  t = sample_times(rng_t, model.sde, x0.shape[0], objective.continuous)
  z = jax.random.normal(rng_z, x0.shape)
  labels = batch['label'] if model.num_classes else None
  return dsm_loss(model.sde, model.bind(params, labels=labels), x0, t, z, objective)
