"""What the processes of a run share out, and what they must agree on; trivial for one process."""

import os
import sys
import threading
from typing import Any

import jax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Sharding
import numpy as np


def join(coordinator: str | None, count: int | None, number: int | None, seconds: int) -> None:
  """Becomes one of the processes of a run, once all of them are there.

  They need not start together. JAX gives up in C++, with a page that does not say why; so after
  `seconds` this process ends itself, with 1, in one line.

  Args:
    coordinator: host:port of process 0; None, like the next two, where the cluster tells.
    count: of the processes.
    number: of this one, from 0.
    seconds: that the others have to start.

  Raises:
    ValueError: if it finds no cluster, or the three don't go together.
  """

  def leave() -> None:
    print(
      f'error: not all {f"{count} " if count else ""}processes are there after {seconds} s. Start '
      'all of them, with the same --coordinator and each with its own --process_id; where machines '
      'come later, allow more with --start_timeout',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)  # the thread that waits cannot be told

  patience = threading.Timer(seconds, leave)
  patience.daemon = True
  patience.start()
  try:
    jax.distributed.initialize(coordinator, count, number, initialization_timeout=2 * seconds + 60)
  finally:
    patience.cancel()


def share() -> dict[str, int]:
  """This process's number and how many there are, as `data.batches` takes them."""
  return {'process_index': jax.process_index(), 'process_count': jax.process_count()}


def from_first(value: Any) -> Any:
  """A number or truth value as process 0 has it.

  What depends on files or clocks, which processes may see differently, is decided there.
  """
  if jax.process_count() == 1:
    return value
  return type(value)(multihost_utils.broadcast_one_to_all(np.int64(value)))


def all_of(value: bool) -> bool:
  """Whether something is true on every process."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.process_allgather(np.int64(value)).all())


def wait_for_all(where: str) -> None:
  """Returns once every process has come to the place that is named so."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(where)


def shard(rows: np.ndarray, sharding: Sharding) -> Array:
  """The rows of a batch, the same on every process, as a batch on the devices."""
  return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)


def own_rows(rows: np.ndarray) -> np.ndarray:
  """The part of the rows, the same on every process, that this process works on."""
  own = len(rows) // jax.process_count()
  return rows[jax.process_index() * own :][:own]


def gather(x: Array | np.ndarray) -> np.ndarray:
  """The global array, or the rows of all processes in their order, on every process."""
  return (
    multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else np.asarray(x)
  )


def local(x: Array) -> np.ndarray:
  """The rows of a batch on the devices that this process holds."""
  shards = sorted(x.addressable_shards, key=lambda part: part.index[0].start or 0)
  return np.concatenate([part.data for part in shards])
