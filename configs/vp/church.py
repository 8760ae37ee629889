"""The VP SDE on LSUN churches, 256x256: `configs/vp/church.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

VARIANTS = released.ddpm_256()


def get_config(variant: str = 'ddpm') -> ConfigDict:
  return released.config_of('vp', 'church', variant, VARIANTS)
