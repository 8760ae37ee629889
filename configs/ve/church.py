"""The VE SDE on LSUN churches, 256x256: `configs/ve/church.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

VARIANTS = released.ncsnpp_256(sigma_max=380.0)


def get_config(variant: str = 'ncsnpp_continuous') -> ConfigDict:
  return released.config_of('ve', 'church', variant, VARIANTS)
