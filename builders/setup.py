"""From a config to the parts of a run: `build` is where names in a config get their meaning."""

from collections.abc import Callable, Collection
import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict, FrozenConfigDict
import optax

from builders import agreement
from builders.data import make_codec
from builders.networks import divisor, LABELLED, NETWORKS
from builders.rules_of_students import DISTILLATIONS
from builders.rules_of_training import USUAL_OUTPUTS
from builders.samplers import make_sampler, METHODS
from configs import ranges
from configs.ranges import field
from data import augmentation, geometry, points
from data.codec import Codec
from data.points import Diffused
from evaluation import features
from likelihood import FORMS
import losses
from losses import (
  ChainTimes,
  Coupling,
  ImportanceSampled,
  LikelihoodTimes,
  LogNormalTimes,
  Matching,
  Objective,
  OneTime,
  Stratified,
  TimeLaw,
  UniformTimes,
  Weight,
)
from models import ncsn, ncsnpp, score
from models.layers import ACTIVATIONS
from models.preconditioning import ENERGY, PRECONDITIONINGS
from models.score import Conditioning, ScoreModel
from runtime.devices import Devices, in_groups, Keys
from runtime.errors import unknown, UserError
from runtime.precision import PRECISIONS
from samplers import ode
from samplers.base import Sampler
from samplers.time_grids import SPACINGS
import sampling
from sde_lib import EDMSDE, RectifiedFlow, ScoreFn, SDE, subVPSDE, VESDE, VPSDE
from training import consistency
from training.optim import DECAYS, LearningRate, OPTIMIZERS

FEWEST = 10  # samples that can be compared with data: an Inception score has ten parts


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


def build(config: ConfigDict) -> Setup:
  """Makes the parts of a run: model, SDE, loss, optimiser and sampler.

  Raises:
    UserError: if a value is not allowed, or values don't go together.
  """
  config = FrozenConfigDict(_spelled_as_here(config))
  _check(config)
  training, optim = config.training, config.optim
  try:
    sde = _SDES[training.sde](config.model)
    _check_times(config, sde)
    model = _score_model(config, sde)
    true_score_fn = _true_score_fn(config, sde)
    sampler = make_sampler(config, model.chain)
    objective = _objective(config, model, true_score_fn)
  except ValueError as error:  # an SDE that can't be
    raise UserError(str(error)) from None
  devices = in_groups(training.fsdp)
  return Setup(
    config=config,
    codec=make_codec(config),
    model=model,
    true_score_fn=true_score_fn,
    objective=objective,
    tx=make_optimizer(config, make_learning_rate(config), optim.weight_decay),
    sampler=sampler,
    devices=devices,
    keys=Keys(config.seed, devices),
  )


# Fields whose values the released code takes in any case, and values of other names there.
_ANY_CASE = (
  'nonlinearity', 'resblock_type', 'embedding_type', 'progressive', 'progressive_input',
  'progressive_combine', 'interpolation',
)  # fmt: skip
_OTHER_NAMES = {'interpolation': {'nearest_neighbor': 'nearest'}}


def _spelled_as_here(config: ConfigDict) -> ConfigDict:
  """The config with choices of networks as they are written here, not as the released code may."""
  values = config.to_dict()
  model = values['model']
  for name in _ANY_CASE:
    if isinstance(value := model.get(name), str):
      model[name] = _OTHER_NAMES.get(name, {}).get(value.lower(), value.lower())
  return ConfigDict(values)


_SDES: dict[str, Callable[[Any], SDE]] = {
  'vesde': lambda model: VESDE(model.sigma_min, model.sigma_max),
  'vpsde': lambda model: VPSDE(model.beta_min, model.beta_max),
  'subvpsde': lambda model: subVPSDE(model.beta_min, model.beta_max),
  'edm': lambda model: EDMSDE(model.sigma_max),
  'flow': lambda model: RectifiedFlow(),
}

# The laws that training times are drawn from, and how a time is weighed, where the config says so.
_TIME_LAWS: dict[str, Callable[[Any, SDE], TimeLaw]] = {
  'uniform': lambda training, sde: UniformTimes(training.eps, sde.T),
  'log_normal': lambda training, sde: LogNormalTimes(
    sde, training.time_mean, training.time_std, training.eps
  ),
  'likelihood': lambda training, sde: LikelihoodTimes(sde, training.eps),
}
_WEIGHTS: dict[str, Callable[[FrozenConfigDict], Weight]] = {
  'variance': lambda config: losses.by_variance,
  'likelihood': lambda config: losses.by_likelihood,
  'edm': lambda config: losses.ByUnitLoss(config.model.sigma_data),
  'flow': lambda config: losses.by_velocity,
  'min_snr': lambda config: losses.ByMinSNR(config.training.weight_gamma),
  'soft_min_snr': lambda config: losses.BySoftMinSNR(config.training.weight_gamma),
  'sigmoid': lambda config: losses.BySigmoid(config.training.weight_bias),
}
# Those that are rates: of a loss that is an integral over time, however its times are drawn.
_RATES = ('likelihood', 'sigmoid')

# Which noise goes with which data.
_COUPLINGS: dict[str, Callable[[Any], Coupling]] = {
  'independent': lambda training: losses.independent,
  'optimal_transport': lambda training: losses.OptimalTransport(
    training.coupling_batch or training.batch_size
  ),
}

_CHOICES: dict[str, Collection[str]] = {
  'data.fit': geometry.FITS,
  'distill.method': ('', *DISTILLATIONS),
  'distill.grid': SPACINGS,
  'distill.solver': ('heun', 'euler'),
  'distill.distance': ('', *consistency.DISTANCES),
  'distill.weight': ('', *consistency.WEIGHTS),
  'training.sde': _SDES,
  'model.name': NETWORKS,
  'model.nonlinearity': ACTIVATIONS,
  'model.resblock_type': ncsnpp.RESBLOCK_TYPES,
  'model.embedding_type': ncsnpp.EMBEDDING_TYPES,
  'model.progressive': ncsnpp.PROGRESSIVE,
  'model.progressive_input': ncsnpp.PROGRESSIVE_INPUT,
  'model.progressive_combine': ncsnpp.COMBINE_METHODS,
  'model.interpolation': ncsn.INTERPOLATIONS,
  'model.dtype': ('float32', 'bfloat16'),
  'model.precision': PRECISIONS,
  'model.output': ('', *PRECONDITIONINGS),
  'training.time_law': ('', *_TIME_LAWS),
  'training.weight': ('', *_WEIGHTS),
  'training.coupling': _COUPLINGS,
  'training.objective': ('dsm', 'esm', *losses.MATCHINGS, 'cd'),
  'optim.optimizer': OPTIMIZERS,
  'optim.decay': ('constant', *DECAYS),
  'optim.unit': ('steps', 'images'),
  'sampling.method': METHODS,
  'sampling.predictor': sampling.PREDICTORS,
  'sampling.corrector': sampling.CORRECTORS,
  'sampling.grid': ('', *SPACINGS),
  'sampling.ode_solver': ode.SOLVERS,
  'sampling.uint8': ('truncate', 'round'),
  'sampling.task': ('', 'inpaint', 'colorize', 'superres', 'deblur'),
  'sampling.conditioning': ('constraint', 'posterior'),
  'eval.bpd_dataset': ('train', 'test'),
  'eval.bound_form': FORMS,
  'eval.features': ('', *features.NETWORKS),
  'eval.stats_split': ('train', 'test'),
}


def _check(config: FrozenConfigDict) -> None:
  """Raises UserError for values that no run could have."""
  ranges.check(config)
  for name, allowed in _CHOICES.items():
    value = field(config, name)
    if value is not None and value not in allowed:
      raise unknown(f'config.{name}', value, allowed)
  check_shared(config, 'eval.batch_size')
  devices = jax.device_count()
  if config.eval.num_samples < config.eval.batch_size and config.eval.num_samples % devices:
    raise UserError(
      f'config.eval.num_samples = {config.eval.num_samples}, where less than a batch, must be a '
      f'multiple of the number of devices, {devices}'
    )
  multiple, why = divisor(config.model)
  if config.data.image_size % multiple:
    raise UserError(
      f'config.data.image_size = {config.data.image_size} must be a multiple of {multiple}: '
      f'the network ({config.model.name}) {why}'
    )
  _, normalizations = NETWORKS[config.model.name]
  if config.data.dim and config.model.name != 'mlp':
    raise UserError(
      f'config.data.dim = {config.data.dim} is for points, which need config.model.name = mlp; '
      f'got {config.model.name}'
    )
  if normalizations and config.model.normalization not in normalizations:
    what = f'config.model.normalization of {config.model.name}:'
    raise unknown(what, config.model.normalization, normalizations)
  takes_labels = config.model.name in LABELLED and config.model.conditional
  if config.model.num_classes and not takes_labels:
    raise UserError(
      f'config.model.num_classes = {config.model.num_classes} needs a network with an embedding of '
      'the time: config.model.name = ncsnpp, ddpm, dit or mlp, with config.model.conditional'
    )
  for name in ('eval.enable_bpd', 'eval.enable_bound', 'eval.features', 'sampling.task'):
    if config.data.dim and field(config, name):
      raise UserError(f'config.{name} is for images, and config.data.dim = {config.data.dim}')
  wanted = config.eval
  if wanted.enable_sampling and wanted.features and wanted.num_samples < FEWEST:
    raise UserError(
      f'config.eval.num_samples = {wanted.num_samples} is too few to be compared with data: at '
      f'least {FEWEST}; --config.eval.features= draws samples without comparing them'
    )
  if config.training.objective == 'cd':
    _check_ebm(config)
  if config.model.scale_by_sigma and config.training.sde != 'vesde':
    raise UserError('config.model.scale_by_sigma is for config.training.sde = vesde')
  agreement.check(config)


def _check_times(config: FrozenConfigDict, sde: SDE) -> None:
  """Raises UserError unless the smallest times lie on the SDE."""
  for name in ('training.eps', 'sampling.eps'):
    if not field(config, name) < sde.T:
      raise UserError(
        f'config.{name} = {field(config, name)} must be below T = {sde.T}, the last time of '
        f'{config.training.sde}'
      )


def _check_ebm(config: FrozenConfigDict) -> None:
  """Raises UserError unless contrastive divergence goes with the rest."""
  if not (config.model.output == ENERGY and config.training.single_scale):
    raise UserError(
      'config.training.objective = cd needs config.model.output = energy and '
      'config.training.single_scale'
    )
  if config.training.grad_accum != 1:
    raise UserError('config.training.grad_accum must be 1 where config.training.objective = cd')
  if config.ebm.buffer_size < config.training.batch_size:
    raise UserError(
      f'config.ebm.buffer_size = {config.ebm.buffer_size} must not be below '
      f'config.training.batch_size = {config.training.batch_size}'
    )


def check_shared(config: FrozenConfigDict, name: str, parts: str = '') -> None:
  """Raises UserError unless the devices can share a batch of the size that a field holds.

  `parts` is the field, if any, that says in how many parts they take it.
  """
  n = field(config, parts) if parts else 1
  if field(config, name) % (n * jax.device_count()):
    times = f', times config.{parts} = {n}' if parts else ''
    raise UserError(
      f'config.{name} = {field(config, name)} must be a multiple of the number of devices, '
      f'{jax.device_count()}{times}'
    )


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


def _score_model(config: FrozenConfigDict, sde: SDE) -> ScoreModel:
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
  )


def _objective(
  config: FrozenConfigDict, model: ScoreModel, true_score_fn: Diffused | None
) -> Objective:
  training = config.training
  times: TimeLaw = ChainTimes(model.chain, 0.0 if model.chain.has_kernels else training.eps)
  if training.single_scale:
    times = OneTime(training.eps)
  elif training.continuous:
    times = _TIME_LAWS[training.time_law or 'uniform'](training, model.sde)
  name = training.weight or ('likelihood' if training.likelihood_weighting else 'variance')
  weight = _WEIGHTS[name](config)
  if training.time_law == 'likelihood' and name in _RATES:
    weight = ImportanceSampled(weight, LikelihoodTimes(model.sde, training.eps))
  return Objective(
    kernels=model.trained_with,
    times=Stratified(times) if training.stratified else times,
    weight=weight,
    matching=_matching(training.objective, true_score_fn),
    coupling=_COUPLINGS[training.coupling](training),
    reduce_mean=training.reduce_mean,
  )


def _true_score_fn(config: FrozenConfigDict, sde: SDE) -> Diffused | None:
  data = config.data
  paired = config.training.coupling != 'independent'  # then no score is learned
  if not data.dim or config.model.num_classes or paired:
    return None
  return points.distribution(data.dataset, data.dim).score_fn(sde)


def _matching(name: str, true_score_fn: Diffused | None) -> Matching | None:
  if name != 'esm':
    return losses.MATCHINGS.get(name)
  if true_score_fn is None:
    raise UserError(
      'config.training.objective = esm needs a true score: that of points, all classes together'
    )
  return explicit_matching(true_score_fn)


def explicit_matching(true_score_fn: ScoreFn) -> Matching:
  """Explicit score matching, as an `Objective` takes it."""
  return lambda score_fn, x, t, rng: losses.explicit_score_matching(true_score_fn, score_fn, x, t)


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
