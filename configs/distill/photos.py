"""Your images in a few steps, of a model that is there: `photos.py[:method[_size]]`.

The teacher of progressive is `configs/vp/photos.py` with `model.output=v`, that of the others
`configs/edm/photos.py`, of the same size.
"""

from ml_collections import ConfigDict

from configs import base, distilled, own
from runtime.errors import unknown

# Sizes but for the first, which two CPU cores train, are named.
VARIANTS = {
  method + (f'_{size}' if size != 'cpu' else ''): (method, size)
  for method in distilled.METHODS
  for size in own.PHOTOS
}
_CHANGES: dict[str, dict[str, base.Changes]] = {
  'cpu': {
    'progressive': {'training.n_iters': 500, 'model.ema_rate': 0.0},
    '': {'optim.lr': 5e-4, 'model.ema_rate': 0.999},
    'ct': {'distill.end_steps': 80},
    'ict': {'distill.end_steps': 160},
  },
  'gpu': {
    'progressive': {'training.n_iters': 20_000, 'optim.lr': 1e-4},
  },
}


def get_config(variant: str = 'progressive') -> ConfigDict:
  if variant not in VARIANTS:
    raise unknown('variant (distill, photos)', variant, VARIANTS)
  method, size = VARIANTS[variant]
  teachers = {
    'vp': lambda: own.photos(base.vp('ddpmpp'), size),
    'edm': lambda: own.few_steps(own.photos(base.edm('ddpmpp'), size), 18),
  }
  return distilled.config_of(method, teachers, _CHANGES['cpu' if size == 'cpu' else 'gpu'])
