"""The published settings of EDM (Karras et al. 2022, https://arxiv.org/abs/2206.00364, Table 7).

There, what is counted are images: 200 million of them, a learning rate that rises over the first 10
million, a moving average whose half-life is half a million.

All of it was trained with augmentation, which is a variant of each config here, `_augmented`. The
others are the networks without it, such as the consistency models' EDM
(https://arxiv.org/abs/2303.01469, whose code has no augmentation).
"""

from ml_collections import ConfigDict

from configs.base import Changes, edm
from configs.released import Variants
from runtime.errors import unknown

_IMAGES = 200_000_000
_COUNTED_IN_IMAGES: Changes = {
  'optim.unit': 'images',
  'optim.warmup': 10_000_000,
  'ema.half_life': 500_000.0,
  'ema.ramp_up': 0.05,
}

CIFAR10: Changes = {
  'model.ch_mult': (2, 2, 2),
  'model.dropout': 0.13,
  'training.batch_size': 512,
  'training.n_iters': _IMAGES // 512,
  'optim.lr': 1e-3,
  **_COUNTED_IN_IMAGES,
  'eval.end_ckpt': 8,
}


def folder_64(dropout: float) -> Changes:
  """A folder of images at 64x64, as EDM prepares FFHQ and AFHQv2."""
  return {
    'data.dataset': 'folder',
    'data.image_size': 64,
    'model.dropout': dropout,
    'training.batch_size': 256,
    'training.n_iters': _IMAGES // 256,
    'optim.lr': 2e-4,
    **_COUNTED_IN_IMAGES,
    'eval.end_ckpt': 16,
  }


def both_networks(changes: Changes) -> Variants:
  """DDPM++ and NCSN++."""
  return {network: (network, changes) for network in ('ddpmpp', 'ncsnpp')}


def conditional(variants: Variants, num_classes: int) -> Variants:
  """Each variant, told the class: `_cond`."""
  told = {'model.num_classes': num_classes, 'training.label_dropout': 0.0}
  return {f'{name}_cond': (network, c | told) for name, (network, c) in variants.items()}


def augmented(variants: Variants, probability: float) -> Variants:
  """Each variant, trained on images that are augmented, of which it is told: `_augmented`.

  Images then are not mirrored as well without its knowing.
  """
  told = {'data.augment_probability': probability, 'data.random_flip': False}
  return {f'{name}_augmented': (network, c | told) for name, (network, c) in variants.items()}


def config_of(dataset: str, variant: str, variants: Variants) -> ConfigDict:
  """The config of the entry `variant` of a table.

  Raises:
    UserError: if there is no such entry.
  """
  if variant not in variants:
    raise unknown(f'variant (edm, {dataset})', variant, variants)
  network, changes = variants[variant]
  config = edm(network)
  config.update_from_flattened_dict(changes)
  return config
