"""How far samples are from the truth, for every sampler, SDE and number of score evaluations.

The data are a mixture of Gaussians, whose score is exact: what is left is the sampler's own error.
It is measured by the sliced Wasserstein distance of order one, the mean over random directions of
the distance between the sorted projections of samples and of data. Two sets of true samples have a
distance too, the floor. A second table gives the measured orders of convergence.

  python -m benchmarks.samplers [--json PATH] [--plot PATH]

Most of its minutes go into compiling every sampler for every number of steps.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import math
from pathlib import Path
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from data.points import Mixture
from samplers.adaptive_sde import AdaptiveSDESampler
from samplers.base import draw_prior, GridSampler, Sampler, Solver
from samplers.edm import EDM
from samplers.multistep import DDIM, DEIS, DPMSolver, DPMSolver2S, UniPC
from samplers.time_grids import log_snr, SPACINGS, TimeGrid
from sampling import CORRECTORS, ODESampler, PCSampler, PREDICTORS
from sde_lib import SDE, subVPSDE, VESDE, VPSDE
from tests.analytic import gaussian, moments
from workdir.artifacts import json_text

BUDGETS = (5, 10, 20, 50, 100, 1000)
SAMPLES, DIMENSIONS, DIRECTIONS = 5000, 2, 64
SDES = {
  've': VESDE(sigma_max=20.0),
  'vp': VPSDE(),
  'subvp': subVPSDE(),
}
EPS = {'ve': 1e-5, 'vp': 1e-3, 'subvp': 1e-3}
# Eight narrow modes of unequal weight on a circle, with a ninth, wide one in the middle.
ANGLES = 2 * np.pi * np.arange(8) / 8
DATA = Mixture(
  weights=jnp.array([*np.arange(4, 12), 20.0]) / 80,
  means=jnp.array([*np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1), [0.0, 0.0]]),
  stds=jnp.array([0.1] * 8 + [0.3]),
)


@dataclasses.dataclass(frozen=True)
class Steps:
  """Samplers whose number of evaluations is chosen: (sde, number of times, eps) -> sampler."""

  make: Callable[[SDE, int, float], Sampler]
  per_step: int = 1  # evaluations

  def at(self, sde: SDE, budget: int, eps: float) -> Sampler:
    # Two evaluations a step, and one to remove the noise.
    n = budget if self.per_step == 1 else (budget - 1) // self.per_step + 1
    return self.make(sde, n, eps)


def _grid(solver: Solver, spacing: str, per_step: int = 1) -> Steps:
  def make(sde: SDE, n: int, eps: float) -> Sampler:
    return GridSampler(sde, solver, TimeGrid(n, eps, SPACINGS[spacing](7.0)))

  return Steps(make, per_step)


def _pc(predictor: str, corrector: str = 'none') -> Steps:
  parts = PREDICTORS[predictor](), CORRECTORS[corrector](0.1, 1)
  each = 1 if corrector == 'none' else 2  # evaluations at a time of the grid
  return Steps(lambda sde, n, eps: PCSampler(sde, *parts, TimeGrid(n // each, eps)))


FIXED = {
  'pc euler_maruyama': _pc('euler_maruyama'),
  'pc reverse_diffusion + langevin': _pc('reverse_diffusion', 'langevin'),
  'ddim': _grid(DDIM(), 'log_snr'),
  'ddim eta=1': _grid(DDIM(1.0), 'log_snr'),
  'dpm_solver++ 2M': _grid(DPMSolver(2), 'log_snr'),
  'dpm_solver++ 3M': _grid(DPMSolver(3), 'log_snr'),
  'dpm_solver++ 2M eta=1': _grid(DPMSolver(2, 1.0), 'log_snr'),
  'unipc 3': _grid(UniPC(3), 'log_snr'),
  'deis 3': _grid(DEIS(3), 'quadratic'),
  'heun': _grid(EDM(2), 'edm', 2),
  'heun s_churn=40': _grid(EDM(2, churn=40.0), 'edm', 2),
}
# Samplers that choose their steps: as many tolerances as budgets, and the evaluations they take.
ADAPTIVE = {
  'adaptive_sde': lambda sde, eps, tol: AdaptiveSDESampler(sde, eps, rtol=tol, atol=tol / 5),
  'ode dopri5': lambda sde, eps, tol: ODESampler(sde, eps, tol / 10, tol / 10),
}
TOLERANCES = (0.5, 0.1, 0.02)
ORDERS = {
  'ddim': DDIM(), 'dpm_solver++ 2M': DPMSolver(2), 'dpm_solver++ 3M': DPMSolver(3),
  'dpm_solver++_2s': DPMSolver2S(), 'unipc 2': UniPC(2), 'unipc 3': UniPC(3), 'deis 2': DEIS(2),
  'deis 3': DEIS(3), 'euler': EDM(1), 'heun': EDM(2),
}  # fmt: skip


def true_samples(seed: int) -> np.ndarray:
  rng = np.random.default_rng(seed)
  k = rng.choice(len(DATA.weights), SAMPLES, p=np.asarray(DATA.weights, np.float64))
  noise = rng.standard_normal((SAMPLES, DIMENSIONS))
  return np.asarray(DATA.means)[k] + np.asarray(DATA.stds)[k, None] * noise


def sliced_wasserstein(x: np.ndarray, y: np.ndarray) -> float:
  """Mean over directions of the Wasserstein-1 distance of projections of x and y [n, d]."""
  directions = np.random.default_rng(0).standard_normal((x.shape[1], DIRECTIONS))
  directions /= np.linalg.norm(directions, axis=0)
  return float(np.abs(np.sort(x @ directions, 0) - np.sort(y @ directions, 0)).mean())


def measure(sampler: Sampler, truth: np.ndarray) -> dict[str, float]:
  """Error and evaluations."""
  x, nfe = sampler(jax.random.key(0), DATA.score_fn(sampler.sde), (SAMPLES, DIMENSIONS))
  return {'nfe': nfe, 'error': sliced_wasserstein(np.asarray(x, np.float64), truth)}


def order(solver: Solver, sde: SDE) -> float:
  """log2 of the ratio of errors with 80 and 160 equal steps of the log-SNR, on one Gaussian.

  There the probability flow is known: x_t = m_t + s_t / s_T (x_T - m_T).
  """
  eps, mean, std = 1e-2, 0.7, 0.4
  data = gaussian(jnp.array([mean]), std)
  errors = []
  with jax.enable_x64(True):
    key, shape = jax.random.key(0), (64, 1)
    z = draw_prior(sde, jax.random.split(key)[0], shape, None)  # as the samplers do
    (m, v), (m_T, v_T) = (moments(sde, mean, std, jnp.float64(t)) for t in (eps, sde.T))
    exact = m + jnp.sqrt(v / v_T) * (z - m_T)
    for n in (81, 161):
      sampler = GridSampler(sde, solver, TimeGrid(n, eps, log_snr), noise_removal=False)
      x, _ = sampler(key, data.score_fn(sde), shape)
      errors.append(float(jnp.abs(x - exact).max()))
  return math.log2(errors[0] / errors[1])


def table(results: dict) -> str:
  """What `main` measures, as text."""
  lines = [f'sliced Wasserstein distance; two sets of data: {results["floor"]:.4f}']
  for sde, rows in results['errors'].items():
    lines.append(f'\n{sde:34}' + ''.join(f'{n:>9}' for n in BUDGETS) + '   evaluations')
    for name in FIXED:
      cells = [f'{row["error"]:9.4f}' if row else f'{"-":>9}' for row in rows[name]]
      lines.append(f'{name:34}' + ''.join(cells))
    for name in ADAPTIVE:
      cells = [f'{row["error"]:.4f} at {row["nfe"]}' for row in rows[name]]
      lines.append(f'{name:34}   ' + ', '.join(cells))
  lines.append(f'\n{"order of convergence":34}' + ''.join(f'{sde:>9}' for sde in SDES))
  for name, orders in results['orders'].items():
    lines.append(f'{name:34}' + ''.join(f'{orders[sde]:9.2f}' for sde in SDES))
  return '\n'.join(lines)


def plot(results: dict, path: str) -> None:
  """Error against evaluations, one panel for each SDE."""
  try:
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot
  except ImportError:
    sys.exit('--plot needs matplotlib: pip install -r requirements-dev.txt')
  figure, panels = pyplot.subplots(1, len(SDES), figsize=(18, 6), sharey=True)
  colours = pyplot.colormaps['tab20'].colors
  names = [*FIXED, *ADAPTIVE]
  for panel, (sde, rows) in zip(panels, results['errors'].items(), strict=True):
    for i, name in enumerate(names):
      points = [(row['nfe'], row['error']) for row in rows[name] if row]
      style = {'marker': 'osD^'[i // len(colours)], 'linestyle': '-' if name in FIXED else ':'}
      panel.loglog(*zip(*points, strict=True), color=colours[i % len(colours)], label=name, **style)
    panel.axhline(results['floor'], color='grey', linewidth=0.8)
    panel.set(title=sde, xlabel='score evaluations')
  panels[0].set_ylim(results['floor'] / 1.5, 2)  # worse is off the picture
  panels[0].set_ylabel('sliced Wasserstein distance (grey: between two sets of data)')
  panels[-1].legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
  figure.tight_layout()
  figure.savefig(path, dpi=90)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--json', metavar='PATH', help='write the numbers')
  parser.add_argument('--plot', metavar='PATH', help='draw them, as a PNG')
  args = parser.parse_args()
  began, truth = time.monotonic(), true_samples(0)
  results = {'floor': sliced_wasserstein(true_samples(1), truth), 'errors': {}, 'orders': {}}
  samplers = {
    (sde_name, name): [steps.at(sde, budget, EPS[sde_name]) for budget in BUDGETS]
    for sde_name, sde in SDES.items()
    for name, steps in FIXED.items()
  } | {
    (sde_name, name): [make(sde, EPS[sde_name], tolerance) for tolerance in TOLERANCES]
    for sde_name, sde in SDES.items()
    for name, make in ADAPTIVE.items()
  }
  with ThreadPoolExecutor(2) as pool:  # one compiles while the other computes
    rows = pool.map(lambda row: [measure(sampler, truth) for sampler in row], samplers.values())
    for (sde_name, name), row in zip(samplers, rows, strict=True):
      results['errors'].setdefault(sde_name, {})[name] = row
      print(f'{time.monotonic() - began:4.0f} s: {sde_name}, {name}', file=sys.stderr)
  for name, solver in ORDERS.items():
    results['orders'][name] = {key: order(solver, sde) for key, sde in SDES.items()}
  results['seconds'] = time.monotonic() - began
  print(table(results))
  print(f'\n{results["seconds"]:.0f} s')
  if args.json:
    Path(args.json).write_text(json_text(results, indent=2) + '\n')
  if args.plot:
    plot(results, args.plot)


if __name__ == '__main__':
  main()
