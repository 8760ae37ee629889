"""The VP SDE on LSUN churches, 256x256: `configs/vp/church.py[:variant]`."""

from ml_collections import ConfigDict

from configs import base

VARIANTS = base.ddpm_256()


def get_config(variant: str = 'ddpm') -> ConfigDict:
  return base.released('vp', 'church', variant, VARIANTS)
