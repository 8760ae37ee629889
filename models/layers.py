"""Layers that the networks share, over images [B, H, W, C]; each computes in its input's dtype.

Parameter names and shapes are those of the released code, so that its checkpoints fit.
"""

from collections.abc import Callable, Sequence
from functools import partial
import math

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float

from models.barriers import apart, as_made, stored
from runtime.shapes import Condition, Features, Images, Maps, PerRow

Activation = Callable[[Array], Array]
Tokens = Float[Array, 'b n c']  # the pixels of feature maps, one after another

ACTIVATIONS: dict[str, Activation] = {
  'swish': nn.swish,
  'elu': nn.elu,
  'relu': nn.relu,
  'lrelu': lambda x: nn.leaky_relu(x, negative_slope=0.2),
}


def beside(x: Images, condition: Condition | None) -> Maps:
  """The input of a network: x and, if there is any, the channels of a condition after its own."""
  return x if condition is None else jnp.concatenate([x, condition.astype(x.dtype)], axis=-1)


def default_init(scale: float = 1.0) -> nn.initializers.Initializer:
  """DDPM's initialiser: uniform, variance `scale` over the mean of fan-in and fan-out."""
  # A scale of zero would make the variance scaling refuse; 1e-10 is DDPM's "zero".
  return nn.initializers.variance_scaling(scale or 1e-10, 'fan_avg', 'uniform')


class Conv(nn.Module):
  """A square convolution with DDPM's initialisation, (images) -> (maps, the bias [C] to add).

  Who normalises the maps adds the bias there; `conv` adds it at once.
  """

  features: int
  kernel: int = 3
  stride: int = 1
  init_scale: float = 1.0

  @nn.compact
  def __call__(self, x: Images) -> tuple[Maps, Array]:
    shape = (self.kernel, self.kernel, x.shape[-1], self.features)
    kernel = self.param('kernel', default_init(self.init_scale), shape)
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    y = jax.lax.conv_general_dilated(
      x,
      kernel.astype(x.dtype),
      (self.stride, self.stride),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return as_made(y), bias.astype(x.dtype)


def conv(
  x: Images, features: int, kernel: int = 3, stride: int = 1, init_scale: float = 1.0
) -> Maps:
  """A square convolution with its bias; call it inside a compact module."""
  y, bias = Conv(features, kernel, stride, init_scale)(x)
  return y + bias


def dense(x: Float[Array, '*b f'], features: int) -> Float[Array, '*b _']:
  """A fully connected layer with DDPM's initialisation."""
  return nn.Dense(features, kernel_init=default_init(), dtype=x.dtype)(x)


def linear(x: Features, features: int, name: str) -> Float[Array, 'b _']:
  """The same without a bias: zeros stay zeros. With a name, for what only some networks have."""
  layer = nn.Dense(features, use_bias=False, kernel_init=default_init(), dtype=x.dtype, name=name)
  return layer(x)


def unchanged(x: Array) -> Array:
  """The activation that is none."""
  return x


class GroupNorm(nn.Module):
  """GroupNorm (https://arxiv.org/abs/1803.08494), and the activation of what it makes.

  Both are computed in float32 whatever the dtype of x. Moments are summed by channel, then by
  group, and scale and shift are applied as one: on CPU twice as fast as Flax's layer, whose
  parameters these are.

  Raises:
    ValueError: if the groups cannot share the channels.
  """

  num_groups: int
  epsilon: float = 1e-6
  act: Activation = unchanged

  @nn.compact
  def __call__(self, x: Images, *added: Array) -> Images:
    """Normalises x, or the sum of x and of what is added to all pixels, [C] or [B, C]."""
    channels = x.shape[-1]
    if channels % self.num_groups:
      raise ValueError(f'{channels} channels cannot be shared by {self.num_groups} groups')
    scale = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    offset = None  # [B, C], in whose stead moments and shift change
    if added:
      x, offset = jax.lax.platform_dependent(
        x, *added, cuda=_as_offset, rocm=_as_offset, default=_summed
      )
    h = x.astype(jnp.float32)
    mean, square = h.mean((1, 2)), (h * h).mean((1, 2))
    if offset is not None:
      mean, square = mean + offset, square + offset * (2 * mean + offset)
    moments = jnp.stack([mean, square])  # [2, B, C]
    by_group = moments.reshape(2, len(x), self.num_groups, -1)
    center, square = jnp.repeat(by_group.mean(-1), by_group.shape[-1], axis=-1)
    slope = scale * jax.lax.rsqrt(jnp.maximum(square - center * center, 0) + self.epsilon)
    shift = bias - center * slope
    if offset is not None:
      shift += offset * slope
    return _activated(x, apart(slope), apart(shift), self.act)


def _summed(x: Array, *added: Array) -> tuple[Array, Array]:
  """x with all that is added to it, and an offset of nothing."""
  for a in added:
    x += a[..., None, None, :]
  return stored(x), jnp.zeros(x.shape[::3])


def _as_offset(x: Array, *added: Array) -> tuple[Array, Array]:
  """x as it is, and as its offset what is added to it, [B, C] in float32.

  So the sum is never written, and the gradient by what is added no sum over pixels.
  """
  return x, sum((a.astype(jnp.float32) for a in added), jnp.zeros(x.shape[::3]))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _activated(x: Array, slope: Array, shift: Array, act: Activation) -> Array:
  """act(slope x + shift), for x [B, H, W, C] and slope, shift [B, C], in float32."""
  return act(_affine(x, slope, shift)).astype(x.dtype)


def _affine(x: Array, slope: Array, shift: Array) -> Array:
  return x.astype(jnp.float32) * slope[:, None, None] + shift[:, None, None]


@_activated.defjvp
def _activated_jvp(
  act: Activation, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
  """The derivative, where the part by x is `apart` from the part by slope and shift.

  Backwards the latter is two sums over pixels, on which the gradient by x waits, since slope and
  shift depend on x. Both parts take the gradient by what is activated. Computed for each anew, it
  never goes through memory: a GPU reads x and the gradient by y twice, and writes that by x.
  """
  x, slope, shift = primals
  dx, d_slope, d_shift = tangents

  def along(slope: Array, shift: Array, tangent: Array) -> Array:
    return jax.jvp(act, (_affine(x, slope, shift),), (tangent,))[1].astype(x.dtype)

  y = _activated(x, slope, shift, act)
  by_moments = along(slope, shift, _affine(x, d_slope, d_shift))
  slope, shift = apart(slope), apart(shift)
  by_x = along(slope, shift, dx.astype(jnp.float32) * slope[:, None, None])
  return y, by_x + by_moments


def group_norm(
  x: Images, min_group_size: int = 4, act: Activation = unchanged, added: Sequence[Array] = ()
) -> Images:
  """act(GroupNorm(x)), of 32 groups; fewer where one would have under `min_group_size` channels.

  What is added to all pixels of x before, [C] or [B, C], is part of what is normalised.
  """
  norm = GroupNorm(min(x.shape[-1] // min_group_size, 32), act=act)
  return norm(x, *added) if added else norm(stored(x))


def attention(q: Tokens, k: Tokens, v: Tokens) -> Tokens:
  """softmax(q k^T / sqrt(C)) v of one head; the softmax is in float32."""
  logits = jnp.einsum('bqc,bkc->bqk', q, k, preferred_element_type=jnp.float32)
  weights = nn.softmax(logits * q.shape[-1] ** -0.5).astype(q.dtype)
  return jnp.einsum('bqk,bkc->bqc', weights, v)


class NIN(nn.Module):
  """Network in network: the same linear map at every pixel (a 1x1 convolution)."""

  features: int
  init_scale: float = 0.1

  @nn.compact
  def __call__(self, x: Images) -> Maps:
    w = self.param('W', default_init(self.init_scale), (x.shape[-1], self.features))
    b = self.param('b', nn.initializers.zeros, (self.features,))
    return x @ w.astype(x.dtype) + b.astype(x.dtype)


class GaussianFourierProjection(nn.Module):
  """2 `features` random Fourier features of a scalar (Sec. C.1).

  The frequencies W are drawn once and never trained.
  """

  features: int
  scale: float = 16.0

  @nn.compact
  def __call__(self, x: PerRow) -> Features:
    w = self.param('W', nn.initializers.normal(stddev=self.scale), (self.features,))
    phase = 2 * jnp.pi * x[:, None] * jax.lax.stop_gradient(w)[None, :]
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


def positional_embedding(t: PerRow, features: int, max_period: float = 10000.0) -> Features:
  """The sinusoidal embedding of DDPM; t counts time steps, 0 to N - 1."""
  half = features // 2
  frequencies = jnp.exp(-math.log(max_period) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
  phase = t.astype(jnp.float32)[:, None] * frequencies[None, :]
  embedding = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
  return jnp.pad(embedding, [[0, 0], [0, features % 2]])
