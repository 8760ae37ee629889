"""Checkpoints of a training run, with Orbax: asynchronous and atomic.

`checkpoints/` holds the snapshots, which are kept; `checkpoints-meta/` the last two states saved
against pre-emption. Both are named by training step. A partial or damaged checkpoint is never
taken for a good one: Orbax renames a directory once it is whole, and every state is saved with
a checksum.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
from functools import partial
import gc
import itertools
import json
import logging
import sys
import time
from typing import Any, TypeVar
import zlib

from etils import epath
import jax
from jax import Array
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
  AnyPreservationPolicy,
  LatestN,
  PreservationPolicy,
)

from models.score import Params
from runtime import processes
from runtime.errors import Failure, UserError
from training.checksums import checksums
from training.step import AnyState, TrainState
from workdir import best
from workdir.artifacts import is_remote
from workdir.origin import Origin

logger = logging.getLogger('score_sde')

Restored = TypeVar('Restored')

FOLDERS = ('checkpoints', 'checkpoints-meta')  # of a workdir
# What says that a checkpoint is out of reach, not that it is damaged: of Python, of TensorStore.
_UNREADABLE = (PermissionError, ConnectionError, TimeoutError)
_UNREADABLE_STATUS = (
  'PERMISSION_DENIED', 'UNAUTHENTICATED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'RESOURCE_EXHAUSTED',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Notes:
  """What is written down with a checkpoint, beside its arrays; empty where earlier code wrote it.

  Attributes:
    classes: the names of the classes of the training data, in the order of their labels.
    images: the fingerprint of the training images.
    begun_from: the checkpoint whose parameters the run began with, if it did: its workdir, step
      and checksum, and the name that the user gave for it.
    teacher: the checkpoint that it is taught by, if it is: its workdir, step and checksum.
  """

  classes: tuple[str, ...] = ()
  images: str = ''
  begun_from: dict[str, Any] = dataclasses.field(default_factory=dict)
  teacher: dict[str, Any] = dataclasses.field(default_factory=dict)


def notes(root: epath.Path, step: int | None = None) -> Notes:
  """What is written down with the checkpoint of a step in a workdir, or with the newest."""
  steps = sorted(steps_in(root), reverse=True) if step is None else [step]
  for there in map(partial(_metadata, root), steps):
    if written := there.get('custom_metadata'):
      known = {field.name for field in dataclasses.fields(Notes)}
      found = Notes(**{name: value for name, value in written.items() if name in known})
      return dataclasses.replace(found, classes=tuple(found.classes))
    if there:
      break
  return Notes()


def _metadata(root: epath.Path, step: int) -> dict[str, Any]:
  """What Orbax writes down with a checkpoint; nothing if it is not whole, or damaged."""
  for name in FOLDERS:
    with contextlib.suppress(OSError, ValueError):
      return json.loads((root / name / str(step) / '_CHECKPOINT_METADATA').read_text())
  return {}


def identity(*params: Params) -> str:
  """What tells moving averages of checkpoints from others: their checksums, in hexadecimal."""
  return '-'.join(f'{int(checksums({"params": p})["params"]):08x}' for p in params)


def origin(root: epath.Path, step: int, *params: Params) -> Origin:
  """The checkpoint of a step, of which these averages are, as results carry it."""
  return Origin(step, identity(*params), _begun(root, step))


def _begun(root: epath.Path, step: int) -> float:
  """When a checkpoint began to be written, in seconds since 1970; now, if it is not whole yet."""
  nanoseconds = _metadata(root, step).get('init_timestamp_nsecs')
  return nanoseconds / 1e9 if nanoseconds else time.time()


def earlier_checksum(state: Any) -> np.ndarray:
  """CRC-32 over the bytes of all arrays, uint32 []: of checkpoints that have one for all parts."""
  crc = 0
  for leaf in jax.tree.leaves(state):
    whole = isinstance(leaf, Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    array: Any = np.ascontiguousarray(processes.gather(leaf) if whole else leaf)
    crc = zlib.crc32(array, crc)
  return np.asarray(crc, np.uint32)


def on_disk(state: TrainState) -> dict[str, Any]:
  """A state under the names of its parts in a checkpoint.

  The first average is `ema_params`, as it was while there was one alone, others `ema_params_<i>`.
  """
  parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  averages = parts.pop('averages')
  return parts | {_average_name(i): average for i, average in enumerate(averages)}


def _from_disk(parts: dict[str, Any], like: AnyState) -> AnyState:
  """The state whose parts `on_disk` names; it has as many averages as `like`."""
  averages = tuple(parts[_average_name(i)] for i in range(len(like.averages)))
  others = {field.name for field in dataclasses.fields(like)} - {'averages'}
  return dataclasses.replace(like, averages=averages, **{name: parts[name] for name in others})


def _average_name(i: int) -> str:
  return f'ema_params_{i}' if i else 'ema_params'


class Checkpoints:
  """The checkpoints of one workdir; a context manager that waits for the last one to be written.

  Args:
    workdir: where they lie.
    notes: what is written down with each that is saved.
    most: snapshots that are kept, the newest, and the best if one is named; 0 for all.
    create: their folders, if they are not there; they are needed to save.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    notes: Notes | None = None,
    most: int = 0,
    create: bool = True,
  ):
    root = epath.Path(workdir)
    self._notes = dataclasses.asdict(notes or Notes())
    kept, meta = (root / name for name in FOLDERS)
    newest = LatestN(n=most or None)
    self._kept = _manager(kept, AnyPreservationPolicy([newest, _TheBest(root)]), create)
    self._meta = _manager(meta, LatestN(n=2), create)
    self._damaged: list[epath.Path] = []

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: type | None, *exception: object) -> None:
    lost = kind and issubclass(kind, (jax.errors.JaxRuntimeError, Failure))
    if lost and jax.process_count() > 1:  # to wait would be for a process that is lost
      return
    # What is on its way is finished; if it cannot be, an error that came before is told instead.
    with contextlib.suppress(Failure) if kind else contextlib.nullcontext():
      self.wait()
    for manager in (self._kept, self._meta):
      with contextlib.suppress(Exception) if kind else _told(manager):
        manager.close()

  def save(self, state: TrainState, *, keep: bool) -> None:
    """Saves the state in the background: for good if `keep`, else until two newer ones are.

    Raises:
      Failure: if it, or the one before it, cannot be written.
    """
    manager, step = (self._kept if keep else self._meta), int(state.step)
    if self._damaged:
      self._set_aside()
    if step in manager.all_steps():
      return
    parts = on_disk(state)
    item = {'state': parts, 'checksums': checksums(parts)}
    with _told(manager):
      begun = manager.save(step, args=ocp.args.StandardSave(item), custom_metadata=self._notes)
    if not begun:  # Orbax goes forward only
      raise Failure(
        f'checkpoint {step} cannot be written to {manager.directory}, where there is one of step '
        f'{manager.latest_step()}; move that away and repeat the command'
      )

  def _set_aside(self) -> None:
    """Renames damaged checkpoints: they are made again, and what is left stays for inspection."""
    if jax.process_index() == 0:
      for folder in self._damaged:
        folder.rename(_free_name(folder))
    processes.wait_for_all('damaged checkpoints')
    self._damaged.clear()
    for manager in (self._kept, self._meta):
      manager.reload()

  def wait(self) -> None:
    """Returns once all that was saved is on disk.

    Raises:
      Failure: if some of it cannot be written.
    """
    for manager in (self._kept, self._meta):
      with _told(manager):
        manager.wait_until_finished()

  def steps(self) -> list[int]:
    """The steps of the snapshots that are there now, ascending."""
    self._kept.reload()
    return sorted(self._kept.all_steps())

  def restore(self, step: int, like: AnyState) -> AnyState:
    """The snapshot of a step, with the shapes, dtypes and shardings of `like`.

    Raises:
      UserError: if it is damaged or does not fit.
      Failure: if it cannot be read at present.
    """
    return _restore(self._kept, step, like)

  def restore_averages(
    self, step: int, like: TrainState, which: Sequence[int] | None = None
  ) -> tuple[Params, ...]:
    """The averages of the snapshot of a step, all or those of these numbers; raises as `restore`.

    Nothing else is read.
    """
    return _restore_averages(self._kept, step, like, which)

  def restore_params(self, step: int, like: TrainState) -> Params:
    """The parameters of the snapshot of a step, not their averages. Raises as `restore`."""
    return _restore_parts(self._kept, step, like, ['params'])['params']

  def restore_latest(self, like: AnyState) -> AnyState | None:
    """The newest good checkpoint of either kind, or None if there is none at all.

    Raises:
      UserError: if there are checkpoints and not one can be restored.
      Failure: if one cannot be read at present.
    """
    newest = self._newest(lambda manager, step: _restore(manager, step, like))
    return newest[1] if newest else None

  def restore_latest_averages(
    self, like: TrainState, which: Sequence[int] | None = None
  ) -> tuple[int, tuple[Params, ...]] | None:
    """Step and averages of the newest good one, or None; reads and raises as the two above."""
    return self._newest(lambda manager, step: _restore_averages(manager, step, like, which))

  def restore_parameters(
    self, like: TrainState, step: int | None = None
  ) -> tuple[int, Params, tuple[Params, ...]] | None:
    """Step, parameters and averages of a checkpoint, or of the newest good one; or None.

    It reads and raises as the others.
    """

    def read(manager: ocp.CheckpointManager, step: int) -> tuple[Params, tuple[Params, ...]]:
      averages = [_average_name(i) for i in range(len(like.averages))]
      parts = _restore_parts(manager, step, like, ['params', *averages])
      return parts['params'], tuple(parts[name] for name in averages)

    if step is not None:
      manager = self._kept if step in self._kept.all_steps() else self._meta
      return (step, *read(manager, step))
    newest = self._newest(read)
    return (newest[0], *newest[1]) if newest else None

  def _newest(
    self, read: Callable[[ocp.CheckpointManager, int], Restored]
  ) -> tuple[int, Restored] | None:
    """Step of the newest checkpoint that can be read, and what is read of it."""
    newest = [(step, m) for m in (self._kept, self._meta) for step in m.all_steps()]
    for step, manager in sorted(newest, key=lambda entry: entry[0], reverse=True):
      restored = None
      try:
        restored = read(manager, step)
      except UserError as error:
        logger.warning('%s; trying the one before it', error)
      if processes.all_of(restored is not None) and restored is not None:
        return step, restored
      self._damaged.append(manager.directory / str(step))
    if newest:
      raise UserError(
        f'none of the {len(newest)} checkpoints in {self._kept.directory.parent} can be restored; '
        'move checkpoints/ and checkpoints-meta/ away to start anew'
      )
    return None


def exist(workdir: epath.PathLike) -> bool:
  """Whether a workdir holds a checkpoint of either kind."""
  return bool(steps_in(epath.Path(workdir)))


def steps_in(root: epath.Path) -> set[int]:
  """The steps of a workdir's checkpoints, of either kind."""
  folders = (root / name for name in FOLDERS)
  return {int(p.name) for f in folders if f.exists() for p in f.iterdir() if p.name.isdigit()}


def _free_name(folder: epath.Path) -> epath.Path:
  names = (f'{folder.name}.damaged{f"-{i}" if i > 1 else ""}' for i in itertools.count(1))
  return next(path for path in map(folder.with_name, names) if not path.exists())


class _TheBest(PreservationPolicy):
  """Keeps the snapshot that `best.json` names, whenever another is saved."""

  def __init__(self, root: epath.Path):
    self._root = root

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    named = best.read(self._root)
    return [named is not None and one.step == named.step for one in checkpoints]


def _manager(
  directory: epath.Path, kept: PreservationPolicy, create: bool
) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(preservation_policy=kept, create=create)
  if not is_remote(directory):  # of which epath would make a path below this folder
    directory = directory.resolve()
  return ocp.CheckpointManager(directory, options=options)


def _restore(manager: ocp.CheckpointManager, step: int, like: AnyState) -> AnyState:
  parts = on_disk(like)
  return _from_disk(_restore_parts(manager, step, like, list(parts)), like)


def _restore_averages(
  manager: ocp.CheckpointManager, step: int, like: TrainState, which: Sequence[int] | None
) -> tuple[Params, ...]:
  names = [_average_name(i) for i in (range(len(like.averages)) if which is None else which)]
  parts = _restore_parts(manager, step, like, names)
  return tuple(parts[name] for name in names)


def _restore_parts(
  manager: ocp.CheckpointManager, step: int, like: TrainState, names: list[str]
) -> dict[str, Any]:
  """The parts of these names, once their checksums match.

  Where a checkpoint has one checksum for all parts, as earlier ones have, all are read.
  """

  def struct(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

  whole, where = on_disk(like), manager.directory / str(step)
  number = jax.ShapeDtypeStruct((), np.uint32, sharding=like.step.sharding)
  with _without_noise():
    try:
      there = ocp.PyTreeCheckpointHandler().metadata(where / 'default').tree
      by_part = 'checksums' in there
      wanted = {name: whole[name] for name in (names if by_part else whole)}
      expected: Any = {'checksums': dict.fromkeys(wanted, number)} if by_part else {}
      expected = expected or {'checksum': number}
      item = jax.tree.map(struct, {'state': wanted, **expected})
      if len(wanted) == len(whole):
        item = manager.restore(step, args=ocp.args.StandardRestore(item))
      else:
        how = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
        item = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(where / 'default', args=args)
    except jax.errors.JaxRuntimeError:  # memory is short, or another process is lost
      raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
      reason = str(error).strip().partition('\n')[0][:120]
      if isinstance(error, _UNREADABLE) or reason.startswith(_UNREADABLE_STATUS):
        raise Failure(
          f'checkpoint {where} cannot be read ({reason}); see to that and repeat the command'
        ) from error
      raise UserError(f'checkpoint {where} is damaged or does not fit: {reason}') from None
  parts = item['state']
  if by_part:
    matches = all(int(item['checksums'][k]) == int(v) for k, v in checksums(parts).items())
  else:
    matches = int(item['checksum']) == int(earlier_checksum(_from_disk(parts, like)))
  if not matches:
    raise UserError(f'checkpoint {where} is damaged: its checksum does not match')
  return parts


@contextlib.contextmanager
def _told(manager: ocp.CheckpointManager) -> Iterator[None]:
  """Turns what Orbax and TensorStore raise where they cannot write into one line."""
  try:
    yield
  except jax.errors.JaxRuntimeError:  # of the devices or of other processes
    raise
  except Exception as error:  # they raise many kinds
    reason = str(error).strip().partition('\n')[0].rpartition(': ')[2][:120]
    raise Failure(
      f'a checkpoint cannot be written to {manager.directory} ({reason}); see to that, for example '
      'make room, and repeat the command: it goes on from the newest whole one'
    ) from error


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
  """Hides what Orbax's abandoned readers print when a checkpoint is damaged."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    yield
  except UserError:
    gc.collect()  # it ends the readers; where all went well there are none
    raise
  finally:
    sys.unraisablehook = hook
