"""What a training step needs on each of several devices: memory, and what it sends to the others.

The step is compiled for 1, 8 and 64 simulated devices, as a pod would run it, and not run. Memory
of a device is modelled as 16 bytes for each parameter (itself, its average, two moments of Adam)
and m_0 + m_1 b for the b images it holds, where m_0 and m_1 are those of one device with 1 and 2
images; the table has the model beside XLA's plan.

  python -m benchmarks.scaling [--network NAME] [--batches N ...] [--devices N ...] [--json PATH]
"""

import json
import math
import os
import re
import subprocess
import sys
from typing import Any

import jax

from benchmarks import common
from builders.training import score_task
from training import loop

_DTYPE_BYTES = {'f32': 4, 'bf16': 2, 's32': 4, 'u32': 4}


def plan(name: str, batch: int) -> dict[str, Any]:
  """Bytes on each of this process's devices, where `batch` images are shared by all of them."""
  fixed = {'training.batch_size': batch, 'training.n_jitted_steps': 1}
  # Other batches must be shared by the devices too.
  fixed |= {'training.snapshot_samples': batch, 'eval.batch_size': 64}
  setup = common.network(name, fixed)
  task, rng = score_task(setup), setup.keys.key('train')
  images = setup.devices.put({'data': common.images(setup, batch)})
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=setup.devices.replicated),
    jax.eval_shape(task.init, rng),
  )
  shardings = (setup.devices.replicated, setup.devices.replicated)
  step = jax.jit(task.update, donate_argnums=0, out_shardings=shardings).lower(
    state, None, images, rng
  )
  with common.no_cache():
    compiled = step.compile(loop.compiler_options())
  memory = compiled.memory_analysis()
  return {
    'devices': jax.device_count(),
    'batch': batch,
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
    'memory': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    'sent': all_reduced(compiled.as_text()),
  }


def all_reduced(program: str) -> int:
  """Bytes that the all-reductions of a program sum over the devices."""
  total = 0
  for shapes in re.findall(r'= (.*?) all-reduce(?:-start)?\(', program):
    for dtype, dimensions in re.findall(r'(\w+)\[([\d,]*)\]', shapes):
      total += _DTYPE_BYTES[dtype] * math.prod(int(d) for d in dimensions.split(',') if d)
  return total


def measure(name: str, batch: int, devices: int) -> dict[str, Any]:
  """`plan` in a process that has so many devices."""
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
  own = ['-m', 'benchmarks.scaling', '--network', name, '--batches', str(batch), '--plan']
  done = subprocess.run(
    [sys.executable, *own], env=os.environ | {'XLA_FLAGS': flags}, capture_output=True, text=True,
    check=False,
  )  # fmt: skip
  if done.returncode:
    raise RuntimeError(done.stderr)
  return json.loads(done.stdout)


def table(results: list[dict[str, Any]]) -> str:
  """The plans beside the model, which the first two of them make."""
  one, two = results[:2]
  state = 16 * one['parameters']
  per_image = two['memory'] - one['memory']
  fixed = one['memory'] - per_image - state
  rows = []
  for row in results:
    each = row['batch'] // row['devices']
    model = state + fixed + per_image * each
    off = f'{100 * (model / row["memory"] - 1):+.1f} %'
    rows.append([str(row['devices']), str(row['batch']), str(each), row['memory'] / 1e6])
    rows[-1] += [model / 1e6, off, row['sent'] / 1e6, 4 * one['parameters'] / 1e6]
  head = ['devices', 'images', 'on each', 'MB on each', 'model', 'off', 'MB all-reduced']
  text = common.table([*head, 'MB of parameters'], rows)
  a, b = fixed / 1e6, per_image / 1e6
  return f'{text}\n\nMB of a device: {state / 1e6:.0f} + {a:.0f} + {b:.1f} for each of its images'


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument('--network', choices=common.NETWORKS, default='reduced ncsnpp')
  parser.add_argument('--batches', type=int, nargs='+', default=[4, 8, 16], help='on one device')
  parser.add_argument('--devices', type=int, nargs='+', default=[8, 64], help='for 4 images each')
  parser.add_argument('--plan', action='store_true', help='of this very process: JSON (internal)')
  args = parser.parse_args()
  if args.plan:
    print(json.dumps(plan(args.network, args.batches[0])))
    return
  cases = [(1, batch) for batch in (1, 2, *args.batches)]
  cases += [(n, n * args.batches[0]) for n in args.devices]
  results = []
  for devices, batch in cases:
    results.append(measure(args.network, batch, devices))
    print(f'{devices} devices, {batch} images: done', file=sys.stderr)
  common.report(table(results), results, args.json)


if __name__ == '__main__':
  main()
