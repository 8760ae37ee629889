"""The VP SDE on CelebA-HQ, 256x256: `configs/vp/celebahq.py[:variant]`."""

from ml_collections import ConfigDict

from configs import base

VARIANTS = base.ddpm_256()


def get_config(variant: str = 'ddpm') -> ConfigDict:
  return base.released('vp', 'celebahq_256', variant, VARIANTS)
