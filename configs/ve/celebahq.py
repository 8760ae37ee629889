"""The VE SDE on CelebA-HQ, 1024x1024: `configs/ve/celebahq.py[:variant]`."""

from ml_collections import ConfigDict

from configs import base

VARIANTS = base.ncsnpp_1024(reduce_mean=False)


def get_config(variant: str = 'ncsnpp_continuous') -> ConfigDict:
  return base.released('ve', 'celebahq', variant, VARIANTS)
