"""What must agree wherever a workdir is used again: the config, the classes, the images.

A run goes on with what it began with, and is evaluated as it was trained; what differs is named,
with the way out. See `workdir.same_config` for the fields of a config.
"""

from collections.abc import Callable, Sequence
import dataclasses
import logging
import os

from etils import epath
from ml_collections import FrozenConfigDict

from builders.data import load_images
from builders.setup import saved_setup, Setup
from builders.training import abstract_state
from data.classes import check_same, describe
from data.images import Source
from evaluation.evaluate import Measurement
from runtime.errors import cannot_write, UserError
from training import checkpoints as checkpoints_lib
from training import fine_tuning
from training.checkpoints import Notes
from training.step import TrainState
from workdir import artifacts, same_config, versions
from workdir.origin import has_results
from workdir.same_config import check_unchanged, FIXED_IN_EVAL, LEARNED, MODEL

logger = logging.getLogger('score_sde')


def write_config(folder: epath.Path, setup: Setup, step: int) -> None:
  """Writes the config with which a folder is used from a step on, once that is sure to go well."""
  try:
    same_config.write(folder, setup.config.to_dict(), step)
  except OSError as error:
    raise cannot_write(folder, error, 'choose another') from error


def check_goes_on(root: epath.Path, setup: Setup, learned: tuple[str, ...]) -> None:
  """Raises UserError if there are checkpoints, and the config would have other things learned."""
  if checkpoints_lib.exist(root):
    way_out = (
      'What is learned must not change in mid-run: give back these values, or choose a new '
      f'--workdir; --init_from={root} begins that with the parameters that are here'
    )
    check_unchanged(root / 'config.json', setup.config.to_dict(), learned, way_out)


def check_model(root: epath.Path, setup: Setup) -> None:
  """Raises UserError if the checkpoints of a workdir are of another model."""
  way_out = 'Give back these values, or choose another --workdir'
  check_unchanged(root / 'config.json', setup.config.to_dict(), MODEL, way_out)


def check_results(out: epath.Path, setup: Setup) -> None:
  """Raises UserError if a folder holds results of another config."""
  if has_results(out):
    way_out = 'Give back these values, or choose another folder (--eval_folder, --sample_folder)'
    path, config = out / 'config.json', setup.config.to_dict()
    check_unchanged(path, config, FIXED_IN_EVAL, way_out)
    if other := same_config.other_folder(path, config, 'data', 'condition'):
      raise UserError(
        f'{out} was made with another config: '
        f'{same_config.told({"data.condition": other})}. {way_out}'
      )


def note_machine(root: epath.Path) -> None:
  """Writes down by what, with and on a run is trained; says so if it had other devices before."""
  path, here = root / 'machine.json', versions.here()
  before = artifacts.read_json(path) if path.exists() else here
  names = ('devices', 'processes')
  if any(before.get(name) != here[name] for name in names):
    was, now = (', '.join(f'{n} {m.get(n)}' for n in names) for m in (before, here))
    logger.info('%s, before %s: the same run but for the order of sums', now, was)
  artifacts.write_json(path, here | {'command': versions.command()})


# What to do where classes have other names than those that a model was trained with.
_RENAME = 'Give the folders back their names, or choose a --workdir of a model of these classes'


def note_data(root: epath.Path, setup: Setup, source: Source, told_classes: int) -> Notes:
  """What to write down of the training data with each checkpoint; says what the classes are.

  Raises:
    UserError: if a run would go on with other classes, which it is told, or with other images.
  """
  if source.class_names:
    logger.info('%s', describe(source.class_names, source.class_counts()))
  there, now = checkpoints_lib.notes(root), source.fingerprint()
  if told_classes:
    check_same(there.classes, source.class_names, root, _RENAME)
  if checkpoints_lib.exist(root) and now:
    _check_images(root, setup, there.images, now)
  return dataclasses.replace(there, classes=tuple(source.class_names), images=now)


def begin_from(
  name: str, root: epath.Path, setup: Setup, notes: Notes
) -> tuple[Notes, Callable[[TrainState], TrainState] | None]:
  """What a run that begins with the parameters of another notes of it, and how it begins.

  Where it has begun already, it just goes on.

  Raises:
    UserError: if the workdir holds another run, or there are no such parameters.
  """
  path = artifacts.root_of(name, '--init_from')
  if not artifacts.is_remote(path):
    path = epath.Path(_place(name))
  if checkpoints_lib.exist(root):
    there = notes.begun_from.get('name', '')
    if there == str(path):
      return notes, None
    what = f'that was begun from {there}' if there else 'that was begun from nothing'
    raise UserError(
      f'{root} holds a run {what}, and --init_from {name} is for a new one: choose a new '
      '--workdir. Without --init_from the run there goes on'
    )
  place = fine_tuning.find(path)
  others = saved_setup(place.root, '--init_from')
  beginning, source = fine_tuning.load(place, abstract_state(others), notes.classes)
  logger.info('beginning with the parameters of %s', beginning.where)
  different = same_config.differences(others.config.to_dict(), setup.config.to_dict())
  learned = {k: v for k, v in different.items() if k in LEARNED}
  if learned:
    logger.info('of what is learned, it had: %s', same_config.told(learned))
  return dataclasses.replace(notes, begun_from=source | {'name': str(path)}), beginning.begin


def _check_images(root: epath.Path, setup: Setup, there: str, now: str) -> None:
  """Raises UserError if `data.path` was changed to another folder of other images.

  Fingerprints tell the images, where those that the run began with were written down.
  """
  config, names = setup.config, ('path', 'condition')
  others = (
    same_config.other_folder(root / 'config.json', config.to_dict(), 'data', name) for name in names
  )
  moved = {name: other for name, other in zip(names, others, strict=True) if other}
  if there == now or not (there or moved):
    return
  if not moved:
    logger.warning(
      'the images in %s are not those of before: files came, went or were changed. The run goes on '
      'with what is there', ' and '.join(_folders(config)),
    )  # fmt: skip
    return
  [(name, (former, path)), *_] = moved.items()
  what = 'holds other images' if there else 'cannot be compared with it, as earlier code noted less'
  raise UserError(
    f'{root} was trained with the images in config.data.{name} = {former!r}, and {path!r} {what}. '
    'What is learned must not change in mid-run: give back that path, or choose a new '
    f'--workdir; --init_from={root} begins that with the parameters that are here'
  )


def _folders(config: FrozenConfigDict) -> list[str]:
  """Where the images of a config lie, and their conditions, if they have a folder."""
  condition = config.data.condition
  paired = same_config.condition_kind(condition) != condition
  return [config.data.path, *([condition] if paired else [])]


def _place(path: str) -> str:
  return os.path.realpath(os.path.expanduser(path))


def check_classes(
  setup: Setup, root: epath.Path, step: int, measurements: Sequence[Measurement]
) -> None:
  """Raises UserError if a model that is told classes would be measured on others."""
  trained = checkpoints_lib.notes(root, step).classes if setup.model.num_classes else ()
  for measurement in measurements:
    if measurement.class_names:
      check_same(trained, measurement.class_names, root, _RENAME)


def class_names(setup: Setup, root: epath.Path) -> Sequence[str]:
  """The names of the classes that a model was trained with; of one of earlier code, the data's.

  Raises:
    UserError: if the data lie here, in a folder, and their classes have other names.
  """
  data, trained = setup.config.data, checkpoints_lib.notes(root).classes
  if not (setup.model.num_classes or setup.config.sampling.labels):
    return ()
  at_hand = data.dataset.lower() == 'digits' or (
    data.dataset.lower() in ('folder', 'packed') and os.path.isdir(os.path.expanduser(data.path))
  )
  if not at_hand:
    return trained
  section = 'model' if setup.model.num_classes else 'classifier'
  now = load_images(setup.config, 'train', section).class_names
  check_same(trained, now, root, _RENAME)
  return now
