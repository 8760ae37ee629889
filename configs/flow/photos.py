"""Flow matching on a folder of your images: `configs/flow/photos.py[:size]`."""

from ml_collections import ConfigDict

from configs import base, own
from runtime.errors import unknown

VARIANTS = own.PHOTOS | own.DIT_PHOTOS


def get_config(variant: str = 'cpu') -> ConfigDict:
  if variant not in VARIANTS:
    raise unknown('variant', variant, VARIANTS)
  network = 'dit_s' if variant in own.DIT_PHOTOS else 'ddpmpp'
  return own.few_steps(own.photos(base.flow(network), variant), 25)
