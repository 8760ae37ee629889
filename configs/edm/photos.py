"""EDM on a folder of your images: `configs/edm/photos.py[:size]`."""

from ml_collections import ConfigDict

from configs import base, own

VARIANTS = own.PHOTOS


def get_config(variant: str = 'cpu') -> ConfigDict:
  return own.few_steps(own.photos(base.edm('ddpmpp'), variant), 18)
