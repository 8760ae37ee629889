"""What batches of images cost, and how much of it the training step hides.

Times of a batch by itself are taken twice: while images are decoded, and from memory, where those
of up to 4 GiB are kept. A training step is timed on one batch that stays on the device, and as it
is in training, where threads prepare the next batches: what it is longer by is not hidden.

  python -m benchmarks.input_pipeline [--dataset NAME] [--path PATH] [--data-dir PATH]
      [--network NAME] [--batch N] [--steps N] [--json PATH]
"""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
import statistics
import time
from typing import Any

import jax

from benchmarks import common, training
from builders.setup import Setup
from builders.training import make_schedule, score_task
from data.batches import train_batches
from data.images import ImageSource
from training import loop

ROUNDS = 5  # of steps


def times_of(iterator: Iterator[Any], n: int) -> list[float]:
  """Seconds that each of the next n took."""
  times = []
  began = time.perf_counter()
  for value in islice(iterator, n):
    jax.block_until_ready(value)
    times.append(time.perf_counter() - began)
    began = time.perf_counter()
  return times


def batches(setup: Setup, source: ImageSource) -> dict[str, float]:
  """Seconds of a batch, from the source to the devices, while decoded and from memory."""
  size, found = setup.config.training.batch_size, {}
  for which in ('decoded', 'from memory'):  # the same images
    with closing(train_batches(source, size, seed=0)) as batches:
      times = times_of(map(setup.devices.put, batches), len(source) // size)
    found[which] = sum(times) / len(times)  # threads deliver in bursts
  return found


def steps(setup: Setup, source: ImageSource, n: int) -> dict[str, float]:
  """Seconds of a step on one batch that stays on the devices, and of one as it is in training.

  In turns, as speed varies from minute to minute: rounds of some calls, which wait in the queue of
  the device. The median round counts.
  """
  task, rng, calls = score_task(setup), setup.keys.key('train'), max(1, n // ROUNDS)
  run, batch, _ = training.compile_step(setup, True, loop.compiler_options())
  state = training.initial(setup)
  updates = loop.updates(
    task, make_schedule(setup.config), setup.devices, setup.keys, source, training.initial(setup)
  )
  state, _ = jax.block_until_ready(run(state, None, batch, rng))
  jax.block_until_ready(next(updates))  # compiled, and batches are on their way
  held, trained = [], []
  for _ in range(ROUNDS):
    began = time.perf_counter()
    for _ in range(calls):
      state, measured = run(state, None, batch, rng)
    jax.block_until_ready(measured)
    between = time.perf_counter()
    for _ in range(calls):
      _, _, measured = next(updates)
    jax.block_until_ready(measured)
    held.append((between - began) / calls)
    trained.append((time.perf_counter() - between) / calls)
  updates.close()
  return {'step': statistics.median(held), 'step of training': statistics.median(trained)}


def measure(setup: Setup, source: ImageSource, n: int) -> dict[str, float]:
  """All of it."""
  return batches(setup, source) | steps(setup, source, n)


def table(results: dict[str, float], batch: int) -> str:
  """What `measure` found, as text."""
  rows = [[what, 1e3 * s, batch / s] for what, s in results.items()]
  shown = results['step of training'] - results['step']
  text = common.table([f'{batch} images', 'ms', 'images/s'], rows)
  return f'{text}\n\nof a step of training not hidden: {100 * shown / results["step"]:.1f} %'


def main() -> None:
  parser = common.network_parser(__doc__)
  common.add_data_flags(parser)
  parser.add_argument('--steps', type=int, default=15, help='timed, in five rounds (15)')
  args = parser.parse_args()
  fixed = {'training.batch_size': args.batch, 'training.n_jitted_steps': 1}
  setup = common.network(args.network, fixed)
  results = measure(setup, common.load(args, setup, 'train'), args.steps)
  common.report(table(results, args.batch), results, args.json)


if __name__ == '__main__':
  main()
