"""EDM on the digits that come with the code: `configs/edm/digits.py`."""

from ml_collections import ConfigDict

from configs import base, own


def get_config() -> ConfigDict:
  return own.few_steps(own.digits(base.edm('ddpmpp')), 18)
