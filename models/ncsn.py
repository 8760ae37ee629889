"""NCSN and NCSNv2: a residual network whose feature maps a RefineNet joins, coarse to fine.

NCSN (https://arxiv.org/abs/1907.05600) tells every normalisation which noise scale it sees; NCSNv2
(https://arxiv.org/abs/2006.09011) is told nothing, its output is divided by sigma instead. Module
names and their order are those of the released code, where NCSN's blocks have names of their
own: `CondRefineBlock` for `RefineBlock`, and so on.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jax.typing import DTypeLike

from models import layers, normalization
from models.layers import Activation
from models.normalization import ConditionalInstanceNorm2dPlus
from runtime.shapes import Condition, Images, Maps, PerRow

Layer = Callable[[Array], Array]

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic')


class Stage(NamedTuple):
  """One resolution of the network; widths are multiples of nf."""

  width: int  # of the residual blocks
  dilation: int  # of their convolutions; the stage halves the resolution if it is 1
  refined: int  # width of what the RefineNet makes of it


# By the name of the network, from the first stage, at full resolution, to the last.
STAGES = {
  'ncsn': (Stage(1, 1, 1), Stage(2, 1, 2), Stage(2, 2, 2), Stage(2, 4, 2)),
  'ncsnv2_64': (Stage(1, 1, 1), Stage(2, 1, 2), Stage(2, 2, 2), Stage(2, 4, 2)),
  'ncsnv2_128': (
    Stage(1, 1, 1), Stage(2, 1, 1), Stage(2, 1, 2), Stage(4, 2, 2), Stage(4, 4, 4),
  ),
  'ncsnv2_256': (
    Stage(1, 1, 1), Stage(2, 1, 1), Stage(2, 1, 2), Stage(2, 1, 2), Stage(4, 2, 2), Stage(4, 4, 4),
  ),
}  # fmt: skip


def halvings(name: str) -> int:
  """How often the network `name` halves the resolution."""
  return sum(stage.dilation == 1 for stage in STAGES[name][1:])


def conv(x: Images, features: int, kernel: int = 3, dilation: int = 1, bias: bool = True) -> Maps:
  """A square convolution with PyTorch's initialisation, uniform within 1 / sqrt(fan-in)."""
  bound = (kernel * kernel * x.shape[-1]) ** -0.5

  def uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return nn.Conv(
    features,
    (kernel, kernel),
    kernel_dilation=dilation,
    padding='SAME',
    use_bias=bias,
    kernel_init=uniform,
    bias_init=uniform,
    dtype=x.dtype,
  )(x)


class ConvMeanPool(nn.Module):
  """A convolution, then the mean of every 2x2 square."""

  features: int
  kernel: int

  @nn.compact
  def __call__(self, x: Images) -> Maps:
    return nn.avg_pool(conv(x, self.features, self.kernel), (2, 2), (2, 2))


class ResidualBlock(nn.Module):
  """Two convolutions beside a shortcut.

  Going `down` without dilation halves the resolution; with it, the dilation stands for that.
  """

  features: int
  act: Activation
  down: bool
  dilation: int

  @nn.compact
  def __call__(self, x: Images, normalize: Layer) -> Maps:
    h = self.act(normalize(x))
    h = conv(h, x.shape[-1] if self.down else self.features, dilation=self.dilation)
    h = self.act(normalize(h))
    if self.down and self.dilation == 1:
      return ConvMeanPool(self.features, 3)(h) + ConvMeanPool(self.features, 1)(x)
    h = conv(h, self.features, dilation=self.dilation)
    if self.down:
      x = conv(x, self.features, dilation=self.dilation)
    return h + x


class RCUBlock(nn.Module):
  """Residual convolution units: each adds two convolutions to its input."""

  n_units: int
  act: Activation

  @nn.compact
  def __call__(self, x: Images, normalize: Layer) -> Maps:
    for _ in range(self.n_units):
      h = x
      for _ in range(2):
        h = conv(self.act(normalize(h)), x.shape[-1], bias=False)
      x += h
    return x


class MSFBlock(nn.Module):
  """Multi-resolution fusion: feature maps convolved, enlarged to the first one's size and added."""

  features: int
  interpolation: str

  @nn.compact
  def __call__(self, xs: list[Maps], normalize: Layer) -> Maps:
    hs = [conv(normalize(x), self.features) for x in xs]
    shape = hs[0].shape
    return sum(jax.image.resize(h, shape, self.interpolation) for h in hs)


class CRPBlock(nn.Module):
  """Chained residual pooling, which gathers context from further and further away."""

  act: Activation
  pool: Layer

  @nn.compact
  def __call__(self, x: Images, normalize: Layer) -> Maps:
    x = h = self.act(x)
    for _ in range(2):
      h = conv(self.pool(normalize(h)), x.shape[-1], bias=False)
      x += h
    return x


class RefineBlock(nn.Module):
  """Joins a feature map and what was made of the coarser ones, if any."""

  features: int
  act: Activation
  interpolation: str
  pool: Layer
  last: bool

  @nn.compact
  def __call__(self, xs: list[Maps], normalize: Layer) -> Maps:
    hs = [RCUBlock(2, self.act)(x, normalize) for x in xs]
    h = MSFBlock(self.features, self.interpolation)(hs, normalize) if len(hs) > 1 else hs[0]
    h = CRPBlock(self.act, self.pool)(h, normalize)
    return RCUBlock(3 if self.last else 1, self.act)(h, normalize)


class RefineNet(nn.Module):
  """The network, (x, cond) -> a map like x, in float32.

  With `num_classes` it is NCSN: `cond` is the number of the noise scale, counted from the largest,
  every normalisation is InstanceNorm++ conditioned on it, in the RefineNet as well, which pools
  by means. Without, it is NCSNv2: `cond` is not read, the RefineNet does not normalise, and pools
  by maxima.

  A `condition`, images of the same size, is told as further channels of the input.
  """

  nf: int
  stages: tuple[Stage, ...]
  nonlinearity: str = 'elu'
  normalization: str = 'InstanceNorm++'
  interpolation: str = 'bilinear'
  num_classes: int | None = None
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Images, cond: PerRow, train: bool, condition: Condition | None = None
  ) -> Images:
    del train  # there is nothing random
    act, channels = layers.ACTIVATIONS[self.nonlinearity], x.shape[-1]
    window = {'window_shape': (5, 5), 'strides': (1, 1), 'padding': 'SAME'}
    pool = partial(nn.avg_pool if self.num_classes else nn.max_pool, **window)

    def normalize(h: Array) -> Array:
      if self.num_classes:
        labels = jnp.round(cond).astype(jnp.int32)
        return ConditionalInstanceNorm2dPlus(self.num_classes)(h, labels)
      return normalization.normalize(h, self.normalization)

    def normalize_refined(h: Array) -> Array:
      return normalize(h) if self.num_classes else h

    h = conv(layers.beside(x, condition).astype(self.dtype), self.nf)
    features = []
    for i, stage in enumerate(self.stages):
      width = self.nf * stage.width
      h = ResidualBlock(width, act, i > 0, stage.dilation)(h, normalize)
      h = ResidualBlock(width, act, False, stage.dilation)(h, normalize)
      features.append(h)

    refined: list[Array] = []
    for i, stage in reversed(list(enumerate(self.stages))):
      block = RefineBlock(self.nf * stage.refined, act, self.interpolation, pool, last=i == 0)
      refined = [block([features[i], *refined], normalize_refined)]
    return conv(act(normalize(refined[0])), channels).astype(jnp.float32)
