"""Packing and reading more images than memory should hold: images/s, and resident memory.

Tar shards of PNG images are made, packed, and read in a random order: decoded, packed, and as
training reads them. Memory is that of this process, before a stage and the most during it: a Python
object for each image would show. A training step waits if it is shorter than its batch takes.

  python -m benchmarks.packing [--images N] [--sizes PIXELS,PIXELS,...] [--few N] [--batch N]
      [--json PATH]

The first size is measured with all images, the others with few.
"""

from collections import deque
from collections.abc import Callable
from contextlib import closing
import io
from itertools import islice
import os
from pathlib import Path
import tarfile
import tempfile
import threading
import time
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import common
from data import packing
from data.batches import train_batches
from data.decoding import Decoder
from data.sources import Dataset

_IN_A_SHARD = 10_000  # images of a tar
_DIFFERENT = 500  # images, over and over
_CLASSES = 10

Row = dict[str, Any]


def memory() -> float:
  """Of this process, MiB that are resident."""
  pages = int(Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def write_tars(folder: Path, n: int, size: int) -> None:
  """Shards of n PNG images of the size, smooth with some noise, with labels."""
  rng, encoded = np.random.default_rng(0), list[bytes]()
  ramp = np.linspace(0, 200, size)
  for _ in range(_DIFFERENT):
    smooth = ramp[:, None, None] * rng.uniform(0, 1, 3) + ramp[:, None] * rng.uniform(0, 0.2)
    stream = io.BytesIO()
    pixels = smooth + rng.integers(0, 16, (size, size, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(stream, 'png')
    encoded.append(stream.getvalue())
  folder.mkdir(parents=True)
  for first in range(0, n, _IN_A_SHARD):
    with tarfile.open(folder / f'{first // _IN_A_SHARD:05d}.tar', 'w') as archive:
      for i in range(first, min(first + _IN_A_SHARD, n)):
        for ending, data in (('png', encoded[i % _DIFFERENT]), ('cls', b'%d' % (i % _CLASSES))):
          info = tarfile.TarInfo(f'{i:08d}.{ending}')
          info.size = len(data)
          archive.addfile(info, io.BytesIO(data))


def stage(what: str, n: int, run: Callable[[], Any]) -> tuple[Row, Any]:
  """What n images of a stage take, and what it returns."""
  before, done, most = memory(), threading.Event(), [0.0]

  def watch() -> None:
    while not done.wait(0.1):
      most.append(memory())

  watcher = threading.Thread(target=watch)
  watcher.start()
  began, processor = time.perf_counter(), time.process_time()
  value = run()
  seconds, processor = time.perf_counter() - began, time.process_time() - processor
  done.set()
  watcher.join()
  row = {'stage': what, 'images': n, 'images/s': n / seconds, 'images/s of a core': n / processor}
  return row | {'MiB before': before, 'MiB at most': max(*most, memory())}, value


def measure(folder: Path, n: int, size: int, batch: int) -> list[Row]:
  """All stages, of images of one size."""
  tars, packed, few = folder / f'tars-{size}', folder / f'packed-{size}', min(n, 10_000)
  write_tars(tars, n, size)
  order = np.random.default_rng(0).permutation(n)

  def read_packed() -> None:
    for first in range(0, n, batch):
      source.batch(order[first : first + batch])

  def as_in_training() -> None:
    with closing(train_batches(source, batch, seed=0)) as batches:
      for _ in islice(batches, n // batch):
        pass

  of_tars, of_packed = (
    Dataset(name, size, Decoder(3), str(path)) for name, path in (('tar', tars), ('packed', packed))
  )
  scanned, reader = stage('read the headers', n, lambda: of_tars.reader('train'))
  decoded, _ = stage('decode PNG', few, lambda: deque(map(reader, order[:few].tolist()), 0))
  written, _ = stage('pack', n, lambda: packing.pack(packed, {'train': reader}, {}))
  opened, source = stage('open what is packed', n, lambda: of_packed.images('train'))
  rows = [
    scanned,
    decoded,
    written,
    opened,
    stage('read in a random order', n, read_packed)[0],
    stage('read as in training', n // batch * batch, as_in_training)[0],
  ]
  return [{'size': f'{size}x{size}'} | row for row in rows]


def table(rows: list[Row], batch: int) -> str:
  """What `measure` found, as text."""
  text = common.table([*rows[0]], [[*row.values()] for row in rows])
  waits = [
    f'{row["size"]}: a step of {batch} images that is shorter than '
    f'{1e3 * batch / row["images/s"]:.3g} ms waits'
    for row in rows
    if row['stage'] == 'read as in training'
  ]
  return '\n'.join([text, '', *waits])


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument('--images', type=int, default=200_000, help='of the first size (200000)')
  parser.add_argument('--sizes', default='32,64,128,256', help='of images (32,64,128,256)')
  parser.add_argument('--few', type=int, default=2000, help='images of the other sizes (2000)')
  parser.add_argument('--batch', type=int, default=128, help='images (128)')
  args = parser.parse_args()
  rows = list[Row]()
  for i, size in enumerate(map(int, args.sizes.split(','))):
    with tempfile.TemporaryDirectory() as folder:
      rows += measure(Path(folder), args.few if i else args.images, size, args.batch)
  common.report(table(rows, args.batch), rows, args.json)


if __name__ == '__main__':
  main()
