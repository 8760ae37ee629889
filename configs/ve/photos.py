"""The VE SDE on a folder of your images: `configs/ve/photos.py[:size]`."""

from ml_collections import ConfigDict

from configs import base

VARIANTS = base.PHOTOS


def get_config(variant: str = 'cpu') -> ConfigDict:
  return base.photos(base.ve('ncsnpp'), variant)
