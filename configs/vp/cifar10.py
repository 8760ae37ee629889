"""The VP SDE on CIFAR-10: `configs/vp/cifar10.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

_DEEP = {'model.num_res_blocks': 8, 'training.n_iters': 950_001}
_ANCESTRAL = {'training.continuous': False, 'sampling.predictor': 'ancestral_sampling'}
VARIANTS: released.Variants = {
  'ddpmpp_continuous': ('ddpmpp', {}),
  'ddpmpp_deep_continuous': ('ddpmpp', _DEEP),
  'ddpmpp': ('ddpmpp', _ANCESTRAL),
  'ncsnpp_continuous': ('ncsnpp', {}),
  'ncsnpp_deep_continuous': ('ncsnpp', _DEEP),
  'ncsnpp': ('ncsnpp', _ANCESTRAL | {'sampling.predictor': 'reverse_diffusion'}),
  'ddpm_continuous': ('ddpm', {}),
  'ddpm': ('ddpm', _ANCESTRAL),
  'ddpm_unconditional': ('ddpm', _ANCESTRAL | {'model.conditional': False}),
}
VARIANTS |= released.for_likelihood(VARIANTS, eps=1e-5, sampling_eps=1e-3)


def get_config(variant: str = 'ddpmpp_continuous') -> ConfigDict:
  return released.config_of('vp', 'cifar10', variant, VARIANTS)
