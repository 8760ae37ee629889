"""Score matching, and the training step that minimises it.

The denoising score matching loss of the continuous SDEs (Eq. 7 of
https://arxiv.org/abs/2011.13456), of SMLD (Eq. 1) and of DDPM (Eq. 3) is one formula: they differ
in the times that they draw and in the kernel alpha, std that perturbs the data, not in what they
minimise. Its forerunners, explicit, implicit and sliced score matching, ask for the same score.
"""

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Any, TypeVar

import flax
import jax
from jax import Array
import jax.numpy as jnp
import optax

from models.classifier import Classifier
from models.score import Params, ScoreModel
from sde_lib import expand, ScoreFn, SDE

Metrics = dict[str, Array]
# 'data', uint8 [B, H, W, C], or float32 [B, d] of points; 'label', int32 [B], if there are labels.
Batch = dict[str, Array]

# (score_fn, x [B, ...], t [B], key) -> loss [B], whose expectation over x ~ p_t is least at the
# score of p_t.
Matching = Callable[[ScoreFn, Array, Array, Array], Array]


@flax.struct.dataclass
class TrainState:
  """All that changes during training. There is no random key: those come from seed and step."""

  step: Array  # optimiser steps taken, int32 []
  params: Params
  ema_params: Params
  opt_state: Any


AnyState = TypeVar('AnyState', bound=TrainState)


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised, and over which data.

  Attributes:
    matching: what is asked of the score at x_t, or None for denoising score matching.
    single_scale: train at time eps alone: one level of noise.
    continuous: train at all times in [eps, T], or only at those of the chain.
    reduce_mean: the mean over dimensions, or half the sum, the released code's scale.
    likelihood_weighting: weigh times by g(t)^2, for likelihood, not by std^2, for samples.
    random_flip: mirror every other training image.
    uniform_dequantization: spread the 256 levels of a pixel over [0, 1).
    label_dropout: the share of training labels that the null label replaces.
  """

  matching: Matching | None = None
  single_scale: bool = False
  continuous: bool = True
  reduce_mean: bool = False
  likelihood_weighting: bool = False
  random_flip: bool = False
  uniform_dequantization: bool = False
  label_dropout: float = 0.0


def sample_times(
  rng: Array, sde: SDE, n: int, continuous: bool, single_scale: bool = False
) -> Array:
  """n training times [n], uniform over [eps, T] or over the chain's times, or all of them eps."""
  if single_scale:
    return jnp.full(n, sde.eps)
  if continuous:
    return jax.random.uniform(rng, (n,), minval=sde.eps, maxval=sde.T)
  return sde.time(jax.random.randint(rng, (n,), 0, sde.N))


# What may be asked of a score at x [B, ...] and times t [B]; each is a loss [B].


def explicit_score_matching(true_score_fn: ScoreFn, score_fn: ScoreFn, x: Array, t: Array) -> Array:
  """1/2 ||s(x) - grad log p(x)||^2, where the true score is known (Hyvarinen 2005, Eq. 2).

  https://jmlr.org/papers/v6/hyvarinen05a.html. The others have this expectation but for a constant.
  """
  return 0.5 * _square(score_fn(x, t) - true_score_fn(x, t))


def implicit_score_matching(score_fn: ScoreFn, x: Array, t: Array) -> Array:
  """tr(ds/dx) + 1/2 ||s(x)||^2, integrated by parts (Hyvarinen 2005, Theorem 1).

  The trace is exact, and costs one derivative for each dimension.
  """
  axes = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, 1, *x.shape[1:])

  def along(axis: Array) -> tuple[Array, Array]:
    v = jnp.broadcast_to(axis, x.shape)
    score, slope = jax.jvp(lambda x: score_fn(x, t), [x], [v])
    return score, _dot(v, slope)

  scores, slopes = jax.vmap(along)(axes)
  return slopes.sum(0) + 0.5 * _square(scores[0])


def sliced_score_matching(score_fn: ScoreFn, x: Array, t: Array, v: Array) -> Array:
  """v^T (ds/dx) v + 1/2 (v^T s)^2 for random directions v like x, E[v v^T] = I.

  SSM of Song et al. 2019, https://arxiv.org/abs/1905.07088.
  """
  score, slope = jax.jvp(lambda x: score_fn(x, t), [x], [v])
  return _dot(v, slope) + 0.5 * jnp.square(_dot(v, score))


def hutchinson_score_matching(score_fn: ScoreFn, x: Array, t: Array, v: Array) -> Array:
  """v^T (ds/dx) v + 1/2 ||s||^2: implicit score matching with Hutchinson's estimate of the trace.

  Of less variance than `sliced_score_matching` (SSM-VR of the same paper).
  """
  score, slope = jax.jvp(lambda x: score_fn(x, t), [x], [v])
  return _dot(v, slope) + 0.5 * _square(score)


MATCHINGS: dict[str, Matching] = {
  'ism': lambda score_fn, x, t, rng: implicit_score_matching(score_fn, x, t),
  'ssm': lambda score_fn, x, t, rng: sliced_score_matching(score_fn, x, t, _signs(rng, x)),
  'ssm_vr': lambda score_fn, x, t, rng: hutchinson_score_matching(score_fn, x, t, _signs(rng, x)),
}


def _signs(rng: Array, x: Array) -> Array:
  return jax.random.rademacher(rng, x.shape, x.dtype)


def _dot(u: Array, v: Array) -> Array:
  return (u * v).reshape(len(u), -1).sum(-1)


def _square(x: Array) -> Array:
  return _dot(x, x)


def score_matching_loss(
  sde: SDE, score_fn: ScoreFn, x0: Array, t: Array, z: Array, rng: Array, objective: Objective
) -> Array:
  """The loss of each example [B] at given times and noise, of any kind.

  What is asked of the score at x_t = alpha x_0 + std z is weighed by std^2, as in `dsm_loss`, which
  so is this loss of `explicit_score_matching`, but for a constant at each time.

  Args:
    rng: the key of random directions.
    sde, score_fn, x0, t, z, objective: as in `dsm_loss`.
  """
  if objective.matching is None:
    return dsm_loss(sde, score_fn, x0, t, z, objective)
  alpha, std = sde.kernel(t, objective.continuous)
  x = expand(alpha, x0) * x0 + expand(std, x0) * z
  weight = sde.diffusion_coef(t) if objective.likelihood_weighting else std
  loss = weight**2 * objective.matching(score_fn, x, t, rng)
  return 2 / x0[0].size * loss if objective.reduce_mean else loss


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


def preprocess(rng: Array, data: Array, centered: bool, flip: bool, dequantize: bool) -> Array:
  """Images as stored, uint8 [B, H, W, C], to floats in [0, 1], or in [-1, 1] if `centered`.

  Points, which are floats, stay what they are.
  """
  if data.dtype != jnp.uint8:
    return data
  rng_flip, rng_level = jax.random.split(rng)
  x = data.astype(jnp.float32)
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
  at `grad_clip`, unless negative; weight decay is decoupled. The tree of its state depends on none
  of them, so that they can be changed while a run goes on.
  """
  clip = optax.clip_by_global_norm(grad_clip) if grad_clip >= 0 else optax.identity()
  schedule = optax.linear_schedule(0.0, lr, warmup) if warmup else optax.constant_schedule(lr)
  return optax.chain(
    clip, optax.adamw(schedule, b1=beta1, b2=0.999, eps=eps, weight_decay=weight_decay)
  )


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
  grad_accum: int = 1,
) -> tuple[TrainState, Metrics]:
  """One optimiser step on a batch of images; random only in (rng, state.step).

  The loss is the mean over the whole batch, wherever its parts lie, and in however many parts the
  batch is taken, one after another: `grad_accum`.
  """
  rng_step = jax.random.fold_in(rng, state.step)
  rng_data, rng_t, rng_z, rng_dropout = jax.random.split(rng_step, 4)
  labels = None
  if model.num_classes:
    rng_labels = jax.random.fold_in(rng_step, 4)  # a fifth key; the four are what they always were
    labels = drop_labels(rng_labels, batch['label'], objective.label_dropout, model.num_classes)
  x0 = preprocess(
    rng_data,
    batch['data'],
    model.centered,
    objective.random_flip,
    objective.uniform_dequantization,
  )
  t = sample_times(rng_t, model.sde, len(x0), objective.continuous, objective.single_scale)
  z = jax.random.normal(rng_z, x0.shape)
  return optimize(
    state, x0, t, z, rng_dropout, labels,
    model=model, objective=objective, tx=tx, ema_rate=ema_rate, ema_warmup=ema_warmup,
    grad_accum=grad_accum,
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
  grad_accum: int = 1,
) -> tuple[TrainState, Metrics]:
  """The step of `train_step` once data x0 [B, ...], times t [B], noise z and labels are drawn."""

  def loss_fn(params: Params, part: Any) -> tuple[Array, Metrics]:
    rng_dropout, x0, t, z, labels = part
    score_fn = model.bind(params, rng_dropout, labels)
    rng = jax.random.fold_in(rng_dropout, 1)
    return score_matching_loss(model.sde, score_fn, x0, t, z, rng, objective).mean(), {}

  def differentiate(params: Params) -> tuple[tuple[Array, Metrics], Params]:
    of_part = jax.value_and_grad(loss_fn, has_aux=True)
    if grad_accum == 1:
      return of_part(params, (rng_dropout, x0, t, z, labels))
    rngs = jax.random.split(rng_dropout, grad_accum)
    parts = jax.tree.map(partial(_parts, n=grad_accum), (x0, t, z, labels))
    return _mean(partial(of_part, params), (rngs, *parts))

  return apply_gradients(state, differentiate, tx, ema_rate, ema_warmup)


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
  ema_rate: float,
  ema_warmup: bool,
) -> tuple[AnyState, Metrics]:
  """A step of the optimiser down the loss, and one of the moving average of the parameters.

  Args:
    state: before the step.
    differentiate: parameters -> the loss [] with what else to report of it, and its gradient, as
      `jax.value_and_grad` with `has_aux` makes it.
    tx: the optimiser.
    ema_rate: what the moving average keeps of itself.
    ema_warmup: let that grow with the number n of this step, from 1, as (1 + n) / (10 + n), up to
      `ema_rate`.
  """
  (loss, measured), grads = differentiate(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  n = state.step + 1
  rate = jnp.minimum(ema_rate, (1 + n) / (10 + n)) if ema_warmup else ema_rate
  ema_params = optax.incremental_update(params, state.ema_params, 1 - rate)
  metrics = {'loss': loss, 'grad_norm': optax.tree.norm(grads), **measured}
  state = dataclasses.replace(
    state, step=n, params=params, ema_params=ema_params, opt_state=opt_state
  )
  return state, metrics


def finite_step(
  update: Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]],
  state: TrainState,
  batch: Batch,
  rng: Array,
) -> tuple[TrainState, Metrics]:
  """The step that `update` makes, but where its loss or gradient is not finite.

  There the state stays what it is, but for the number of steps; 'skipped' is then 1, otherwise 0.
  """
  following, measured = update(state, batch, rng)
  finite = jnp.isfinite(measured['loss']) & jnp.isfinite(measured['grad_norm'])
  unmoved = dataclasses.replace(state, step=following.step)
  kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, unmoved)
  return kept, measured | {'skipped': 1 - finite.astype(jnp.float32)}


def eval_step(
  params: Params, batch: Batch, rng: Array, *, model: ScoreModel, objective: Objective
) -> Array:
  """The loss of each example of a batch [B] at random times, without dropout or flips."""
  rng_data, rng_t, rng_z = jax.random.split(rng, 3)
  x0 = preprocess(rng_data, batch['data'], model.centered, False, objective.uniform_dequantization)
  t = sample_times(rng_t, model.sde, len(x0), objective.continuous, objective.single_scale)
  z = jax.random.normal(rng_z, x0.shape)
  score_fn = model.bind(params, labels=batch['label'] if model.num_classes else None)
  rng_matching = jax.random.fold_in(rng, 3)  # another key; the three are what they always were
  return score_matching_loss(model.sde, score_fn, x0, t, z, rng_matching, objective)
