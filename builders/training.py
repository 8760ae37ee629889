"""From a config to what is trained, and for how long: the score model, and the classifier."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jax import Array
from ml_collections import FrozenConfigDict

from builders.setup import make_optimizer, Setup
from losses import UniformTimes
from models.classifier import Classifier
from models.score import Params
from models.wideresnet import WideResnet
from training import classifier, contrastive_divergence
from training.contrastive_divergence import ContrastiveDivergence
from training.loop import Schedule, Task, Update
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


def score_task(setup: Setup) -> Task:
  """The training of the score model of a config."""
  model, config = setup.model, setup.config
  shape = (1, *setup.data_shape)

  def evaluate(params: Params, batch: Batch, rng: Array) -> Metrics:
    each = eval_step(params, batch, rng, model=model, codec=setup.codec, objective=setup.objective)
    return {'loss': each.mean()}

  choices = {
    'model': model,
    'codec': setup.codec,
    'objective': setup.objective,
    'tx': setup.tx,
    'ema_rate': config.model.ema_rate,
    'ema_warmup': config.model.ema_warmup,
  }
  init: Callable[[Array], TrainState] = partial(init_state, model=model, tx=setup.tx, shape=shape)
  step: Callable[..., Any] = partial(train_step, grad_accum=config.training.grad_accum, **choices)
  if config.training.objective == 'cd':
    divergence = make_divergence(config)
    init = partial(
      contrastive_divergence.init_state,
      model=model, tx=setup.tx, shape=shape, divergence=divergence,
    )  # fmt: skip
    step = partial(contrastive_divergence.train_step, divergence=divergence, **choices)
  return Task(
    section='model',
    init=init,
    update=_without_frozen(step),
    evaluate=evaluate,
    purposes=('init', 'train', 'eval'),
    batch_size=config.training.batch_size,
  )


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
  return Classifier(net, setup.model.sde, setup.model.precision)


def classifier_times(setup: Setup) -> UniformTimes:
  """The times of the classifier: all of the SDE's, whichever the score model is trained at."""
  return UniformTimes(setup.config.training.eps, setup.model.sde.T)


def classifier_task(setup: Setup) -> Task:
  """The training of the classifier of a config."""
  choice, model, times = setup.config.classifier, make_classifier(setup), classifier_times(setup)
  tx = make_optimizer(setup.config.optim, choice.lr, choice.weight_decay, choice.warmup)

  def evaluate(params: Params, batch: Batch, rng: Array) -> Metrics:
    span = (times.eps, times.T)
    each = classifier.eval_step(params, batch, rng, span, classifier=model, codec=setup.codec)
    return dict(zip(('loss', 'accuracy'), (v.mean() for v in each), strict=True))

  step = partial(
    classifier.train_step,
    classifier=model, codec=setup.codec, times=times, tx=tx, ema_rate=setup.config.model.ema_rate,
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
