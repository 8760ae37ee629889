"""From a config to the parts of a run: `build` is where names in a config get their meaning."""

from collections.abc import Sequence
import dataclasses

from etils import epath
import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict, FrozenConfigDict
import optax

from builders import values
from builders.data import condition_channels, make_codec
from builders.networks import NETWORKS
from builders.objectives import make_objective, SDES
from builders.rules_of_training import USUAL_OUTPUTS
from builders.samplers import make_sampler
from configs.base import saved
from data import augmentation, points
from data.codec import Codec
from data.points import Diffused
from losses import (
  Objective,
)
from models import score
from models.preconditioning import PRECONDITIONINGS
from models.score import Conditioning, ScoreModel
from runtime.devices import Devices, in_groups, Keys
from runtime.errors import UserError
from samplers.base import Sampler
from sde_lib import SDE
from training.optim import LearningRate, OPTIMIZERS
from workdir import artifacts


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a config stands for.

  Attributes:
    config: the config itself.
    codec: between stored data and what networks see.
    model: the score model, with its SDE.
    true_score_fn: what the model learns, for points whose density is known; otherwise, and of a
      model that is told classes, None.
    objective: the training loss.
    tx: the optimiser.
    sampler: draws samples.
    devices: that the run is spread over.
    keys: the random keys of the run.
  """

  config: FrozenConfigDict
  codec: Codec
  model: ScoreModel
  true_score_fn: Diffused | None
  objective: Objective
  tx: optax.GradientTransformation
  sampler: Sampler
  devices: Devices
  keys: Keys

  @property
  def data_shape(self) -> tuple[int, ...]:
    """Of one example as a network sees it."""
    return self.codec.model_shape


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Setup:
  """Makes the parts of a run: model, SDE, loss, optimiser and sampler.

  Args:
    config: what is asked for.
    devices: that it runs on, by default all of all processes.

  Raises:
    UserError: if a value is not allowed, or values don't go together.
  """
  config = FrozenConfigDict(values.spelled_as_here(config))
  values.check(config)
  training, optim = config.training, config.optim
  spread = in_groups(training.fsdp, devices=devices)
  try:
    sde = SDES[training.sde](config.model)
    values.check_times(config, sde)
    model = _score_model(config, sde, spread.rows)
    true_score_fn = _true_score_fn(config, sde)
    sampler = make_sampler(config, model.chain)
    objective = make_objective(config, model, true_score_fn)
  except ValueError as error:  # an SDE that can't be
    raise UserError(str(error)) from None
  return Setup(
    config=config,
    codec=make_codec(config),
    model=model,
    true_score_fn=true_score_fn,
    objective=objective,
    tx=make_optimizer(config, make_learning_rate(config), optim.weight_decay),
    sampler=sampler,
    devices=spread,
    keys=Keys(config.seed, spread),
  )


def saved_setup(root: epath.Path, what: str) -> Setup:
  """What the config of a workdir stands for.

  Args:
    root: the workdir.
    what: the flag or field that names it, for messages.

  Raises:
    UserError: if it has no config, or it was changed to what is none.
  """
  path = root / 'config.json'
  if not path.exists():
    raise UserError(f'{what}: {path} does not exist; it belongs to the checkpoints')
  try:
    return build(saved(artifacts.read_json(path), path))
  except UserError as error:
    raise UserError(f'{what}: {path}: {error}') from None


# What a network is told of t, and what its output means, where the config says no more: released.
_CONDITIONINGS: dict[tuple[bool, bool, bool], Conditioning] = {
  # (VE, Fourier features, read at all times)
  (True, True, True): score.log_sigma,
  (True, True, False): score.log_sigma,
  (True, False, True): score.noise_time,
  (True, False, False): score.noise_label,
  (False, True, True): score.log_scaled_time,
  (False, True, False): score.log_chain_time,
  (False, False, True): score.scaled_time,
  (False, False, False): score.chain_time,
}


def _score_model(config: FrozenConfigDict, sde: SDE, rows: NamedSharding | None) -> ScoreModel:
  model, training = config.model, config.training
  make, _ = NETWORKS[model.name]
  ve = training.sde == 'vesde'
  fourier = model.get('embedding_type') == 'fourier'
  chain = sde.chain(model.num_scales)
  if not (training.continuous or chain.can_be_taken):
    raise UserError(
      f'config.model.num_scales = {model.num_scales} must be above config.model.beta_max = '
      f'{model.beta_max} where config.training.continuous = False: the steps of the chain are '
      'beta / num_scales, which must be below 1'
    )
  # A chain without kernels of its own is the SDE at some times, and is read as that, as released.
  continuous = training.continuous or not chain.has_kernels
  usual_output = 'scaled_score' if model.scale_by_sigma else USUAL_OUTPUTS[training.sde]
  preconditioning = PRECONDITIONINGS[model.output or usual_output].for_data(model.sigma_data)
  net = make(model)
  conditioning = _CONDITIONINGS[ve, fourier, continuous]
  if 'edm' in (training.sde, model.output):
    conditioning = score.quarter_log_noise
  elif training.sde == 'flow' and fourier:
    conditioning = score.time
  augmented = config.data.augment_probability > 0
  if augmented:
    net = net.clone(num_augment_labels=augmentation.LABELS)
  precision = model.precision
  if preconditioning.in_float32:  # whatever the config says
    net, precision = net.clone(dtype='float32'), 'highest'
  return ScoreModel(
    net,
    chain,
    conditioning,
    preconditioning,
    continuous,
    config.data.centered,
    model.num_classes,
    precision,
    augmented,
    rows,
    condition_channels(config),
  )


def _true_score_fn(config: FrozenConfigDict, sde: SDE) -> Diffused | None:
  data = config.data
  paired = config.training.coupling != 'independent'  # then no score is learned
  if not data.dim or config.model.num_classes or paired:
    return None
  return points.distribution(data.dataset, data.dim).score_fn(sde)


def make_learning_rate(config: FrozenConfigDict) -> LearningRate:
  """The learning rate of the score model, in steps."""
  optim, training = config.optim, config.training
  warmup, until = optim.warmup, optim.decay_until
  if optim.unit == 'images':
    warmup, until = warmup / training.batch_size, until / training.batch_size
  return LearningRate(optim.lr, warmup, optim.decay, until or training.n_iters)


def make_optimizer(
  config: FrozenConfigDict, lr: LearningRate, weight_decay: float
) -> optax.GradientTransformation:
  """The optimiser of a config, with what networks have of their own."""
  optim = config.optim
  return OPTIMIZERS[optim.optimizer](
    lr, beta1=optim.beta1, eps=optim.eps, weight_decay=weight_decay, grad_clip=optim.grad_clip
  )
