"""The VE SDE on CIFAR-10: `configs/ve/cifar10.py[:variant]`."""

from ml_collections import ConfigDict

from configs import base

VARIANTS = {
  'ncsnpp_continuous': {},
  'ncsnpp_deep_continuous': {'model.num_res_blocks': 8, 'training.n_iters': 950_001},
  'ncsnpp': {'training.continuous': False, 'model.embedding_type': 'positional'},
  'ddpm': {'training.continuous': False},
}


def get_config(variant: str = 'ncsnpp_continuous') -> ConfigDict:
  changes = base.variant(variant, VARIANTS, 'configs/ve/cifar10.py')
  return base.cifar10(base.ve(variant.split('_', maxsplit=1)[0]), changes)
