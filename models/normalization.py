"""Normalisations of images [B, H, W, C] in NCSN and NCSNv2.

Mean and variance are taken in float32, whatever the dtype of the images. Names and shapes of the
parameters are those of the released code, there with three leading axes of size one.
"""

import flax.linen as nn
from jax import Array
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.layers import group_norm
from runtime.shapes import Images, Labels

EPSILON = 1e-5


def _near_one(key: Array, shape: tuple[int, ...]) -> Array:
  return 1 + 0.02 * nn.initializers.normal(1.0)(key, shape)


def _standardize(x: Array, axis: int | tuple[int, ...]) -> Array:
  """x at zero mean and unit variance along `axis`."""
  return (x - x.mean(axis, keepdims=True)) * _inverse_std(x, axis)


def _inverse_std(x: Array, axis: int | tuple[int, ...]) -> Array:
  return 1 / jnp.sqrt(x.var(axis, keepdims=True) + EPSILON)


def _plus(x: Array, alpha: Array) -> Array:
  """InstanceNorm++ before its scale and shift (Appendix A of https://arxiv.org/abs/1907.05600).

  Instance normalisation loses the mean of each channel; `alpha` [..., C] of it comes back, relative
  to the other channels.
  """
  means = x.mean((1, 2), keepdims=True)
  return _standardize(x, (1, 2)) + alpha * _standardize(means, -1)


class InstanceNorm2d(nn.Module):
  """Each channel of each image at zero mean and unit variance, then scaled and shifted."""

  @nn.compact
  def __call__(self, x: Images) -> Images:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return (scale * _standardize(x.astype(jnp.float32), (1, 2)) + bias).astype(x.dtype)


class InstanceNorm2dPlus(nn.Module):
  """InstanceNorm++, which keeps how the means of the channels differ."""

  @nn.compact
  def __call__(self, x: Images) -> Images:
    alpha = self.param('alpha', _near_one, (x.shape[-1],))
    gamma = self.param('gamma', _near_one, (x.shape[-1],))
    beta = self.param('beta', nn.initializers.zeros, (x.shape[-1],))
    return (gamma * _plus(x.astype(jnp.float32), alpha) + beta).astype(x.dtype)


class ConditionalInstanceNorm2dPlus(nn.Module):
  """InstanceNorm++ with parameters for each of `num_classes` noise scales."""

  num_classes: int

  @nn.compact
  def __call__(self, x: Images, labels: Labels) -> Images:
    def init(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
      classes, features = shape[0], shape[1] // 3
      scales, shift = _near_one(key, (classes, 2 * features)), jnp.zeros((classes, features))
      return jnp.concatenate([scales, shift], axis=-1).astype(dtype)

    table = nn.Embed(self.num_classes, 3 * x.shape[-1], embedding_init=init)
    gamma, alpha, beta = jnp.split(table(labels)[:, None, None, :], 3, axis=-1)
    return (gamma * _plus(x.astype(jnp.float32), alpha) + beta).astype(x.dtype)


class VarianceNorm2d(nn.Module):
  """Each channel of each image divided by its standard deviation, then scaled."""

  @nn.compact
  def __call__(self, x: Images) -> Images:
    scale = self.param('scale', _near_one, (x.shape[-1],))
    h = x.astype(jnp.float32)
    return (scale * h * _inverse_std(h, (1, 2))).astype(x.dtype)


_NORMALIZATIONS: dict[str, type[nn.Module]] = {
  'InstanceNorm': InstanceNorm2d,
  'InstanceNorm++': InstanceNorm2dPlus,
  'VarianceNorm': VarianceNorm2d,
}
NORMALIZATIONS = (*_NORMALIZATIONS, 'GroupNorm')


def normalize(x: Images, name: str) -> Images:
  """Applies one of `NORMALIZATIONS`; call it inside a compact module."""
  return group_norm(x, min_group_size=1) if name == 'GroupNorm' else _NORMALIZATIONS[name]()(x)
