"""From the section `model` of a config to a network, which does not know of configs."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
from ml_collections import FrozenConfigDict

from models import ncsn, ncsnpp
from models.ddpm import DDPM
from models.dit import DiT
from models.mlp import MLP
from models.normalization import NORMALIZATIONS


def _unet_fields(model: FrozenConfigDict) -> dict[str, Any]:
  return {
    'nf': model.nf,
    'ch_mult': tuple(model.ch_mult),
    'num_res_blocks': model.num_res_blocks,
    'attn_resolutions': tuple(model.attn_resolutions),
    'nonlinearity': model.nonlinearity,
    'dropout': model.dropout,
    'conditional': model.conditional,
    'resamp_with_conv': model.resamp_with_conv,
    'dtype': model.dtype,
    'num_classes': model.num_classes,
    'remat': model.remat,
  }


def _ncsnpp(model: FrozenConfigDict) -> nn.Module:
  return ncsnpp.NCSNpp(
    **_unet_fields(model),
    resblock_type=model.resblock_type,
    embedding_type=model.embedding_type,
    fourier_scale=model.fourier_scale,
    fir_kernel=tuple(model.fir_kernel) if model.fir else None,
    progressive=model.progressive,
    progressive_input=model.progressive_input,
    progressive_combine=model.progressive_combine,
    skip_rescale=model.skip_rescale,
    init_scale=model.init_scale,
  )


def _mlp(model: FrozenConfigDict) -> nn.Module:
  return MLP(
    nf=model.nf,
    num_layers=model.num_layers,
    nonlinearity=model.nonlinearity,
    conditional=model.conditional,
    fourier_scale=model.fourier_scale,
    dtype=model.dtype,
    num_classes=model.num_classes,
  )


def _dit(model: FrozenConfigDict) -> nn.Module:
  return DiT(
    patch_size=model.patch_size,
    nf=model.nf,
    num_layers=model.num_layers,
    num_heads=model.num_heads,
    conditional=model.conditional,
    embedding_type=model.embedding_type,
    fourier_scale=model.fourier_scale,
    dropout=model.dropout,
    dtype=model.dtype,
    num_classes=model.num_classes,
    remat=model.remat,
    flash_attention=model.flash_attention,
  )


def _refinenet(model: FrozenConfigDict) -> nn.Module:
  return ncsn.RefineNet(
    nf=model.nf,
    stages=ncsn.STAGES[model.name],
    nonlinearity=model.nonlinearity,
    normalization=model.normalization,
    interpolation=model.interpolation,
    num_classes=model.num_scales if model.name == 'ncsn' else None,
    dtype=model.dtype,
  )


# By name: how to make a network, and the normalisations that it can have, if any.
NETWORKS: dict[str, tuple[Callable[[FrozenConfigDict], nn.Module], Iterable[str]]] = {
  'ncsnpp': (_ncsnpp, ('GroupNorm',)),
  'ddpm': (lambda model: DDPM(**_unet_fields(model)), ('GroupNorm',)),
  'ncsn': (_refinenet, ('InstanceNorm++',)),
  'ncsnv2_64': (_refinenet, NORMALIZATIONS),
  'ncsnv2_128': (_refinenet, NORMALIZATIONS),
  'ncsnv2_256': (_refinenet, NORMALIZATIONS),
  'dit': (_dit, ()),
  'mlp': (_mlp, ()),
}


LABELLED = ('ncsnpp', 'ddpm', 'dit', 'mlp')  # can be told the class
AUGMENTED = ('ncsnpp', 'ddpm', 'dit')  # can be told how an image was augmented
CONDITIONED = tuple(name for name in NETWORKS if name != 'mlp')  # can be told an image


def divisor(model: FrozenConfigDict) -> tuple[int, str]:
  """What the size of images must be a multiple of for the network of a config, and why."""
  if model.name == 'dit':
    return model.patch_size, 'cuts them into patches of that size'
  times = len(model.get('ch_mult', [1])) - 1
  if model.name in ncsn.STAGES:
    times = ncsn.halvings(model.name)
  return 2**times, f'halves it {times} times'


def pytorch_release_has(config: FrozenConfigDict) -> bool:
  """Whether the PyTorch release has this very network: NCSN++ and DDPM, told of nothing but time.

  Without a map of its embedding, or where it changes size without parameters, its modules are
  numbered otherwise than ours.
  """
  model = config.model
  return (
    model.name in ('ncsnpp', 'ddpm')
    and model.conditional
    and model.resamp_with_conv
    and not model.num_classes
    and not config.data.augment_probability
    and not config.data.condition
  )
