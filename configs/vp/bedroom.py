"""The VP SDE on LSUN bedrooms, 256x256: `configs/vp/bedroom.py[:variant]`."""

from ml_collections import ConfigDict

from configs import base

VARIANTS = base.ddpm_256()


def get_config(variant: str = 'ddpm') -> ConfigDict:
  return base.released('vp', 'bedroom', variant, VARIANTS)
