"""The configurations of the released code, https://github.com/yang-song/score_sde.

A config file is a table of variants, each a network and what it changes; what follows is common to
several. Values are those of the released code.
"""

from ml_collections import ConfigDict

from configs.base import Changes, SDES
from runtime.errors import unknown

Variants = dict[str, tuple[str, Changes]]  # by name: a network, and what it changes

_LARGE = {
  'data.image_size': 256,
  'training.n_iters': 2_400_001,
  'training.snapshot_freq_for_preemption': 5000,
  'eval.batch_size': 512,
  'eval.begin_ckpt': 50,
  'eval.end_ckpt': 96,
  'eval.enable_sampling': True,
}
_HUGE = {
  'data.image_size': 1024,
  'training.n_iters': 2_400_001,
  'training.snapshot_freq_for_preemption': 5000,
  'eval.end_ckpt': 96,
}
_CELEBA = {'data.dataset': 'CELEBA', 'data.image_size': 64, 'eval.enable_sampling': True}
_LSUN = _LARGE | {'data.dataset': 'LSUN'}
DATASETS: dict[str, Changes] = {
  'cifar10': {'eval.begin_ckpt': 9, 'classifier.num_classes': 10},
  'celeba': _CELEBA,
  'bedroom': _LSUN | {'data.category': 'bedroom'},
  'church': _LSUN | {'data.category': 'church_outdoor'},
  'celebahq_256': _LARGE | {'data.dataset': 'CelebAHQ'},
  'celebahq': _HUGE | {'data.dataset': 'CelebAHQ'},
  'ffhq_256': _LARGE | {'data.dataset': 'FFHQ'},
  'ffhq': _HUGE | {'data.dataset': 'FFHQ'},
}

# What goes with a network for 256x256 pixels.
_RUN_256 = {'training.batch_size': 64, 'sampling.snr': 0.075}


def for_likelihood(variants: Variants, eps: float, sampling_eps: float) -> Variants:
  """The DDPM++ of a table, trained for likelihood: `_likelihood`.

  As published by score_flow, the code of https://arxiv.org/abs/2101.09258, with its flags
  likelihood_weighting and importance_weighting, without its flips. Uniform dequantisation in
  training is ours: bits/dim are of dequantised images.
  """
  changes = {
    'training.time_law': 'likelihood',  # with the weight variance, and so without Z, as there
    'training.eps': eps,
    'sampling.eps': sampling_eps,
    'data.random_flip': False,
    'data.uniform_dequantization': True,
    'eval.enable_bpd': True,
    'eval.enable_bound': True,
    'eval.bound_times': 1000,
  }
  names = ('ddpmpp_continuous', 'ddpmpp_deep_continuous')
  return {f'{name}_likelihood': (variants[name][0], variants[name][1] | changes) for name in names}


def config_of(sde: str, dataset: str, variant: str, variants: Variants) -> ConfigDict:
  """The config of the entry `variant` of a table, on a dataset from `DATASETS`.

  Raises:
    UserError: if there is no such entry.
  """
  if variant not in variants:
    raise unknown(f'variant ({sde}, {dataset})', variant, variants)
  network, changes = variants[variant]
  config = SDES[sde](network)
  config.update_from_flattened_dict(DATASETS[dataset] | changes)
  return config


def ncsnpp_256(sigma_max: float) -> Variants:
  """NCSN++ on images of 256x256 pixels, under the VE SDE."""
  changes = _RUN_256 | {'model.num_scales': 2000, 'model.sigma_max': sigma_max}
  return {'ncsnpp_continuous': ('ncsnpp_256', changes)}


def ddpm_256() -> Variants:
  """DDPM on images of 256x256 pixels, under the VP SDE."""
  changes = _RUN_256 | {
    'model.sigma_max': 378.0,  # which the VP SDE does not read
    'training.continuous': False,
    'optim.lr': 2e-5,
    'sampling.predictor': 'ancestral_sampling',
  }
  return {'ddpm': ('ddpm_256', changes)}


def ncsnpp_1024(reduce_mean: bool) -> Variants:
  """NCSN++ on images of 1024x1024 pixels, under the VE SDE."""
  changes = {
    'model.num_scales': 2000,
    'model.sigma_max': 1348.0,
    'model.ema_rate': 0.9999,
    'training.batch_size': 8,
    'training.reduce_mean': reduce_mean,
    'sampling.snr': 0.15,
  }
  return {'ncsnpp_continuous': ('ncsnpp_1024', changes)}


def ncsn(num_scales: int, sigma_max: float, snr: float) -> Variants:
  """NCSN, with some of the techniques of NCSNv2 by their numbers there, and NCSNv2 itself.

  The arguments are what techniques 1 (sigma_max), 2 (number of scales) and 4 (step size) choose;
  technique 5 is the moving average of the parameters (https://arxiv.org/abs/2006.09011).
  """
  first = {
    'model.num_scales': 10,
    'model.sigma_max': 1.0,
    'sampling.n_steps_each': 100,
    'sampling.snr': 0.316,
  }
  improved = {
    'model.num_scales': num_scales,
    'model.sigma_max': sigma_max,
    'sampling.n_steps_each': 5,
    'sampling.snr': snr,
  }
  no_average = {'model.ema_rate': 0.0}
  return {
    'ncsn': ('ncsn', first | no_average),
    'ncsn_5': ('ncsn', first),
    'ncsn_124': ('ncsn', improved | no_average),
    'ncsn_1245': ('ncsn', improved),
    'ncsnv2': ('ncsnv2_64', improved),
  }
