"""From a config to the weaker model that samples are led away from: see `Autoguidance`."""

import logging

from etils import epath
from ml_collections import FrozenConfigDict

from builders.data import condition_channels
from builders.rules_of_students import CONSISTENCY
from builders.setup import saved_setup, Setup
from builders.training import abstract_state
from builders.weights import read_weights
from data.classes import check_same
from evaluation.draw import Guide
from models.score import Params
from runtime.errors import UserError
from training import checkpoints as checkpoints_lib
from training import exported, fine_tuning
from training.checkpoints import Checkpoints, Notes
from workdir import artifacts, same_config

logger = logging.getLogger('score_sde')

_FIELD = 'config.sampling.guide'


def load_guide(setup: Setup, root: epath.Path) -> Guide | None:
  """The guide that `sampling.guide` names, for the model in the workdir `root`; None if none is.

  A scale of 1 is the model alone, which no guide is read for.

  Raises:
    UserError: if there is no such checkpoint, or it is of another kind of model.
  """
  choice = setup.config.sampling
  if not choice.guide:
    return None
  if choice.guide_scale == 1:
    logger.info('config.sampling.guide_scale = 1 is the model alone: %s is not read', choice.guide)
    return None
  where = artifacts.root_of(choice.guide, _FIELD)
  try:
    read = _weights if exported.is_here(where) else _checkpoint
    its, notes, step, params = read(setup, where)
  except UserError as error:
    told = str(error)
    raise UserError(told if told.startswith(_FIELD) else f'{_FIELD}: {told}') from None
  names = checkpoints_lib.notes(root).classes if setup.model.num_classes else ()
  if names:
    way_out = f'Name a guide in {_FIELD} that was trained with these classes'
    check_same(notes.classes, names, where, way_out)
  logger.info('guided by %s, step %d: an evaluation of the score takes both networks', where, step)
  identity = checkpoints_lib.identity(params)
  return Guide(its.model, params, choice.guide_scale, step, identity)


def _checkpoint(setup: Setup, where: epath.Path) -> tuple[Setup, Notes, int, Params]:
  """The parts of the guide, what is noted with it, its step and the average that is wanted."""
  place = fine_tuning.find(where, _FIELD)
  its = saved_setup(place.root, _FIELD)
  _check_same_kind(setup, its, place.root)
  with Checkpoints(place.root, create=False) as checkpoints:
    found = checkpoints.restore_parameters(abstract_state(its), place.step)
  if found is None:  # an object store shows those that broke off
    raise UserError(f'{place.root} holds no whole checkpoint')
  step, _, averages = found
  params = averages[_average(setup.config.sampling, its.config, len(averages))]
  return its, checkpoints_lib.notes(place.root, step), step, params


def _weights(setup: Setup, where: epath.Path) -> tuple[Setup, Notes, int, Params]:
  """The same of a folder that `--mode export` wrote, which holds one average."""
  its, notes, step, params = read_weights(where)
  _check_same_kind(setup, its, where)
  _average(setup.config.sampling, its.config, 1)  # says so if another is wanted
  return its, notes, step, params


def _average(choice: FrozenConfigDict, its: FrozenConfigDict, n: int) -> int:
  """The number of the average of the guide that is wanted, of n."""
  if choice.guide_ema < 0:
    return its.ema.use
  if choice.guide_ema >= n:
    raise UserError(
      f'config.sampling.guide_ema must be below {n}, the number of averages of the guide '
      f'{choice.guide}; got {choice.guide_ema}'
    )
  return choice.guide_ema


def _check_same_kind(setup: Setup, its: Setup, where: epath.Path) -> None:
  """Raises UserError unless both scores are of the same p_t(x | y), or their difference means none.

  Networks, what their outputs stand for, and how they were trained may be others.
  """
  own, other = setup.config, its.config
  compared = {
    'data of shape': (setup.data_shape, its.data_shape),
    'config.data.centered =': (own.data.centered, other.data.centered),
    'noise of': (setup.model.trained_with, its.model.trained_with),
    'config.model.num_classes =': (setup.model.num_classes, its.model.num_classes),
    'config.training.coupling =': (own.training.coupling, other.training.coupling),  # or no score
    'conditions': tuple(
      (same_config.condition_kind(c.data.condition), condition_channels(c)) for c in (own, other)
    ),
  }
  for what, (here, there) in compared.items():
    if here != there:
      raise UserError(
        f'{where} is a model with {what} {there}, and this one with {what} {here}: a '
        'guide is a weaker model of the same data, noise, classes and conditions; name another'
      )
  if other.distill.method in CONSISTENCY:
    raise UserError(f'{where} is a consistency model, which has no score: name a score model')
  level = other.training.eps
  same_level = own.training.single_scale and own.training.eps == level
  if other.training.single_scale and not same_level:
    raise UserError(
      f'{where} was trained at one level of noise, t = {level}, this model at others; '
      'name a guide of the same'
    )
  if own.data.dataset.lower() != other.data.dataset.lower():
    logger.warning(
      '%s: %s was trained with %s, and this model with %s: a guide is meant to be of the same data',
      _FIELD, where, other.data.dataset, own.data.dataset,
    )  # fmt: skip
  both = own.model.num_classes and own.sampling.guidance_scale != 1
  if both and other.training.label_dropout == 0:
    raise UserError(
      f'{where} was trained with config.training.label_dropout = 0, so it does not know '
      f'all classes together, which config.sampling.guidance_scale = {own.sampling.guidance_scale} '
      'asks of it too: set that to 1, or name another'
    )
