"""Flow matching on the digits that come with the code: `configs/flow/digits.py`."""

from ml_collections import ConfigDict

from configs import base, own


def get_config() -> ConfigDict:
  return own.few_steps(own.digits(base.flow('ddpmpp')), 25)
