"""EDM on CIFAR-10: `configs/edm/cifar10.py[:variant]`."""

from ml_collections import ConfigDict

from configs import published

_UNCONDITIONAL = published.both_networks(published.CIFAR10)
_PLAIN = _UNCONDITIONAL | published.conditional(_UNCONDITIONAL, num_classes=10)
VARIANTS = _PLAIN | published.augmented(_PLAIN, 0.12)


def get_config(variant: str = 'ddpmpp') -> ConfigDict:
  return published.config_of('cifar10', variant, VARIANTS)
