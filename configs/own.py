"""Data that the released code has no configs for: digits, Fashion-MNIST, and yours."""

from ml_collections import ConfigDict

from configs.base import Changes, SDES
from runtime.errors import unknown

# Of networks for digits: what two CPU cores train in minutes.
_DIGITS: dict[str, Changes] = {
  'ncsnpp': {'nf': 16, 'ch_mult': (1, 2), 'attn_resolutions': (4,), 'num_res_blocks': 1},
  'dit': {'nf': 64, 'num_layers': 4, 'num_heads': 4},
}


def digits(config: ConfigDict) -> ConfigDict:
  """The handwritten digits that come with the code, 8x8: minutes on two CPU cores."""
  config.data.dataset = 'digits'
  config.data.image_size = 8
  config.data.num_channels = 1
  config.data.random_flip = False
  config.model.update(_DIGITS[config.model.name])
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
  config.classifier.num_classes = 10
  config.classifier.blocks_per_group = 1
  config.classifier.channel_multiplier = 1
  config.classifier.batch_size = 64
  config.classifier.n_iters = 2000
  config.classifier.lr = 2e-3
  config.classifier.warmup = 100
  config.sampling.predictor = 'reverse_diffusion'
  config.sampling.num_steps = 200
  config.eval.begin_ckpt = 2
  config.eval.end_ckpt = 1000
  config.eval.batch_size = 128
  config.eval.enable_sampling = True
  config.eval.num_samples = 128
  config.eval.features = 'pixels'
  return config


# Fashion-MNIST by size: two CPU cores train 16x16 in minutes, all of its pixels in 1 to 2 hours.
FASHION_MNIST: dict[str, Changes] = {
  '16': {
    'data.image_size': 16,
    'model.nf': 16,
    'model.ch_mult': (1, 2),
    'model.attn_resolutions': (8,),
    'model.sigma_max': 12.0,  # about the largest distance between two images
    'training.n_iters': 2000,
    'training.snapshot_freq': 1000,
    'training.snapshot_freq_for_preemption': 100,
  },
  '28': {
    'data.image_size': 28,
    'model.nf': 32,
    'model.ch_mult': (1, 2, 2),
    'model.attn_resolutions': (7, 14),
    'model.sigma_max': 22.0,
    'training.n_iters': 6000,
    'training.snapshot_freq': 2000,
    'training.snapshot_freq_for_preemption': 200,
  },
}
# The same, told each image's means over 4x4 pixels: what is learned is to enlarge it fourfold.
FASHION_MNIST['16_super_resolution'] = FASHION_MNIST['16'] | {'data.condition': 'lowres:4'}
_FASHION_MNIST: Changes = {
  'data.dataset': 'FashionMNIST',
  'data.num_channels': 1,
  'data.random_flip': False,  # shoes all point to the left
  'model.num_res_blocks': 1,
  'model.dropout': 0.0,
  'model.ema_warmup': True,
  'training.batch_size': 64,
  'optim.lr': 2e-3,
  'optim.warmup': 100,
  'sampling.num_steps': 200,
  'eval.begin_ckpt': 1,
  'eval.end_ckpt': 1000,
  'eval.batch_size': 128,
  'eval.enable_sampling': True,
  'eval.num_samples': 512,
  'eval.features': 'pixels',
}


def fashion_mnist(config: ConfigDict, size: str) -> ConfigDict:
  """Fashion-MNIST (Xiao et al. 2017, https://arxiv.org/abs/1708.07747), grey images of clothing.

  Raises:
    UserError: if there is no such size.
  """
  if size not in FASHION_MNIST:
    raise unknown('variant', size, FASHION_MNIST)
  config.update_from_flattened_dict(_FASHION_MNIST | FASHION_MNIST[size])
  return config


def small_ddpmpp(sde: str) -> ConfigDict:
  """The settings of an SDE with DDPM++ whatever the SDE is, so that SDEs can be compared.

  How the network is told of the noise belongs to the SDE: VE has Fourier features of log(sigma).
  """
  config = SDES[sde]('ddpmpp')
  if sde == 've':
    config.model.embedding_type = 'fourier'
  return config


def few_steps(config: ConfigDict, num_steps: int) -> ConfigDict:
  """One of these with the number of steps of EDM or flow matching, and EDM's sigma_max."""
  config.sampling.num_steps = num_steps
  if config.training.sde == 'edm':
    config.model.sigma_max = 80.0
  return config


# What two CPU cores train in minutes, at 16x16.
_MINUTES: Changes = {
  'data.image_size': 16,
  'training.batch_size': 32,
  'training.n_iters': 1000,
  'training.snapshot_freq': 500,
  'training.snapshot_freq_for_preemption': 100,
  'training.snapshot_samples': 16,
  'optim.lr': 1e-3,
  'optim.warmup': 100,
  'sampling.num_steps': 100,
  'eval.begin_ckpt': 2,
  'eval.batch_size': 64,
  'eval.num_samples': 128,
  'eval.features': 'pixels',
}
# Images of one's own, by size: what fits a GPU of 16 GB, and what two CPU cores train in minutes.
PHOTOS: dict[str, Changes] = {
  'cpu': {
    **_MINUTES,
    'model.nf': 32,
    'model.ch_mult': (1, 2),
    'model.attn_resolutions': (8,),
    'model.num_res_blocks': 1,
  },
  '32': {'data.image_size': 32, 'training.batch_size': 64},
  '64': {'data.image_size': 64, 'model.num_res_blocks': 2, 'training.batch_size': 32},
  '128': {
    'data.image_size': 128,
    'model.nf': 64,
    'model.ch_mult': (1, 2, 2, 4, 4),
    'model.num_res_blocks': 2,
    'training.batch_size': 16,
  },
  '256': {
    'data.image_size': 256,
    'model.nf': 64,
    'model.ch_mult': (1, 1, 2, 2, 4, 4),
    'model.num_res_blocks': 2,
    'training.batch_size': 4,
  },
}
# The same by a transformer, whose patches grow with the images: 64 of them at 16 pixels, then 256.
DIT_PHOTOS: dict[str, Changes] = {
  'dit_cpu': {
    **_MINUTES,
    'model.nf': 128,
    'model.num_layers': 4,
    'model.num_heads': 4,
  },
  'dit_32': {'data.image_size': 32, 'model.patch_size': 2, 'training.batch_size': 64},
  'dit_64': {'data.image_size': 64, 'model.patch_size': 4, 'training.batch_size': 64},
  'dit_128': {'data.image_size': 128, 'model.patch_size': 8, 'training.batch_size': 64},
  'dit_256': {'data.image_size': 256, 'model.patch_size': 16, 'training.batch_size': 64},
}
_PHOTOS = {
  'data.dataset': 'folder',
  'model.ema_warmup': True,
  'training.n_iters': 200_000,
  'training.snapshot_freq': 10_000,
  'training.snapshot_freq_for_preemption': 1000,
  'eval.batch_size': 64,
  'eval.num_samples': 10_000,
  'eval.end_ckpt': 1000,
  'eval.enable_sampling': True,
}


def photos(config: ConfigDict, size: str) -> ConfigDict:
  """A folder of images, `data.path`, at one of the sizes of `PHOTOS`, or of `DIT_PHOTOS`.

  Raises:
    UserError: if there is no such size.
  """
  sizes = DIT_PHOTOS if config.model.name == 'dit' else PHOTOS
  if size not in sizes:
    raise unknown('variant', size, sizes)
  config.update_from_flattened_dict(_PHOTOS | sizes[size])
  return config
