"""A new run that begins with the parameters of another: step 0, a fresh optimiser.

All parameters must fit but for two arrays. Other classes have another label embedding, which is
initialised anew. So is the map of the labels of augmentation, where only this run has one. The size
of the images is no matter where the network is the same.
"""

from collections.abc import Callable
import dataclasses
import logging
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp

from models import ncsnpp
from models.score import Params
from runtime.errors import UserError
from training import checkpoints as checkpoints_lib
from training.checkpoints import Checkpoints
from training.step import AnyState, TrainState

logger = logging.getLogger('score_sde')

LABELS = 'Embed_0/embedding'  # of the networks that are told the class
AUGMENTATION = f'{ncsnpp.AUGMENTATION}/kernel'  # of those told how images were augmented
_SHOWN = 3  # parameters that do not fit, in a message


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the parameters come from.

  Attributes:
    root: the workdir.
    step: of the checkpoint; None for the newest.
  """

  root: epath.Path
  step: int | None

  def __str__(self) -> str:
    return f'{self.root}' if self.step is None else f'{self.root}, step {self.step}'


@dataclasses.dataclass(frozen=True)
class Beginning:
  """Parameters of another run.

  Attributes:
    where: they come from, for messages.
    params: the parameters.
    average: their moving average.
    same_classes: whether the label embedding, if there is one, is of the same classes.
  """

  where: str
  params: Params
  average: Params
  same_classes: bool

  def begin(self, state: AnyState) -> AnyState:
    """The state before the first step, with these parameters and averages in place of its own.

    Raises:
      UserError: if they do not fit.
    """
    new, there = _shapes(state.params), _shapes(self.params)
    fits = self.same_classes and new.get(LABELS) == there.get(LABELS)
    anew = {LABELS} & (new.keys() | there.keys()) if not fits else set()
    anew |= {AUGMENTATION} & (new.keys() ^ there.keys())
    wrong = [
      f'{name} is {there.get(name, "not there")} there, {new.get(name, "not there")} here'
      for name in sorted(new.keys() | there.keys())
      if name not in anew and new.get(name) != there.get(name)
    ]
    if wrong:
      more = f'; and {len(wrong) - _SHOWN} more' if len(wrong) > _SHOWN else ''
      raise UserError(
        f'--init_from: the parameters of {self.where} do not fit the network of this config: '
        f'{"; ".join(wrong[:_SHOWN])}{more}. Give config.model the values that it has there, and '
        'attn_resolutions that put attention at the same levels'
      )
    for name in sorted(anew):
      logger.info('%s is %s', name, 'initialised anew' if name in new else 'left out')
    taken = _taker(anew)
    return dataclasses.replace(
      state,
      params=taken(state.params, self.params),
      averages=tuple(taken(own, self.average) for own in state.averages),
    )


def _taker(anew: set[str]) -> Callable[[Params, Params], Params]:
  """(own parameters, those of another) -> copies of the latter, but for those that stay."""

  def taken(own: Params, others: Params) -> Params:
    flat = _flat(others)
    chosen = {k: v if k in anew else flat[k] for k, v in _flat(own).items()}
    copies = {k: jax.device_put(jnp.copy(v), _flat(own)[k].sharding) for k, v in chosen.items()}
    return traverse_util.unflatten_dict(copies, sep='/')

  return taken


def find(path: epath.Path, option: str = '--init_from') -> Place:
  """The checkpoints that an option names: a workdir, its checkpoints/, or one in there.

  Raises:
    UserError: if there are none.
  """
  if path.name.isdigit() and path.parent.name in checkpoints_lib.FOLDERS and path.is_dir():
    return Place(path.parent.parent, int(path.name))
  root = path.parent if path.name in checkpoints_lib.FOLDERS else path
  if path.exists() and not path.is_dir():
    raise UserError(
      f'{option} {path} is a file; a released checkpoint becomes a workdir with --mode import '
      f'--checkpoint FILE --workdir WORKDIR, and {option} takes WORKDIR'
    )
  if not checkpoints_lib.exist(root):
    raise UserError(
      f'{option} {path} holds no checkpoints; name a workdir, or WORKDIR/checkpoints/STEP'
    )
  return Place(root, None)


def load(
  place: Place, like: TrainState, classes: tuple[str, ...]
) -> tuple[Beginning, dict[str, Any]]:
  """The parameters at a place, whose state is like `like`, for a run with these classes.

  Returns:
    The parameters, and what the run is to write down of where they come from.

  Raises:
    UserError: if they cannot be restored.
  """
  with Checkpoints(place.root, create=False) as checkpoints:
    found = checkpoints.restore_parameters(like, place.step)
  if found is None:  # an object store shows those that broke off
    raise UserError(f'--init_from {place.root} holds no whole checkpoint')
  step, params, averages = found
  trained = checkpoints_lib.notes(place.root, step).classes
  if classes and not trained and LABELS in _flat(params):
    logger.warning(
      '%s does not say its classes, as earlier checkpoints do not: if there are as many, the label '
      'embedding is taken as it is', place,
    )  # fmt: skip
  where = f'{place.root}, step {step}'
  beginning = Beginning(where, params, averages[0], not trained or trained == classes)
  identity = checkpoints_lib.identity(averages[0])
  return beginning, {'workdir': str(place.root), 'step': step, 'checkpoint': identity}


def _flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
  return {name: leaf.shape for name, leaf in _flat(params).items()}
