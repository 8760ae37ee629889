"""The VE SDE on a folder of your images: `configs/ve/photos.py[:size]`."""

from ml_collections import ConfigDict

from configs import base, own

VARIANTS = own.PHOTOS


def get_config(variant: str = 'cpu') -> ConfigDict:
  return own.photos(base.ve('ncsnpp'), variant)
