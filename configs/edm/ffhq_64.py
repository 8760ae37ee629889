"""EDM on FFHQ at 64x64 pixels, from a folder of images: `configs/edm/ffhq_64.py[:variant]`."""

from ml_collections import ConfigDict

from configs import published

_PLAIN = published.both_networks(published.folder_64(dropout=0.05))
VARIANTS = _PLAIN | published.augmented(_PLAIN, 0.15)


def get_config(variant: str = 'ddpmpp') -> ConfigDict:
  return published.config_of('ffhq_64', variant, VARIANTS)
