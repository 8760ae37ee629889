"""The sub-VP SDE on CIFAR-10: `configs/subvp/cifar10.py[:variant]`."""

from ml_collections import ConfigDict

from configs import base

_DEEP = {'model.num_res_blocks': 8, 'training.n_iters': 950_001}
VARIANTS = {
  'ddpmpp_continuous': {},
  'ddpmpp_deep_continuous': _DEEP,
  'ncsnpp_continuous': {},
  'ncsnpp_deep_continuous': _DEEP,
  'ddpm_continuous': {},
}


def get_config(variant: str = 'ddpmpp_continuous') -> ConfigDict:
  changes = base.variant(variant, VARIANTS, 'configs/subvp/cifar10.py')
  return base.cifar10(base.subvp(variant.split('_', maxsplit=1)[0]), changes)
