"""Two moons: `configs/toy/two_moons.py:VARIANT`."""

from ml_collections import ConfigDict

from configs import points

VARIANTS = points.VARIANTS


def get_config(variant: str = 've') -> ConfigDict:
  return points.config_of('two_moons', variant)
