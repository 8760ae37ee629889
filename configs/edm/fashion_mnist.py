"""EDM on Fashion-MNIST: `configs/edm/fashion_mnist.py[:size]`."""

from ml_collections import ConfigDict

from configs import own

VARIANTS = own.FASHION_MNIST


def get_config(variant: str = '16') -> ConfigDict:
  return own.few_steps(own.fashion_mnist(own.small_ddpmpp('edm'), variant), 18)
