"""Which pairs of times a consistency model is trained at, at which step: all that schedules change.

The number N of times of a grid, the average mu that the target follows, or how close r comes to t:
Song et al. 2023 (https://arxiv.org/abs/2303.01469), Song & Dhariwal 2023 (arXiv 2310.14189), Geng
et al. 2024 (arXiv 2406.14548).
"""

import abc
import dataclasses
import math

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from runtime.shapes import Key, PerRow
from samplers.time_grids import in_float64
from sde_lib import SDE
from training.averages import Average, ConstantRate


@dataclasses.dataclass(frozen=True)
class Changing:
  """What may change while training goes on; unless it says otherwise, it does not."""

  @property
  def target(self) -> Average | None:
    """The average of the parameters that f' has; None if they are those of f."""
    return None

  @property
  def last_step(self) -> int:
    """A step from which on all is as it will stay."""
    return 0


@dataclasses.dataclass(frozen=True)
class Curriculum(Changing, abc.ABC):
  """What changes while training goes on: the pairs of times, and the rate of the target.

  Attributes:
    sde: whose times they are.
    eps: the earliest, where f(x, eps) = x.
  """

  sde: SDE
  eps: float

  @abc.abstractmethod
  def pairs(self, rng: Key, step: Array, n: int) -> tuple[PerRow, PerRow]:
    """Draws n times t, and r < t of each, for the step number `step`, from 0 on."""

  def levels(self) -> tuple[float, float]:
    """The noise levels s of T and eps."""
    first, last = np.exp(-in_float64(self.sde.log_snr, np.array([self.sde.T, self.eps])))
    return float(first), float(last)

  def time_of_level(self, s: PerRow) -> PerRow:
    """The time of a noise level, within [eps, T] whatever the rounding."""
    return jnp.clip(self.sde.time_of_log_snr(-jnp.log(s)), self.eps, self.sde.T)


@dataclasses.dataclass(frozen=True)
class Counts(Changing, abc.ABC):
  """How many intervals the grid of times has at a step."""

  @abc.abstractmethod
  def __call__(self, step: Array) -> Array:
    """The number of intervals, int32 []; of times it is one more."""


@dataclasses.dataclass(frozen=True)
class Constant(Counts):
  """Always the same.

  Attributes:
    n: intervals.
    mu: the share that the average of the target keeps in a step; 0 for no average.
  """

  n: int = 17
  mu: float = 0.0

  def __call__(self, step: Array) -> Array:
    return jnp.full_like(step, self.n)

  @property
  def target(self) -> Average | None:
    return ConstantRate(self.mu) if self.mu else None


@dataclasses.dataclass(frozen=True)
class Growing(Counts):
  """From `start` to `end` intervals, whose squares grow evenly, and an average that slows down.

  n = ceil(sqrt(k / K ((end + 1)^2 - start^2) + start^2) - 1) at step k of K, at least 1, and mu =
  exp(start log(mu) / n) (https://arxiv.org/abs/2303.01469, Appendix C). Beyond K it goes on so.

  Attributes:
    steps: K.
    start, end: s_0 and s_1.
    mu: mu_0, that of n = start.
  """

  steps: int
  start: int = 2
  end: int = 150
  mu: float = 0.9

  def __call__(self, step: Array) -> Array:
    growth = step / self.steps * ((self.end + 1) ** 2 - self.start**2)
    n = jnp.ceil(jnp.sqrt(growth + self.start**2) - 1)
    return jnp.maximum(n, 1).astype(jnp.int32)

  @property
  def target(self) -> Average | None:
    return GrowingAverage(self)

  @property
  def last_step(self) -> int:
    return self.steps


@dataclasses.dataclass(frozen=True)
class GrowingAverage(Average):
  """The average of the target, with mu of the number of intervals before the step."""

  counts: Growing

  def weight(self, n: Array) -> Array | float:
    rate = self.counts.start * math.log(self.counts.mu)
    return -jnp.expm1(rate / self.counts(n - 1).astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Doubling(Counts):
  """min(start 2^floor(k / K'), end) intervals at step k (https://arxiv.org/abs/2310.14189, Eq. 11).

  K' = floor(K / (log2 floor(end / start) + 1)), so that each number has the same share of K steps.

  Attributes:
    steps: K.
    start, end: s_0 and s_1.
  """

  steps: int
  start: int = 10
  end: int = 1280

  def __call__(self, step: Array) -> Array:
    most = math.ceil(math.log2(self.end / self.start))
    doublings = jnp.minimum(step // self._every, max(0, most))
    return jnp.minimum(self.start * 2**doublings, self.end).astype(jnp.int32)

  @property
  def _every(self) -> int:
    return max(1, int(self.steps / (math.log2(max(1, self.end // self.start)) + 1)))

  @property
  def last_step(self) -> int:
    return self.steps


@dataclasses.dataclass(frozen=True)
class NormalLaw:
  """log s is normal, within the levels of a curriculum."""

  mean: float = -1.1
  std: float = 2.0

  def __call__(self, rng: Key, n: int, low: float, high: float) -> PerRow:
    """Draws n levels between two."""
    lowest, highest = ((math.log(level) - self.mean) / self.std for level in (low, high))
    normal = jax.random.truncated_normal(rng, lowest, highest, (n,))
    return jnp.clip(jnp.exp(self.mean + self.std * normal), low, high)


LOG_NORMAL = NormalLaw()  # that of both papers


@dataclasses.dataclass(frozen=True)
class Grid(Curriculum):
  """Neighbours of a grid of times, equally spaced in s^(1 / rho) from T down to eps.

  Attributes:
    counts: how many intervals there are at a step.
    rho: of the spacing.
    law: of the noise level that lies in the interval between the two, as Eq. 10 of
      https://arxiv.org/abs/2310.14189 has it; None if all intervals are drawn alike.
  """

  counts: Counts
  rho: float = 7.0
  law: NormalLaw | None = None

  @property
  def target(self) -> Average | None:
    return self.counts.target

  @property
  def last_step(self) -> int:
    return self.counts.last_step

  def pairs(self, rng: Key, step: Array, n: int) -> tuple[PerRow, PerRow]:
    count = self.counts(step)
    i = jnp.minimum(jnp.floor(self._places(rng, n) * count), count - 1)
    return self.time(i, count), self.time(i + 1, count)

  def time(self, i: Array, count: Array) -> PerRow:
    """The time i = 0 ... count of the grid of so many intervals; the first is T, the last eps."""
    first, last = self._ends
    s = (first + i / count * (last - first)) ** self.rho
    inner = self.time_of_level(s)
    return jnp.where(i == 0, self.sde.T, jnp.where(i == count, self.eps, inner))

  def _places(self, rng: Key, n: int) -> PerRow:
    """Draws n places between the ends of the grid, from 0 to 1."""
    if self.law is None:
      return jax.random.uniform(rng, (n,))
    first, last = self._ends
    high, low = self.levels()
    return (first - self.law(rng, n, low, high) ** (1 / self.rho)) / (first - last)

  @property
  def _ends(self) -> tuple[float, float]:
    first, last = self.levels()
    return first ** (1 / self.rho), last ** (1 / self.rho)


@dataclasses.dataclass(frozen=True)
class Approaching(Curriculum):
  """r comes close to t in stages (https://arxiv.org/abs/2406.14548, Sec. 3.2 and Appendix A).

  In noise levels it is r = t (1 - q^-a (1 + k / (1 + exp(b t)))) in stage a = 1, 2, ..., and at
  least eps. In the first stages, r of a small t is eps, where f' is the data: that is the loss of a
  denoiser, which the model that training begins with has been trained for.

  Attributes:
    steps: of the whole training.
    q, k, b: of the formula above.
    stages: how many there are, of equally many steps.
    law: of the noise level t.
  """

  steps: int
  q: float = 2.0
  k: float = 8.0
  b: float = 1.0
  stages: int = 8
  law: NormalLaw = LOG_NORMAL

  @property
  def last_step(self) -> int:
    return self.steps - 1

  def pairs(self, rng: Key, step: Array, n: int) -> tuple[PerRow, PerRow]:
    high, low = self.levels()
    # Some way above eps: there is nothing to learn where t = r.
    t = self.time_of_level(self.law(rng, n, low * 1.001, high))
    stage = jnp.minimum(step // max(1, self.steps // self.stages), self.stages - 1) + 1
    s = jnp.exp(-self.sde.log_snr(t))
    share = self.q ** -stage.astype(jnp.float32) * (1 + self.k * jax.nn.sigmoid(-self.b * s))
    return t, self.time_of_level(jnp.maximum(s * (1 - share), low))
