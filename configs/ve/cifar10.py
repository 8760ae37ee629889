"""The VE SDE on CIFAR-10: `configs/ve/cifar10.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

VARIANTS: released.Variants = {
  'ncsnpp_continuous': ('ncsnpp', {}),
  'ncsnpp_deep_continuous': ('ncsnpp', {'model.num_res_blocks': 8, 'training.n_iters': 950_001}),
  'ncsnpp': ('ncsnpp', {'training.continuous': False, 'model.embedding_type': 'positional'}),
  'ddpm': ('ddpm', {'training.continuous': False}),
  **released.ncsn(num_scales=232, sigma_max=50.0, snr=0.176),
}


def get_config(variant: str = 'ncsnpp_continuous') -> ConfigDict:
  return released.config_of('ve', 'cifar10', variant, VARIANTS)
