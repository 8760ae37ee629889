"""What a likelihood costs: this code, and the scheme of the released code, on a reduced NCSN++.

The released scheme evaluates the network twice for each evaluation of the ODE, once for the drift
and once inside the gradient that gives the divergence, with its layers and JAX's own flags
(`benchmarks/released.py`), and solves the ODE with SciPy's RK45 on the host, in float64. Here one
evaluation and its pullback give both, and the state of the solver stays on the device. Both get the
same probe, tolerance and weights and are timed in turns, so that ratios mean something on any
machine; the first runs compile and are not timed.

Two ratios matter. That of one evaluation is what the layers and the shared pass save. That of whole
solutions adds what surrounds the evaluations.

With the workdir of a trained model, the exact value and the bound without an ODE are timed in turns
instead, on held-out images and with the tolerance and the times that its config has.

  python -m benchmarks.likelihood [--network NAME | --workdir FOLDER] [--batch N] [--json PATH]
"""

from functools import partial

import jax
from jax import Array
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
from scipy import integrate

from benchmarks import common, released
from builders.data import load_source
from builders.evaluation import make_bits_per_dim, make_bound
from data.codec import LEVELS
from likelihood import bits_per_dim, draw_probes, Likelihood, VolumeChange
import run_lib
from sampling import ProbabilityFlow
from sde_lib import SDE

TOLERANCE = 1e-2  # of both solvers
WEIGHTS = 0.02  # standard deviation of what is added to initial weights, whose output is zero
EVALUATIONS, SOLUTIONS = 11, 2  # timed; the median counts


@partial(jax.jit, compiler_options=released.OPTIONS)
def drift_alone(flow: ProbabilityFlow, x: Array, t: Array) -> Array:
  """The drift [B, ...]."""
  return flow(x, t)


@partial(jax.jit, compiler_options=released.OPTIONS)
def divergence_alone(flow: ProbabilityFlow, probe: Array, x: Array, t: Array) -> Array:
  """The estimated divergence [B], by the gradient of an inner product."""
  gradient = jax.grad(lambda x: (flow(x, t) * probe).sum())(x)
  return (gradient * probe).reshape(len(x), -1).sum(-1)


def evaluate_released(
  flow: ProbabilityFlow, probe: Array, x: Array, t: Array
) -> tuple[np.ndarray, np.ndarray]:
  """Both on the host, the second asked for once the first is there."""
  return np.asarray(drift_alone(flow, x, t)), np.asarray(divergence_alone(flow, probe, x, t))


@jax.jit
def both(change: VolumeChange, x: Array, t: Array) -> tuple[Array, Array]:
  """Drift and divergence by one evaluation and its pullback."""
  return change((x, jnp.zeros((1, len(x)))), t)


def solve_released(
  sde: SDE, eps: float, flow: ProbabilityFlow, probe: Array, x0: Array
) -> tuple[np.ndarray, int]:
  """log p(x0) [B], and the evaluations of the ODE, with SciPy's solver on the host."""
  size = x0.size

  def change(t: float, state: np.ndarray) -> np.ndarray:
    x, t = jnp.asarray(state[:size].reshape(x0.shape), jnp.float32), jnp.float32(t)
    parts = evaluate_released(flow, probe, x, t)
    return np.concatenate([np.ravel(part) for part in parts]).astype(np.float64)

  start = np.concatenate([np.ravel(x0), np.zeros(len(x0))])
  solution = integrate.solve_ivp(
    change, (eps, sde.T), start, method='RK45', rtol=TOLERANCE, atol=TOLERANCE
  )
  z = jnp.asarray(solution.y[:size, -1].reshape(x0.shape), jnp.float32)
  return np.asarray(sde.prior_logp(z)) + solution.y[size:, -1], solution.nfev


def measure(name: str, batch: int) -> dict[str, dict[str, float]]:
  """For both schemes: evaluations, bits per dimension, and seconds per image."""
  setup = common.network(name, {})
  rng_weights, rng_data, rng_probe = jax.random.split(jax.random.key(0), 3)
  flat, tree = ravel_pytree(common.init(setup))
  params = tree(flat + WEIGHTS * jax.random.normal(rng_weights, flat.shape))
  sde, eps, score_fn = setup.model.sde, setup.config.training.eps, setup.model.bind(params)
  x0 = jax.random.uniform(rng_data, (batch, *setup.data_shape))
  probes = draw_probes(rng_probe, x0, 'rademacher', 1)
  flow = ProbabilityFlow(score_fn, sde)
  change, ours = VolumeChange(flow, probes), Likelihood(sde, eps, TOLERANCE, TOLERANCE)
  t = jnp.float32(0.5)
  evaluate = {
    'released': lambda: evaluate_released(flow, probes[0], x0, t),
    'here': lambda: both(change, x0, t),
  }
  solve = {
    'released': lambda: solve_released(sde, eps, flow, probes[0], x0),
    'here': lambda: ours(rng_probe, score_fn, x0)[::2],
  }
  with released.forms():
    evaluate_released(flow, probes[0], x0, t)  # compiles it with these layers
  evaluations, results = common.timed(evaluate, EVALUATIONS), {}
  for name, (seconds, (logp, nfe)) in common.timed(solve, SOLUTIONS).items():
    results[name] = {
      'nfe': int(nfe),
      'bpd': float(bits_per_dim(logp, setup.codec.dim, 1 / LEVELS).mean()),
      'evaluation': evaluations[name][0] / batch,
      'solution / nfe': seconds / batch / int(nfe),
      'solution': seconds / batch,
    }
  return results


def table(results: dict[str, dict[str, float]]) -> str:
  """What `measure` returns, as text, with the ratios of times."""
  old, new = results['released'], results['here']
  rows = [['evaluations', str(old['nfe']), str(new['nfe']), '']]
  rows.append(['bits/dim', old['bpd'], new['bpd'], ''])
  for key, what in (
    ('evaluation', 'one evaluation, ms per image'),
    ('solution / nfe', 'solution / evaluations, ms per image'),
    ('solution', 'solution, ms per image'),
  ):
    rows.append([what, 1e3 * old[key], 1e3 * new[key], f'{old[key] / new[key]:.2f}'])
  return common.table(['', 'released', 'here', 'ratio'], rows)


def measure_bound(workdir: str, batch: int) -> dict[str, dict[str, float]]:
  """For the exact value and the bound of a trained model: evaluations, bits/dim, seconds."""
  setup, params = run_lib.load(workdir)
  estimators = {'exact': make_bits_per_dim(setup).estimator, 'bound': make_bound(setup).estimator}
  held_out, score_fn = load_source(setup.config, 'test'), setup.model.bind(params)
  rng_noise, rng = jax.random.split(jax.random.key(0))
  images = held_out.batch(np.arange(min(batch, len(held_out))))['data']
  x0 = setup.codec.dequantized(rng_noise, jnp.asarray(images))
  runs = {
    name: partial(estimator.density.estimates, rng, score_fn, x0)
    for name, estimator in estimators.items()
  }
  return {
    name: {
      'evaluations': int(evaluations),
      'bits/dim': float(
        bits_per_dim(logp.mean(0), setup.codec.dim, setup.codec.level_width).mean()
      ),
      'ms': 1e3 * seconds / len(x0),
    }
    for name, (seconds, (logp, evaluations)) in common.timed(runs, SOLUTIONS).items()
  }


def table_of_bound(results: dict[str, dict[str, float]]) -> str:
  """What `measure_bound` returns, as text."""
  exact, bound = results['exact'], results['bound']
  rows = [
    ['evaluations of the score', exact['evaluations'], bound['evaluations'], ''],
    ['bits/dim', exact['bits/dim'], bound['bits/dim'], ''],
    ['ms per image', exact['ms'], bound['ms'], f'{exact["ms"] / bound["ms"]:.2f}'],
  ]
  return common.table(['', 'exact', 'bound', 'ratio'], rows)


def main() -> None:
  parser = common.network_parser(__doc__)
  parser.add_argument('--workdir', help='of a trained model: its exact value and its bound')
  args = parser.parse_args()
  results = (
    measure_bound(args.workdir, args.batch) if args.workdir else measure(args.network, args.batch)
  )
  text = table_of_bound(results) if args.workdir else table(results)
  common.report(text, results, args.json)


if __name__ == '__main__':
  main()
