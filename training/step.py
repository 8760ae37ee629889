"""One step of training: the state, the gradient of the loss, the optimiser, the moving averages."""

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Any, TypeVar, Unpack

import flax
import jax
from jax import Array
import jax.numpy as jnp
import optax

from data.augmentation import Augmentation
from data.codec import Codec
from losses import Objective, score_matching_loss
from models.classifier import Classifier
from models.score import Params, ScoreModel
from runtime.shapes import Data, Key, PerRow, Told
from training.averages import Average
from training.packing import pack_like, unpacked

Metrics = dict[str, Array]
# 'data', uint8 [B, H, W, C], or float32 [B, d] of points; 'label', int32 [B], if there are labels;
# 'condition', uint8 [B, H, W, C], if each image goes with another that the network is told.
Batch = dict[str, Array]


@flax.struct.dataclass
class TrainState:
  """All that changes during training. There is no random key: those come from seed and step.

  While it is trained, what is a tree like the parameters may be `training.packing.Packed`.
  """

  step: Any  # optimiser steps taken, int32 []; a `jax.ShapeDtypeStruct` in a template
  params: Params
  averages: tuple[Params, ...]  # moving averages of the parameters, at least one
  opt_state: Any

  @property
  def ema_params(self) -> Params:
    """The first average: what is evaluated and sampled during training."""
    return unpacked(self.averages[0])


AnyState = TypeVar('AnyState', bound=TrainState)
# (loss of each example, its time) -> what is minimised, [], and what else to report.
Reduction = Callable[[PerRow, PerRow], tuple[Array, Metrics]]


def mean_loss(each: PerRow, t: PerRow) -> tuple[Array, Metrics]:
  """All examples count the same."""
  del t
  return each.mean(), {}


def init_state(
  rng: Key,
  model: ScoreModel | Classifier,
  tx: optax.GradientTransformation,
  shape: tuple[int, ...],
  n_averages: int = 1,
) -> TrainState:
  """The state before the first step, for data of `shape`, a batch's."""
  params = model.init(rng, shape)
  # Buffers of their own: the state's are donated.
  averages = tuple(jax.tree.map(jnp.copy, params) for _ in range(n_averages))
  return TrainState(jnp.zeros((), jnp.int32), params, averages, tx.init(params))


def train_step(
  state: AnyState,
  batch: Batch,
  rng: Key,
  *,
  model: ScoreModel,
  codec: Codec,
  objective: Objective,
  tx: optax.GradientTransformation,
  averages: tuple[Average, ...],
  grad_accum: int = 1,
  augmentation: Augmentation | None = None,
  reduce: Reduction = mean_loss,
) -> tuple[AnyState, Metrics]:
  """One optimiser step on a batch of images; random only in (rng, state.step).

  The loss is the mean over the whole batch, wherever its parts lie, and in however many parts the
  batch is taken, one after another: `grad_accum`.
  """
  rng_step = jax.random.fold_in(rng, state.step)
  rng_data, rng_t, rng_z, rng_dropout = jax.random.split(rng_step, 4)
  x0, told = seen_in_training(rng_step, rng_data, batch, model, codec, augmentation)
  t = objective.times(rng_t, len(x0))
  z = objective.coupling(x0, jax.random.normal(rng_z, x0.shape))
  return optimize(
    state, x0, t, z, rng_dropout,
    model=model, objective=objective, tx=tx, averages=averages, grad_accum=grad_accum,
    reduce=reduce, **told,
  )  # fmt: skip


def seen_in_training(
  rng_step: Key,
  rng_data: Key,
  batch: Batch,
  model: ScoreModel,
  codec: Codec,
  augmentation: Augmentation | None = None,
) -> tuple[Data, Told]:
  """The data x0 of a step, and what a network is told of them.

  Some labels are hidden. A condition is flipped and augmented as the image that it goes with.

  Args:
    rng_step: of the step. Labels and augmentation have a fifth and a sixth key of it; the four that
      it is split into are what they always were.
    rng_data: the one of these four by which the codec flips and dequantises.
    batch: as it is stored.
    model: which says what is told.
    codec: of the data.
    augmentation: of images, if there is any.
  """
  told = Told()
  if model.num_classes:
    rng_labels = jax.random.fold_in(rng_step, 4)
    told['labels'] = codec.training_labels(rng_labels, batch['label'], model.num_classes)
  x0 = codec.for_training(rng_data, batch['data'])
  if model.condition_channels:
    told['condition'] = codec.training_condition(rng_data, batch['condition'])
  if augmentation:
    rng = jax.random.fold_in(rng_step, 5)
    x0, told['augment_labels'] = augmentation(rng, x0)
    if 'condition' in told:
      told['condition'], _ = augmentation(rng, told['condition'])
  return x0, told


def told_in_evaluation(batch: Batch, model: ScoreModel, codec: Codec) -> Told:
  """What a network is told of a batch as it is; data without labels are of any class."""
  told = Told()
  if model.num_classes and 'label' in batch:
    told['labels'] = batch['label']
  if model.condition_channels:
    told['condition'] = codec.condition(batch['condition'])
  return told


def optimize(
  state: AnyState,
  x0: Data,
  t: PerRow,
  z: Data,
  rng_dropout: Key,
  *,
  model: ScoreModel,
  objective: Objective,
  tx: optax.GradientTransformation,
  averages: tuple[Average, ...],
  grad_accum: int = 1,
  reduce: Reduction = mean_loss,
  **told: Unpack[Told],
) -> tuple[AnyState, Metrics]:
  """The step of `train_step` once data x0, times t, noise z and what the network is told are drawn.

  `reduce` makes one number of the losses of a batch, or of each of its parts; the mean over the
  parts is then taken.
  """

  def loss_fn(params: Params, part: Any) -> tuple[Array, Metrics]:
    rng_dropout, x0, t, z, told = part
    score_fn = model.bind(params, rng_dropout, **told)
    rng = jax.random.fold_in(rng_dropout, 1)
    return reduce(score_matching_loss(objective, score_fn, x0, t, z, rng), t)

  differentiate = gradient_in_parts(loss_fn, rng_dropout, (x0, t, z, told), grad_accum)
  return apply_gradients(state, differentiate, tx, averages)


def gradient_in_parts(
  loss_fn: Callable[[Params, Any], tuple[Array, Metrics]], rng: Key, batch: tuple, n: int
) -> Callable[[Params], tuple[tuple[Array, Metrics], Params]]:
  """Loss and gradient as `apply_gradients` takes them, of a batch in n parts, one after another.

  Args:
    loss_fn: (parameters, (key, *part)) -> the mean of the loss over a part, and what else to say.
    rng: of dropout; each part has a key of its own.
    batch: arrays [B, ...], or trees of them.
    n: of the parts, which all devices share.
  """

  def differentiate(params: Params) -> tuple[tuple[Array, Metrics], Params]:
    of_part = jax.value_and_grad(loss_fn, has_aux=True)
    if n == 1:
      return of_part(params, (rng, *batch))
    rngs = jax.random.split(rng, n)
    parts = jax.tree.map(partial(_parts, n=n), batch)
    return _mean(partial(of_part, params), (rngs, *parts))

  return differentiate


def _parts(x: Array, n: int) -> Array:
  """A batch [B, ...] as n parts [n, B / n, ...], each spread over the devices as the batch is."""
  return x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)


def _mean(function: Callable[[Any], Any], parts: Any) -> Any:
  """The mean of a function over parts, trees of arrays [n, ...], one after another."""

  def add(total: Any, part: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, function(part)), None

  first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
  total, _ = jax.lax.scan(add, zero, parts)
  n = len(jax.tree.leaves(parts)[0])
  return jax.tree.map(lambda v: v / n, total)


def apply_gradients(
  state: AnyState,
  differentiate: Callable[[Params], tuple[tuple[Array, Metrics], Params]],
  tx: optax.GradientTransformation,
  averages: tuple[Average, ...],
) -> tuple[AnyState, Metrics]:
  """A step of the optimiser down the loss, and one of the moving averages of the parameters.

  Args:
    state: before the step.
    differentiate: parameters -> the loss [] with what else to report of it, and its gradient, as
      `jax.value_and_grad` with `has_aux` makes it.
    tx: the optimiser.
    averages: how each of the state's moving averages moves.
  """
  (loss, measured), grads = differentiate(unpacked(state.params))
  grads = pack_like(state.params, grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  n = state.step + 1
  moved = tuple(
    moved_average(average, params, way.weight(n))
    for way, average in zip(averages, state.averages, strict=True)
  )
  metrics = {'loss': loss, 'grad_norm': optax.tree.norm(grads), **measured}
  state = dataclasses.replace(state, step=n, params=params, averages=moved, opt_state=opt_state)
  return state, metrics


def moved_average(average: Params, params: Params, weight: Array | float) -> Params:
  """average + weight (params - average): a step of an exponential moving average.

  In this form what stands still is kept to the bit. (1 - weight) average + weight params is not the
  same: in float32 its two factors sum to 1 - 1.7e-8 at weight 1e-4, and 10,000 such steps shrink
  the average by 1.7e-4. Both forms stop where a move is below half a bit, within about 3e-8 /
  weight of parameters that stand still.
  """

  def move(average: Array, params: Array) -> Array:
    moved = average + weight * (params - average)
    return jnp.where(jnp.asarray(weight) < 1, moved, params)  # 1: no average

  return jax.tree.map(move, average, params)


def finite_step(
  update: Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Metrics]],
  state: TrainState,
  frozen: Any,
  batch: Batch,
  rng: Key,
) -> tuple[TrainState, Metrics]:
  """The step that `update` makes, but where its loss or gradient is not finite.

  There the state stays what it is, but for the number of steps; 'skipped' is then 1, otherwise 0.
  """
  following, measured = update(state, frozen, batch, rng)
  finite = jnp.isfinite(measured['loss']) & jnp.isfinite(measured['grad_norm'])
  unmoved = dataclasses.replace(state, step=following.step)
  kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, unmoved)
  return kept, measured | {'skipped': 1 - finite.astype(jnp.float32)}


def eval_step(
  params: Params,
  batch: Batch,
  rng: Key,
  *,
  model: ScoreModel,
  codec: Codec,
  objective: Objective,
) -> PerRow:
  """The loss of each example of a batch at random times: images as they are, without dropout."""
  rng_data, rng_t, rng_z = jax.random.split(rng, 3)
  x0 = codec.for_evaluation(rng_data, batch['data'])
  t = objective.times(rng_t, len(x0))
  z = objective.coupling(x0, jax.random.normal(rng_z, x0.shape))
  score_fn = model.bind(params, **told_in_evaluation(batch, model, codec))
  rng_matching = jax.random.fold_in(rng, 3)  # another key; the three are what they always were
  return score_matching_loss(objective, score_fn, x0, t, z, rng_matching)
