"""What a training step needs on each of several devices: memory, and what it sends to the others.

The step is compiled for simulated devices, as a pod would run it, and not run. Memory of a device
is modelled as 16 bytes for each parameter (itself, its average, two moments of Adam), of which each
of a group of `training.fsdp` devices has its part of the large ones, and m_0 + m_1 b for the b
images that it holds, where m_0 and m_1 are those of one device with 1 and 2 images; the table has
the model beside XLA's plan. Bytes of collectives are those of their results on one device, and of a
reduction that is scattered those of what is reduced.

  python -m benchmarks.scaling [--network NAME] [--batches N ...] [--devices N ...] [--fsdp N ...]
  python -m benchmarks.scaling --batches --devices --fits 16 24 40 80
  python -m benchmarks.scaling --config configs/flow/imagenet_64.py:dit_xl --devices 64 --fsdp 1 64
"""

from collections.abc import Sequence
import json
import math
import os
import subprocess
import sys
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks import common, compile_for, hlo, programs
from builders.setup import build
from runtime.devices import everywhere, InParts
from training import loop

GROUPS = (1, 8, 64, 256)  # devices that share the state


def plan(config: ConfigDict, batch: int, fsdp: int) -> dict[str, Any]:
  """Bytes on each of this process's devices, where `batch` images are shared by all of them."""
  fixed = {'training.batch_size': batch, 'training.n_jitted_steps': 1, 'training.fsdp': fsdp}
  # Other batches must be shared by the devices too.
  fixed |= {'training.snapshot_samples': batch, 'eval.batch_size': batch}
  config.update_from_flattened_dict(fixed | {'eval.num_samples': 16 * batch})
  program = programs.training_step(build(config))
  state = program.arguments[0]
  step = jax.jit(program.function, donate_argnums=program.donated, out_shardings=program.results)
  with common.no_cache():
    compiled = step.lower(*program.arguments).compile(loop.compiler_options())
  memory = compiled.memory_analysis()
  return {
    'devices': jax.device_count(),
    'fsdp': fsdp,
    'batch': batch,
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
    'state': sum(_bytes_on_a_device(x) for x in jax.tree.leaves(state)),
    'in_groups': {n: state_in_groups(state, n) for n in GROUPS},
    'memory': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    'collectives': collectives(compiled.as_text()),
  }


def _bytes_on_a_device(x: jax.ShapeDtypeStruct) -> int:
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def state_in_groups(state: Any, n: int) -> int:
  """Bytes of a state on each device, where groups of n share its large arrays."""
  split = InParts(n) if n > 1 else everywhere
  return sum(
    x.size * x.dtype.itemsize // (n if any(split(path, x)) else 1)
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  )


def collectives(program: str) -> dict[str, int]:
  """Kind of a collective operation -> bytes of the results of all of them, on a device."""
  total: dict[str, int] = {}
  for one in hlo.collectives(hlo.parse(program)):
    total[one.kind] = total.get(one.kind, 0) + one.turns * one.nbytes
  return total


def measure(which: Sequence[str], batch: int, devices: int, fsdp: int) -> dict[str, Any]:
  """`plan` in a process that has so many devices; `which` are the flags that say of what."""
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
  own = ['-m', 'benchmarks.scaling', *which, '--batches', str(batch)]
  done = subprocess.run(
    [sys.executable, *own, '--fsdp', str(fsdp), '--plan'],
    env=os.environ | {'XLA_FLAGS': flags}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  if done.returncode:
    raise RuntimeError(done.stderr)
  return json.loads(done.stdout)


def model_of(results: list[dict[str, Any]]) -> tuple[int, int]:
  """m_0 and m_1, of the plans for one and for two images, which come first."""
  one, two = results[:2]
  per_image = two['memory'] - one['memory']
  return one['memory'] - per_image - one['state'], per_image


def what_fits(results: list[dict[str, Any]], sizes: Sequence[int]) -> str:
  """How many images of a step fit a device of so many GB, of which a tenth is left free."""
  fixed, per_image = model_of(results)
  rows = []
  for size in sizes:
    left = [0.9e9 * size - fixed - state for state in results[0]['in_groups'].values()]
    rows.append([f'{size} GB', *(str(max(0, int(free // per_image))) for free in left)])
  return common.table(['images that fit', *(f'fsdp {n}' for n in GROUPS)], rows)


def table(results: list[dict[str, Any]]) -> str:
  """The plans beside the model, which the first two of them make."""
  one, (fixed, per_image) = results[0], model_of(results)
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
  parser.add_argument('--config', help='in place of a network: file[:variant], and its fields')
  parser.add_argument('--batches', type=int, nargs='*', default=[4, 8, 16], help='on one device')
  parser.add_argument('--devices', type=int, nargs='*', default=[8, 64], help='for 4 images each')
  parser.add_argument('--fsdp', type=int, nargs='+', default=[1, 8], help='devices of a group')
  parser.add_argument('--fits', type=int, nargs='*', default=[], help='GB: how many images fit')
  parser.add_argument('--plan', action='store_true', help='of this very process: JSON (internal)')
  args, overrides = parser.parse_known_args()
  if args.plan:
    of_file = compile_for.config_of(args.config, overrides) if args.config else None
    config = of_file or common.config_of(args.network)
    print(json.dumps(plan(config, args.batches[0], args.fsdp[0])))
    return
  which = ['--config', args.config, *overrides] if args.config else ['--network', args.network]
  cases = [(1, batch, 1) for batch in (1, 2, *args.batches)]
  cases += [(n, n * args.batches[0], fsdp) for n in args.devices for fsdp in args.fsdp]
  results = []
  for devices, batch, fsdp in cases:
    results.append(measure(which, batch, devices, fsdp))
    print(f'{devices} devices, {batch} images, fsdp {fsdp}: done', file=sys.stderr)
  text = table(results)
  if args.fits:
    text += f'\n\n{what_fits(results, args.fits)}'
  common.report(text, results, args.json)


if __name__ == '__main__':
  main()
