"""Flow matching on Fashion-MNIST: `configs/flow/fashion_mnist.py[:size]`."""

from ml_collections import ConfigDict

from configs import own

VARIANTS = own.FASHION_MNIST


def get_config(variant: str = '16') -> ConfigDict:
  return own.few_steps(own.fashion_mnist(own.small_ddpmpp('flow'), variant), 25)
