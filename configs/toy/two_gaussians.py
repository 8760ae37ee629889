"""Two Gaussians of unequal weight: `configs/toy/two_gaussians.py:VARIANT`."""

from ml_collections import ConfigDict

from configs import points

VARIANTS = points.VARIANTS


def get_config(variant: str = 've') -> ConfigDict:
  return points.config_of('two_gaussians', variant)
