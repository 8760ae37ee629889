"""From data as they are stored, images of bytes with labels, to what a network is trained on."""

import jax
from jax import Array
import jax.numpy as jnp

from sde_lib import expand


def preprocess(rng: Array, data: Array, centered: bool, flip: bool, dequantize: bool) -> Array:
  """Images as stored, uint8 [B, H, W, C], to floats in [0, 1], or in [-1, 1] if `centered`.

  Points, which are floats, stay what they are.
  """
  if data.dtype != jnp.uint8:
    return data
  rng_flip, rng_level = jax.random.split(rng)
  x = data.astype(jnp.float32)
  if flip:
    mirrored = jax.random.bernoulli(rng_flip, shape=x.shape[:1])
    x = jnp.where(expand(mirrored, x), x[:, :, ::-1], x)
  x = (x + jax.random.uniform(rng_level, x.shape)) / 256 if dequantize else x / 255
  return 2 * x - 1 if centered else x


def drop_labels(rng: Array, labels: Array, share: float, null: int) -> Array:
  """Labels [B] of which each is replaced by the null label with probability `share`.

  A network that is trained so knows the score of every class and that of all together, which is
  what classifier-free guidance needs (Algorithm 1 of https://arxiv.org/abs/2207.12598).
  """
  return jnp.where(jax.random.bernoulli(rng, share, labels.shape), null, labels)
