"""Where a training step and an evaluation of a network spend their time, on CPUs.

First, on all cores: the time of each, and that of its convolutions run by themselves, of the same
shapes: no change of what lies between them can take more away than the rest. Then, by kind, the
operations of the program as XLA traces them: on one core, where an operation takes what it costs.

  python -m benchmarks.profile [--network NAME] [--batch N] [--steps N] [--json PATH]

Faults are pages of memory, of 4 KiB or large, that Linux cleared for one turn.
"""

from collections import Counter
from collections.abc import Callable
import json
import os
from pathlib import Path
import re
import resource
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, sampling, training
from training import loop

WORKS = ('training step', 'evaluation')
REPEATS = 5  # of each convolution; the median counts
CONVOLUTIONS = 'convolutions'
# By kind, the operation or the place in the source: the first that is found counts.
KINDS = {
  'random bits, dropout': r'random|bernoulli|uniform|normal\)|Dropout',
  'attention': r'AttnBlock',
  '1x1 convolutions, products': r'^dot|Conv_\d+/conv_general|NIN|Dense',
  'transpositions for gradients by weights': r'Conv\w*_\d+/transpose',
  'GroupNorm, swish': r'GroupNorm|silu|reduce_sum|rsqrt',
  'joins, residual sums, resampling, biases': r'NCSNpp',
}
REST = 'loss, clipping, Adam, average'
# name = shape operation(operands), and what follows, in the text of a compiled program.
_INSTRUCTION = re.compile(r'\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]\S* ([\w-]+)\((.*?)\)(.*)')
_PLACE = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r'calls=%?([\w.-]+)')


def program(what: str, name: str, batch: int) -> tuple[Callable[[], Any], str]:
  """One turn of one of `WORKS`, and its compiled text."""
  setup = common.network(name, {'training.batch_size': batch, 'training.n_jitted_steps': 1})
  if what == 'evaluation':
    score_fn = setup.model.bind(common.init(setup))
    x = jax.random.normal(jax.random.key(0), (batch, *setup.data_shape))
    arguments = score_fn, x, jnp.full(batch, 0.5)
    compiled = sampling.evaluate.lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments)), compiled.as_text()
  step, images, _ = training.compile_step(setup, True, loop.compiler_options())
  state, rng = training.initial(setup), setup.keys.key('train')

  def turn() -> None:
    nonlocal state
    state, _ = jax.block_until_ready(step(state, None, images, rng))

  return turn, step.as_text()


def convolutions(text: str) -> Counter[tuple[Any, ...]]:
  """How often a program has each: shapes of images and weights, strides, padding, dilation."""
  shapes: dict[str, tuple[int, ...]] = {}
  found: Counter[tuple[Any, ...]] = Counter()
  for match in map(_INSTRUCTION.match, text.splitlines()):
    if match is None:
      continue
    name, shape, operation, operands, rest = match.groups()
    shapes[name] = tuple(map(int, shape.split(','))) if shape else ()
    if operation == 'convolution':
      assert 'dim_labels=b01f_01io->b01f' in rest, rest  # as `models.cpu_convolutions` lowers it
      x, w = (shapes[operand.strip(' %')] for operand in operands.split(','))
      found[x, w, *(_window(rest, field) for field in ('stride', 'pad', 'lhs_dilate'))] += 1
  return found


def _window(text: str, field: str) -> tuple[Any, ...]:
  """A field of a convolution's window by axis: '1_1x0_1' are pairs, '2x2' are numbers."""
  match = re.search(rf'window=\{{[^}}]*\b{field}=([\dx_-]+)', text)
  if match is None:
    return ((0, 0), (0, 0)) if field == 'pad' else (1, 1)
  axes = [tuple(map(int, axis.split('_'))) for axis in match[1].split('x')]
  return tuple(axis if field == 'pad' else axis[0] for axis in axes)


def alone(text: str) -> float:
  """Seconds that all convolutions of a program take by themselves, one after another."""
  total = 0.0
  for (x, w, strides, pads, dilation), count in convolutions(text).items():
    run = jax.jit(
      lambda x, w, strides=strides, pads=pads, dilation=dilation: jax.lax.conv_general_dilated(
        x, w, strides, pads, dilation, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )
    )
    operands = jnp.ones(x), jnp.ones(w)
    measured = common.timed({'': lambda run=run, operands=operands: run(*operands)}, REPEATS)
    total += count * measured[''][0]
  return total


def kinds(text: str) -> dict[str, str]:
  """The kind of each operation of a program, by its name in a trace."""
  lines, inside, convolving = text.splitlines(), '', set()
  for line in lines:  # computations that fusions call, some with a convolution in them
    if line and not line[0].isspace() and '(' in line:
      inside = line.split('(')[0].strip(' %')
    elif ' convolution(' in line:
      convolving.add(inside)
  found = {}
  for match in map(_INSTRUCTION.match, lines):
    if match is None:
      continue
    name, _, operation, _, rest = match.groups()
    called, place = _CALLED.search(rest), _PLACE.search(rest)
    if operation == 'convolution' or (called is not None and called[1] in convolving):
      found[name] = CONVOLUTIONS
      continue
    where = f'{operation} {place[1] if place else ""}'
    found[name] = next((kind for kind, has in KINDS.items() if re.search(has, where)), REST)
  return found


def trace(what: str, args: Any) -> dict[str, float]:
  """Seconds of one turn by kind; this process has one core."""
  turn, text = program(what, args.network, args.batch)
  turn()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(args.steps):
        turn()
    (path,) = Path(folder).rglob('*.xplane.pb')
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
  kind, seconds = kinds(text), dict.fromkeys((CONVOLUTIONS, *KINDS, REST), 0.0)
  for plane in planes:
    for line in plane.lines:
      for event in line.events:
        if event.name in kind:
          seconds[kind[event.name]] += event.duration_ns / 1e9 / args.steps
  return seconds


def measure(args: Any) -> dict[str, dict[str, dict[str, float]]]:
  """By work: 'whole', seconds and faults on all cores; 'kinds', seconds of each on one."""
  results = {}
  for what in WORKS:
    turn, text = program(what, args.network, args.batch)
    turn()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    (seconds, _) = common.timed({'': turn}, args.steps)['']
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (args.steps + 1)
    whole = {'seconds': seconds, 'convolutions alone': alone(text), 'faults': faults}
    results[what] = {'whole': whole, 'kinds': _on_one_core(what, args)}
  return results


def _on_one_core(what: str, args: Any) -> dict[str, float]:
  """`trace`, in a process of its own."""
  cores = os.sched_getaffinity(0)
  command = [sys.executable, '-m', 'benchmarks.profile', '--network', args.network]
  command += ['--batch', str(args.batch), '--steps', str(args.steps), '--trace', what]
  os.sched_setaffinity(0, {max(cores)})  # the new process inherits it
  try:
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
  finally:
    os.sched_setaffinity(0, cores)
  return json.loads(done.stdout)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
  """What `measure` found, as text: the whole, and what it is made of."""
  rows = []
  for what, row in results.items():
    whole = row['whole']
    share = f'{100 * whole["convolutions alone"] / whole["seconds"]:.0f}'
    rows.append([what, *(1e3 * whole[key] for key in ('seconds', 'convolutions alone')), share])
    rows[-1].append(f'{whole["faults"]:.0f}')
  text = common.table(['all cores, ms', 'whole', 'convolutions alone', '%', 'faults'], rows)
  head, rows = ['one core, ms'], []
  for what in results:
    head += [what, '%']
  for kind in (CONVOLUTIONS, *KINDS, REST):
    rows.append([kind])
    for row in results.values():
      seconds, total = row['kinds'][kind], sum(row['kinds'].values())
      rows[-1] += [1e3 * seconds, f'{100 * seconds / total:.1f}']
  rows.append(['all'])
  for row in results.values():
    rows[-1] += [1e3 * sum(row['kinds'].values()), '100']
  return f'{text}\n\n{common.table(head, rows)}'


def main() -> None:
  parser = common.network_parser(__doc__)
  parser.add_argument('--steps', type=int, default=3, help='turns of each (3)')
  parser.add_argument('--trace', choices=WORKS, help='only trace one, and print what it finds')
  args = parser.parse_args()
  if args.trace:
    print(json.dumps(trace(args.trace, args)))
    return
  if not hasattr(os, 'sched_setaffinity') or jax.default_backend() != 'cpu':
    sys.exit('this benchmark is for CPUs, on Linux, which can give one core to a process')
  results = measure(args)
  common.report(table(results), results, args.json)


if __name__ == '__main__':
  main()
