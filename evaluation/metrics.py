"""How far samples are from data, by the features that a network takes of both.

The functions are for features of any network, float [N, d], one row an image. With pool_3 of the
Inception network (`models/inception.py`) `frechet_distance` is FID, `kernel_distance` is KID. They
run in float64, except for the distances of `precision_recall`.
"""

import dataclasses
from functools import partial, reduce
import math
from operator import add

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from runtime import processes
from runtime.devices import rows_over
from runtime.errors import UserError

SUBSETS, SUBSET_SIZE = 100, 1000  # of `kernel_distance`
NEIGHBOURS = 3  # of `precision_recall`
_PIECE = 4096  # rows that `Moments.of` takes at a time
_ROWS = 512  # that `precision_recall` compares with all others at once, on each device


@dataclasses.dataclass(frozen=True)
class Moments:
  """Mean and covariance of features, in one pass over them: `Moments.of(a) + Moments.of(b)`.

  Sums merge as in Chan, Golub & LeVeque (1979, eq. 2.1), without the cancellation of
  E[x^2] - E[x]^2.

  Attributes:
    n: number of rows.
    mean: float64 [d].
    scatter: the sum of (x - mean)(x - mean)^T, float64 [d, d].
  """

  n: int
  mean: np.ndarray
  scatter: np.ndarray

  @classmethod
  def of(cls, x: np.ndarray) -> 'Moments':
    """The moments of features [N, d], in pieces, so that float64 takes little memory."""
    return reduce(add, map(cls._of_piece, np.array_split(x, math.ceil(len(x) / _PIECE))))

  @classmethod
  def _of_piece(cls, x: np.ndarray) -> 'Moments':
    x = np.asarray(x, np.float64)
    mean = x.mean(0)
    return cls(len(x), mean, (x - mean).T @ (x - mean))

  def __add__(self, other: 'Moments') -> 'Moments':
    n, apart = self.n + other.n, other.mean - self.mean
    between = np.outer(apart, apart) * (self.n * other.n / n)
    mean = self.mean + apart * (other.n / n)
    return Moments(n, mean, self.scatter + other.scatter + between)

  @property
  def cov(self) -> np.ndarray:
    """The unbiased covariance [d, d]."""
    return self.scatter / (self.n - 1)


def frechet_distance(
  mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
  """The squared Wasserstein-2 distance of two Gaussians, of means [d] and covariances [d, d].

  |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); with Inception features this is FID (Heusel et al.
  2017, https://arxiv.org/abs/1706.08500, eq. 6). The trace of the root is the sum of the singular
  values of C1^(1/2) C2^(1/2), which stays real and accurate where the covariances are singular, as
  of fewer than d images.
  """
  root = np.linalg.svd(_root(cov1) @ _root(cov2), compute_uv=False).sum()
  return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root)


def _root(cov: np.ndarray) -> np.ndarray:
  """The symmetric square root of a covariance."""
  values, vectors = np.linalg.eigh(cov)
  return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
  """exp E KL(p(y | x) || p(y)), its mean and standard deviation over parts of the samples.

  Salimans et al. 2016, https://arxiv.org/abs/1606.03498, Sec. 4.

  Args:
    logits: [N, K], of p(y | x).
    splits: the number of parts, of successive rows; each has a p(y) of its own.

  Raises:
    UserError: if there are fewer samples than parts.
  """
  if len(logits) < splits:
    raise UserError(f'an Inception score needs at least {splits} samples; got {len(logits)}')
  logits = np.asarray(logits, np.float64)
  log_p = logits - _log_sum_exp(logits, axis=1)
  scores = []
  for part in np.split(log_p, [len(log_p) * i // splits for i in range(1, splits)]):
    log_marginal = _log_sum_exp(part, axis=0) - np.log(len(part))
    scores.append(np.exp((np.exp(part) * (part - log_marginal)).sum(1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def _log_sum_exp(x: np.ndarray, axis: int) -> np.ndarray:
  most = x.max(axis, keepdims=True)
  return most + np.log(np.exp(x - most).sum(axis, keepdims=True))


def kernel_distance(
  x: np.ndarray, y: np.ndarray, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 2020
) -> tuple[float, float]:
  """Unbiased squared MMD with the kernel (x . y / d + 1)^3, and its spread over subsets.

  With Inception features this is KID (Binkowski et al. 2018, https://arxiv.org/abs/1801.01401,
  Sec. 3.2). It can fall a little below zero.

  Args:
    x: features [N, d].
    y: features [M, d].
    subsets: how many random subsets of each there are.
    size: rows in a subset, or as many as there are.
    seed: of the subsets.

  Returns:
    Mean and standard deviation over the subsets.
  """
  rng, size = np.random.RandomState(seed), min(size, len(x), len(y))
  values = []
  for _ in range(subsets):
    a = x[rng.choice(len(x), size, replace=False)].astype(np.float64)
    b = y[rng.choice(len(y), size, replace=False)].astype(np.float64)
    within = sum(k.sum() - np.trace(k) for k in (_kernel(a, a), _kernel(b, b)))
    values.append(within / (size * (size - 1)) - 2 * _kernel(a, b).mean())
  return float(np.mean(values)), float(np.std(values))


@dataclasses.dataclass(frozen=True)
class Floor:
  """How far data are from other data of the same kind, by features of so many of each.

  So much of a distance is a matter of the number of samples. A perfect model can be somewhat below
  it: samples are compared with all of the data, whose own number matters less.

  Attributes:
    n: images of each half.
    frechet: `frechet_distance` of the halves.
    kernel: `kernel_distance` of them.
  """

  n: int
  frechet: float
  kernel: float

  @classmethod
  def of(cls, data: np.ndarray, n: int, seed: int = 0) -> 'Floor':
    """Of two disjoint parts, of n rows each, of features [M, d]; of fewer where M is below 2 n.

    The parts are drawn at random: the rows of a dataset may be in an order.
    """
    n = min(n, len(data) // 2)
    rows = np.random.RandomState(seed).permutation(len(data))
    halves = data[rows[:n]], data[rows[n : 2 * n]]
    a, b = map(Moments.of, halves)
    frechet = frechet_distance(a.mean, a.cov, b.mean, b.cov)
    return cls(n, frechet, kernel_distance(*halves)[0])


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  base = x @ y.T / x.shape[1] + 1
  return base * base * base  # which NumPy's power is far slower at


def precision_recall(
  samples: np.ndarray, data: np.ndarray, mesh: jax.sharding.Mesh, k: int = NEIGHBOURS
) -> tuple[float, float]:
  """Improved precision and recall (Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991).

  Precision is the share of samples in the manifold of the data, recall that of data in the manifold
  of the samples. A manifold is the union of balls around its points, each out to the k-th nearest
  other point.

  Args:
    samples: features [N, d].
    data: features [M, d].
    mesh: the devices, which share the work.
    k: which neighbour.

  Raises:
    UserError: unless there are more than k of both.
  """
  if min(len(samples), len(data)) <= k:
    raise UserError(
      f'precision and recall need more than {k} samples and images; '
      f'got {len(samples)} and {len(data)}'
    )
  centre = data.mean(0)  # |x - y|^2 = |x|^2 + |y|^2 - 2 x . y loses less of small numbers
  samples, data = (np.asarray(x - centre, np.float32) for x in (samples, data))
  over_rows = partial(_over_rows, mesh=mesh)
  precision = over_rows(_inside, samples, data, over_rows(partial(_kth_distance, k), data, data))
  around_samples = over_rows(partial(_kth_distance, k), samples, samples)
  recall = over_rows(_inside, data, samples, around_samples)
  return float(precision.mean()), float(recall.mean())


def _squared_distances(x: Array, y: Array) -> Array:
  product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
  return ((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * product).clip(0)


def _kth_distance(k: int, x: Array, y: Array) -> Array:
  """Squared distances [B] from x [B, d] to the k-th nearest of y [N, d], x itself not counted."""
  nearest, _ = jax.lax.top_k(-_squared_distances(x, y), k + 1)
  # Of which one is wanted; XLA would see that, and sort whole rows in place of the selection.
  return -jax.lax.optimization_barrier(nearest)[:, -1]


def _inside(x: Array, y: Array, radius: Array) -> Array:
  """Whether each x [B, d] lies in a ball around one of y [N, d], of squared radius [N]."""
  return (_squared_distances(x, y) <= radius).any(1)


def _over_rows(function, x: np.ndarray, *rest: np.ndarray, mesh: jax.sharding.Mesh) -> np.ndarray:
  """function(rows of x, *rest) [N], some rows at a time, shared by the devices."""
  by_rows, whole = NamedSharding(mesh, rows_over(mesh)), NamedSharding(mesh, PartitionSpec())
  size = _ROWS * mesh.size
  shared = [processes.shard(array, whole) for array in rest]
  compiled, parts = jax.jit(function, out_shardings=whole), []
  for start in range(0, len(x), size):
    rows = np.arange(start, start + size).clip(max=len(x) - 1)
    parts.append(np.asarray(compiled(processes.shard(x[rows], by_rows), *shared)))
  return np.concatenate(parts)[: len(x)]
