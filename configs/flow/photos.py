"""Flow matching on a folder of your images: `configs/flow/photos.py[:size]`."""

from ml_collections import ConfigDict

from configs import base, own

VARIANTS = own.PHOTOS


def get_config(variant: str = 'cpu') -> ConfigDict:
  return own.few_steps(own.photos(base.flow('ddpmpp'), variant), 25)
