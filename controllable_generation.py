"""Controllable generation: samples of p(x | y) from a score of p(x) (Sec. 5, Appendix I).

There are two ways, and every sampler takes either.

A `Constraint` puts what is known of x where it belongs at each time, as the paper does to inpaint
and colorize. It costs nothing, and is an approximation: the unknown part answers to what is known
with a delay, which correctors make up for.

A guided score is the score of p_t(x | y) = p_t(x) p_t(y | x) / p_t(y) (Eq. 14). What is added to
grad log p_t(x) comes from a classifier of noisy data (`ClassifierGuidance`), from a network that
knows the labels (`ClassifierFreeGuidance`), or from a linear measurement (`PosteriorGuidance`).
`Autoguidance` is of its kind, and knows no y: it leads away from the mistakes of a weaker model.
The evaluations that a sampler counts are then those of the guided score.

All classes are pytrees of their arrays, so that a sampler compiles once for all data.
"""

from collections.abc import Callable
import dataclasses
import math

import flax
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Shaped
import numpy as np

from runtime.shapes import Data, Key, Labels, PerRow, PerRowExpanded
from samplers.base import Update
from sde_lib import expand, ScoreFn, SDE

# A linear map of data to measurements of the same shape; a pytree of its arrays.
Operator = Callable[[Data], Data]
Number = float | Float[Array, '']  # a leaf, that compiled code may be given
# (x, t, labels) -> log p_t(labels | x); a pytree of its arrays.
LogProb = Callable[[Data, PerRow, Labels], PerRow]


# What is measured of an image. The first three are orthogonal projections, P P = P = P^T.


@flax.struct.dataclass
class Mask:
  """Keeps what a mask marks: P x = m x."""

  mask: Shaped[Array, ' ...'] | np.ndarray  # 1 where x is known, 0 elsewhere; broadcasts against x

  def __call__(self, x: Data) -> Data:
    return x * self.mask


@flax.struct.dataclass
class Gray:
  """The grey part of images [B, H, W, C], the mean of their channels, in every channel."""

  def __call__(self, x: Data) -> Data:
    return jnp.broadcast_to(x.mean(-1, keepdims=True), x.shape)


@flax.struct.dataclass
class BlockMean:
  """Images [B, H, W, C] at a resolution `factor` times lower, every pixel repeated."""

  factor: int = flax.struct.field(pytree_node=False)

  def __call__(self, x: Data) -> Data:
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // self.factor, self.factor, w // self.factor, self.factor, c)
    return jnp.broadcast_to(blocks.mean((2, 4), keepdims=True), blocks.shape).reshape(x.shape)


@flax.struct.dataclass
class GaussianBlur:
  """Images [B, H, W, C] blurred by a Gaussian of standard deviation `std` pixels.

  What lies outside an image counts for nothing: weights are normalised over the pixels inside.
  """

  std: float = flax.struct.field(pytree_node=False)

  def __call__(self, x: Data) -> Data:
    rows, columns = self._weights(x.shape[1]), self._weights(x.shape[2])
    return jnp.einsum('ij,kl,bjlc->bikc', rows, columns, x, precision='highest')

  def _weights(self, n: int) -> Float[Array, ' n n']:
    distances = jnp.arange(n)[:, None] - jnp.arange(n)
    return jax.nn.softmax(-0.5 * jnp.square(distances / self.std), axis=-1)


@flax.struct.dataclass
class Known:
  """The constraint P x_0 = P y of an orthogonal projection P (Appendix I.2 and I.3).

  After every update the known part of x is drawn from p_t(P x | P y), and that of its mean is the
  mean there: x <- (I - P) x + P (alpha(t) y + sigma(t) z). Inpainting is P = `Mask`, colorization
  is P = `Gray`, super-resolution is P = `BlockMean`. The paper writes colorization as inpainting
  in a basis of colours whose first vector is grey, which is the same.

  At t = 0 the mean has the known part of y itself; that of `Mask` to the bit.
  """

  y: Data  # of which only P y is read
  project: Operator
  sde: SDE = flax.struct.field(pytree_node=False)

  def __call__(self, rng: Key, update: Update, t: PerRow) -> Update:
    x, x_mean = update
    mean, std = self.sde.marginal_prob(self.y, t)
    known = mean + expand(std, x) * jax.random.normal(rng, x.shape)
    # x + P (known - x) would round what is known to the digits of x.
    return x - self.project(x) + self.project(known), x_mean - self.project(x_mean) + self.project(
      mean
    )


@dataclasses.dataclass(frozen=True)
class NoiseInterval:
  """The noise levels low < sigma / alpha <= high, the only ones that are guided.

  Kynkaanniemi et al. 2024, https://arxiv.org/abs/2404.07724, Sec. 3: guidance harms diversity where
  the noise is large, and does nothing where it is small. Elsewhere the score is that of p(x | y),
  or of the model alone.

  Raises:
    ValueError: unless 0 <= low < high.
  """

  sde: SDE
  low: float = 0.0
  high: float = math.inf

  def __post_init__(self) -> None:
    if not 0 <= self.low < self.high:
      raise ValueError(f'guided noise levels need 0 <= low < high; got {self.low} and {self.high}')

  def scale(self, scale: Number, x: Data, t: PerRow) -> PerRowExpanded:
    """`scale` inside of the interval, 1 outside; to multiply x."""
    noise = jnp.exp(-self.sde.log_snr(t))
    return expand(jnp.where((noise > self.low) & (noise <= self.high), scale, 1.0), x)


@flax.struct.dataclass
class ClassifierGuidance:
  """s(x, t) + scale grad_x log p_t(labels | x), from a classifier of noisy data (Eq. 14).

  A scale of 1 is the paper's; a larger one makes samples more typical of their class and less
  diverse (https://arxiv.org/abs/2105.05233).
  """

  score_fn: ScoreFn
  log_prob: LogProb
  labels: Labels
  scale: Number = 1.0
  interval: NoiseInterval | None = flax.struct.field(pytree_node=False, default=None)

  def __call__(self, x: Data, t: PerRow) -> Data:
    scale = self.interval.scale(self.scale, x, t) if self.interval else self.scale
    gradient = jax.grad(lambda x: self.log_prob(x, t, self.labels).sum())(x)
    return self.score_fn(x, t) + scale * gradient


@flax.struct.dataclass
class ClassifierFreeGuidance:
  """s(x, t) + scale (s(x, t | y) - s(x, t)) (https://arxiv.org/abs/2207.12598, Eq. 6).

  The difference is grad log p_t(y | x), so the scale means what it does to `ClassifierGuidance`;
  it is 1 + w in the letters of that paper.
  """

  conditional: ScoreFn
  unconditional: ScoreFn
  scale: Number = 1.0
  interval: NoiseInterval | None = flax.struct.field(pytree_node=False, default=None)

  def __call__(self, x: Data, t: PerRow) -> Data:
    scale = self.interval.scale(self.scale, x, t) if self.interval else self.scale
    score = self.unconditional(x, t)
    return score + scale * (self.conditional(x, t) - score)


@flax.struct.dataclass
class Autoguidance:
  """s(x, t) + (scale - 1) (s(x, t) - s_guide(x, t)), from a weaker model of the same data.

  Karras et al. 2024, https://arxiv.org/abs/2406.02507: D_guide + scale (D - D_guide), with the
  denoised D = (x + sigma^2 s) / alpha. The guide is smaller, or was trained for less time. Where
  the two differ it is more wrong than the model, so the model is likely to be wrong in the same
  direction, and is led away from there. Unlike guidance by labels it narrows no class on purpose.

  Written like this it is s(x, t) to the bit at a scale of 1, and where the two are the same.
  """

  score_fn: ScoreFn
  guide: ScoreFn
  scale: Number = 1.0
  interval: NoiseInterval | None = flax.struct.field(pytree_node=False, default=None)

  def __call__(self, x: Data, t: PerRow) -> Data:
    scale = self.interval.scale(self.scale, x, t) if self.interval else self.scale
    score = self.score_fn(x, t)
    return score + (scale - 1) * (score - self.guide(x, t))


@flax.struct.dataclass
class PosteriorGuidance:
  """The score of p_t(x | y) for a measurement y = A x_0 + n, with noise n ~ N(0, noise_std^2 I).

  p(x_0 | x_t) is taken to be the Gaussian with its true mean D and covariance V,

    D = (x + sigma^2 s(x, t)) / alpha,    V = sigma^2 / alpha dD/dx,

  so that p(y | x_t) = N(A D, A V A^T + noise_std^2 I), whose gradient is

    (dD/dx)^T A^T (A V A^T + noise_std^2 I)^-1 (y - A D).

  This is exact for Gaussian data. The inverse takes some iterations of conjugate gradients; each
  costs one pullback of the network and no evaluation. More of them are closer to the formula, but
  trust the derivatives of the network more; `BoundedMean` keeps samples from running away. From
  Rozet et al. 2024, https://arxiv.org/abs/2405.13712 (Sec. 4.2); with V = r^2 I in place of the
  covariance it would be https://openreview.net/forum?id=9_gsMA8MRKQ, and DPS
  (https://arxiv.org/abs/2209.14687) lets the whole inverse be a step size.
  """

  score_fn: ScoreFn
  operator: Operator
  y: Data  # without noise it is A of something, such as 0 outside of a mask
  sde: SDE = flax.struct.field(pytree_node=False)
  noise_std: Number = 0.0
  iterations: int = flax.struct.field(pytree_node=False, default=1)

  def __call__(self, x: Data, t: PerRow) -> Data:
    score, pullback = jax.vjp(lambda x: self.score_fn(x, t), x)
    alpha, variance = expand(self.sde.alpha(t), x), expand(jnp.square(self.sde.sigma(t)), x)
    denoised = (x + variance * score) / alpha
    predicted, transpose = jax.vjp(self.operator, denoised)

    def gradient(u: Data) -> Data:  # (A dD/dx)^T u; dD/dx is symmetric, as s is a gradient
      v = transpose(u)[0]
      return (v + variance * pullback(v)[0]) / alpha

    def covariance(u: Data) -> Data:
      return self.operator(variance / alpha * gradient(u)) + jnp.square(self.noise_std) * u

    u = conjugate_gradients(covariance, self.y - predicted, self.iterations)
    return score + gradient(u)


@flax.struct.dataclass
class BoundedMean:
  """The score whose E[x_0 | x_t = x] is that of `score_fn`, cut to [low, high], where data lie.

  A guided score that is wrong in places may otherwise lead samples ever further away.
  """

  score_fn: ScoreFn
  sde: SDE = flax.struct.field(pytree_node=False)
  low: Number = 0.0
  high: Number = 1.0

  def __call__(self, x: Data, t: PerRow) -> Data:
    score = self.score_fn(x, t)
    alpha, variance = expand(self.sde.alpha(t), x), expand(jnp.square(self.sde.sigma(t)), x)
    mean = (x + variance * score) / alpha
    return score + alpha / variance * (jnp.clip(mean, self.low, self.high) - mean)


def conjugate_gradients(matrix: Operator, b: Data, iterations: int) -> Data:
  """x with matrix(x) = b, for a matrix of its own, symmetric and positive, each example.

  A direction without curvature, as the projections have, ends an example's search.
  """

  def dot(u: Data, v: Data) -> PerRow:
    return (u * v).reshape(u.shape[0], -1).sum(-1)

  def ratio(a: PerRow, b: PerRow) -> PerRowExpanded:
    return expand(jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0), x)

  x, residual, direction = jnp.zeros_like(b), b, b
  for _ in range(iterations):  # few; in a loop, gradients of convolutions are slow on CPU
    product = matrix(direction)
    step = ratio(dot(residual, residual), dot(direction, product))
    previous, residual = residual, residual - step * product
    x = x + step * direction
    direction = residual + ratio(dot(residual, residual), dot(previous, previous)) * direction
  return x
