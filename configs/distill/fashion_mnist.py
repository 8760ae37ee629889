"""Fashion-MNIST in a few steps, of a model that is there: `fashion_mnist.py[:method[_28]]`.

The teacher of progressive is `configs/vp/fashion_mnist.py` with `model.output=v`, that of the
others `configs/edm/fashion_mnist.py`, of the same size: 16x16 unless a variant says 28.
"""

from ml_collections import ConfigDict

from configs import base, distilled, own
from runtime.errors import unknown

_ALL: base.Changes = {'optim.lr': 1e-3, 'optim.decay': 'linear', 'model.ema_rate': 0.999}
_CHANGES: dict[str, dict[str, base.Changes]] = {
  '16': {
    '': {'training.n_iters': 600, 'training.snapshot_freq': 600, **_ALL},
    'progressive': {'training.n_iters': 500, 'model.ema_rate': 0.0},
    'ct': {'distill.end_steps': 80},
    'ict': {'distill.end_steps': 160},
  },
  '28': {
    '': {'training.n_iters': 3000, **_ALL},
    'progressive': {'training.n_iters': 1000, 'model.ema_rate': 0.0},
    'ct': {'distill.end_steps': 80},
    'ict': {'distill.end_steps': 160},
  },
}
VARIANTS = {
  method + (f'_{size}' if size != '16' else ''): (method, size)
  for method in distilled.METHODS
  for size in _CHANGES
}


def get_config(variant: str = 'progressive') -> ConfigDict:
  if variant not in VARIANTS:
    raise unknown('variant (distill, Fashion-MNIST)', variant, VARIANTS)
  method, size = VARIANTS[variant]
  teachers = {
    'vp': lambda: own.fashion_mnist(own.small_ddpmpp('vp'), size),
    'edm': lambda: own.few_steps(own.fashion_mnist(own.small_ddpmpp('edm'), size), 18),
  }
  return distilled.config_of(method, teachers, _CHANGES[size])
