"""Batches of a source that are a pure function of (seed, step).

source = load('CIFAR10', 'train', image_size=32, num_channels=3)
for batch in train_batches(source, 128, seed=42, start=step):
  batch['data']   # uint8 [128, 32, 32, 3]
  batch['label']  # int32 [128], where the source has classes
"""

from collections.abc import Callable, Generator
from contextlib import closing
import functools
import os
import sys
from typing import Any

import numpy as np

from data.images import Batch, Source
from runtime.errors import UserError

Batches = Generator[Batch, None, None]
_AHEAD_LIMIT = 2**30  # bytes of batches that are prepared ahead, but at least two


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
  """The permutation of one epoch, the same in any numpy: RandomState's stream is frozen."""
  bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
  return np.random.RandomState(bits).permutation(length)


def train_batches(
  source: Source,
  batch_size: int,
  *,
  seed: int,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Endless batches from number `start` on, each epoch in a new random order.

  The epochs follow each other in one stream of images; global batch k is its elements
  [k B, (k + 1) B), whatever `start` and the number of processes. A batch may span epochs.

  Args:
    source: what `load` returns.
    batch_size: B, of all processes together.
    seed: at least 0.
    start: the number of batches already taken.
    process_index: p in [0, P); this process gets rows [p B / P, (p + 1) B / P) of each batch.
    process_count: P.

  Returns:
    An iterator of {'data': uint8 [B / P, H, W, C]}, and with it 'label': int32 [B / P] if the
    source has labels, prefetched by threads; it has a `close()`.

  Raises:
    UserError: a bad size or seed; also from the iterator, an image that can't be read.
  """
  rows = _rows(batch_size, process_index, process_count)
  if seed < 0 or start < 0:
    raise UserError(f'seed is {seed} and start is {start}; both must be at least 0')

  def batch(k: int) -> Batch:
    epoch, within = np.divmod(k * batch_size + rows, len(source))
    indices = np.empty_like(within)
    for e in np.unique(epoch):
      indices[epoch == e] = _order(seed, int(e), len(source))[within[epoch == e]]
    return source.batch(indices)

  return _prefetch(batch, start, sys.maxsize // batch_size, _nbytes(source, rows))


def eval_batches(
  source: Source,
  batch_size: int,
  *,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Every image once, in order; the last batch is filled up with the last image, masked out.

  The arguments and errors are those of `train_batches`. All processes get as many batches.

  Returns:
    An iterator of what `train_batches` gives, with 'mask': bool [B / P], False where filled up.
  """
  rows = _rows(batch_size, process_index, process_count)

  def batch(k: int) -> Batch:
    indices = k * batch_size + rows
    return source.batch(np.minimum(indices, len(source) - 1)) | {'mask': indices < len(source)}

  return _prefetch(batch, start, -(-len(source) // batch_size), _nbytes(source, rows))


def _rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
  """The rows of the global batch that this process owns."""
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f'batch size {batch_size} must be positive and divisible by {process_count}, '
      'the number of processes'
    )
  own = batch_size // process_count
  return np.arange(process_index * own, (process_index + 1) * own)


def _nbytes(source: Source, rows: np.ndarray) -> int:
  """The size of a batch of so many rows."""
  of_one = source.batch(np.zeros(1, np.int64))
  return len(rows) * sum(array.nbytes for array in of_one.values())


def _prefetch(batch: Callable[[int], Any], start: int, stop: int, nbytes: int) -> Batches:
  """batch(start), ..., batch(stop - 1), computed ahead by threads: decoding releases the GIL."""
  import grain

  threads = min(16, os.cpu_count() or 1)
  ahead = max(2, min(2 * threads, _AHEAD_LIMIT // nbytes))
  options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
  numbers = grain.MapDataset.range(start, stop)
  with closing(iter(numbers.map(batch).to_iter_dataset(options))) as batches:
    yield from batches
