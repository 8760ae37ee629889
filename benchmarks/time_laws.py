"""How much the loss of training and its gradient vary, for every law of times.

A network is trained on the digits that come with the code. Then, at its parameters, many batches
are drawn as training draws them, with the images, times and noise of each; the variance is that of
a batch's loss, and of its gradient the sum of the variances of all parameters. What has the same
name in the first column has the same expectation, so that there variances compare as they are.

  python -m benchmarks.time_laws [--sde vp|subvp|ve] [--steps N] [--draws N] [--json PATH]
"""

from collections.abc import Iterator
import importlib
from typing import Any

import jax
from jax import Array
import numpy as np

from benchmarks import common
from builders.setup import build, Setup
from builders.training import make_schedule, score_task
from data import sources
from data.images import Source
from losses import score_matching_loss
from models.score import Params
from training import loop

# What the loss weighs, and the laws of times that estimate it: fields of `training`.
LIKELIHOOD, SAMPLES = {'likelihood_weighting': True}, {'likelihood_weighting': False}
CASES: dict[tuple[str, str], dict[str, Any]] = {
  ('likelihood', 'uniform'): LIKELIHOOD | {'time_law': 'uniform'},
  ('likelihood', 'likelihood'): LIKELIHOOD | {'time_law': 'likelihood'},
  ('variance', 'uniform'): SAMPLES | {'time_law': 'uniform'},
  ('variance, log_normal times', 'log_normal'): SAMPLES | {'time_law': 'log_normal'},
}


def setup_of(sde: str, steps: int, **fields: Any) -> Setup:
  """The digits' config of an SDE, for so many steps, with fields of `training`."""
  config = importlib.import_module(f'configs.{sde}.digits').get_config()
  config.training.n_iters = steps
  config.training.update(fields)
  return build(config)


def train(setup: Setup, source: Source) -> Params:
  """The moving average of the parameters after training in memory."""
  task = score_task(setup)
  state = jax.jit(task.init)(setup.keys.key('init'))
  *_, (state, _, _) = loop.updates(
    task, make_schedule(setup.config), setup.devices, setup.keys, source, state
  )
  return state.ema_params


def draws(setup: Setup, params: Params, source: Source, n: int) -> Iterator[Any]:
  """The loss of each of n batches, and its gradient."""
  size, objective = setup.config.training.batch_size, setup.objective

  @jax.jit
  def loss_and_grad(params: Params, images: Array, rng: Array) -> tuple[Array, Params]:
    rng_data, rng_t, rng_z, rng_matching = jax.random.split(rng, 4)
    x0 = setup.codec.for_training(rng_data, images)
    t, z = objective.times(rng_t, size), jax.random.normal(rng_z, x0.shape)

    def loss(params: Params) -> Array:
      return score_matching_loss(objective, setup.model.bind(params), x0, t, z, rng_matching).mean()

    return jax.value_and_grad(loss)(params)

  chosen = np.random.default_rng(0)
  for i in range(n):
    images = source.batch(chosen.choice(len(source), size, replace=False))['data']
    yield loss_and_grad(params, images, jax.random.fold_in(jax.random.key(1), i))


def variances(setup: Setup, params: Params, source: Source, n: int) -> dict[str, float]:
  """Of the loss and of the gradient of a batch, from n of them; and the mean of the loss."""
  values = list(draws(setup, params, source, n))
  losses = np.array([float(loss) for loss, _ in values])
  spread = 0.0
  for leaves in zip(*(jax.tree.leaves(grads) for _, grads in values), strict=True):
    spread += float(np.var(np.stack(leaves), axis=0, ddof=1, dtype=np.float64).sum())
  return {'loss': losses.mean(), 'of loss': losses.var(ddof=1), 'of gradient': spread}


def measure(sde: str, steps: int, n: int) -> dict[str, dict[str, float]]:
  """The variances of every case, with independent times and with stratified ones."""
  base = setup_of(sde, steps, **LIKELIHOOD, time_law='likelihood', stratified=True)
  source = sources.load('digits', 'train', image_size=8, num_channels=1)
  params, found = train(base, source), {}
  for (weight, law), fields in CASES.items():
    for stratified in (False, True):
      name = f'{weight} | {law}{", stratified" if stratified else ""}'
      setup = setup_of(sde, steps, **fields, stratified=stratified)
      found[name] = variances(setup, params, source, n)
  return found


def table(found: dict[str, dict[str, float]]) -> str:
  """Markdown: the variances, and how many times smaller than those of the weight's first row."""
  head = ('weight', 'times', 'loss', 'variance of the loss', 'ratio', 'of the gradient', 'ratio')
  lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  first: dict[str, dict[str, float]] = {}
  for name, row in found.items():
    against = first.setdefault(name.partition(' | ')[0], row)
    cells = [f'{row["loss"]:.4g}']
    for what in ('of loss', 'of gradient'):
      cells += [f'{row[what]:.3g}', f'{against[what] / row[what]:.2f}']
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument('--sde', choices=('ve', 'vp', 'subvp'), default='vp')
  parser.add_argument('--steps', type=int, default=1000, help='of training (1000)')
  parser.add_argument('--draws', type=int, default=400, help='batches (400)')
  choices = parser.parse_args()
  found = measure(choices.sde, choices.steps, choices.draws)
  common.report(table(found), found, choices.json)


if __name__ == '__main__':
  main()
