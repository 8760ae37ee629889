"""The VE SDE on FFHQ, 1024x1024: `configs/ve/ffhq.py[:variant]`."""

from ml_collections import ConfigDict

from configs import base

VARIANTS = base.ncsnpp_1024(reduce_mean=True)


def get_config(variant: str = 'ncsnpp_continuous') -> ConfigDict:
  return base.released('ve', 'ffhq', variant, VARIANTS)
