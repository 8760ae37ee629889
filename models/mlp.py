"""A multilayer perceptron for points, or for images as points."""

import math

import flax.linen as nn

from models.layers import ACTIVATIONS, dense, GaussianFourierProjection
from runtime.shapes import Features, PerRow


class MLP(nn.Module):
  """Residual layers, each of which is told the noise level.

  Attributes:
    nf: features of each layer.
    num_layers: how many residual layers.
    nonlinearity: a key of `ACTIVATIONS`.
    conditional: whether it is told the noise level at all.
    fourier_scale: of the Fourier features of the noise level.
    dtype: of the arithmetic.
  """

  nf: int = 128
  num_layers: int = 3
  nonlinearity: str = 'swish'
  conditional: bool = True
  fourier_scale: float = 0.2
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Features, cond: PerRow, train: bool) -> Features:
    del train
    act = ACTIVATIONS[self.nonlinearity]
    h = dense(x.reshape(len(x), -1).astype(self.dtype), self.nf)
    if self.conditional:
      features = GaussianFourierProjection(self.nf // 2, self.fourier_scale)(cond)
      level = act(dense(features.astype(self.dtype), self.nf))
    for _ in range(self.num_layers):
      to = dense(act(h), self.nf)
      if self.conditional:
        to += dense(level, self.nf)
      h = (h + dense(act(to), self.nf)) / math.sqrt(2)
    return dense(act(h), math.prod(x.shape[1:])).reshape(x.shape).astype(x.dtype)
