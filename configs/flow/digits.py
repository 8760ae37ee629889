"""Flow matching on the digits that come with the code: `configs/flow/digits.py[:network]`."""

from ml_collections import ConfigDict

from configs import base, own
from runtime.errors import unknown

VARIANTS = {'ddpmpp': 'ddpmpp', 'dit': 'dit_s'}


def get_config(variant: str = 'ddpmpp') -> ConfigDict:
  if variant not in VARIANTS:
    raise unknown('variant', variant, VARIANTS)
  return own.few_steps(own.digits(base.flow(VARIANTS[variant])), 25)
