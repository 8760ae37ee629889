"""A classifier of noisy images, for class-conditional sampling (Appendix I.1).

A Wide ResNet (https://arxiv.org/abs/1605.07146) that is told the noise scale, with GroupNorm in
place of batch normalisation. Names are those of the released code's `wideresnet_noise_conditional`.
"""

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jax.typing import DTypeLike

from models import layers
from runtime.shapes import Features, Images, Maps, PerRow

_conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
EMBEDDING = 128  # half the number of Fourier features of the noise scale


def _output_init(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
  return nn.initializers.uniform(2.0)(key, shape, dtype) * shape[1] ** -0.5 - shape[1] ** -0.5


def _activation(x: Array, name: str) -> Array:
  groups = min(x.shape[-1] // 4, 32)
  return nn.relu(layers.GroupNorm(groups, epsilon=1e-5, name=name)(x))


def _conv(x: Array, features: int, name: str, stride: int = 1) -> Array:
  return nn.Conv(
    features,
    (3, 3),
    (stride, stride),
    use_bias=False,
    kernel_init=_conv_init,
    dtype=x.dtype,
    name=name,
  )(x)


class WideResnetBlock(nn.Module):
  """Two convolutions beside a shortcut, which is pooled and padded where they change the shape.

  The `first` block of the network activates its input before the shortcut leaves.
  """

  features: int
  stride: int
  first: bool

  @nn.compact
  def __call__(self, x: Images, temb: Features) -> Maps:
    h = _activation(x, 'init_bn')
    if self.first:
      x = h
    h = _conv(h, self.features, 'conv1', self.stride)
    h += nn.Dense(self.features, dtype=x.dtype)(nn.swish(temb))[:, None, None, :]
    h = _conv(_activation(h, 'bn_2'), self.features, 'conv2')
    if self.features != x.shape[-1]:
      window = (self.stride, self.stride)
      x = nn.avg_pool(x, window, window)
      x = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, self.features - x.shape[-1])])
    return h + x


class WideResnetGroup(nn.Module):
  """Blocks of one width, the first of which may reduce the resolution."""

  n_blocks: int
  features: int
  stride: int
  first: bool

  @nn.compact
  def __call__(self, x: Images, temb: Features) -> Maps:
    for i in range(self.n_blocks):
      stride, first = (self.stride, self.first) if i == 0 else (1, False)
      x = WideResnetBlock(self.features, stride, first)(x, temb)
    return x


class WideResnet(nn.Module):
  """The classifier, (x, log sigma) -> `num_outputs` logits in float32.

  Four blocks per group and a multiplier of ten make the WRN-28-10 of the paper. Every image is
  brought to zero mean and unit variance first, so that neither its scaling nor alpha(t) matters.
  """

  num_outputs: int
  blocks_per_group: int = 4
  channel_multiplier: int = 10
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Images, log_sigma: PerRow, train: bool) -> Features:
    del train  # there is nothing random
    axes, dim = (1, 2, 3), x[0].size
    std = jnp.maximum(x.std(axes, keepdims=True), dim**-0.5)  # of a constant image, not zero
    x = ((x - x.mean(axes, keepdims=True)) / std).astype(self.dtype)

    temb = layers.GaussianFourierProjection(EMBEDDING)(log_sigma)
    temb = nn.Dense(4 * EMBEDDING, dtype=x.dtype)(temb.astype(x.dtype))
    temb = nn.Dense(4 * EMBEDDING, dtype=x.dtype)(nn.swish(temb))

    x = _conv(x, 16, 'init_conv')
    for i, (width, stride) in enumerate([(16, 1), (32, 2), (64, 2)]):
      features = width * self.channel_multiplier
      x = WideResnetGroup(self.blocks_per_group, features, stride, i == 0)(x, temb)
    x = _activation(x, 'pre-pool-bn').mean((1, 2)).astype(jnp.float32)
    return nn.Dense(self.num_outputs, kernel_init=_output_init)(x)
