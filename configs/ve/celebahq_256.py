"""The VE SDE on CelebA-HQ, 256x256: `configs/ve/celebahq_256.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

VARIANTS = released.ncsnpp_256(sigma_max=348.0)


def get_config(variant: str = 'ncsnpp_continuous') -> ConfigDict:
  return released.config_of('ve', 'celebahq_256', variant, VARIANTS)
