"""The VP SDE on CelebA-HQ, 256x256: `configs/vp/celebahq.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

VARIANTS = released.ddpm_256()


def get_config(variant: str = 'ddpm') -> ConfigDict:
  return released.config_of('vp', 'celebahq_256', variant, VARIANTS)
