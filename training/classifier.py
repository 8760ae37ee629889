"""Training of the noise-conditional classifier, for class-conditional sampling (Appendix I.1).

It learns p_t(y | x) of images at all times: the cross-entropy of the class y of an image x(0) given
x(t) = alpha x(0) + sigma z, with t uniform over [eps, T].
"""

from collections.abc import Mapping
import logging
from typing import Any

from etils import epath
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from data.batches import eval_batches
from data.codec import Codec
from data.images import Source
from losses import UniformTimes
from models.classifier import Classifier, ClassLogProb
from models.score import Params
from runtime import processes
from runtime.devices import Devices, Keys
from runtime.errors import UserError
from sde_lib import expand
from training import checkpoints as checkpoints_lib
from training.averages import Average
from training.checkpoints import Checkpoints
from training.loop import abstract_state, Task
from training.step import apply_gradients, Batch, Metrics, TrainState
from workdir.progress import Bar
from workdir.same_config import check_unchanged, CLASSIFIER

logger = logging.getLogger('score_sde')

LEVELS = 5  # of noise, equal parts of [eps, T], in a report


def cross_entropy(
  log_prob: ClassLogProb, x0: Array, t: Array, z: Array, labels: Array
) -> tuple[Array, Array]:
  """-log p_t(y | alpha x_0 + sigma z) of data x0 [B, ...] at times t [B], and whether y is guessed.

  Args:
    log_prob: of the classes.
    x0: data [B, ...].
    t: times [B].
    z: standard normal noise, like x0.
    labels: y, int32 [B].

  Returns:
    The loss [B], and [B]: 1 where y is the most probable class, else 0.
  """
  sde = log_prob.classifier.sde
  x = expand(sde.alpha(t), x0) * x0 + expand(sde.sigma(t), x0) * z
  log_p = log_prob.of_all(x, t)
  loss = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
  return loss, (log_p.argmax(-1) == labels).astype(loss.dtype)


def train_step(
  state: TrainState,
  batch: Batch,
  rng: Array,
  *,
  classifier: Classifier,
  codec: Codec,
  times: UniformTimes,
  tx: optax.GradientTransformation,
  averages: tuple[Average, ...],
) -> tuple[TrainState, Metrics]:
  """One optimiser step on a batch of images with labels; random only in (rng, state.step)."""
  rng_data, rng_t, rng_z = jax.random.split(jax.random.fold_in(rng, state.step), 3)
  x0 = codec.for_training(rng_data, batch['data'])
  t = times(rng_t, len(x0))
  z = jax.random.normal(rng_z, x0.shape)

  def loss_fn(params: Params) -> tuple[Array, Metrics]:
    loss, correct = cross_entropy(classifier.bind(params), x0, t, z, batch['label'])
    return loss.mean(), {'accuracy': correct.mean()}

  differentiate = jax.value_and_grad(loss_fn, has_aux=True)
  return apply_gradients(state, differentiate, tx, averages)


def eval_step(
  params: Params,
  batch: Batch,
  rng: Array,
  span: tuple[Array | float, Array | float],
  *,
  classifier: Classifier,
  codec: Codec,
) -> tuple[Array, Array]:
  """`cross_entropy` of a batch at times between the two of `span`, without flips."""
  rng_data, rng_t, rng_z = jax.random.split(rng, 3)
  x0 = codec.for_evaluation(rng_data, batch['data'])
  t = jax.random.uniform(rng_t, x0.shape[:1], minval=span[0], maxval=span[1])
  z = jax.random.normal(rng_z, x0.shape)
  return cross_entropy(classifier.bind(params), x0, t, z, batch['label'])


def folder(root: epath.Path) -> epath.Path:
  """Where the classifier of a workdir lies."""
  return root / 'classifier'


def load(
  root: epath.Path, config: Mapping[str, Any], task: Task, devices: Devices, keys: Keys
) -> Params:
  """The moving average of the classifier's parameters, of the newest checkpoint in a workdir.

  `Classifier.bind` makes log p_t(y | x) of them.

  Raises:
    UserError: if there is none, or it was trained with another config.
  """
  where = folder(root)
  if not checkpoints_lib.exist(where):
    raise UserError(f'{root} holds no classifier; train it first (--mode train_classifier)')
  check_unchanged(where / 'config.json', config, CLASSIFIER)
  with Checkpoints(where) as checkpoints:
    newest = checkpoints.restore_latest_averages(abstract_state(task, devices, keys))
  if newest is None:  # an object store shows those that broke off
    raise UserError(f'{root} holds no whole classifier; train it first (--mode train_classifier)')
  return newest[1][0]


def evaluate(
  classifier: Classifier,
  codec: Codec,
  params: Params,
  held_out: Source,
  times: UniformTimes,
  batch_size: int,
  devices: Devices,
  keys: Keys,
) -> dict[str, Any]:
  """Loss and accuracy on every held-out image, at each of `LEVELS` levels of noise and in all."""
  n, edges = len(held_out), np.linspace(times.eps, times.T, LEVELS + 1)

  def sums(params: Params, batch: Batch, rng: Array, span: tuple[Array, Array]) -> Array:
    each = eval_step(params, batch, rng, span, classifier=classifier, codec=codec)
    return jnp.stack([(v * batch['mask']).sum() for v in each])

  sums = jax.jit(sums, out_shardings=devices.replicated)
  totals = np.zeros((LEVELS, 2))
  with Bar('accuracy', n, unit='images') as bar:
    for i, rows in enumerate(eval_batches(held_out, batch_size, **processes.share())):
      batch = devices.put(rows)
      for level in range(LEVELS):
        rng = jax.random.fold_in(keys.key('classifier_report', i), level)
        totals[level] += sums(params, batch, rng, (edges[level], edges[level + 1]))
      bar.update(min((i + 1) * batch_size, n))
  means, edges, levels = totals / n, edges.tolist(), []
  for (loss, accuracy), low, high in zip(means.tolist(), edges[:-1], edges[1:], strict=True):
    levels.append({'t': [low, high], 'loss': loss, 'accuracy': accuracy})
    logger.info('t from %.2f to %.2f: accuracy %.4f, loss %.4f', low, high, accuracy, loss)
  loss, accuracy = means.mean(0).tolist()
  return {'images': n, 'loss': loss, 'accuracy': accuracy, 'levels': levels}
