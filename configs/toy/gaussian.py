"""A Gaussian in ten dimensions: `configs/toy/gaussian.py:VARIANT`, a key of `base.TOY`."""

from ml_collections import ConfigDict

from configs import base

VARIANTS = base.TOY


def get_config(variant: str = 've') -> ConfigDict:
  return base.toy('gaussian', variant, dim=10)
