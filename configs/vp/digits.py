"""The VP SDE on the digits that come with the code: `configs/vp/digits.py`."""

from ml_collections import ConfigDict

from configs import base, own


def get_config() -> ConfigDict:
  return own.digits(base.vp('ddpmpp'))
