"""NCSN++ (Appendix H of https://arxiv.org/abs/2011.13456); DDPM++ is one of its variants.

A U-Net over images [B, H, W, C], with residual blocks of DDPM or of BigGAN, optional FIR
resampling, and optional progressive growing of the input and of the output. Module names and
the order of their creation follow the released code, so that its parameters fit name by name.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from models import layers, resample
from models.layers import Activation, Conv, conv, dense, group_norm, NIN
from runtime.shapes import Condition, Features, Images, Labels, Maps, PerRow

RESBLOCK_TYPES = ('biggan', 'ddpm')
EMBEDDING_TYPES = ('fourier', 'positional')
PROGRESSIVE = ('none', 'output_skip', 'residual')
PROGRESSIVE_INPUT = ('none', 'input_skip', 'residual')
COMBINE_METHODS = ('sum', 'cat')
AUGMENTATION = 'augmentation'  # the map of labels that say how images were augmented
LABEL_STD = 0.2  # of the vectors of labels before training; about that of what they are added to


def _add(x: Images, h: Images, skip_rescale: bool) -> Images:
  """A residual sum, kept at unit variance if `skip_rescale`; rounded to the dtype of x once."""
  total = x.astype(jnp.float32) + h.astype(jnp.float32)
  total = total / np.sqrt(2.0, dtype=np.float32) if skip_rescale else total
  return layers.stored(total.astype(x.dtype))


class AttnBlockpp(nn.Module):
  """Self-attention over the pixels of an image, one head."""

  init_scale: float
  skip_rescale: bool
  min_group_size: int

  @nn.compact
  def __call__(self, x: Images) -> Images:
    b, height, width, c = x.shape
    h = group_norm(x, self.min_group_size)
    q, k, v = (NIN(c)(h).reshape(b, height * width, c) for _ in range(3))
    h = layers.attention(q, k, v).reshape(x.shape)
    return _add(x, NIN(c, self.init_scale)(h), self.skip_rescale)


class ResnetBlockDDPMpp(nn.Module):
  """The residual block of DDPM."""

  features: int
  act: Activation
  dropout: float
  init_scale: float
  skip_rescale: bool
  min_group_size: int

  @nn.compact
  def __call__(self, x: Images, temb: Features | None, train: bool) -> Maps:
    h = group_norm(x, self.min_group_size, self.act)
    h, *added = Conv(self.features)(h)
    if temb is not None:
      added.append(dense(self.act(temb), self.features))
    h = group_norm(h, self.min_group_size, self.act, added)
    h = nn.Dropout(self.dropout)(h, deterministic=not train)
    h = conv(h, self.features, init_scale=self.init_scale)
    if x.shape[-1] != self.features:
      x = NIN(self.features)(x)
    return _add(x, h, self.skip_rescale)


class ResnetBlockBigGANpp(nn.Module):
  """The residual block of BigGAN, which can also change the resolution on its way."""

  features: int
  act: Activation
  dropout: float
  init_scale: float
  skip_rescale: bool
  min_group_size: int
  fir_kernel: Sequence[float] | None
  direction: str = ''  # 'up' or 'down' changes the resolution

  @nn.compact
  def __call__(self, x: Images, temb: Features | None, train: bool) -> Maps:
    h = group_norm(x, self.min_group_size, self.act)
    if self.direction:
      change = {'up': resample.upsample, 'down': resample.downsample}[self.direction]
      x, h = change(x, self.fir_kernel), change(h, self.fir_kernel)
    h, *added = Conv(self.features)(h)
    if temb is not None:
      added.append(dense(self.act(temb), self.features))
    h = group_norm(h, self.min_group_size, self.act, added)
    h = nn.Dropout(self.dropout)(h, deterministic=not train)
    h = conv(h, self.features, init_scale=self.init_scale)
    if x.shape[-1] != self.features or self.direction:
      x = conv(x, self.features, kernel=1)
    return _add(x, h, self.skip_rescale)


class Combine(nn.Module):
  """Joins the downsampled input to the feature maps of its resolution."""

  method: str

  @nn.compact
  def __call__(self, x: Maps, h: Images) -> Maps:
    x = conv(x, h.shape[-1], kernel=1)
    return x + h if self.method == 'sum' else jnp.concatenate([x, h], axis=-1)


class NCSNpp(nn.Module):
  """The network, (x, cond, labels) -> a map like x, in float32.

  `cond` is what the embedding takes: log sigma or log time for Fourier features, a time step for
  the positional embedding; it is not read if not `conditional`. H and W are divisible by
  2^(len(ch_mult) - 1). Attention stands wherever the height is in `attn_resolutions`.

  With `num_classes`, which needs `conditional`, a learned vector of each label, from 0 on, is added
  to the embedding of `cond`. The null label, num_classes, stands for an image of any class; None
  for a batch of such.

  With `num_augment_labels`, which needs `conditional`, it is told how each image was
  augmented: what a linear map makes of that is added to the features of `cond`. None stands for
  zeros, which change nothing: for images as they are.

  A `condition`, images of the same size, is told as further channels of the input.

  With `remat`, gradients keep nothing from inside residual blocks, and compute it again: less
  memory, for about one more evaluation of the network.
  """

  nf: int
  ch_mult: tuple[int, ...]
  num_res_blocks: int
  attn_resolutions: tuple[int, ...]
  nonlinearity: str = 'swish'
  dropout: float = 0.0
  conditional: bool = True
  embedding_type: str = 'fourier'
  fourier_scale: float = 16.0
  resblock_type: str = 'biggan'
  resamp_with_conv: bool = True
  fir_kernel: tuple[float, ...] | None = (1, 3, 3, 1)  # None: plain resampling
  progressive: str = 'none'
  progressive_input: str = 'none'
  progressive_combine: str = 'sum'
  skip_rescale: bool = True
  init_scale: float = 0.0
  min_group_size: int = 4
  dtype: str = 'float32'
  num_classes: int = 0
  num_augment_labels: int = 0
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    x: Images,
    cond: PerRow,
    train: bool,
    labels: Labels | None = None,
    augment_labels: Features | None = None,
    condition: Condition | None = None,
  ) -> Images:
    act = layers.ACTIVATIONS[self.nonlinearity]
    channels, levels = x.shape[-1], len(self.ch_mult)
    x = layers.beside(x, condition).astype(self.dtype)

    temb = None
    if self.conditional:
      if self.embedding_type == 'fourier':
        temb = layers.GaussianFourierProjection(self.nf, self.fourier_scale)(cond)
      else:
        temb = layers.positional_embedding(cond, self.nf)
      temb = temb.astype(self.dtype)
      if self.num_augment_labels:
        if augment_labels is None:
          augment_labels = jnp.zeros((len(x), self.num_augment_labels))
        temb += layers.linear(augment_labels.astype(self.dtype), temb.shape[-1], AUGMENTATION)
      temb = dense(temb, self.nf * 4)
      temb = dense(act(temb), self.nf * 4)
      if self.num_classes:
        if labels is None:
          labels = jnp.full(x.shape[:1], self.num_classes)
        init = nn.initializers.normal(LABEL_STD)
        rows = nn.Embed(self.num_classes + 1, self.nf * 4, embedding_init=init, dtype=temb.dtype)
        temb += rows(labels)

    biggan = self.resblock_type == 'biggan'
    plain = ResnetBlockBigGANpp if biggan else ResnetBlockDDPMpp
    block = nn.remat(plain, static_argnums=(3,)) if self.remat else plain  # 3 is `train`
    names = (f'{plain.__name__}_{i}' for i in count())  # nn.remat would change them

    def resblock(h: Images, features: int, direction: str = '') -> Maps:
      fields: dict[str, Any] = {
        'features': features,
        'act': act,
        'dropout': self.dropout,
        'init_scale': self.init_scale,
        'skip_rescale': self.skip_rescale,
        'min_group_size': self.min_group_size,
      }
      if biggan:
        fields |= {'fir_kernel': self.fir_kernel, 'direction': direction}
      elif direction:
        change = {'up': resample.Upsample, 'down': resample.Downsample}[direction]
        return change(features, self.resamp_with_conv, self.fir_kernel)(h)
      return block(**fields, name=next(names))(h, temb, train)

    def attend(h: Images) -> Images:
      return AttnBlockpp(self.init_scale, self.skip_rescale, self.min_group_size)(h)

    def head(h: Images, features: int, init_scale: float) -> Maps:
      return conv(group_norm(h, self.min_group_size, act), features, init_scale=init_scale)

    # Down: keep every feature map for the way up.
    input_pyramid = x
    skips = [conv(x, self.nf)]
    for level, mult in enumerate(self.ch_mult):
      for _ in range(self.num_res_blocks):
        h = resblock(skips[-1], self.nf * mult)
        if h.shape[1] in self.attn_resolutions:
          h = attend(h)
        skips.append(h)
      if level == levels - 1:
        break
      h = resblock(h, h.shape[-1], 'down')
      if self.progressive_input == 'input_skip':
        input_pyramid = resample.Downsample(channels, False, self.fir_kernel)(input_pyramid)
        h = Combine(self.progressive_combine)(input_pyramid, h)
      elif self.progressive_input == 'residual':
        input_pyramid = resample.Downsample(h.shape[-1], True, self.fir_kernel)(input_pyramid)
        h = input_pyramid = _add(input_pyramid, h, self.skip_rescale)
      skips.append(h)

    h = resblock(h, h.shape[-1])
    h = attend(h)
    h = resblock(h, h.shape[-1])

    # Up, from the coarsest level to the finest.
    pyramid = None
    for level, mult in reversed(list(enumerate(self.ch_mult))):
      for _ in range(self.num_res_blocks + 1):
        h = resblock(jnp.concatenate([h, skips.pop()], axis=-1), self.nf * mult)
      if h.shape[1] in self.attn_resolutions:
        h = attend(h)
      if self.progressive == 'output_skip':
        if pyramid is not None:
          pyramid = resample.Upsample(channels, False, self.fir_kernel)(pyramid)
        out = head(h, channels, self.init_scale)
        pyramid = out if pyramid is None else pyramid + out
      elif self.progressive == 'residual':
        if pyramid is None:
          pyramid = head(h, h.shape[-1], 1.0)
        else:
          pyramid = resample.Upsample(h.shape[-1], True, self.fir_kernel)(pyramid)
          h = pyramid = _add(pyramid, h, self.skip_rescale)
      if level > 0:
        h = resblock(h, h.shape[-1], 'up')

    if self.progressive == 'output_skip':
      assert pyramid is not None  # there is a level
      return pyramid.astype(jnp.float32)
    return head(h, channels, self.init_scale).astype(jnp.float32)
