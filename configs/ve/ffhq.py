"""The VE SDE on FFHQ, 1024x1024: `configs/ve/ffhq.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

VARIANTS = released.ncsnpp_1024(reduce_mean=True)


def get_config(variant: str = 'ncsnpp_continuous') -> ConfigDict:
  return released.config_of('ve', 'ffhq', variant, VARIANTS)
