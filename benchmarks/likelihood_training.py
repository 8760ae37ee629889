"""Held-out bits/dim of ways to train for it, with an equal budget: weights and laws of times.

Networks of the VP or the sub-VP SDE, the same but for the loss, are trained on uniformly
dequantised images; then every held-out image gets its bits/dim by the probability flow, and the
bound on it. What is behind +- is the standard error, over images, dequantisation, and probes or
times. The last column is how long the exact value takes beside the bound, on this machine.

  python -m benchmarks.likelihood_training [--sde vp|subvp] [--dataset NAME] [--steps N]
    [--variants NAME ...] [--bound-alone] [--json PATH]
"""

import importlib
import tempfile
from typing import Any

from etils import epath
import jax

from benchmarks import common
from builders.data import load_source
from builders.evaluation import make_bits_per_dim, make_bound
from builders.setup import build, Setup
from builders.training import make_schedule, score_task
from models.score import Params
from training import loop
from workdir.reports import Report

_IMPORTANCE = {'training.time_law': 'likelihood'}
VARIANTS: dict[str, dict[str, Any]] = {
  'variance, uniform times': {},
  'likelihood, uniform times': {'training.likelihood_weighting': True},
  'likelihood, importance-sampled times': _IMPORTANCE,
  'the same, stratified': _IMPORTANCE | {'training.stratified': True},
}


def setup_of(sde: str, dataset: str, steps: int, changes: dict[str, Any]) -> Setup:
  """The config of digits, or of another dataset, for so many steps, and what is changed of it."""
  config = importlib.import_module(f'configs.{sde}.{dataset}').get_config()
  config.training.n_iters = steps
  config.data.uniform_dequantization = True
  config.eval.bpd_repeats = 2
  config.update_from_flattened_dict(changes)
  return build(config)


def train(setup: Setup) -> Params:
  """The moving average of the parameters after training in memory."""
  task, source = score_task(setup), load_source(setup.config, 'train')
  state = jax.jit(task.init)(setup.keys.key('init'))
  *_, (state, _, _) = loop.updates(
    task, make_schedule(setup.config), setup.devices, setup.keys, source, state
  )
  return state.ema_params


def measure(setup: Setup, params: Params, bound_alone: bool) -> Report:
  """Bits/dim of the held-out images, unless the bound is wanted alone, and the bound on them."""
  report: Report = {}
  makes = (make_bound,) if bound_alone else (make_bits_per_dim, make_bound)
  for measurement in (make(setup) for make in makes):
    with tempfile.TemporaryDirectory() as folder:
      report |= measurement.measure(params, setup.config.training.n_iters, epath.Path(folder))
  return report


def row(name: str, report: Report) -> str:
  """Of a table in Markdown."""
  bound = f'{report["bound_test"]:.3f} +- {report["bound_test_std_error"]:.3f}'
  if 'bpd_test' not in report:
    return f'| {name} | | {bound} | |'
  exact = f'{report["bpd_test"]:.3f} +- {report["bpd_test_std_error"]:.3f}'
  ratio = report['bpd_test_seconds'] / report['bound_test_seconds']
  return f'| {name} | {exact} | {bound} | {ratio:.1f} |'


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument('--sde', choices=('vp', 'subvp'), default='vp')
  parser.add_argument('--dataset', default='digits', help='that has a config of the SDE (digits)')
  parser.add_argument('--steps', type=int, default=1000, help='of training (1000)')
  parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=VARIANTS, metavar='NAME')
  parser.add_argument('--bound-alone', action='store_true', help='no exact bits/dim: faster')
  choices, reports = parser.parse_args(), {}
  head = ('weight and times', 'bits/dim', 'bound', 'seconds of bits/dim over those of the bound')
  rows = [f'| {" | ".join(head)} |', '|---' * 4 + '|']
  for name in choices.variants:
    setup = setup_of(choices.sde, choices.dataset, choices.steps, VARIANTS[name])
    reports[name] = measure(setup, train(setup), choices.bound_alone)
    rows.append(row(name, reports[name]))
    print(rows[-1], flush=True)
  common.report('\n'.join(rows), reports, choices.json)


if __name__ == '__main__':
  main()
