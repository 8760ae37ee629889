"""Noise between the levels of images that is learned, for a tighter bound on their likelihood.

Images are whole numbers y, and a score model has a density p, per level, of x = y + u with u in
[0, 1)^D. For any density q(u | y) of that noise (Ho et al. 2019, https://arxiv.org/abs/1902.00275)

    log P(y) = log E_q[p(y + u) / q(u | y)] >= E_q[log p(y + u) - log q(u | y)],

with equality if q is what p itself says of u. Uniform noise is q = 1. Here every value has a
logistic law in logit space, whose place and scale a small network reads off the image:

    u = sigmoid(place + scale logit(v)),  v uniform in (0, 1);

place 0 and scale 1, what a new network says, is uniform noise. The model stays what it is. The
gradient of its log p, which the network of the noise is trained with, is its score at eps. In Song,
Durkan, Murray & Ermon 2021, https://arxiv.org/abs/2101.09258, q is a flow, whose values depend on
each other as well, trained for their bound.
"""

from contextlib import closing
import dataclasses
from typing import Any

from etils import epath
import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import optax

from data.batches import train_batches
from data.codec import Codec, level_noise
from data.images import Source
from evaluation.bits_per_dim import BitsPerDim
from evaluation.evaluate import Measurement
from models.score import Params
from runtime import processes
from sde_lib import ScoreFn
from training.step import told_in_evaluation
from workdir.reports import Report

RATE, AVERAGE = 2e-3, 0.99  # of Adam, and of the average of the parameters
_EDGE = 1e-6  # v is kept so far from 0 and 1, where its logit would be infinite
_CALM = 3.0  # the largest absolute value of a scale's logarithm


class PlaceAndScale(nn.Module):
  """Of each value's noise, [B, H, W, C, 2], from images [B, H, W, C]; the scale as its logarithm.

  Attributes:
    features: of its hidden layers.
    depth: how many of them there are, each a 3x3 convolution.
  """

  features: int = 64
  depth: int = 4

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = nn.Conv(self.features, (3, 3))(x)
    for _ in range(self.depth - 1):
      h = h + nn.Conv(self.features, (3, 3))(nn.swish(nn.LayerNorm()(h)))
    last = nn.Conv(2 * x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros)
    return last(nn.swish(nn.LayerNorm()(h))).reshape(*x.shape, 2)


NETWORK = PlaceAndScale()


def noise_of(told: Array, v: Array) -> tuple[Array, Array]:
  """u [B, ...] and log q(u) [B] for place and scale, by uniform numbers v [B, ...]."""
  place, log_scale = told[..., 0], _CALM * jnp.tanh(told[..., 1] / _CALM)
  v = jnp.clip(v, _EDGE, 1 - _EDGE)
  h = place + jnp.exp(log_scale) * (jnp.log(v) - jnp.log1p(-v))
  # q = dv / du, and du / dv = scale u (1 - u) / (v (1 - v)).
  log_q = jnp.log(v) + jnp.log1p(-v) - log_scale - jax.nn.log_sigmoid(h) - jax.nn.log_sigmoid(-h)
  return jax.nn.sigmoid(h), log_q.reshape(len(v), -1).sum(-1)


@dataclasses.dataclass(frozen=True, eq=False)  # compiled as a function, which has to be hashable
class Learned:
  """Noise of the law that a network reads off the images; see `evaluation.bits_per_dim`."""

  codec: Codec
  params: Params
  steps: int

  @property
  def name(self) -> str:
    return f'variational, {self.steps} steps'

  def __call__(self, rngs: Array, images: Array) -> tuple[Array, Array]:
    return _draw(self.codec, self.params, images, jax.vmap(level_noise)(rngs, images))


def _draw(codec: Codec, params: Params, images: Array, v: Array) -> tuple[Array, Array]:
  told: Any = NETWORK.apply(params, codec.scaled(images))
  u, log_q = noise_of(told, v)
  return codec.between_levels(images, u), log_q


def loss(
  params: Params, images: Array, rng: Array, score_fn: ScoreFn, eps: float, codec: Codec
) -> Array:
  """What has the gradient of E[log q - log p], per value: that of log p is the score at eps."""
  x0, log_q = _draw(codec, params, images, jax.random.uniform(rng, images.shape))
  score = jax.lax.stop_gradient(score_fn(x0, jnp.full(len(x0), eps)))
  return (log_q - (score * x0).reshape(len(x0), -1).sum(-1)).mean() / codec.dim


def fit(bits: BitsPerDim, source: Source, eps: float, steps: int, params: Params) -> Learned:
  """The law that is learned for a model with these parameters, of training images."""
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(RATE, steps))
  )

  @jax.jit
  def begin(rng: Array) -> Any:
    params = NETWORK.init(rng, jnp.zeros((1, *bits.codec.model_shape)))
    return params, params, tx.init(params)

  @jax.jit
  def step(state: Any, batch: Any, rng: Array, model_params: Params) -> Any:
    params, average, moments = state
    told = told_in_evaluation(batch, bits.model, bits.codec)
    score_fn = bits.model.bind(model_params, **told)
    gradient = jax.grad(loss)(params, batch['data'], rng, score_fn, eps, bits.codec)
    updates, moments = tx.update(gradient, moments, params)
    params = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda a, p: AVERAGE * a + (1 - AVERAGE) * p, average, params)
    return params, average, moments

  state, seed = begin(bits.keys.key('dequantization')), bits.keys.seed
  with closing(train_batches(source, bits.batch_size, seed=seed, **processes.share())) as batches:
    for i in range(steps):
      batch = bits.devices.put(next(batches))
      state = step(state, batch, bits.keys.key('dequantization', 1 + i), params)
  return Learned(bits.codec, state[1], steps)


@dataclasses.dataclass(frozen=True)
class WithLearnedNoise(Measurement):
  """Bits per dimension with noise that is fitted to each checkpoint, before it is measured.

  Attributes:
    bits: with uniform noise.
    source: training images.
    eps: the smallest time that the score is known at.
    steps: of the fit.
  """

  bits: BitsPerDim
  source: Source
  eps: float
  steps: int

  @property
  def class_names(self) -> Any:
    return self.bits.class_names

  def is_in(self, report: Report) -> bool:
    as_fitted = Learned(self.bits.codec, {}, self.steps)
    return dataclasses.replace(self.bits, dequantization=as_fitted).is_in(report)

  def measure(self, params: Params, step: int, folder: epath.Path) -> Report:
    learned = fit(self.bits, self.source, self.eps, self.steps, params)
    return dataclasses.replace(self.bits, dequantization=learned).measure(params, step, folder)
