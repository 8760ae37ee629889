"""The VE SDE on LSUN bedrooms, 256x256 (NCSNv2: 128x128): `configs/ve/bedroom.py[:variant]`."""

from ml_collections import ConfigDict

from configs import released

_NCSNV2 = {
  'data.image_size': 128,
  'model.num_scales': 1086,
  'model.sigma_max': 190.0,
  'model.ema_rate': 0.9999,
  'sampling.n_steps_each': 3,
  'sampling.snr': 0.095,
}
VARIANTS = released.ncsnpp_256(sigma_max=378.0) | {'ncsnv2': ('ncsnv2_128', _NCSNV2)}


def get_config(variant: str = 'ncsnpp_continuous') -> ConfigDict:
  return released.config_of('ve', 'bedroom', variant, VARIANTS)
