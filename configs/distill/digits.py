"""Digits in a few steps, of a model that is there: `configs/distill/digits.py[:method]`.

The teacher of progressive is `configs/vp/digits.py` with `model.output=v`, that of the others
`configs/edm/digits.py`.
"""

from ml_collections import ConfigDict

from configs import base, distilled, own

VARIANTS = distilled.METHODS
_TEACHERS = {
  'vp': lambda: own.digits(base.vp('ddpmpp')),
  'edm': lambda: own.few_steps(own.digits(base.edm('ddpmpp')), 18),
}
_CHANGES: dict[str, base.Changes] = {
  '': {
    'eval.begin_ckpt': 1,
    'training.snapshot_freq': 500,
    'training.snapshot_freq_for_preemption': 250,
    'optim.lr': 1e-3,
    'optim.decay': 'linear',
    'model.ema_rate': 0.999,
  },
  'progressive': {'training.n_iters': 500, 'distill.late_iters': 3000, 'model.ema_rate': 0.0},
  'cd': {'training.n_iters': 2000},
  'ct': {'training.n_iters': 2000, 'distill.end_steps': 80},
  'ict': {'training.n_iters': 2000, 'distill.end_steps': 160},
  # 2000 steps of a rate that falls are worse, by a classifier's features.
  'ect': {
    'training.n_iters': 3000,
    'optim.decay': 'constant',
    'sampling.num_steps': 0,
    'sampling.consistency_times': (0.5,),
  },
}


def get_config(method: str = 'progressive') -> ConfigDict:
  return distilled.config_of(method, _TEACHERS, _CHANGES)
