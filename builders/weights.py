"""Weights that leave a run or come into one: exported folders, checkpoints of released codes."""

from collections.abc import Mapping
import dataclasses
import logging
from pathlib import Path
import shlex
from typing import Any

from etils import epath
import jax
import numpy as np

from builders.networks import pytorch_release_has
from builders.rules_of_students import CONSISTENCY
from builders.setup import build, Setup
from builders.training import abstract_state, settled_rate, task_of
from configs.base import saved
from models.score import Params
from runtime.errors import UserError
from training import exported, flat_tables, released_checkpoints
from training.checkpoints import Notes
from training.flat_tables import Shapes
from training.step import TrainState
from workdir import same_config, versions

logger = logging.getLogger('score_sde')

# Exported weights that come with the code: those of configs/edm/digits.py in edm/digits.
SHIPPED = Path(__file__).parent.parent / 'assets'


def write_weights(
  folder: epath.Path,
  setup: Setup,
  params: Params,
  step: int,
  notes: Notes,
  trained_with: Mapping[str, Any],
  measured: Mapping[str, Any],
  licence: str,
) -> None:
  """Writes one average of the parameters, with its card; see `training.exported`.

  Args:
    folder: where to.
    setup, params, step, notes: of the checkpoint.
    trained_with: the command, versions and devices that it was trained with, if they are known.
    measured: the report of its evaluation, if there is one.
    licence: under which others may use the weights; empty if nobody has said.

  Raises:
    UserError: if other weights are there.
  """
  config, names = setup.config, _parameters(setup)
  model, in_pytorch = config.model, pytorch_release_has(config)
  card = {
    'config': config.to_dict(),
    'network': model.name,
    'sde': config.training.sde,
    'preconditioning': type(setup.model.preconditioning).__name__,
    'parameters': sum(x.size for x in names.values()),
    'data_shape': setup.data_shape,
    'step': step,
    'images_seen': step * config.training.batch_size,
    'average': config.ema.use,
    'dataset': config.data.dataset,
    'classes': notes.classes,
    'begun_from': notes.begun_from,
    'trained_with': dict(trained_with),
    'made_with': versions.here() | {'command': versions.command()},
    'measured': dict(measured),
    'licence': licence or 'not stated',
  }
  sigmas = np.geomspace(model.sigma_max, model.sigma_min, model.num_scales)
  exported.write(folder, params, card, names if in_pytorch else None, sigmas)
  if not in_pytorch:
    logger.info('the PyTorch release has no such network: no %s', exported.PYTORCH)
  if not licence:
    logger.info('no licence is stated: --licence says under which others may use them')


def read_weights(folder: epath.Path) -> tuple[Setup, Notes, int, Params]:
  """The parts of the config, the notes, the step and the weights that `write_weights` wrote.

  Raises:
    UserError: if they are damaged, or not of this code.
  """
  card = exported.read_card(folder)
  setup = build(saved(card['config'], folder / exported.CARD))
  abstract = abstract_state(setup)
  params = exported.read(folder, card, _parameters(setup))
  placed = jax.device_put(params, jax.tree.map(lambda x: x.sharding, abstract.params))
  notes = Notes(tuple(card['classes']), begun_from=card['begun_from'])
  return setup, notes, card['step'], placed


def imported(setup: Setup, checkpoint: epath.PathLike) -> tuple[TrainState, Notes]:
  """The training state of a released checkpoint, or of exported weights, and what it is noted with.

  Exported weights are the parameters and their average alike, with a fresh optimiser.

  Raises:
    UserError: if it is none of these, or does not fit the config.
  """
  abstract, path = abstract_state(setup), epath.Path(checkpoint)
  if exported.is_here(path):
    state, notes = _of_weights(setup, path)
  else:
    notes = Notes()
    state = released_checkpoints.load(
      path, setup.model, (1, *setup.data_shape), setup.tx, settled_rate(setup.config),
      consistency=setup.config.distill.method in CONSISTENCY,
      has_target=len(abstract.averages) > 1,
    )  # fmt: skip
  return jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract)), notes


def _of_weights(setup: Setup, folder: epath.Path) -> tuple[TrainState, Notes]:
  of_weights, notes, step, params = read_weights(folder)
  if of_model := _differences_of_model(of_weights.config.to_dict(), setup):
    raise UserError(
      f'{folder} does not fit the config: {same_config.told(of_model)}. Give these the values there'
    )
  state = task_of(setup).init(setup.keys.key('init'))
  logger.info('the optimiser begins anew: exported weights have no moments')
  copies = tuple(jax.tree.map(np.copy, params) for _ in state.averages)
  state = dataclasses.replace(state, step=np.int32(step), params=params, averages=copies)
  return state, notes


def _parameters(setup: Setup) -> Shapes:
  return flat_tables.network_parameters(setup.model, (1, *setup.data_shape))


def _differences_of_model(there: Mapping[str, Any], setup: Setup) -> same_config.Changes:
  """What differs between a config and that of a setup, of what parameters are read by."""
  different = same_config.differences(there, setup.config.to_dict())
  return {k: v for k, v in different.items() if same_config.is_among(k, same_config.MODEL)}


def nothing_trained(root: epath.Path, setup: Setup) -> UserError:
  """The error for a workdir without checkpoints; it names weights of its data that are at hand."""
  ways = [f'train first (--mode {"distill" if setup.config.distill.method else "train"})']
  for path in sorted(SHIPPED.glob(f'*/*/{exported.CARD}')):
    folder, name = epath.Path(path.parent), path.parent.relative_to(SHIPPED)
    card = exported.read_card(folder)
    if card['dataset'] == setup.config.data.dataset:
      command = f'--config configs/{name}.py --mode import --checkpoint {SHIPPED.name}/{name}'
      config = saved(card['config'], folder / exported.CARD).to_dict()
      if str(root) != f'runs/{name}' and not _differences_of_model(config, setup):
        command += f' --workdir {shlex.quote(str(root))}'
      ways.append(f'take the weights that come with the code: python main.py {command}')
  return UserError(f'{root} holds no checkpoints: nothing is trained there; {", or ".join(ways)}')
