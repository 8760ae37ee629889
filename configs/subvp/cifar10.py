"""The sub-VP SDE on CIFAR-10: `configs/subvp/cifar10.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

_DEEP = {'model.num_res_blocks': 8, 'training.n_iters': 950_001}
VARIANTS: released.Variants = {
  'ddpmpp_continuous': ('ddpmpp', {}),
  'ddpmpp_deep_continuous': ('ddpmpp', _DEEP),
  'ncsnpp_continuous': ('ncsnpp', {}),
  'ncsnpp_deep_continuous': ('ncsnpp', _DEEP),
  'ddpm_continuous': ('ddpm', {}),
}
VARIANTS |= released.for_likelihood(VARIANTS, eps=1e-2, sampling_eps=1e-2)


def get_config(variant: str = 'ddpmpp_continuous') -> ConfigDict:
  return released.config_of('subvp', 'cifar10', variant, VARIANTS)
