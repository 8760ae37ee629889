"""Two trees whose branches divide, a class each: `configs/toy/branches.py:VARIANT`.

The variant `guide` is `edm` with a small network and a short training: the weaker model that
autoguidance leads away from, with `--config.sampling.guide=WORKDIR`.
"""

from ml_collections import ConfigDict

from configs import points
from runtime.errors import unknown

VARIANTS = ('edm', 'guide', 've', 'vp', 'subvp', 'flow')


def get_config(variant: str = 'edm') -> ConfigDict:
  if variant not in VARIANTS:
    raise unknown('variant (toy, branches)', variant, VARIANTS)
  config = points.config_of('branches', 'edm' if variant == 'guide' else variant)
  config.model.num_classes = 2
  config.model.num_layers = 4
  config.model.sigma_data = 1.2  # of these points
  if config.training.sde == 'edm':
    config.training.time_mean = -1.4  # lower than of images: branches are thin
    config.training.time_std = 1.5
    config.training.snapshot_freq = 500
    config.optim.decay = 'inverse_sqrt'
    config.optim.decay_until = 1000
    config.ema.sigma_rels = (0.05, 0.1)
    config.sampling.num_steps = 32
  if variant == 'guide':
    config.model.nf = 32
    config.training.n_iters = 400
    config.training.snapshot_freq = 400
    config.optim.decay_until = 200
  return config
