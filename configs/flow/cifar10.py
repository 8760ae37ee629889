"""Flow matching on CIFAR-10: `configs/flow/cifar10.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

VARIANTS: released.Variants = {name: (name, {}) for name in ('ddpmpp', 'ncsnpp', 'dit_s', 'dit_b')}


def get_config(variant: str = 'ddpmpp') -> ConfigDict:
  return released.config_of('flow', 'cifar10', variant, VARIANTS)
