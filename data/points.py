"""Points whose density and score are known, at every level of noise: what theory is tried on.

Each distribution gives `log_density(x, alpha, std)`, that of alpha x_0 + std z for data x_0 and
standard normal z; the score after diffusion by any SDE follows. `load` makes a dataset of one.
"""

import abc
from collections.abc import Callable
import dataclasses
import math

import flax
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from data.images import Source
from runtime.errors import unknown, UserError
from sde_lib import expand, SDE

SIZES = {'train': 50_000, 'test': 10_000}  # points


class Distribution(abc.ABC):
  """Of data of any shape; a pytree of its arrays."""

  @abc.abstractmethod
  def sample(self, rng: Array, n: int) -> Array:
    """Draws n points [n, ...]."""

  @abc.abstractmethod
  def log_density(self, x: Array, alpha: Array | float = 1.0, std: Array | float = 0.0) -> Array:
    """log p(x) [B] of alpha x_0 + std z, where alpha and std are numbers or [B]."""

  def score_fn(self, sde: SDE) -> 'Diffused':
    """The score of the data after diffusion by `sde`."""
    return Diffused(self, sde)


@flax.struct.dataclass
class Diffused:
  """grad_x log p_t(x), a `ScoreFn`; and log p_t(x) itself."""

  data: Distribution
  sde: SDE = flax.struct.field(pytree_node=False)

  def __call__(self, x: Array, t: Array) -> Array:
    return jax.grad(lambda x: self.log_density(x, t).sum())(x)

  def log_density(self, x: Array, t: Array) -> Array:
    """log p_t(x) [B] for x [B, ...] and t [B]."""
    return self.data.log_density(x, self.sde.alpha(t), self.sde.sigma(t))


@flax.struct.dataclass
class Mixture(Distribution):
  """p(x_0) = sum_k weights[k] N(means[k], stds[k]^2 I), on data of any shape."""

  weights: Array  # [K]
  means: Array  # [K, ...]
  stds: Array  # [K]

  def sample(self, rng: Array, n: int) -> Array:
    rng_k, rng_z = jax.random.split(rng)
    k = jax.random.choice(rng_k, len(self.weights), (n,), p=self.weights)
    z = jax.random.normal(rng_z, (n, *self.means.shape[1:]))
    return self.means[k] + expand(self.stds[k], z) * z

  def log_density(self, x: Array, alpha: Array | float = 1.0, std: Array | float = 0.0) -> Array:
    alpha, std = (jnp.broadcast_to(v, x.shape[:1])[:, None] for v in (alpha, std))
    variance = (alpha * self.stds) ** 2 + std**2  # [B, K]
    away = x[:, None] - expand(alpha, x[:, None]) * self.means  # [B, K, ...]
    squares = jnp.square(away).reshape(*away.shape[:2], -1)
    log_norm = 0.5 * squares.shape[-1] * jnp.log(2 * jnp.pi * variance)
    log_each = jnp.log(self.weights) - log_norm - 0.5 * squares.sum(-1) / variance
    return jax.nn.logsumexp(log_each, axis=1)

  def mean(self) -> np.ndarray:
    """The mean [...] of the data."""
    return np.tensordot(np.asarray(self.weights), np.asarray(self.means), 1)

  def cov(self) -> np.ndarray:
    """The covariance [D, D] of the data, flattened."""
    weights, stds = np.asarray(self.weights), np.asarray(self.stds)
    means = np.asarray(self.means).reshape(len(weights), -1)
    centred = means - weights @ means
    return (weights * centred.T) @ centred + (weights @ stds**2) * np.eye(means.shape[1])


@flax.struct.dataclass
class ClassMixture(Mixture):
  """A mixture whose components are of classes, in the order of their labels."""

  classes: Array  # [K], the label of each component
  class_names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

  def of_class(self, label: int) -> Mixture:
    """p(x_0 | label)."""
    weights = jnp.where(self.classes == label, self.weights, 0.0)
    return Mixture(weights / weights.sum(), self.means, self.stds)

  def sample_labelled(self, rng: Array, n: int) -> tuple[Array, Array]:
    """Draws n points [n, ...], the same as `sample`, and their labels [n]."""
    rng_k, _ = jax.random.split(rng)
    k = jax.random.choice(rng_k, len(self.weights), (n,), p=self.weights)
    return self.sample(rng, n), self.classes[k]


def parzen(points: Array) -> Mixture:
  """The empirical distribution of points [n, ...], which diffusion makes a Parzen window density.

  `parzen(points).score_fn(sde)` is the exact score of that kernel density estimate, whose bandwidth
  is sigma(t): what denoising score matching on finitely many points learns in the end
  (Vincent 2011).
  """
  n = len(points)
  return Mixture(jnp.full(n, 1 / n), jnp.asarray(points), jnp.zeros(n))


@flax.struct.dataclass
class Gaussian(Distribution):
  """N(mu, directions diag(variances) directions^T) over the D flattened dimensions."""

  mu: Array  # [...]
  variances: Array  # [D]
  directions: Array  # [D, D], orthonormal columns

  @classmethod
  def of(cls, mu: Array, cov: Array) -> 'Gaussian':
    """With a covariance [D, D]."""
    return cls(jnp.asarray(mu), *jnp.linalg.eigh(cov))

  def mean(self) -> np.ndarray:
    """The mean [...] of the data."""
    return np.asarray(self.mu)

  def cov(self) -> np.ndarray:
    """The covariance [D, D] of the data, flattened."""
    directions = np.asarray(self.directions)
    return (directions * np.asarray(self.variances)) @ directions.T

  def sample(self, rng: Array, n: int) -> Array:
    z = jax.random.normal(rng, (n, len(self.variances)))
    away = jnp.matmul(z * jnp.sqrt(self.variances), self.directions.T, precision='highest')
    return self.mu + away.reshape(n, *self.mu.shape)

  def log_density(self, x: Array, alpha: Array | float = 1.0, std: Array | float = 0.0) -> Array:
    alpha, std = (jnp.broadcast_to(v, x.shape[:1])[:, None] for v in (alpha, std))
    away = x - expand(alpha[:, 0], x) * self.mu
    variances = alpha**2 * self.variances + std**2  # [B, D]
    along = jnp.matmul(away.reshape(len(x), -1), self.directions, precision='highest')
    squares = jnp.square(along)
    return -0.5 * (squares / variances + jnp.log(2 * jnp.pi * variances)).sum(-1)


@flax.struct.dataclass
class Checkerboard(Distribution):
  """Uniform on every other square of a board in [-half, half]^2."""

  half: float = 4.0
  squares: int = flax.struct.field(pytree_node=False, default=4)  # along a side; even

  def _places(self) -> np.ndarray:
    return np.stack(np.nonzero(np.indices([self.squares] * 2).sum(0) % 2 == 0), axis=1)

  def sample(self, rng: Array, n: int) -> Array:
    rng_k, rng_u = jax.random.split(rng)
    places = jnp.asarray(self._places())
    corner = places[jax.random.randint(rng_k, (n,), 0, len(places))]
    return (corner + jax.random.uniform(rng_u, (n, 2))) * 2 * self.half / self.squares - self.half

  def log_density(self, x: Array, alpha: Array | float = 1.0, std: Array | float = 0.0) -> Array:
    """Noise blurs the edges to normal distribution functions; without any they are 1e-4 wide."""
    alpha, std = (jnp.broadcast_to(v, x.shape[:1])[:, None, None] for v in (alpha, std))
    std = jnp.maximum(std, 1e-4)
    edges = alpha * self.half * jnp.linspace(-1.0, 1.0, self.squares + 1)  # [B, 1, squares + 1]
    u = (edges - x[:, :, None]) / std
    log_mass = _log_normal_mass(u[..., :-1], u[..., 1:])  # [B, 2, squares]
    places = self._places()
    log_each = log_mass[:, 0, places[:, 0]] + log_mass[:, 1, places[:, 1]]
    log_area = 2 * jnp.log(alpha[:, 0, 0] * 2 * self.half / self.squares) + math.log(len(places))
    return jax.nn.logsumexp(log_each, axis=1) - log_area


def _log_normal_mass(low: Array, high: Array) -> Array:
  """log(Phi(high) - Phi(low)) for low < high, with all its digits in both tails."""
  right = low + high > 0  # then by symmetry of the left
  low, high = jnp.where(right, -high, low), jnp.where(right, -low, high)
  log_low, log_high = (_log_normal_cdf(v) for v in (low, high))
  return log_high + jnp.log(-jnp.expm1(log_low - log_high))


def _log_normal_cdf(x: Array) -> Array:
  """log Phi(x), whose derivative is right far to the left too, where JAX loses it in float32."""
  near, far = jnp.maximum(x, -30.0), jnp.minimum(x, -30.0)
  # The first terms of the asymptotic series of the tail; the next is 15 / far^6.
  tail = jnp.log1p(-1 / far**2 + 3 / far**4) - jnp.log(-far) - 0.5 * math.log(2 * math.pi)
  return jnp.where(x > -30.0, jax.scipy.special.log_ndtr(near), tail - 0.5 * far**2)


def _two_gaussians(dim: int) -> Mixture:
  """Sec. 3.2.2 of https://arxiv.org/abs/1907.05600: 1/5 N((-5, -5), I) + 4/5 N((5, 5), I)."""
  means = 5.0 * jnp.stack([-jnp.ones(dim), jnp.ones(dim)])
  return Mixture(jnp.array([0.2, 0.8]), means, jnp.ones(2))


def _ring(dim: int) -> Mixture:
  """Eight Gaussians of unequal weight on a circle, in the first two dimensions."""
  angles = 2 * np.pi * np.arange(8) / 8
  means = np.zeros((8, dim))
  means[:, :2] = 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
  weights = np.arange(4.0, 12.0)
  return Mixture(jnp.array(weights / weights.sum()), jnp.array(means), jnp.full(8, 0.3))


def _curve(points: np.ndarray, std: float) -> Mixture:
  """Normal noise around a curve, given by points [K, 2] at most `std` apart.

  Normal distributions so close are as smooth as a line to eight digits.
  """
  return Mixture(
    jnp.full(len(points), 1 / len(points)), jnp.array(points), jnp.full(len(points), std)
  )


def _swiss_roll(dim: int) -> Mixture:
  u = np.pi * np.linspace(1.5, 4.5, 300)
  return _curve(u[:, None] * np.stack([np.cos(u), np.sin(u)], axis=1) / 3.5, 0.15)


def _two_moons(dim: int) -> Mixture:
  u = np.pi * np.linspace(0.0, 1.0, 60)
  upper = np.stack([np.cos(u) - 0.5, np.sin(u) - 0.25], axis=1)
  return _curve(2 * np.concatenate([upper, -upper]), 0.15)


def _branches(dim: int) -> ClassMixture:
  """Two trees that grow from one root and divide again and again: the classes left and right.

  Every branch is a row of normal distributions, so close that it is as smooth as a line. Both
  branches that follow one are `SHRINK` times as long and as wide, and have 0.9 of its mass.
  After the example of Karras et al. 2024, https://arxiv.org/abs/2406.02507, Sec. 3: thin branches,
  which a network of few features blurs, and ends of little mass, which samples may miss.
  """
  rows = [row for side in (0, 1) for row in _branch_rows(side)]
  means, stds, weights, classes = (np.concatenate(column) for column in zip(*rows, strict=True))
  return ClassMixture(
    weights=jnp.asarray(weights / weights.sum(), jnp.float32),
    means=jnp.asarray(means, jnp.float32),
    stds=jnp.asarray(stds, jnp.float32),
    classes=jnp.asarray(classes, jnp.int32),
    class_names=('left', 'right'),
  )


BRANCHINGS = 4  # rows of branches, of which each has twice as many as the one before
SHRINK = 0.72  # the length of a branch, in those of the branch that it grows from
_NORMALS = 10  # along a branch


def _branch_rows(side: int) -> list[tuple[np.ndarray, ...]]:
  """For each branch of a tree: means [K, 2], stds [K], weights [K], classes [K]."""
  sign, found = 2 * side - 1, list[tuple[np.ndarray, ...]]()
  tips = [(np.array([0.0, -2.4]), math.pi / 2 - sign * math.radians(38))]
  for depth in range(BRANCHINGS):
    length, mass = 1.75 * SHRINK**depth, (0.9 / 2) ** depth
    next_tips = []
    for start, angle in tips:
      along = (np.arange(_NORMALS) + 0.5) / _NORMALS * length
      bent = angle + sign * 0.25 * along / length  # a curve is longer than a line, and harder
      means = start + np.stack([along * np.cos(bent), along * np.sin(bent)], axis=1)
      std = np.full(_NORMALS, length / _NORMALS / 1.6)
      label = np.full(_NORMALS, side)
      found.append((means, std, np.full(_NORMALS, mass / _NORMALS), label))
      end, turn = angle + sign * 0.25, math.radians(33)
      tip = start + length * np.array([np.cos(end), np.sin(end)])
      next_tips += [(tip, end - turn), (tip, end + turn)]
    tips = next_tips
  return found


def _gaussian(dim: int) -> Gaussian:
  """A mean of 0.5 and correlated dimensions, with standard deviations from 0.5 to 2."""
  directions = np.linalg.qr(np.random.RandomState(0).normal(size=(dim, dim)))[0]
  variances = np.geomspace(0.5, 2.0, dim) ** 2
  return Gaussian(
    *(jnp.asarray(v, jnp.float32) for v in (np.full(dim, 0.5), variances, directions))
  )


# By name: a function of the number of dimensions, and how many those may be at least and at most.
DISTRIBUTIONS: dict[str, tuple[Callable[[int], Distribution], int, int]] = {
  'two_gaussians': (_two_gaussians, 1, 1000),
  'ring': (_ring, 2, 1000),
  'checkerboard': (lambda dim: Checkerboard(), 2, 2),
  'swiss_roll': (_swiss_roll, 2, 2),
  'two_moons': (_two_moons, 2, 2),
  'gaussian': (_gaussian, 1, 1000),
  'branches': (_branches, 2, 2),
}


def distribution(name: str, dim: int) -> Distribution:
  """The distribution `name` of `DISTRIBUTIONS`, in `dim` dimensions.

  Raises:
    UserError: if there is none.
  """
  if name not in DISTRIBUTIONS:
    raise unknown('config.data.dataset of points (config.data.dim > 0):', name, DISTRIBUTIONS)
  make, least, most = DISTRIBUTIONS[name]
  if not least <= dim <= most:
    raise UserError(f'config.data.dim of {name} must be from {least} to {most}; got {dim}')
  return make(dim)


@dataclasses.dataclass(frozen=True)
class PointSource(Source):
  """Points as a dataset, with random access; those of classes have labels."""

  points: np.ndarray  # float32 [n, dim]
  labels: np.ndarray | None = None  # int32 [n]
  class_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.points)

  def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The points of `indices` [n] as 'data', float32 [n, dim], and 'label' if they have any."""
    labels = {} if self.labels is None else {'label': self.labels[indices]}
    return {'data': self.points[indices], **labels}


def load(name: str, split: str, dim: int) -> PointSource:
  """The points of a split, the same ones always; see `distribution`."""
  rng = jax.random.key(list(SIZES).index(split))
  data = distribution(name, dim)
  if isinstance(data, ClassMixture):
    points, labels = data.sample_labelled(rng, SIZES[split])
    return PointSource(
      np.asarray(points, np.float32), np.asarray(labels, np.int32), data.class_names
    )
  return PointSource(np.asarray(data.sample(rng, SIZES[split]), np.float32))
