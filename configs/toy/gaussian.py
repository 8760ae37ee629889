"""A Gaussian in ten dimensions: `configs/toy/gaussian.py:VARIANT`."""

from ml_collections import ConfigDict

from configs import points

VARIANTS = points.VARIANTS


def get_config(variant: str = 've') -> ConfigDict:
  return points.config_of('gaussian', variant, dim=10)
