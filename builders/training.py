"""From a config to what is trained, and for how long: the score model, and the classifier."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jax import Array
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from builders.data import make_augmentation
from builders.distillation import distillation_task
from builders.setup import make_learning_rate, make_optimizer, Setup
from losses import UniformTimes
from models.classifier import Classifier
from models.score import Params
from models.wideresnet import WideResnet
from runtime.errors import UserError
from training import classifier, contrastive_divergence, learned_weight, loop
from training.averages import Average, ConstantRate, HalfLife, Power, WarmingRate
from training.contrastive_divergence import ContrastiveDivergence
from training.learned_weight import LearnedWeight
from training.loop import Schedule, Task, Update
from training.optim import LearningRate
from training.step import Batch, eval_step, init_state, Metrics, train_step, TrainState


def make_schedule(config: FrozenConfigDict, section: str = 'training') -> Schedule:
  """The schedule of the score model, or that of the classifier: another number of steps."""
  training = config.training
  return Schedule(
    n_iters=config.classifier.n_iters if section == 'classifier' else training.n_iters,
    n_jitted_steps=training.n_jitted_steps,
    log_freq=training.log_freq,
    eval_freq=training.eval_freq,
    snapshot_freq=training.snapshot_freq,
    snapshot_freq_for_preemption=training.snapshot_freq_for_preemption,
    skip_nonfinite=training.skip_nonfinite,
    keep_snapshots=training.keep_snapshots,
    wandb=training.wandb,
  )


def task_of(setup: Setup, frozen: Params | None = None) -> Task:
  """The training of a config's model: of its score, or by a teacher whose parameters are frozen."""
  if setup.config.distill.method:
    return distillation_task(setup, make_averages(setup.config), frozen)
  return score_task(setup)


def score_task(setup: Setup) -> Task:
  """The training of the score model of a config."""
  model, config = setup.model, setup.config
  shape = (1, *setup.data_shape)
  averages = make_averages(config)

  def evaluate(params: Params, frozen: None, batch: Batch, rng: Array) -> Metrics:
    del frozen
    each = eval_step(params, batch, rng, model=model, codec=setup.codec, objective=setup.objective)
    return {'loss': each.mean()}

  choices = {
    'model': model,
    'codec': setup.codec,
    'objective': setup.objective,
    'tx': setup.tx,
    'averages': averages,
  }
  init: Callable[[Array], TrainState] = partial(
    init_state, model=model, tx=setup.tx, shape=shape, n_averages=len(averages)
  )
  in_parts = {
    'grad_accum': config.training.grad_accum,
    'augmentation': make_augmentation(config),
    **choices,
  }
  step: Callable[..., Any] = partial(train_step, **in_parts)
  if config.training.objective == 'cd':
    divergence = make_divergence(config)
    init = partial(
      contrastive_divergence.init_state,
      model=model, tx=setup.tx, shape=shape, divergence=divergence,
      n_averages=len(averages),
    )  # fmt: skip
    step = partial(contrastive_divergence.train_step, divergence=divergence, **choices)
  if config.training.learned_weight:
    learned = LearnedWeight(make_optimizer(config, make_learning_rate(config), weight_decay=0.0))
    init = partial(
      learned_weight.init_state,
      model=model, tx=setup.tx, shape=shape, learned=learned, n_averages=len(averages),
    )  # fmt: skip
    step = partial(learned_weight.train_step, learned=learned, **in_parts)
  return Task(
    section='model',
    init=init,
    update=_without_frozen(step),
    evaluate=evaluate,
    purposes=('init', 'train', 'eval'),
    batch_size=config.training.batch_size,
  )


def abstract_state(setup: Setup) -> TrainState:
  """The shapes, dtypes and shardings of the state of a config's model; nothing is computed.

  Raises:
    UserError: if the config does not make a network.
  """
  return loop.abstract_state(task_of(setup), setup.devices, setup.keys)


def make_averages(config: FrozenConfigDict) -> tuple[Average, ...]:
  """The moving averages of a config: the first one, and those of power functions.

  Raises:
    UserError: for a width of a power function that there is not.
  """
  model, ema = config.model, config.ema
  first: Average = WarmingRate(model.ema_rate) if model.ema_warmup else ConstantRate(model.ema_rate)
  if ema.half_life:
    first = HalfLife(ema.half_life, config.training.batch_size, ema.ramp_up)
  try:
    return (first, *(Power(sigma_rel) for sigma_rel in ema.sigma_rels))
  except ValueError as error:
    raise UserError(f'config.ema.sigma_rels: {error}') from error


def average_in_use(config: FrozenConfigDict) -> Average:
  """The moving average that is evaluated and sampled."""
  return make_averages(config)[config.ema.use]


def settled_rate(config: FrozenConfigDict) -> float:
  """The share that the first moving average keeps of itself in a step, once it has warmed up."""
  return 1 - float(make_averages(config)[0].weight(jnp.int32(2**30)))


def make_divergence(config: FrozenConfigDict) -> ContrastiveDivergence:
  """How energies are trained."""
  ebm = config.ebm
  return ContrastiveDivergence(
    ebm.n_steps, ebm.step_size, ebm.buffer_size, ebm.restart, ebm.regularization
  )


def make_classifier(setup: Setup) -> Classifier:
  """The classifier p_t(y | x) of noisy images."""
  choice = setup.config.classifier
  net = WideResnet(
    choice.num_classes,
    choice.blocks_per_group,
    choice.channel_multiplier,
    setup.config.model.dtype,
  )
  return Classifier(net, setup.model.sde, setup.model.precision, setup.model.rows)


def classifier_times(setup: Setup) -> UniformTimes:
  """The times of the classifier: all of the SDE's, whichever the score model is trained at."""
  return UniformTimes(setup.config.training.eps, setup.model.sde.T)


def classifier_task(setup: Setup) -> Task:
  """The training of the classifier of a config."""
  choice, model, times = setup.config.classifier, make_classifier(setup), classifier_times(setup)
  tx = make_optimizer(setup.config, LearningRate(choice.lr, choice.warmup), choice.weight_decay)

  def evaluate(params: Params, frozen: None, batch: Batch, rng: Array) -> Metrics:
    del frozen
    span = (times.eps, times.T)
    each = classifier.eval_step(params, batch, rng, span, classifier=model, codec=setup.codec)
    return dict(zip(('loss', 'accuracy'), (v.mean() for v in each), strict=True))

  step = partial(
    classifier.train_step,
    classifier=model, codec=setup.codec, times=times, tx=tx,
    averages=(WarmingRate(setup.config.model.ema_rate),),
  )  # fmt: skip
  return Task(
    section='classifier',
    init=partial(init_state, model=model, tx=tx, shape=(1, *setup.data_shape)),
    update=_without_frozen(step),
    evaluate=evaluate,
    purposes=('classifier_init', 'classifier_train', 'classifier_eval'),
    batch_size=choice.batch_size,
  )


def _without_frozen(
  step: Callable[[Any, Batch, Array], tuple[TrainState, Metrics]],
) -> Update:
  """A step that reads no parameters but those of its state, as a task takes it."""

  def update(
    state: TrainState, frozen: Any, batch: Batch, rng: Array
  ) -> tuple[TrainState, Metrics]:
    del frozen
    return step(state, batch, rng)

  return update
