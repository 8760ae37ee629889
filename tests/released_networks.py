"""The small networks of the golden numbers, and released checkpoints of them."""

from functools import cache

import numpy as np

from benchmarks.golden import config_of
from builders.setup import build, Setup
from training import flat_tables
from training.flat_tables import network_parameters


def setup_of(arrays: dict[str, np.ndarray]) -> Setup:
  return build(config_of(arrays))


def shapes_of(setup: Setup) -> flat_tables.Shapes:
  return shapes_once(setup.model, (1, *setup.data_shape))


shapes_once = cache(network_parameters)


def torch_content(arrays: dict[str, np.ndarray]) -> dict:
  """A PyTorch checkpoint with the moving averages of a case, as NumPy arrays.

  What is trained is twice those, the moments three and four times those.
  """
  average = {k.split('/')[2]: v for k, v in arrays.items() if k.startswith('ema/')}
  trained = {k: v for k, v in average.items() if not k.endswith('all_modules.0.W')}
  moments = {
    i: {'step': 7, 'exp_avg': 3 * average[k], 'exp_avg_sq': 4 * average[k]}
    for i, k in enumerate(average)
    if k in trained
  }
  return {
    'optimizer': {'state': moments, 'param_groups': [{'params': list(range(len(average)))}]},
    'model': {'module.sigmas': np.ones(3), **average, **{k: 2 * v for k, v in trained.items()}},
    'ema': {'decay': 0.999, 'num_updates': 9, 'shadow_params': list(trained.values())},
    'step': 9,
  }
