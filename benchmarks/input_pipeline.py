"""What batches of images cost, and how much of it the training step hides.

Times of a batch by itself are taken twice: while images are decoded, and from memory, where those
of up to 4 GiB are kept. A training step is timed on one batch that stays on the device, and as it
is in training, where threads prepare the next batches: what it is longer by is not hidden.

  python -m benchmarks.input_pipeline [--dataset NAME] [--path PATH] [--data-dir PATH]
      [--network NAME] [--batch N] [--steps N] [--json PATH]
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from builders.setup import Setup
from data import sources
import run_lib
from training import loop


def times_of(iterator: Iterator[Any], n: int) -> list[float]:
  """Seconds that each of the next n took."""
  times = []
  began = time.perf_counter()
  for value in islice(iterator, n):
    jax.block_until_ready(value)
    times.append(time.perf_counter() - began)
    began = time.perf_counter()
  return times


def seconds(function: Callable[[], Any]) -> float:
  """How long it takes until what it returns is there."""
  began = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - began


def measure(setup: Setup, source: sources.ImageSource, steps: int) -> dict[str, float]:
  """Median seconds of a batch, while decoded and from memory, and of a step, with and without."""
  training, task, rng = setup.config.training, run_lib.score_task(setup), setup.key('train')
  size, results = training.batch_size, {}
  for which in ('decoded', 'from memory'):  # the same images
    with closing(sources.train_batches(source, size, seed=0)) as batches:
      times = times_of(map(setup.put, batches), len(source) // size)
    results[which] = sum(times) / len(times)  # threads deliver in bursts
  state = jax.jit(task.init, compiler_options=common.QUICK)(setup.key('init'))
  images = setup.put(source.batch(np.arange(size)))
  choices = {'out_shardings': setup.replicated, 'compiler_options': loop.compiler_options()}
  update = jax.jit(task.update, **choices)
  updates = loop.updates(setup, task, source, jax.tree.map(jnp.copy, state))
  held, trained = [], []
  for _ in range(steps + 2):  # in turns, as speed varies from minute to minute
    held.append(seconds(partial(update, state, images, rng)))
    trained.append(seconds(lambda: next(updates)))
  results['step'] = statistics.median(held[2:])  # compiled by the first
  results['step of training'] = statistics.median(trained[2:])
  return results


def table(results: dict[str, float], batch: int) -> str:
  """What `measure` found, as text."""
  rows = [[what, 1e3 * s, batch / s] for what, s in results.items()]
  shown = results['step of training'] - results['step']
  text = common.table([f'{batch} images', 'ms', 'images/s'], rows)
  return f'{text}\n\nof a step of training not hidden: {100 * shown / results["step"]:.1f} %'


def main() -> None:
  parser = common.network_parser(__doc__)
  common.add_data_flags(parser)
  parser.add_argument('--steps', type=int, default=15, help='timed; the median counts (15)')
  args = parser.parse_args()
  fixed = {'training.batch_size': args.batch, 'training.n_jitted_steps': 1}
  setup = common.network(args.network, fixed)
  results = measure(setup, common.load(args, setup, 'train'), args.steps)
  common.report(table(results, args.batch), results, args.json)


if __name__ == '__main__':
  main()
