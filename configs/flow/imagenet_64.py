"""Flow matching by transformers on ImageNet at 64x64: `configs/flow/imagenet_64.py[:size]`.

Batch, learning rate, average and times are those of SiT (Ma et al. 2024,
https://arxiv.org/abs/2401.08740) and DiT (https://arxiv.org/abs/2212.09748), which were trained on
32x32 latents of 256x256 pixels.
"""

from ml_collections import ConfigDict

from configs.base import Changes, flow
from runtime.errors import unknown

_IMAGENET: Changes = {
  'data.dataset': 'imagenet_resized/64x64',
  'data.image_size': 64,
  'model.patch_size': 4,
  'model.num_classes': 1000,
  'model.dtype': 'bfloat16',
  'training.time_law': 'uniform',
  'training.batch_size': 256,
  'training.n_iters': 400_000,
  'optim.lr': 1e-4,
  'optim.warmup': 0,
  'optim.grad_clip': -1.0,
  'eval.end_ckpt': 8,
}

VARIANTS = ('dit_s', 'dit_b', 'dit_l', 'dit_xl', 'dit_1b')


def get_config(variant: str = 'dit_b') -> ConfigDict:
  if variant not in VARIANTS:
    raise unknown('variant', variant, VARIANTS)
  config = flow(variant)
  config.update_from_flattened_dict(_IMAGENET)
  return config
