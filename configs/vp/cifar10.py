"""The VP SDE on CIFAR-10: `configs/vp/cifar10.py[:variant]`."""

from ml_collections import ConfigDict

from configs import base

_DEEP = {'model.num_res_blocks': 8, 'training.n_iters': 950_001}
_ANCESTRAL = {'training.continuous': False, 'sampling.predictor': 'ancestral_sampling'}
VARIANTS = {
  'ddpmpp_continuous': {},
  'ddpmpp_deep_continuous': _DEEP,
  'ddpmpp': _ANCESTRAL,
  'ncsnpp_continuous': {},
  'ncsnpp_deep_continuous': _DEEP,
  'ncsnpp': {'training.continuous': False, 'sampling.predictor': 'reverse_diffusion'},
  'ddpm_continuous': {},
  'ddpm': _ANCESTRAL,
  'ddpm_unconditional': _ANCESTRAL | {'model.conditional': False},
}


def get_config(variant: str = 'ddpmpp_continuous') -> ConfigDict:
  changes = base.variant(variant, VARIANTS, 'configs/vp/cifar10.py')
  return base.cifar10(base.vp(variant.split('_', maxsplit=1)[0]), changes)
