"""Time grids: at which n times a sampler asks for the score, from sde.T down to eps.

After the last time come clean data. How the times are spaced is a function (sde, n, eps) -> n
times, descending, in float64. The number of times has nothing to do with the number of noise scales
that a model was trained with.
"""

from collections.abc import Callable
import dataclasses
import functools
from functools import partial
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from runtime.shapes import HostTimes, PerTime, Times
from sde_lib import SDE

Spacing = Callable[[SDE, int, float], HostTimes]


def uniform(sde: SDE, n: int, eps: float) -> HostTimes:
  """Equal steps of t, as in the released code of Song et al. 2021."""
  return np.linspace(sde.T, eps, n)


def quadratic(sde: SDE, n: int, eps: float) -> HostTimes:
  """Equal steps of sqrt(t) (Song et al. 2020, https://arxiv.org/abs/2010.02502, Appendix D.2)."""
  times = np.linspace(math.sqrt(sde.T), math.sqrt(eps), n) ** 2
  times[0], times[-1] = sde.T, eps  # not only to rounding
  return times


def log_snr(sde: SDE, n: int, eps: float) -> HostTimes:
  """Equal steps of lambda = log(alpha / sigma) (Lu et al. 2022, https://arxiv.org/abs/2206.00927).

  For the VE SDE this is the uniform grid.
  """
  first, last = finite_log_snr(sde, np.array([sde.T, eps]))
  return _between_ends(sde, np.linspace(first, last, n), eps)


@dataclasses.dataclass(frozen=True)
class Karras:
  """Equal steps of (sigma / alpha)^(1 / rho) (https://arxiv.org/abs/2206.00364, Eq. 5)."""

  rho: float = 7.0

  def __call__(self, sde: SDE, n: int, eps: float) -> HostTimes:
    first, last = np.exp(-finite_log_snr(sde, np.array([sde.T, eps])) / self.rho)
    return _between_ends(sde, -self.rho * np.log(np.linspace(first, last, n)), eps)


def cosine(sde: SDE, n: int, eps: float) -> HostTimes:
  """Equal steps of the angle arctan(sigma / alpha): in x they turn data into noise evenly.

  Equal steps of t of the SDE whose alpha is a cosine and sigma a sine, on which progressive
  distillation was trained (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, Sec. 2).
  """
  first, last = np.arctan(np.exp(-finite_log_snr(sde, np.array([sde.T, eps]))))
  return _between_ends(sde, -np.log(np.tan(np.linspace(first, last, n))), eps)


# By name, given rho.
SPACINGS: dict[str, Callable[[float], Spacing]] = {
  'uniform': lambda rho: uniform,
  'quadratic': lambda rho: quadratic,
  'log_snr': lambda rho: log_snr,
  'edm': Karras,
  'cosine': lambda rho: cosine,
}


@dataclasses.dataclass(frozen=True)
class TimeGrid:
  """n times from T down to eps.

  Raises:
    ValueError: if there are fewer than two.
  """

  n: int
  eps: float
  spacing: Spacing = uniform

  def __post_init__(self) -> None:
    if self.n < 2:
      raise ValueError(f'a time grid needs at least 2 times, T and eps; got {self.n}')

  def times(self, sde: SDE) -> HostTimes:
    """The n times of an SDE."""
    return self.spacing(sde, self.n, self.eps)


def in_float64(
  f: Callable[[Times], PerTime], v: Float[np.ndarray, ' *n']
) -> Float[np.ndarray, ' *n']:
  """f(v), computed now and in float64: differences of neighbouring times lose digits.

  The CPU of this process does it, since TPUs have no float64; the device that JAX uses, where
  JAX_PLATFORMS leaves the CPU out.
  """
  with jax.ensure_compile_time_eval(), jax.enable_x64(True), jax.default_device(_host()):
    return np.array(_call(f, jnp.asarray(v, jnp.float64)))


@functools.cache
def _host() -> jax.Device | None:
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return None


@partial(jax.jit, static_argnums=0)
def _call(f: Callable[[Times], PerTime], v: Times) -> PerTime:
  """f(v), compiled once for a method of an SDE; `jax.jit` of the method itself forgets it."""
  return f(v)


def finite_log_snr(sde: SDE, times: HostTimes) -> HostTimes:
  """sde.log_snr(times), in float64.

  Raises:
    ValueError: if it is infinite.
  """
  lam = in_float64(sde.log_snr, times)
  if not np.isfinite(lam).all():
    raise ValueError(
      f'{type(sde).__name__} has no noise left at t = {np.min(times)}, or no signal at t = '
      f'{np.max(times)}, where this sampler or time grid needs both; choose eps > 0'
    )
  return lam


def _between_ends(sde: SDE, lam: HostTimes, eps: float) -> HostTimes:
  """The times of the log-SNRs `lam`, which lie between those of T and eps."""
  times = in_float64(sde.time_of_log_snr, lam)
  times[0], times[-1] = sde.T, eps
  return times
