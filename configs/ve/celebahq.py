"""The VE SDE on CelebA-HQ, 1024x1024: `configs/ve/celebahq.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

VARIANTS = released.ncsnpp_1024(reduce_mean=False)


def get_config(variant: str = 'ncsnpp_continuous') -> ConfigDict:
  return released.config_of('ve', 'celebahq', variant, VARIANTS)
