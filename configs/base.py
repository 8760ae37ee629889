"""What the configs have in common: defaults, the three SDEs' settings, and a table of networks.

A config file picks an SDE, a network and a dataset. Values are those of the released code
(https://github.com/yang-song/score_sde) unless a comment says otherwise; fields with a comment
are not in it.
"""

from ml_collections import ConfigDict

from errors import unknown

# What `model` holds beside the noise scales: the fields of each network.
_UNET = {'nf': 128, 'ch_mult': (1, 2, 2, 2), 'attn_resolutions': (16,), 'nonlinearity': 'swish'}
_UNET |= {'resamp_with_conv': True, 'conditional': True, 'dropout': 0.1}
_NCSNPP = _UNET | {
  'name': 'ncsnpp',
  'num_res_blocks': 4,
  'resblock_type': 'biggan',
  'embedding_type': 'positional',
  'fourier_scale': 16.0,
  'fir': True,
  'fir_kernel': (1.0, 3.0, 3.0, 1.0),
  'progressive': 'none',
  'progressive_input': 'residual',
  'progressive_combine': 'sum',
  'skip_rescale': True,
  'init_scale': 0.0,
}
NETWORKS = {
  'ddpm': _UNET | {'name': 'ddpm', 'num_res_blocks': 2},
  'ddpmpp': _NCSNPP | {'fir': False, 'progressive_input': 'none'},
  'ncsnpp': _NCSNPP,
}


def _default() -> ConfigDict:
  config = ConfigDict()
  config.seed = 42

  config.data = data = ConfigDict()
  data.dataset = 'CIFAR10'
  data.image_size = 32
  data.num_channels = 3
  data.path = ''  # an image folder, TFRecord files, or the archive that a dataset is made from
  data.tfds_dir = ''  # where prepared TFDS datasets lie; empty for TFDS's default
  data.category = ''  # of LSUN
  data.centered = False
  data.random_flip = True
  data.uniform_dequantization = False

  config.model = model = ConfigDict()
  model.num_scales = 1000
  model.sigma_min = 0.01
  model.sigma_max = 50.0
  model.beta_min = 0.1
  model.beta_max = 20.0
  model.scale_by_sigma = False
  model.ema_rate = 0.999
  model.ema_warmup = False  # let the rate grow as (1 + n) / (10 + n), for short runs
  model.dtype = 'float32'  # of the network's arithmetic: float32 or bfloat16

  config.training = training = ConfigDict()
  training.sde = 'vesde'
  training.continuous = True
  training.reduce_mean = False
  training.likelihood_weighting = False
  training.eps = 1e-5  # smallest time; the released code has it in losses.py
  training.batch_size = 128
  training.n_iters = 1_300_001
  training.n_jitted_steps = 5
  training.log_freq = 50
  training.eval_freq = 100
  training.snapshot_freq = 50_000
  training.snapshot_freq_for_preemption = 10_000
  training.snapshot_sampling = True
  training.snapshot_samples = 64  # images in the grid of each snapshot

  config.optim = optim = ConfigDict()
  optim.optimizer = 'Adam'
  optim.lr = 2e-4
  optim.beta1 = 0.9
  optim.eps = 1e-8
  optim.weight_decay = 0.0
  optim.warmup = 5000
  optim.grad_clip = 1.0

  config.sampling = sampling = ConfigDict()
  sampling.method = 'pc'
  sampling.predictor = 'reverse_diffusion'
  sampling.corrector = 'langevin'
  sampling.snr = 0.16
  sampling.n_steps_each = 1
  sampling.noise_removal = True
  sampling.probability_flow = False
  sampling.num_steps = 0  # times in the grid; 0 for model.num_scales
  sampling.eps = 1e-5  # last time; the released code has it in run_lib.py
  sampling.grid = ''  # of the times: uniform, quadratic, log_snr or edm; empty for the method's own
  sampling.rho = 7.0  # of the edm grid
  sampling.order = 2  # of dpm_solver++, deis and unipc
  sampling.eta = 0.0  # of ddim and dpm_solver++: 0 for the ODE to 1 for the SDE
  sampling.s_churn = 0.0  # of euler and heun: noise added on the way; the rest are its limits
  sampling.s_tmin = 0.0
  sampling.s_tmax = 1e9
  sampling.s_noise = 1.0
  sampling.ode_solver = 'dopri5'  # of the method ode
  sampling.rtol = 1e-5
  sampling.atol = 1e-5
  sampling.sde_rtol = 0.05  # of adaptive_sde
  sampling.sde_atol = 1 / 256  # one level of the data's range
  sampling.uint8 = 'truncate'  # pixels to whole numbers: truncate or round

  config.eval = evaluation = ConfigDict()
  evaluation.begin_ckpt = 1  # checkpoints are numbered in units of training.snapshot_freq
  evaluation.end_ckpt = 26
  evaluation.batch_size = 1024
  evaluation.enable_loss = True
  evaluation.enable_sampling = False
  evaluation.num_samples = 50_000
  return config


def ve(network: str) -> ConfigDict:
  """The settings of the VE SDE, with a network from `NETWORKS`."""
  config = _default()
  config.model.update(NETWORKS[network])
  config.model.scale_by_sigma = True
  if network == 'ncsnpp':
    config.model.embedding_type = 'fourier'
  return config


def vp(network: str) -> ConfigDict:
  """The settings of the VP SDE, with a network from `NETWORKS`."""
  config = _default()
  config.model.update(NETWORKS[network])
  config.model.ema_rate = 0.9999
  config.training.sde = 'vpsde'
  config.training.reduce_mean = True
  config.data.centered = True
  config.sampling.predictor = 'euler_maruyama'
  config.sampling.corrector = 'none'
  config.sampling.eps = 1e-3
  config.sampling.sde_atol = 2 / 256
  return config


def subvp(network: str) -> ConfigDict:
  """The settings of the sub-VP SDE, with a network from `NETWORKS`."""
  config = vp(network)
  config.training.sde = 'subvpsde'
  return config


def variant(name: str, variants: dict[str, dict], where: str) -> dict:
  """The entry `name` of a config file's table of variants; `where` names the file in the error."""
  if name not in variants:
    raise unknown(f'variant of {where}', name, variants)
  return variants[name]


def cifar10(config: ConfigDict, changes: dict) -> ConfigDict:
  """CIFAR-10, 32x32; `changes` are dotted fields to set."""
  config.eval.begin_ckpt = 9
  config.update_from_flattened_dict(changes)
  return config


def digits(config: ConfigDict) -> ConfigDict:
  """The handwritten digits that come with the code, 8x8: minutes on two CPU cores.

  Not in the released code.
  """
  config.data.dataset = 'digits'
  config.data.image_size = 8
  config.data.num_channels = 1
  config.data.random_flip = False
  config.model.nf = 16
  config.model.ch_mult = (1, 2)
  config.model.attn_resolutions = (4,)
  config.model.num_res_blocks = 1
  config.model.sigma_max = 5.0  # about the largest distance between two images
  config.model.dropout = 0.0
  config.model.ema_rate = 0.999
  config.model.ema_warmup = True
  config.training.batch_size = 64
  config.training.n_iters = 2000
  config.training.snapshot_freq = 1000
  config.training.snapshot_freq_for_preemption = 500
  config.optim.lr = 2e-3
  config.optim.warmup = 100
  config.sampling.predictor = 'reverse_diffusion'
  config.sampling.num_steps = 200
  config.eval.begin_ckpt = 2
  config.eval.end_ckpt = 1000
  config.eval.batch_size = 128
  config.eval.enable_sampling = True
  config.eval.num_samples = 128
  return config
