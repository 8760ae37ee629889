"""Which values a config may have, each by itself and beside the network and the devices.

What else they must agree on is in `builders.agreement`, ranges of numbers in `configs.ranges`.
"""

from collections.abc import Collection

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from builders import agreement
from builders.networks import divisor, LABELLED, NETWORKS
from builders.objectives import COUPLINGS, SDES, TIME_LAWS, WEIGHTS
from builders.rules_of_students import DISTILLATIONS
from builders.samplers import METHODS
from configs import ranges
from configs.ranges import field
from data import geometry
from evaluation import features
from likelihood import FORMS
import losses
from models import ncsn, ncsnpp
from models.layers import ACTIVATIONS
from models.preconditioning import ENERGY, PRECONDITIONINGS
from runtime.errors import unknown, UserError
from runtime.precision import PRECISIONS
from samplers import ode
from samplers.time_grids import SPACINGS
import sampling
from sde_lib import SDE
from training import consistency
from training.optim import DECAYS, OPTIMIZERS

FEWEST = 10  # samples that can be compared with data: an Inception score has ten parts

# Fields whose values the released code takes in any case, and values of other names there.
_ANY_CASE = (
  'nonlinearity', 'resblock_type', 'embedding_type', 'progressive', 'progressive_input',
  'progressive_combine', 'interpolation',
)  # fmt: skip
_OTHER_NAMES = {'interpolation': {'nearest_neighbor': 'nearest'}}


def spelled_as_here(config: ConfigDict) -> ConfigDict:
  """The config with choices of networks as they are written here, not as the released code may."""
  values = config.to_dict()
  model = values['model']
  for name in _ANY_CASE:
    if isinstance(value := model.get(name), str):
      model[name] = _OTHER_NAMES.get(name, {}).get(value.lower(), value.lower())
  return ConfigDict(values)


CHOICES: dict[str, Collection[str]] = {
  'data.fit': geometry.FITS,
  'distill.method': ('', *DISTILLATIONS),
  'distill.grid': SPACINGS,
  'distill.solver': ('heun', 'euler'),
  'distill.distance': ('', *consistency.DISTANCES),
  'distill.weight': ('', *consistency.WEIGHTS),
  'training.sde': SDES,
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
  'training.time_law': ('', *TIME_LAWS),
  'training.weight': ('', *WEIGHTS),
  'training.coupling': COUPLINGS,
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
  'eval.bpd_dequantization': ('uniform', 'variational'),
  'eval.features': ('', *features.NETWORKS),
  'eval.stats_split': ('train', 'test'),
}


def check(config: FrozenConfigDict) -> None:
  """Raises UserError for values that no run could have."""
  ranges.check(config)
  for name, allowed in CHOICES.items():
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
  compared = config.training.fid_samples
  if config.training.fid_freq and compared < config.eval.batch_size and compared % devices:
    raise UserError(
      f'config.training.fid_samples = {compared}, where less than config.eval.batch_size, must be '
      f'a multiple of the number of devices, {devices}'
    )
  if config.training.fid_freq and compared < FEWEST:
    raise UserError(f'config.training.fid_samples = {compared} must be at least {FEWEST}')
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


def check_times(config: FrozenConfigDict, sde: SDE) -> None:
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
