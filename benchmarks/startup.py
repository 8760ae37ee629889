"""How long until the first training step is done: cold, and with what earlier runs compiled.

Two new processes run one after the other, on an empty folder of compiled programs that they share.

  python -m benchmarks.startup [--network NAME] [--batch N] [--json PATH]
"""

import json
import os
import subprocess
import sys
import tempfile
import time

from builders.training import score_task

_BEGAN = time.time()  # before JAX and the rest are imported

import jax  # noqa: E402

from benchmarks import common  # noqa: E402
from training import loop  # noqa: E402

STAGES = ('interpreter', 'import', 'build', 'initialisation', 'trace', 'compile', 'first step')


def first_step(network: str, batch: int, launched: float) -> dict[str, float]:
  """Seconds of each stage in this process, launched at that time."""
  seconds, last = {'interpreter': _BEGAN - launched}, _BEGAN

  def done(stage: str) -> None:
    nonlocal last
    seconds[stage], last = time.time() - last, time.time()

  done('import')
  setup = common.network(network, {'training.batch_size': batch})
  task, images = score_task(setup), setup.devices.put({'data': common.images(setup, batch)})
  jax.block_until_ready(images)
  done('build')
  init = jax.jit(task.init, compiler_options=loop.once_options())
  state = jax.block_until_ready(init(setup.keys.key('init')))
  done('initialisation')
  update = jax.jit(task.update, donate_argnums=0).lower(
    state, None, images, setup.keys.key('train')
  )
  done('trace')
  update = update.compile(loop.compiler_options())
  done('compile')
  jax.block_until_ready(update(state, None, images, setup.keys.key('train')))
  done('first step')
  return seconds


def measure(network: str, batch: int) -> dict[str, dict[str, float]]:
  """Seconds of each stage, cold and warm."""
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    for which in ('cold', 'warm'):
      child = [sys.executable, '-m', 'benchmarks.startup', '--network', network]
      child += ['--batch', str(batch), '--launched', str(time.time())]
      environment = os.environ | {'JAX_COMPILATION_CACHE_DIR': folder}
      done = subprocess.run(child, env=environment, check=True, capture_output=True, text=True)
      results[which] = json.loads(done.stdout.splitlines()[-1])
  return results


def table(results: dict[str, dict[str, float]]) -> str:
  """What `measure` found, as text, with the share of the cold start that a warm one takes."""
  results = {which: row | {'all': sum(row.values())} for which, row in results.items()}
  cold, warm = results['cold'], results['warm']
  rows = [[what, cold[what], warm[what], warm[what] / cold[what]] for what in (*STAGES, 'all')]
  return common.table(['seconds', 'cold', 'warm', 'ratio'], rows)


def main() -> None:
  parser = common.network_parser(__doc__)
  parser.add_argument('--launched', type=float, help='of this very process: print JSON (internal)')
  args = parser.parse_args()
  if args.launched:
    print(json.dumps(first_step(args.network, args.batch, args.launched)))
    return
  results = measure(args.network, args.batch)
  common.report(table(results), results, args.json)


if __name__ == '__main__':
  main()
