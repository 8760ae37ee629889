"""What a learned dequantisation brings: a trained model's bits/dim with it, and with uniform noise.

The noise is that of `evaluation/dequantization.py`; both laws get the same v, so the gain is of the
same images and noise.

  python -m benchmarks.dequantization WORKDIR [--steps N] [--images N] [--json PATH]
"""

import dataclasses
import math
import tempfile

from etils import epath

from benchmarks import common, runs
from builders.data import load_source
from builders.evaluation import make_bits_per_dim, make_bound
from builders.setup import Setup
from evaluation.dequantization import fit, Learned
from models.score import Params
import run_lib

BATCH = 64


def train(setup: Setup, params: Params, steps: int) -> Learned:
  """The law that is learned for a model that is what it is."""
  bits = dataclasses.replace(make_bits_per_dim(setup), batch_size=BATCH)
  return fit(bits, load_source(setup.config, 'train'), setup.config.training.eps, steps, params)


def measure(workdir: str, steps: int, n_images: int) -> dict[str, dict[str, float]]:
  """For the exact value and the bound: with each noise, and how much less the learned one gives."""
  setup, params = run_lib.load(workdir)
  learned, results = train(setup, params, steps), {}
  for name, whole in (('bound', make_bound(setup)), ('exact', make_bits_per_dim(setup))):
    source = runs.FirstImages(whole.source, n_images)
    uniform = dataclasses.replace(whole, source=source, repeats=1, batch_size=len(source))
    each = {}
    for noise, bits in (
      ('uniform', uniform),
      ('learned', dataclasses.replace(uniform, dequantization=learned)),
    ):
      with tempfile.TemporaryDirectory() as folder:
        each[noise] = bits.of_images(params, epath.Path(folder))[0].mean((0, 1))
    gain = each['uniform'] - each['learned']
    results[name] = {noise: float(values.mean()) for noise, values in each.items()} | {
      'gain': float(gain.mean()),
      'error': float(gain.std(ddof=1) / math.sqrt(len(gain))),
    }
  return results


def table(results: dict[str, dict[str, float]]) -> str:
  """What `measure` returns, as text."""
  rows = [
    [name, *(f'{of[noise]:.4f}' for noise in ('uniform', 'learned')),
     f'{of["gain"]:+.4f} ± {of["error"]:.4f}']
    for name, of in results.items()
  ]  # fmt: skip
  return common.table(['bits/dim', 'uniform noise', 'learned noise', 'gain'], rows)


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument('workdir', help='of the trained model')
  parser.add_argument('--steps', type=int, default=1000, help='of training the noise (1000)')
  parser.add_argument('--images', type=int, default=100, help='held-out ones, the first (100)')
  args = parser.parse_args()
  results = measure(args.workdir, args.steps, args.images)
  common.report(table(results), results, args.json)


if __name__ == '__main__':
  main()
