"""The noise that samplers leave, with an exact score: how far samples end from the data.

The data are 100 handwritten digits as they are, in [-1, 1], whose score after diffusion is known. A
sample without noise is one of them; what is measured is the root mean square of the difference
between samples and their nearest digit, a pixel.

  python -m benchmarks.noise_left [--json PATH]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from data import sources
from data.points import Mixture
from samplers.base import GridSampler, Sampler
from samplers.multistep import DPMSolver
from samplers.time_grids import log_snr, TimeGrid
from sampling import CORRECTORS, PCSampler, PREDICTORS
from sde_lib import SDE, subVPSDE, VESDE, VPSDE

STEPS = (50, 100, 200, 1000)
SAMPLES = 64
SDES: dict[str, tuple[SDE, float]] = {  # with the usual last time
  've': (VESDE(), 1e-5),
  'vp': (VPSDE(), 1e-3),
  'subvp': (subVPSDE(), 1e-3),
}


def data() -> Mixture:
  images = sources.load('digits', 'train', image_size=8, num_channels=1).gather(np.arange(100))
  points = jnp.asarray(images.reshape(len(images), -1) / 127.5 - 1, jnp.float32)
  return Mixture(jnp.full(len(points), 1 / len(points)), points, jnp.zeros(len(points)))


def samplers(sde: SDE, n: int, eps: float) -> dict[str, Sampler]:
  uniform, none = TimeGrid(n, eps), CORRECTORS['none'](0.0, 1)
  found: dict[str, Sampler] = {
    name: PCSampler(sde, PREDICTORS[name](), none, uniform)
    for name in ('euler_maruyama', 'reverse_diffusion', 'ancestral_sampling')
  }
  if n == 1000:
    for name in list(found):
      released = PCSampler(sde, PREDICTORS[name](), none, uniform, chain=sde.chain(n))
      found[f'{name}, as released'] = released
  return found | {'dpm_solver++': GridSampler(sde, DPMSolver(2), TimeGrid(n, eps, log_snr))}


def noise_left(sampler: Sampler, sde: SDE, digits: Mixture) -> float:
  x, _ = sampler(jax.random.key(0), digits.score_fn(sde), (SAMPLES, digits.means.shape[-1]))
  squares = np.square(np.asarray(x)[:, None] - np.asarray(digits.means)).mean(-1)
  return float(np.sqrt(squares.min(1).mean()))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--json', metavar='PATH', help='write the numbers')
  args = parser.parse_args()
  digits, results = data(), {}
  for name, (sde, eps) in SDES.items():
    for n in STEPS:
      for sampler_name, sampler in samplers(sde, n, eps).items():
        row = results.setdefault(f'{name}, {sampler_name}', {})
        row[str(n)] = noise_left(sampler, sde, digits)
  head = ['root mean square of the noise left', *(f'{n} steps' for n in STEPS)]
  rows = [
    [name, *(f'{row[str(n)]:.5f}' if str(n) in row else '-' for n in STEPS)]
    for name, row in results.items()
  ]
  common.report(common.table(head, rows), results, args.json)


if __name__ == '__main__':
  main()
