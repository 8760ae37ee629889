"""A multilayer perceptron for points, or for images as points."""

import math

import flax.linen as nn
import jax.numpy as jnp

from models.layers import ACTIVATIONS, dense, GaussianFourierProjection
from runtime.shapes import Features, Labels, PerRow


class MLP(nn.Module):
  """Residual layers, each of which is told the noise level, and the label if there are classes.

  As in the other networks, a learned vector of each label is added to the embedding of the noise
  level; the null label, num_classes, or None, stands for a point of any class.

  Attributes:
    nf: features of each layer.
    num_layers: how many residual layers.
    nonlinearity: a key of `ACTIVATIONS`.
    conditional: whether it is told the noise level at all.
    fourier_scale: of the Fourier features of the noise level.
    dtype: of the arithmetic.
    num_classes: of the labels, which need `conditional`; 0 for none.
  """

  nf: int = 128
  num_layers: int = 3
  nonlinearity: str = 'swish'
  conditional: bool = True
  fourier_scale: float = 0.2
  dtype: str = 'float32'
  num_classes: int = 0

  @nn.compact
  def __call__(
    self, x: Features, cond: PerRow, train: bool, labels: Labels | None = None
  ) -> Features:
    del train
    act = ACTIVATIONS[self.nonlinearity]
    h = dense(x.reshape(len(x), -1).astype(self.dtype), self.nf)
    if self.conditional:
      features = GaussianFourierProjection(self.nf // 2, self.fourier_scale)(cond)
      level = dense(features.astype(self.dtype), self.nf)
      if self.num_classes:
        if labels is None:
          labels = jnp.full(x.shape[:1], self.num_classes)
        level += nn.Embed(self.num_classes + 1, self.nf, dtype=level.dtype)(labels)
      level = act(level)
    for _ in range(self.num_layers):
      to = dense(act(h), self.nf)
      if self.conditional:
        to += dense(level, self.nf)
      h = (h + dense(act(to), self.nf)) / math.sqrt(2)
    return dense(act(h), math.prod(x.shape[1:])).reshape(x.shape).astype(x.dtype)
