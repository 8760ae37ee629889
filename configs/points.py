"""What the configs of points, configs/toy/, have in common; not in the released code."""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import base
from runtime.errors import unknown

_SINGLE_SCALE = {
  'training.single_scale': True,
  'model.conditional': False,
  'model.sigma_min': 0.1,
  'model.sigma_max': 4.0,  # of where samples begin
  'sampling.method': 'langevin',
  'sampling.num_steps': 500,
}
_CHAIN = {
  'training.continuous': False,
  'model.num_scales': 10,
  'model.sigma_min': 0.1,
  'sampling.predictor': 'none',
  'sampling.corrector': 'ald',
  'sampling.num_steps': 0,
  'sampling.n_steps_each': 100,
  'sampling.snr': 0.2,
}
_CD = {'training.objective': 'cd', 'model.output': 'energy', 'training.n_iters': 2000}
_CD |= {'training.snapshot_freq': 2000}
VARIANTS: dict[str, tuple[Callable[[str], ConfigDict], base.Changes]] = {
  've': (base.ve, {}),
  'vp': (base.vp, {}),
  'subvp': (base.subvp, {}),
  'edm': (base.edm, {'sampling.num_steps': 18}),
  'flow': (base.flow, {'sampling.num_steps': 25, 'model.fourier_scale': 1.0}),
  'energy': (base.ve, {'model.output': 'energy'}),
  'ncsn': (base.ve, _CHAIN),
  'esm': (base.ve, _SINGLE_SCALE | {'training.objective': 'esm'}),
  'ism': (base.ve, _SINGLE_SCALE | {'training.objective': 'ism'}),
  'ssm': (base.ve, _SINGLE_SCALE | {'training.objective': 'ssm'}),
  'ssm_vr': (base.ve, _SINGLE_SCALE | {'training.objective': 'ssm_vr'}),
  'dsm': (base.ve, _SINGLE_SCALE),
  'dae': (base.ve, _SINGLE_SCALE | {'model.output': 'denoised'}),
  'cd': (base.ve, _SINGLE_SCALE | _CD),
}


def config_of(dataset: str, variant: str, dim: int = 2) -> ConfigDict:
  """Points of `data.points.DISTRIBUTIONS`, trained in a minute or two on two CPU cores.

  A variant is one of the ways to a score, from score matching at one level of noise to the SDEs.

  Raises:
    UserError: if there is no such variant.
  """
  if variant not in VARIANTS:
    raise unknown(f'variant (toy, {dataset})', variant, VARIANTS)
  make, changes = VARIANTS[variant]
  config = make('mlp')
  config.data.dataset = dataset
  config.data.dim = dim
  config.data.centered = True
  config.data.random_flip = False
  config.model.sigma_min = 0.05
  config.model.sigma_max = 20.0  # about the largest distance between two points
  config.model.ema_rate = 0.999
  config.model.ema_warmup = True
  config.training.reduce_mean = True
  config.training.batch_size = 256
  config.training.n_iters = 4000
  config.training.n_jitted_steps = 50
  config.training.log_freq = 500
  config.training.eval_freq = 500
  config.training.snapshot_freq = 4000
  config.training.snapshot_freq_for_preemption = 2000
  config.training.snapshot_samples = 2000
  config.optim.lr = 5e-3
  config.optim.warmup = 100
  config.sampling.num_steps = 200
  config.sampling.predictor = 'reverse_diffusion'
  config.eval.begin_ckpt = 1
  config.eval.end_ckpt = 1000
  config.eval.batch_size = 5000
  config.eval.enable_sampling = True
  config.eval.num_samples = 5000
  config.eval.features = ''
  config.update_from_flattened_dict(changes)
  return config
