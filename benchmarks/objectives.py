"""How far learnt scores are from the truth, for every training objective and set of points.

The error is that of the moving average of the parameters on held-out points, over the noise levels
that the objective trains: E ||s - true||^2 / E ||true||^2, both weighed by sigma^2. A score of zero
has an error of 1.

  python -m benchmarks.objectives [--steps N] [--sets NAME ...] [--variants NAME ...] [--json PATH]
"""

import argparse
import dataclasses
from functools import partial
import importlib
from pathlib import Path
import time

import jax
import jax.numpy as jnp
import numpy as np

from builders.objectives import explicit_matching
from builders.setup import build, Setup
from builders.training import make_schedule, score_task
from configs.points import VARIANTS
from data import points
from models.score import Params
from training import loop
from training.step import eval_step
from workdir.artifacts import json_text

POINTS = 5000  # that the error is measured on


def config_of(name: str, variant: str, steps: int):
  """The config of `configs/toy`, for so many steps."""
  config = importlib.import_module(f'configs.toy.{name}').get_config(variant)
  config.training.n_iters = min(steps, config.training.n_iters)
  return config


def train(setup: Setup) -> Params:
  """The moving average of the parameters after training in memory."""
  task, data = score_task(setup), setup.config.data
  source = points.load(data.dataset, 'train', data.dim)
  state = jax.jit(task.init)(setup.keys.key('init'))
  *_, (state, _, _) = loop.updates(
    task, make_schedule(setup.config), setup.devices, setup.keys, source, state
  )
  return state.ema_params


def error(setup: Setup, params: Params) -> float:
  """The error of a learnt score, as a share of the score itself."""
  data, true_score_fn = setup.config.data, setup.true_score_fn
  held_out = points.load(data.dataset, 'test', data.dim).batch(np.arange(POINTS))
  matchings = {
    'error': explicit_matching(true_score_fn),
    'size': lambda score_fn, x, t, rng: 0.5 * jnp.square(true_score_fn(x, t)).sum(-1),
  }
  measured = {}
  for what, matching in matchings.items():
    objective = dataclasses.replace(setup.objective, matching=matching)
    measure = jax.jit(partial(eval_step, model=setup.model, codec=setup.codec, objective=objective))
    measured[what] = float(measure(params, held_out, setup.keys.key('eval')).mean())
  return measured['error'] / measured['size']


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=4000, help='of training, at most')
  parser.add_argument('--sets', nargs='+', choices=points.DISTRIBUTIONS, metavar='NAME')
  parser.add_argument('--variants', nargs='+', choices=VARIANTS, metavar='NAME')
  parser.add_argument('--json', type=Path, metavar='PATH', help='also write the errors here')
  choices = parser.parse_args()
  names = choices.sets or list(points.DISTRIBUTIONS)
  print('| objective | ' + ' | '.join(names) + ' | seconds each |')
  print('|---' * (len(names) + 2) + '|', flush=True)
  table = {}
  for variant in choices.variants or VARIANTS:
    began, table[variant] = time.monotonic(), {}
    for name in names:
      setup = build(config_of(name, variant, choices.steps))
      table[variant][name] = error(setup, train(setup))
    seconds = (time.monotonic() - began) / len(names)
    cells = ' | '.join(f'{value:.4f}' for value in table[variant].values())
    print(f'| {variant} | {cells} | {seconds:.0f} |', flush=True)
  if choices.json:
    choices.json.write_text(json_text(table, indent=2) + '\n')


if __name__ == '__main__':
  main()
