"""The sub-VP SDE on Fashion-MNIST: `configs/subvp/fashion_mnist.py[:size]`."""

from ml_collections import ConfigDict

from configs import own

VARIANTS = own.FASHION_MNIST


def get_config(variant: str = '16') -> ConfigDict:
  return own.fashion_mnist(own.small_ddpmpp('subvp'), variant)
