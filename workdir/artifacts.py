"""What a run leaves behind: metrics, arrays, pictures. Files appear whole or not at all."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import secrets
from types import TracebackType
from typing import Any

from etils import epath
import filelock
import jax
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from runtime import processes
from runtime.errors import cannot_write, UserError

logger = logging.getLogger('score_sde')


def root_of(path: epath.PathLike, what: str = '--workdir') -> epath.Path:
  """The path of a workdir that a user names: a folder, or gs://bucket/folder.

  Raises:
    UserError: if it is neither, or what gs:// takes is not installed.
  """
  name = str(path)
  scheme = re.match(r'([A-Za-z][A-Za-z0-9+.-]*):/', name)
  if scheme and scheme[1].lower() == 'gs':
    if not re.match(r'gs://[^/]', name):
      raise UserError(f'{what} {name}: write it as gs://BUCKET/FOLDER')
    if importlib.util.find_spec('gcsfs') is None:
      raise UserError(f'{what} {name} needs gcsfs: pip install gcsfs google-cloud-storage')
  elif scheme:
    raise UserError(
      f'{what} {name}: {scheme[1]}:// cannot hold a workdir; name a folder, or gs://BUCKET/FOLDER'
    )
  try:
    os.path.abspath(name).encode()
  except UnicodeEncodeError:
    raise UserError(f'{what} {name!r} is not UTF-8, as checkpoints need; choose another') from None
  return epath.Path(name).expanduser()


def is_remote(path: epath.Path) -> bool:
  """Whether a path lies in an object store, as gs://bucket/run does."""
  return '://' in str(path)


def write(path: epath.Path, data: bytes) -> None:
  """Writes a file, by way of a temporary name beside it; on process 0 only.

  That name is this call's own: training and an evaluation may write the same page. It is short, so
  that every name that a disk takes can be written. An object store shows a file whole or not at
  all, and has no renaming.
  """
  if jax.process_index() > 0:
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(path):
    path.write_bytes(data)
    return
  temporary = path.parent / f'.{secrets.token_hex(8)}.tmp'
  try:
    temporary.write_bytes(data)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)  # where the disk is full


def check_can_write(folder: epath.Path, longest: str) -> None:
  """Sees to it, before long work, that its results can be written: a file of such a long name.

  Raises:
    UserError: if not.
    Failure: if the disk is full.
  """
  failed: OSError | None = None
  probe = folder / ('.' + 'x' * (len(os.fsencode(longest)) - 1))
  try:
    write(probe, b'')
    if jax.process_index() == 0:
      probe.unlink()
  except OSError as error:
    failed = error
  if not processes.from_first(failed is not None):
    return
  if failed and failed.errno == errno.ENAMETOOLONG:
    raise UserError(
      f'{folder / longest} is too long a name for a file; rename what it is named for'
    )
  raise cannot_write(folder, failed or OSError('another process cannot'), 'choose another')


@contextlib.contextmanager
def claimed(folder: epath.Path) -> Iterator[None]:
  """Keeps every other run out of a folder, as long as this process lives; not in object stores.

  Raises:
    UserError: if another run is in it.
  """
  lock = filelock.FileLock(folder / '.lock')
  taken = False
  if jax.process_index() == 0 and not is_remote(folder):
    try:
      lock.acquire(blocking=False)
    except filelock.Timeout:
      taken = True
    except NotImplementedError:
      logger.warning('the disk of %s has no locks: see to it that no other run uses it', folder)
  if processes.from_first(taken):
    raise UserError(f'another run is at work in {folder}; wait for it, or choose another folder')
  try:
    yield
  finally:
    lock.release()


@contextlib.contextmanager
def opened(folder: epath.Path) -> Iterator[None]:
  """Makes a folder, if it is not there, and has it to itself.

  Raises:
    UserError: if another run is in it.
    Failure: if nothing can be written there.
  """
  with contextlib.ExitStack() as stack:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      stack.enter_context(claimed(folder))
    except OSError as error:
      raise cannot_write(folder, error, 'choose another') from error
    yield


def write_json(path: epath.Path, value: Any) -> None:
  """Writes JSON that a person can read; see `json_text`."""
  write(path, (json_text(value, indent=2) + '\n').encode())


# A string, which stays as it is, or a word of Python's that JSON does not have.
_STRING_OR_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')
_WORDS = {'NaN': 'null', 'Infinity': '1e999', '-Infinity': '-1e999'}


def json_text(value: Any, indent: int | None = None) -> str:
  """JSON as its standard has it (RFC 8259), which knows no NaN and no infinity.

  NaN, what is not known, is null. An infinite number is one that is too large for a float, so that
  it is read as what it was.
  """
  text = json.dumps(value, indent=indent)
  return _STRING_OR_WORD.sub(lambda found: _WORDS.get(found[0], found[0]), text)


def read_json(path: epath.Path) -> Any:
  """Reads JSON.

  Raises:
    UserError: if it is not.
  """
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f'{path} is not valid JSON ({error}); restore it or move it away') from None


def write_npz(path: epath.Path, **arrays: ArrayLike) -> None:
  """Writes arrays as a compressed npz."""
  _write_npz(path, np.savez_compressed, arrays)


def write_large_npz(path: epath.Path, **arrays: ArrayLike) -> None:
  """Writes arrays as an npz as they are: to compress them would take far longer than to write."""
  _write_npz(path, np.savez, arrays)


def _write_npz(path: epath.Path, save: Callable[..., None], arrays: dict[str, ArrayLike]) -> None:
  buffer = io.BytesIO()
  save(buffer, **arrays)
  write(path, buffer.getvalue())


def read_npz(path: epath.Path) -> dict[str, np.ndarray]:
  """Reads arrays of a file that can be made again.

  Raises:
    UserError: if it is damaged.
  """
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      return dict(arrays)
  except Exception as error:  # zipfile, zlib and NumPy raise many kinds
    raise UserError(f'{path} is damaged ({error}); move it away, and it is made again') from None


def write_png(path: epath.Path, picture: Image.Image) -> None:
  """Writes a picture."""
  _write_image(path, picture, 'PNG')


def write_gif(path: epath.Path, frames: list[Image.Image]) -> None:
  """Writes pictures one after the other, the last for two seconds."""
  first, *rest = frames
  durations = [80] * len(rest) + [2000]  # ms
  _write_image(path, first, 'GIF', save_all=True, append_images=rest, duration=durations, loop=0)


def _write_image(path: epath.Path, image: Image.Image, format: str, **choices: Any) -> None:
  buffer = io.BytesIO()
  image.save(buffer, format=format, **choices)
  write(path, buffer.getvalue())


class Metrics:
  """Scalars over training steps, in `metrics.jsonl` and as TensorBoard events; on process 0 only.

  What an earlier run wrote after `step`, where this one resumes, is taken back. An object store
  cannot append to a file: there, `metrics.jsonl` is written anew with every `flush`.

  They also go to a project of Weights & Biases, if one is named.

  Raises:
    UserError: if that is wanted and not installed.
  """

  def __init__(self, workdir: epath.Path, step: int, project: str = ''):
    self._events = self._lines = self._wandb = None
    if jax.process_index() > 0:
      return
    self._wandb = _wandb_run(workdir, project) if project else None
    self._path = workdir / 'metrics.jsonl'
    former = self._path.read_text().splitlines() if self._path.exists() else []
    self._all = [line + '\n' for line in former if _step(line) <= step]
    write(self._path, ''.join(self._all).encode())
    self._lines = None if is_remote(workdir) else self._path.open('a')
    self._events = events_writer(workdir / 'tensorboard', step + 1)

  def __enter__(self) -> 'Metrics':
    return self

  def __exit__(
    self, kind: type | None, value: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.flush()
    if self._lines:
      self._lines.close()
    if self._events:
      self._events.close()
    if self._wandb:
      self._wandb.finish()

  def write(self, step: int, **scalars: float) -> None:
    """Adds the scalars of a training step."""
    if not self._events:
      return
    line = json_text({'step': step, **scalars}) + '\n'
    self._all.append(line)
    if self._lines:
      self._lines.write(line)
      self._lines.flush()
    for name, value in scalars.items():
      self._events.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log({'step': step, **scalars})

  def flush(self) -> None:
    """Sees to it that what was added so far is there, whatever comes."""
    if self._events:
      self._events.flush()
      if not self._lines:
        write(self._path, ''.join(self._all).encode())


def events_writer(folder: epath.Path, purge_step: int) -> Any:
  """A tensorboardX.SummaryWriter; of what is there already, steps from `purge_step` on are void."""
  import tensorboardX  # here, as it imports PyTorch where there is one, which takes seconds

  return tensorboardX.SummaryWriter(str(folder), purge_step=purge_step)


def _wandb_run(workdir: epath.Path, project: str) -> Any:
  """The run of a workdir in a project; it goes on where the workdir was there before."""
  try:
    import wandb
  except ImportError:
    raise UserError(
      f'config.training.wandb = {project!r} needs Weights & Biases: pip install wandb'
    ) from None
  where = str(workdir) if is_remote(workdir) else str(workdir.resolve())
  name = f'{workdir.name}-{hashlib.sha256(os.fsencode(where)).hexdigest()[:8]}'
  config = read_json(workdir / 'config.json')
  folder = None if is_remote(workdir) else where
  run = wandb.init(project=project, id=name, name=name, resume='allow', config=config, dir=folder)
  run.define_metric('*', step_metric='step')  # lines that are taken back would disturb its own
  return run


def _step(line: str) -> float:
  """The step of a line of metrics.jsonl; infinity for a line that was cut off."""
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError):
    return math.inf
