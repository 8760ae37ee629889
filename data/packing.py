"""Packing: images of any dataset, decoded once, to the shards that `data.packed` reads.

A shard is written under another name, which it leaves when it is whole; then `packing.json` lists
it. The card, `dataset.json`, comes last. So whatever stops it, nothing is read as whole that is
not, and the same command goes on with the first shard that is missing.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import hashlib
import logging
import math
import os
from pathlib import Path
from typing import Any

from etils import epath
import numpy as np

from data.folder import shown
from data.packed import as_os_error, CARD, LABEL, open_packed, Packed, PLAN, Shard
from data.records import Reader
from runtime.errors import cannot_write, Failure, UserError
from workdir import artifacts, versions
from workdir.progress import Bar

logger = logging.getLogger('score_sde')

SHARD_BYTES = 2**28  # of pixels in a shard, about; more where there would be too many shards
_MOST_SHARDS = 512  # of a split: each is a file that is open while images are read
_AT_A_TIME = 256  # images that are decoded before they are written
# One record a block, so that one is read alone; raw pixels hardly compress, and are read faster.
_WRITER = 'group_size:1,uncompressed'


@dataclasses.dataclass(frozen=True)
class _Done:
  """A shard that is whole.

  Attributes:
    shard: it.
    class_counts: of its images.
    digest: the sum, modulo 2^128, of the hashes of its records, each with its number in the split.
  """

  shard: Shard
  class_counts: list[int]
  digest: int


def pack(folder: Path, splits: dict[str, Reader], made_of: dict[str, Any]) -> Packed:
  """Writes the images of all splits to a folder, or goes on with that.

  Args:
    folder: where to.
    splits: what reads the images of each, as they are to be stored.
    made_of: what the images are and how they are read, which a packing that goes on must have, too.

  Raises:
    UserError: if an image cannot be read, or something else is in the folder.
    Failure: if the disk is full, or lost.
  """
  train = splits['train']
  plan = {
    'format': 1,
    'image_size': train.size,
    'num_channels': train.decoder.num_channels,
    'classes': list(train.records.class_names),
    'fit': 'own' if train.records.fit else train.decoder.fit,
    'made_of': made_of,
    'images': {name: read.records.length for name, read in splits.items()},
    'shards': {name: _shards(read) for name, read in splits.items()},
  }
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with artifacts.claimed(epath.Path(folder)):
      if _is_done(folder, plan):
        logger.info('%s holds these images already', folder)
      else:
        _pack(folder, splits, plan)
      (folder / PLAN).unlink(missing_ok=True)
  except OSError as error:
    raise cannot_write(shown(error.filename or folder), error, 'choose another') from error
  return open_packed(str(folder))


def _shards(read: Reader) -> int:
  """How many shards the images of a split take."""
  size = read.records.length * read.size**2 * read.decoder.num_channels
  return max(1, min(math.ceil(size / SHARD_BYTES), _MOST_SHARDS, read.records.length))


def _is_done(folder: Path, plan: dict[str, Any]) -> bool:
  """Whether all of it is there.

  Raises:
    UserError: if something else is.
  """
  card, begun = (epath.Path(folder / name) for name in (CARD, PLAN))
  there = next((artifacts.read_json(path) for path in (card, begun) if path.exists()), None)
  if there is None:
    if any(folder.glob('*.array_record')):
      raise UserError(f'{shown(folder)} holds shards of something else; choose another folder')
    return False
  different = [name for name in plan if there.get(name) != plan[name]]
  if different:
    name = different[0]
    raise UserError(
      f'{shown(folder)} holds other images, or packed otherwise: {name} is {there.get(name)} there '
      f'and {plan[name]} now; choose another folder, or remove it'
    )
  return card.exists()


def _pack(folder: Path, splits: dict[str, Reader], plan: dict[str, Any]) -> None:
  begun = epath.Path(folder / PLAN)
  listed = artifacts.read_json(begun)['done'] if begun.exists() else []
  if not listed:  # a folder that is begun says so, and what it will hold
    artifacts.write_json(begun, plan | {'done': []})
  done = [_Done(Shard(**one['shard']), one['class_counts'], one['digest']) for one in listed]
  done = [one for one in done if _is_whole(folder, one.shard)]
  if done:
    logger.info('going on with %s, where %d shards are whole', folder, len(done))
  card_of = dict[str, Any]()
  for name, read in splits.items():
    whole = {one.shard.name: one for one in done}
    of_split, n = list[_Done](), plan['shards'][name]
    edges = np.linspace(0, read.records.length, n + 1).round().astype(int)
    with Bar(f'pack {name}', read.records.length, unit='images') as bar:
      for k in range(n):
        file = f'{name}-{k:05d}-of-{n:05d}.array_record'
        begin, end = int(edges[k]), int(edges[k + 1])
        if file not in whole:
          made = _write_shard(folder / file, read, range(begin, end), bar)
          done.append(made)
          artifacts.write_json(begun, plan | {'done': [dataclasses.asdict(one) for one in done]})
          whole[file] = made
        of_split.append(whole[file])
    card_of[name] = _of_split(of_split)
    logger.info('%s: %d images in %d shards', name, read.records.length, n)
  card = plan | {'splits': card_of, 'record': 'int32 label, uint8 pixels [H, W, C]'}
  artifacts.write_json(epath.Path(folder / CARD), card | {'versions': versions.here()})


def _is_whole(folder: Path, shard: Shard) -> bool:
  path = folder / shard.name
  return path.exists() and path.stat().st_size == shard.size


def _of_split(done: list[_Done]) -> dict[str, Any]:
  digest = sum(one.digest for one in done) % 2**128
  return {
    'shards': [dataclasses.asdict(one.shard) for one in done],
    'class_counts': np.sum([one.class_counts for one in done], 0).tolist(),
    'fingerprint': f'{digest:032x}'[:16],
  }


def _write_shard(path: Path, read: Reader, numbers: range, bar: Bar) -> _Done:
  """Writes these images to a file, which appears whole."""
  part = path.with_name(f'.{path.name}.part')
  counts, digest = np.zeros(len(read.records.class_names), int), 0
  try:
    with _writer(part) as write, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
      for begin in range(numbers.start, numbers.stop, _AT_A_TIME):
        some = range(begin, min(begin + _AT_A_TIME, numbers.stop))
        for i, (pixels, label) in zip(some, pool.map(read, some), strict=True):
          record = np.array(label, LABEL).tobytes() + pixels.tobytes()
          hashed = hashlib.blake2b(i.to_bytes(8, 'little') + record, digest_size=16).digest()
          digest += int.from_bytes(hashed, 'little')
          if len(counts):
            counts[label] += 1
          write(record)
        bar.update(some.stop)
    _flush(part)
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)
  shard = Shard(path.name, len(numbers), path.stat().st_size)
  return _Done(shard, counts.tolist(), digest % 2**128)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Any]:
  """What writes a record to a new file, all of which is there at the end.

  Raises:
    OSError: if the system does not write it.
    Failure: if array_record does not.
  """
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(path), _WRITER)
  try:
    yield writer.write
    writer.close()
  except RuntimeError as error:
    of_system = as_os_error(error)
    if of_system is None:
      raise Failure(f'cannot write to {shown(path)} ({error})') from error
    raise OSError(of_system.errno, of_system.strerror, str(path)) from error


def _flush(path: Path) -> None:
  """Sees to it that a file is on the disk before it gets its name."""
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)
