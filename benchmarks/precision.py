"""Training in bfloat16 beside float32: the same network, images, times and noise.

Prints the mean training loss over stretches of the steps, and at the end of each the loss of the
moving average over held-out images, with the same times and noise every time; then the time of a
step. Parameters, their average, statistics of normalisation, softmax and losses are float32 both
times.

  python -m benchmarks.precision [--dataset NAME] [--path PATH] [--data-dir PATH]
      [--network NAME] [--batch N] [--steps N] [--json PATH]
"""

import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks import common, training
from builders.setup import Setup
from builders.training import make_schedule, score_task
from data.batches import train_batches
from data.images import Source
from training import loop

DTYPES = ('float32', 'bfloat16')
STRETCHES = 10  # rows of the table
HELD_OUT = 16  # batches of held-out images


def curve(setup: Setup, source: Source, held_out: Source) -> dict[str, Any]:
  """Mean training losses and held-out losses over stretches of a run, and seconds of a step."""
  task, size = score_task(setup), setup.config.training.batch_size
  evaluate = jax.jit(task.evaluate)
  batches = train_batches(held_out, size, seed=0)
  fixed = [(setup.devices.put(next(batches)), setup.keys.key('eval', i)) for i in range(HELD_OUT)]
  batches.close()
  start = training.initial(setup)
  every, losses, times = setup.config.training.n_iters // STRETCHES, [], []
  found = {'step': [], 'training': [], 'held out': []}
  began = time.perf_counter()
  for state, step, measured in loop.updates(
    task, make_schedule(setup.config), setup.devices, setup.keys, source, start
  ):
    losses.append(float(measured['loss']))
    times.append(time.perf_counter() - began)
    if step % every == 0:
      evaluated = [evaluate(state.ema_params, task.frozen, *batch)['loss'] for batch in fixed]
      found['step'].append(step)
      found['training'].append(statistics.mean(losses))
      found['held out'].append(float(np.mean(evaluated)))
      print(*(row[-1] for row in found.values()), file=sys.stderr)
      losses = []
    began = time.perf_counter()
  return found | {'seconds': statistics.median(times)}


def table(results: dict[str, dict[str, Any]]) -> str:
  """What `curve` found for both, as text."""
  a, b = (results[dtype] for dtype in DTYPES)
  rows = []
  for i, step in enumerate(a['step']):
    row = [str(step)]
    for name in ('training', 'held out'):
      before, after = a[name][i], b[name][i]
      row += [before, after, f'{100 * (after / before - 1):+.2f} %']
    rows.append(row)
  head = ['step', 'training f32', 'bf16', '', 'held-out f32', 'bf16', '']
  seconds = ', '.join(f'{dtype} {results[dtype]["seconds"]:.3g} s' for dtype in DTYPES)
  return f'{common.table(head, rows)}\n\na step: {seconds}'


def main() -> None:
  parser = common.network_parser(__doc__)
  common.add_data_flags(parser)
  parser.add_argument('--steps', type=int, default=500, help='of training (500)')
  args = parser.parse_args()
  results = {}
  for dtype in DTYPES:
    changes = {'training.batch_size': args.batch, 'training.n_jitted_steps': 1}
    changes |= {'training.n_iters': args.steps, 'model.dtype': dtype}
    changes |= {'optim.warmup': args.steps // 5, 'model.ema_rate': 0.99}
    setup = common.network(args.network, changes)
    source, held_out = (common.load(args, setup, split) for split in ('train', 'test'))
    results[dtype] = curve(setup, source, held_out)
  common.report(table(results), results, args.json)


if __name__ == '__main__':
  main()
