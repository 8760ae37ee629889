"""Two Gaussians of unequal weight: `configs/toy/two_gaussians.py:VARIANT`, a key of `base.TOY`."""

from ml_collections import ConfigDict

from configs import base

VARIANTS = base.TOY


def get_config(variant: str = 've') -> ConfigDict:
  return base.toy('two_gaussians', variant)
