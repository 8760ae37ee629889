"""Eight Gaussians on a circle: `configs/toy/ring.py:VARIANT`."""

from ml_collections import ConfigDict

from configs import points

VARIANTS = points.VARIANTS


def get_config(variant: str = 've') -> ConfigDict:
  return points.config_of('ring', variant)
