"""The VP SDE on LSUN bedrooms, 256x256: `configs/vp/bedroom.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

VARIANTS = released.ddpm_256()


def get_config(variant: str = 'ddpm') -> ConfigDict:
  return released.config_of('vp', 'bedroom', variant, VARIANTS)
