"""What samplers add to the network: time beside what the evaluations of the score take.

All draw the same batch from a reduced NCSN++ with initial weights, in turns with the network alone,
called as often from Python. What a sampler adds is less than such times vary by on a shared
machine; so it is measured by itself, with a score, -x, that costs nothing.

  python -m benchmarks.sampling [--network NAME] [--batch N] [--steps N] [--dtype TYPE]
      [--json PATH]
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from benchmarks import common
from sde_lib import ScoreFn

SAMPLERS = {
  'PC, reverse diffusion + Langevin': {},
  'PC, reverse diffusion': {'sampling.corrector': 'none'},
  'probability flow, RK45': {'sampling.method': 'ode'},
  'DPM-Solver++ 2M': {'sampling.method': 'dpm_solver++'},
  'Heun': {'sampling.method': 'heun'},
}
NETWORK = 'the network alone'
REPEATS = 5  # timed; the median counts


@jax.tree_util.Partial
def _free(x: Array, t: Array) -> Array:
  return -x


@jax.jit
def evaluate(score_fn: ScoreFn, x: Array, t: Array) -> Array:
  """One evaluation of the score."""
  return score_fn(x, t)


def measure(
  name: str,
  batch: int,
  steps: int,
  changes: dict[str, Any],
  which: Iterable[str] = tuple(SAMPLERS),
  repeats: int = REPEATS,
) -> dict[str, dict[str, float]]:
  """Evaluations of each sampler, seconds for one, and those of them that are not the network's."""
  setups = {
    sampler: common.network(name, changes | SAMPLERS[sampler] | {'sampling.num_steps': steps})
    for sampler in which
  }
  setup = next(iter(setups.values()))
  score_fn, shape = setup.model.bind(common.init(setup)), (batch, *setup.data_shape)
  key, t = jax.random.key(0), jnp.full(batch, 0.5)
  x = jax.random.normal(key, shape)

  def bare() -> tuple[Array, int]:
    for _ in range(steps):  # queued, so that the device has no gap between them
      out = evaluate(score_fn, x, t)
    return out, steps

  samplers = {sampler: own.sampler for sampler, own in setups.items()}
  runs = {name: partial(draw, key, score_fn, shape) for name, draw in samplers.items()}
  free = {name: partial(draw, key, _free, shape) for name, draw in samplers.items()}
  results = {}
  for run, (seconds, (_, nfe)) in common.timed({NETWORK: bare} | runs, repeats).items():
    results[run] = {'nfe': int(nfe), 'evaluation': seconds / int(nfe), 'added': 0.0}
  for run, (seconds, (_, nfe)) in common.timed(free, repeats).items():
    results[run]['added'] = seconds / int(nfe)
  return results


def table(results: dict[str, dict[str, float]], batch: int) -> str:
  """What `measure` found, as text."""
  bare = results[NETWORK]['evaluation']
  head = ['', 'evaluations', 'ms each', 'added ms', 'added %', 'samples/s']
  rows = []
  for name, row in results.items():
    seconds, nfe, added = row['evaluation'], row['nfe'], row['added']
    rows.append([name, str(nfe), 1e3 * seconds, 1e3 * added, f'{100 * added / bare:.1f}'])
    rows[-1].append('-' if name == NETWORK else batch / seconds / nfe)
  return common.table(head, rows)


def main() -> None:
  parser = common.network_parser(__doc__)
  parser.add_argument('--steps', type=int, default=20, help='times of the grid (20)')
  parser.add_argument('--dtype', default='float32', help='float32 or bfloat16')
  args = parser.parse_args()
  results = measure(args.network, args.batch, args.steps, {'model.dtype': args.dtype})
  common.report(table(results, args.batch), results, args.json)


if __name__ == '__main__':
  main()
