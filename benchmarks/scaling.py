"""What a training step needs on each of several devices: memory, and what it sends to the others.

The step is compiled for simulated devices, as a pod would run it, and not run. Memory of a device
is modelled as 16 bytes for each parameter (itself, its average, two moments of Adam), of which each
of a group of `training.fsdp` devices has its part of the large ones, and m_0 + m_1 b for the b
images that it holds, where m_0 and m_1 are those of one device with 1 and 2 images; the table has
the model beside XLA's plan. Bytes of collectives are those of their results on one device.

  python -m benchmarks.scaling [--network NAME] [--batches N ...] [--devices N ...] [--fsdp N ...]
"""

import json
import math
import os
import subprocess
import sys
from typing import Any

import jax

from benchmarks import common, hlo
from builders.training import abstract_state, score_task
from training import loop


def plan(name: str, batch: int, fsdp: int) -> dict[str, Any]:
  """Bytes on each of this process's devices, where `batch` images are shared by all of them."""
  fixed = {'training.batch_size': batch, 'training.n_jitted_steps': 1, 'training.fsdp': fsdp}
  # Other batches must be shared by the devices too.
  fixed |= {'training.snapshot_samples': batch, 'eval.batch_size': 64}
  setup = common.network(name, fixed)
  task, rng = score_task(setup), setup.keys.key('train')
  images = setup.devices.put({'data': common.images(setup, batch)})
  state = abstract_state(setup)
  shardings = (setup.devices.state_shardings(state), setup.devices.replicated)
  step = jax.jit(task.update, donate_argnums=0, out_shardings=shardings).lower(
    state, None, images, rng
  )
  with common.no_cache():
    compiled = step.compile(loop.compiler_options())
  memory = compiled.memory_analysis()
  return {
    'devices': jax.device_count(),
    'fsdp': fsdp,
    'batch': batch,
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
    'state': sum(_bytes_on_a_device(x) for x in jax.tree.leaves(state)),
    'memory': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    'collectives': collectives(compiled.as_text()),
  }


def _bytes_on_a_device(x: jax.ShapeDtypeStruct) -> int:
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def collectives(program: str) -> dict[str, int]:
  """Kind of a collective operation -> bytes of the results of all of them, on a device."""
  total: dict[str, int] = {}
  for kind, _, one in hlo.kernels(hlo.parse(program)):
    if kind == 'collective':
      name = one.op.removesuffix('-start')
      total[name] = total.get(name, 0) + hlo.nbytes(one.shape)
  return total


def measure(name: str, batch: int, devices: int, fsdp: int) -> dict[str, Any]:
  """`plan` in a process that has so many devices."""
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
  own = ['-m', 'benchmarks.scaling', '--network', name, '--batches', str(batch)]
  done = subprocess.run(
    [sys.executable, *own, '--fsdp', str(fsdp), '--plan'],
    env=os.environ | {'XLA_FLAGS': flags}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  if done.returncode:
    raise RuntimeError(done.stderr)
  return json.loads(done.stdout)


def table(results: list[dict[str, Any]]) -> str:
  """The plans beside the model, which the first two of them make."""
  one, two = results[:2]
  per_image = two['memory'] - one['memory']
  fixed = one['memory'] - per_image - one['state']
  kinds = sorted({kind for row in results for kind in row['collectives']})
  rows = []
  for row in results:
    each = row['batch'] // row['devices']
    model = row['state'] + fixed + per_image * each
    sent = [row['collectives'].get(kind, 0) / 1e6 for kind in kinds]
    off = f'{100 * (model / row["memory"] - 1):+.1f} %'
    counts = [str(row[name]) for name in ('devices', 'fsdp', 'batch')]
    rows.append([*counts, str(each), row['memory'] / 1e6, model / 1e6, off])
    rows[-1] += [row['state'] / 1e6, *sent]
  head = ['devices', 'fsdp', 'images', 'on each', 'MB on each', 'model', 'off', 'MB of state']
  text = common.table([*head, *(f'MB {kind}' for kind in kinds)], rows)
  a, b, all_parameters = fixed / 1e6, per_image / 1e6, 4 * one['parameters'] / 1e6
  return (
    f'{text}\n\nMB of a device: its state + {a:.0f} + {b:.1f} for each of its images; '
    f'all parameters are {all_parameters:.1f} MB'
  )


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument('--network', choices=common.NETWORKS, default='reduced ncsnpp')
  parser.add_argument('--batches', type=int, nargs='+', default=[4, 8, 16], help='on one device')
  parser.add_argument('--devices', type=int, nargs='+', default=[8, 64], help='for 4 images each')
  parser.add_argument('--fsdp', type=int, nargs='+', default=[1, 8], help='devices of a group')
  parser.add_argument('--plan', action='store_true', help='of this very process: JSON (internal)')
  args = parser.parse_args()
  if args.plan:
    print(json.dumps(plan(args.network, args.batches[0], args.fsdp[0])))
    return
  cases = [(1, batch, 1) for batch in (1, 2, *args.batches)]
  cases += [(n, n * args.batches[0], fsdp) for n in args.devices for fsdp in args.fsdp]
  results = []
  for devices, batch, fsdp in cases:
    results.append(measure(args.network, batch, devices, fsdp))
    print(f'{devices} devices, {batch} images, fsdp {fsdp}: done', file=sys.stderr)
  common.report(table(results), results, args.json)


if __name__ == '__main__':
  main()
