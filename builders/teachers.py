"""The teacher of --mode distill: a run whose moving average a student begins with, or learns from.

A student has its teacher's network, which is read in the same way: its SDE, its output and the
shape of the data are the teacher's. A run goes on with the teacher that it began with, told by the
checksum of that average; where the teacher lies may change.
"""

import dataclasses
import logging
from typing import Any

from builders.setup import saved_setup, Setup
from builders.training import abstract_state
from data.classes import check_same
from models.score import Params
from runtime.errors import UserError
from training import checkpoints as checkpoints_lib
from training import fine_tuning
from training.checkpoints import Checkpoints, Notes
from training.fine_tuning import Beginning, Place
from workdir import artifacts, same_config
from workdir.same_config import LEARNED, MODEL

logger = logging.getLogger('score_sde')

# Of how a network is read, what a teacher was trained with, not what it became.
_OF_TRAINING = (
  'training.objective', 'ebm.buffer_size', 'distill.method', 'data.augment_probability',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A moving average of another run.

  Attributes:
    beginning: that average, as what a student begins with.
    source: its workdir, step and checksum, as `Notes` has them.
  """

  beginning: Beginning
  source: dict[str, Any]

  @property
  def params(self) -> Params:
    """The average, on the devices."""
    return self.beginning.params


def load_teacher(name: str, setup: Setup, notes: Notes) -> Teacher:
  """The teacher of a run that --teacher names: the one that it began with, if that is noted.

  Raises:
    UserError: if it does not fit the student, cannot be restored, or is another one.
  """
  path = artifacts.root_of(name, '--teacher')
  place, noted = fine_tuning.find(path, '--teacher'), notes.teacher
  if noted and place.step is None:
    place = dataclasses.replace(place, step=noted['step'])
  others = saved_setup(place.root, '--teacher')
  _check_fits(place, others, setup)
  check_same(
    checkpoints_lib.notes(place.root).classes if setup.model.num_classes else (), notes.classes,
    place.root, 'Choose a teacher of these classes',
  )  # fmt: skip
  # Where the student's parameters lie.
  teacher = _load(place, dataclasses.replace(others, devices=setup.devices))
  if not noted:
    logger.info('the teacher is %s', teacher.beginning.where)
    return teacher
  if teacher.source['checkpoint'] != noted['checkpoint']:
    raise UserError(
      f'--teacher {name} has changed, or is another: the run learns from step {noted["step"]} of '
      f'{noted["workdir"]}, whose average has the checksum {noted["checkpoint"]}, and this one, of '
      f'step {teacher.source["step"]}, has {teacher.source["checkpoint"]}; give back that teacher, '
      'or choose a new --workdir'
    )
  if teacher.source['workdir'] != noted['workdir']:
    logger.info('the teacher has moved from %s to %s', noted['workdir'], place.root)
  return teacher


def _check_fits(place: Place, teacher: Setup, setup: Setup) -> None:
  """Raises UserError unless a student's network is its teacher's, read in the same way."""
  different = same_config.differences(teacher.config.to_dict(), setup.config.to_dict())
  wrong = {k: v for k, v in different.items() if k in MODEL and k not in _OF_TRAINING}
  if wrong:
    raise UserError(
      f'--teacher {place.root} does not fit: {same_config.told(wrong)}. A student has the network, '
      'the SDE and the shape of data of its teacher: give the config the values that are there'
    )
  choice, taught = setup.config.distill, teacher.config.distill
  if taught.method and not taught.method == choice.method == 'progressive':
    raise UserError(
      f'--teacher {place.root} is a student itself, by config.distill.method = {taught.method}, '
      f'and knows no score for {choice.method}; choose the model that it learned from'
    )
  if taught.method and taught.end_steps != 2 * choice.end_steps:
    raise UserError(
      f'--teacher {place.root} takes {taught.end_steps} steps, and is to teach one of '
      f'{choice.end_steps}: set config.distill.start_steps = {taught.end_steps}'
    )
  learned = {k: v for k, v in different.items() if k in LEARNED and k.partition('.')[0] == 'data'}
  if learned:
    logger.info('the teacher learned other data: %s', same_config.told(learned))


def _load(place: Place, others: Setup) -> Teacher:
  """The average of a run that its config says is in use."""
  with Checkpoints(place.root, create=False) as checkpoints:
    there = checkpoints_lib.steps_in(place.root)
    if place.step is not None and place.step not in there:
      raise UserError(
        f'--teacher {place.root} holds no checkpoint of step {place.step}, but of {sorted(there)}'
      )
    found = checkpoints.restore_parameters(abstract_state(others), place.step)
  if found is None:  # an object store shows those that broke off
    raise UserError(f'--teacher {place.root} holds no whole checkpoint')
  step, _, averages = found
  average = averages[others.config.ema.use]
  source = {
    'workdir': str(place.root),
    'step': step,
    'checkpoint': checkpoints_lib.identity(average),
  }
  where = f'{place.root}, step {step}'
  return Teacher(Beginning(where, average, average, same_classes=True), source)
