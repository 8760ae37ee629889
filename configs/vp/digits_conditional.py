"""The VP SDE on the digits, told which digit: `configs/vp/digits_conditional.py`."""

from ml_collections import ConfigDict

from configs import base, own


def get_config() -> ConfigDict:
  config = own.digits(base.vp('ddpmpp'))
  config.model.num_classes = 10
  return config
