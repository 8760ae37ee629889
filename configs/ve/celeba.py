"""The VE SDE on CelebA, 64x64: `configs/ve/celeba.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

VARIANTS = {
  'ncsnpp': (
    'ncsnpp',
    {
      'training.continuous': False,
      'model.embedding_type': 'positional',
      'model.sigma_max': 90.0,
      'sampling.snr': 0.17,
    },
  ),
  **released.ncsn(num_scales=500, sigma_max=90.0, snr=0.128),
}


def get_config(variant: str = 'ncsnpp') -> ConfigDict:
  return released.config_of('ve', 'celeba', variant, VARIANTS)
