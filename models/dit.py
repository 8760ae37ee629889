"""DiT: a transformer over the patches of an image (Peebles & Xie 2022, arXiv 2212.09748).

An image is cut into patches, each a token. Every block is told the noise level, and the class, by
the shifts, scales and gates of its normalisations, which are zero to begin with, so that each block
begins as the identity (adaLN-Zero, Sec. 3.2). The blocks are one program that runs `num_layers`
times, so that a deep network compiles as quickly as a shallow one.
"""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from models import layers
from models.layers import dense, Tokens
from models.ncsnpp import AUGMENTATION
from runtime.shapes import Condition, Features, Images, Labels, PerRow

PerImage = Float[Array, 'b 1 c']  # what all patches of an image are told

_FREQUENCIES = 256  # of the embedding of the noise level, whatever the width
_LABEL_STD = 0.02


def positions(height: int, width: int, features: int) -> np.ndarray:
  """Sines and cosines of the row and of the column of each patch [height width, features].

  A quarter of the features each: sines of the columns, their cosines, and the same of the rows.
  """
  frequencies = 10_000.0 ** (-np.arange(features // 4) / (features // 4))
  rows, columns = np.divmod(np.arange(height * width), width)
  phases = [np.outer(at, frequencies) for at in (columns, rows)]
  waves = [wave(phase) for phase in phases for wave in (np.sin, np.cos)]
  return np.concatenate(waves, axis=1).astype(np.float32)


def _zeros(x: Features | Tokens, features: int) -> Any:
  """A fully connected layer that begins as zero."""
  return nn.Dense(features, kernel_init=nn.initializers.zeros, dtype=x.dtype)(x)


def _normalized(x: Tokens, shift: PerImage, scale: PerImage) -> Tokens:
  """LayerNorm, in float32, then a scale and a shift of each image."""
  normalize = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32)
  return (normalize(x) * (1 + scale) + shift).astype(x.dtype)


class DiTBlock(nn.Module):
  """Attention between the patches and a perceptron on each, (x, level) -> (x, None).

  The pair is what a loop over blocks takes; `level` [B, f] is the embedding of noise and class.
  """

  num_heads: int
  dropout: float
  train: bool
  flash_attention: bool

  @nn.compact
  def __call__(self, x: Tokens, level: Features) -> tuple[Tokens, None]:
    features = x.shape[-1]
    told = jnp.split(_zeros(nn.silu(level), 6 * features)[:, None], 6, axis=-1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = told

    h = dense(_normalized(x, shift, scale), 3 * features)
    q, k, v = jnp.split(h.reshape(*h.shape[:2], self.num_heads, -1), 3, axis=-1)
    h = jax.nn.dot_product_attention(q, k, v, implementation=self._attention()).reshape(x.shape)
    x += gate * self._dropped(dense(h, features))

    h = nn.gelu(dense(_normalized(x, shift_mlp, scale_mlp), 4 * features), approximate=True)
    return x + gate_mlp * self._dropped(dense(h, features)), None

  def _attention(self) -> Literal['cudnn', 'xla']:
    # cuDNN's has no forward derivatives, which likelihoods take.
    fused = self.flash_attention and self.train and jax.default_backend() == 'gpu'
    return 'cudnn' if fused else 'xla'

  def _dropped(self, x: Tokens) -> Tokens:
    return nn.Dropout(self.dropout, deterministic=not self.train)(x)


class DiT(nn.Module):
  """The network, (x, cond, train, labels) -> a map like x, in float32.

  `cond`, the labels and the condition are those of `ncsnpp.NCSNpp`, as are `num_classes` and
  `num_augment_labels`.

  Attributes:
    patch_size: side of a patch, which divides that of the images.
    nf: width: features of a patch.
    num_layers: depth: blocks.
    num_heads: of attention; they divide nf, which 4 divides.
    conditional: whether it is told the noise level at all.
    embedding_type: of the noise level, fourier or positional.
    fourier_scale: of the Fourier features.
    dropout: of what attention and the perceptrons add.
    remat: gradients keep nothing from inside a block, and compute it again, for less memory.
    flash_attention: by cuDNN while training, on NVIDIA GPUs, in bfloat16.

  Raises:
    ValueError: if a size does not divide another.
  """

  patch_size: int
  nf: int
  num_layers: int
  num_heads: int
  conditional: bool = True
  embedding_type: str = 'positional'
  fourier_scale: float = 16.0
  dropout: float = 0.0
  dtype: str = 'float32'
  num_classes: int = 0
  num_augment_labels: int = 0
  remat: bool = False
  flash_attention: bool = False

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
    b, height, width, channels = x.shape
    p = self.patch_size
    if height % p or width % p:
      raise ValueError(f'patches of {p}x{p} do not make up images of {height}x{width}')
    if self.nf % self.num_heads or self.nf % 4:
      raise ValueError(f'the width, {self.nf}, must be a multiple of 4 and of the heads')
    rows, columns = height // p, width // p

    level = self._level(b, cond, labels, augment_labels)
    seen = layers.beside(x, condition).astype(self.dtype)
    patches = seen.reshape(b, rows, p, columns, p, -1)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, -1)
    h = dense(patches, self.nf) + positions(rows, columns, self.nf).astype(self.dtype)

    block = nn.remat(DiTBlock, prevent_cse=False) if self.remat else DiTBlock
    blocks = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=nn.broadcast,
      length=self.num_layers,
    )
    h, _ = blocks(self.num_heads, self.dropout, train, self.flash_attention, name='blocks')(
      h, level
    )

    told = _zeros(nn.silu(level), 2 * self.nf)[:, None]
    h = _zeros(_normalized(h, *jnp.split(told, 2, axis=-1)), p * p * channels)
    h = h.reshape(b, rows, columns, p, p, channels).transpose(0, 1, 3, 2, 4, 5)
    return h.reshape(x.shape).astype(jnp.float32)

  def _level(
    self, b: int, cond: PerRow, labels: Labels | None, augment_labels: Features | None
  ) -> Features:
    """The embedding of the noise level, of the class and of the augmentation."""
    if not self.conditional:
      return jnp.zeros((b, self.nf), self.dtype)
    if self.embedding_type == 'fourier':
      features = layers.GaussianFourierProjection(_FREQUENCIES // 2, self.fourier_scale)(cond)
    else:
      features = layers.positional_embedding(cond, _FREQUENCIES)
    features = features.astype(self.dtype)
    if self.num_augment_labels:
      if augment_labels is None:
        augment_labels = jnp.zeros((b, self.num_augment_labels))
      features += layers.linear(augment_labels.astype(self.dtype), _FREQUENCIES, AUGMENTATION)
    normal = partial(nn.Dense, self.nf, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype)
    level = normal()(features)
    level = normal()(nn.silu(level))
    if self.num_classes:
      if labels is None:
        labels = jnp.full(b, self.num_classes)
      init = nn.initializers.normal(_LABEL_STD)
      level += nn.Embed(self.num_classes + 1, self.nf, embedding_init=init, dtype=level.dtype)(
        labels
      )
    return level
