"""What a training step costs: time, images a second, FLOP/s, memory, and what compiling takes.

A step draws times and noise, differentiates the loss, and updates parameters and their average; its
state is donated. FLOP are those that XLA counts in the program before it is optimised; the share of
the peak is that of the convolution measured on the same machine just before. Memory is XLA's plan
for the program: arguments, results and temporaries.

  python -m benchmarks.training [--networks NAME ...] [--batch N] [--steps N]
      [--changes SECTION.FIELD=VALUE ...] [--released [no-scan]] [--compile-only] [--json PATH]

Every network is measured as it is, once with each of --changes, and, with --released, as the
released code has it: with its FIR resampling, Flax's GroupNorm, and five steps in a `lax.scan`
of one program, which JAX compiles by its own rules and flags. XLA:CPU runs that scan slowly, so
there is a row without it too, of one step; `--released no-scan` measures that alone.
"""

import ast
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
import statistics
import sys
import time
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from benchmarks import common, released
from builders.setup import Setup
from builders.training import score_task
from training import loop
from training.step import TrainState


def change(text: str) -> dict[str, Any]:
  """'section.field=value,...' as a change of a config."""
  pairs = (pair.partition('=')[::2] for pair in text.split(',') if pair)
  return {name: _value(value) for name, value in pairs}


def _value(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):  # a word
    return text


def compile_step(
  setup: Setup, donate: bool, options: dict[str, str]
) -> tuple[Callable[..., Any], Any, dict[str, float]]:
  """A call of the training step, which takes `n_jitted_steps` of them, as it is in training.

  Returns:
    The program, (state, frozen, batch, key) -> (state, metrics); its batch; and seconds, bytes,
    and the FLOP of one step.
  """
  training, task, rng = setup.config.training, score_task(setup), setup.keys.key('train')
  n, update = training.n_jitted_steps, task.update
  batch = setup.devices.put({'data': common.images(setup, training.batch_size)})
  state = jax.eval_shape(task.init, rng)
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=setup.devices.replicated),
    jax.eval_shape(partial(loop.as_trained, devices=setup.devices), state),
  )
  one = batch
  if n > 1:
    update = partial(loop.several_steps, task.update)
    stacked = NamedSharding(setup.devices.mesh, PartitionSpec(None, *setup.devices.batch.spec))
    batch = jax.tree.map(lambda x: jax.device_put(np.stack([x] * n), stacked), batch)
  began = time.perf_counter()
  choices = {'out_shardings': setup.devices.replicated, 'donate_argnums': 0 if donate else ()}
  lowered = jax.jit(update, **choices).lower(state, None, batch, rng)
  traced = time.perf_counter()
  with common.no_cache():
    step = lowered.compile(options)
  compiled, memory = time.perf_counter(), step.memory_analysis()
  flop = common.flop(lowered if n == 1 else jax.jit(task.update).lower(state, None, one, rng))
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  measured = {
    'batch': training.batch_size,
    'flop': flop * training.grad_accum,  # of a loop XLA counts one turn
    'trace': traced - began,
    'compile': compiled - traced,
    'temporary': memory.temp_size_in_bytes,
    'memory': memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
  }
  return step, batch, measured


def initial(setup: Setup) -> TrainState:
  """The state before the first step."""
  init = score_task(setup).init
  make = jax.jit(init, out_shardings=setup.devices.replicated, compiler_options=loop.once_options())
  return loop.as_trained(make(setup.keys.key('init')), setup.devices)


def measure(setup: Setup, steps: int, donate: bool, options: dict[str, str]) -> dict[str, float]:
  """Seconds, bytes and FLOP of one step; times and peaks only where some steps are to be taken."""
  step, batch, measured = compile_step(setup, donate, options)
  if not steps:
    return measured
  peaks, times = common.peaks(setup.config.model.dtype), []
  state, rng = initial(setup), setup.keys.key('train')
  for _ in range(steps + 1):  # the first is not counted
    began = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, None, batch, rng))
    times.append((time.perf_counter() - began) / setup.config.training.n_jitted_steps)
  return measured | {'step': statistics.median(times[1:])} | peaks


def table(results: list[dict[str, Any]]) -> str:
  """What `measure` found, as text."""
  head = ['', 'batch', 'trace s', 'compile s', 'temporary MB', 'memory MB', 'GFLOP']
  head += ['step s', 'images/s', 'GFLOP/s', '% of conv peak', '% of matmul peak']
  rows = []
  for row in results:
    cells = [row['name'], str(row['batch']), row['trace'], row['compile']]
    cells += [f'{row[key] / 1e6:.0f}' for key in ('temporary', 'memory')] + [row['flop'] / 1e9]
    if 'step' in row:
      speed = row['flop'] / row['step']
      cells += [row['step'], row['batch'] / row['step'], speed / 1e9]
      cells += [100 * speed / row[peak] for peak in ('convolution', 'matmul')]
    rows.append(cells + ['-'] * (len(head) - len(cells)))
  return common.table(head, rows)


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument('--networks', nargs='+', choices=common.NETWORKS, default=['reduced ncsnpp'])
  parser.add_argument('--batch', type=int, default=16, help='images (16)')
  parser.add_argument('--steps', type=int, default=5, help='calls, after one that warms up (5)')
  parser.add_argument('--changes', nargs='+', type=change, default=[], metavar='FIELD=VALUE,...')
  parser.add_argument('--released', nargs='?', const='both', choices=('both', 'no-scan'),
                      help='also as the released code has it; or so, but its scan')  # fmt: skip
  parser.add_argument('--compile-only', action='store_true', help='take no step, and show what '
                      'memory is needed without donation too')  # fmt: skip
  args = parser.parse_args()
  variants = [(changes, False) for changes in [{}, *args.changes]]
  if args.released:
    variants.append(({'training.n_jitted_steps': 1}, True))
  if args.released == 'both':
    variants.append(({'training.n_jitted_steps': 5}, True))
  results = []
  for name in args.networks:
    for changes, old in variants:
      fixed = {'training.batch_size': args.batch, 'training.n_jitted_steps': 1}
      setup = common.network(name, fixed | changes)
      for donate in (True, False) if args.compile_only else (True,):
        with released.forms() if old else nullcontext():
          options = released.OPTIONS if old else loop.compiler_options()
          row = measure(setup, 0 if args.compile_only else args.steps, donate, options)
        what = [name, *(f'{key.partition(".")[2]}={value}' for key, value in changes.items())]
        what += ['released'] * old + ['not donated'] * (not donate)
        row['name'] = ' '.join(what)
        results.append(row)
        print(f'{row["name"]}: compiled in {row["compile"]:.0f} s', end='', file=sys.stderr)
        print(f', a step in {row["step"]:.3g} s' if 'step' in row else '', file=sys.stderr)
  common.report(table(results), results, args.json)


if __name__ == '__main__':
  main()
