"""CIFAR-10 in a few steps, of a model that is there: `configs/distill/cifar10.py[:method]`.

The teacher of progressive is `configs/vp/cifar10.py` with `model.output=v`, that of the others
`configs/edm/cifar10.py`.
"""

from ml_collections import ConfigDict

from configs import base, distilled
from configs.edm import cifar10 as edm
from configs.vp import cifar10 as vp

VARIANTS = distilled.METHODS
_TEACHERS = {'vp': vp.get_config, 'edm': edm.get_config}
_CHANGES: dict[str, base.Changes] = {
  'progressive': {'training.n_iters': 50_000, 'optim.lr': 1e-4, 'model.dropout': 0.0},
  'cd': {'training.n_iters': 800_000},
  'ct': {'training.n_iters': 800_000, 'training.batch_size': 512},
  'ict': {'training.n_iters': 400_000, 'training.batch_size': 1024, 'model.dropout': 0.3},
  'ect': {'training.n_iters': 200_000, 'training.batch_size': 128, 'model.dropout': 0.2},
}


def get_config(method: str = 'progressive') -> ConfigDict:
  return distilled.config_of(method, _TEACHERS, _CHANGES)
