"""Fast samplers: solvers that know the linear part of the reverse process exactly.

All are written with alpha(t), sigma(t) and lambda(t) = log(alpha / sigma) alone, so that VE, VP and
sub-VP are one case. Given the data prediction D(x, t) = E[x_0 | x_t = x] = (x + sigma^2 score) /
alpha, the probability flow from time s to time t < s is

  x_t = sigma_t / sigma_s x_s + alpha_t int_0^h exp(-(h - u)) D(lambda_s + u) du

with h = lambda_t - lambda_s (Lu et al. 2022, https://arxiv.org/abs/2211.01095, Eq. 8), of which
only the integral is approximated.
EDM's form of the same flow has a module of its own, `samplers.edm`.

A solver gives the numbers of each step (`coefficients`) and says what a step does with them
(`update`); `samplers.base.GridSampler` walks down the time grid with it.
"""

from collections.abc import Callable
import dataclasses

import jax
from jax import Array
from jaxtyping import Float
import numpy as np

from runtime.shapes import Data, HostTimes, Key
from samplers.base import Coefficients, Denoiser, Memory, OfStep, Update
from samplers.time_grids import finite_log_snr, in_float64
from sde_lib import SDE

GAUSS_LEGENDRE = np.polynomial.legendre.leggauss(24)


# Multistep solvers: x' = keep x + sum_j weights_j D_j + noise z, over the last values of D.


@dataclasses.dataclass(frozen=True)
class DDIM:
  """Denoising diffusion implicit models (https://arxiv.org/abs/2010.02502, Eq. 12).

  `eta` = 0 is deterministic, and the first-order solver of the probability flow; 1 draws from the
  posterior p(x_s | x_t, x_0) of ancestral sampling.
  """

  eta: float = 0.0
  nfe = 1

  def __post_init__(self) -> None:
    _check_eta(self.eta)

  def coefficients(self, sde: SDE, times: HostTimes) -> Coefficients:
    path = Path.of(sde, times)
    # The posterior's variance is sigma^2 (1 - exp(-2 h)).
    return _first_order(path, np.sqrt(1 + self.eta**2 * np.expm1(-2 * path.h)))

  def init(self, x: Data) -> Memory:
    return _no_history(x, 1)

  def update(
    self, rng: Key, denoise: Denoiser, c: OfStep, x: Data, memory: Memory
  ) -> tuple[Update, Memory]:
    mean, memory = _multistep(denoise(x, c['t']), c, x, memory)
    return _add_noise(rng, c, mean) if self.eta else (mean, mean), memory


@dataclasses.dataclass(frozen=True)
class DPMSolver:
  """DPM-Solver++ as a multistep solver (https://arxiv.org/abs/2211.01095, Algorithm 2: 2M).

  Its third order integrates the polynomial through three values exactly: that is UniP-3, the
  predictor of `UniPC`, of order three. `DPMSolver3M` is what public codes call 3M.

  `eta` = 1 makes it SDE-DPM-Solver++ (Sec. 6 there: 2M), which solves the reverse SDE; 0 is the
  probability flow, and in between the noise that is put in anew shrinks with eta. A step keeps
  exp(-eta h) of the old noise.
  """

  order: int = 2
  eta: float = 0.0
  nfe = 1

  def __post_init__(self) -> None:
    check_order(self.order, (1, 2, 3), 'dpm_solver++')
    _check_eta(self.eta)

  def coefficients(self, sde: SDE, times: HostTimes) -> Coefficients:
    path = Path.of(sde, times)
    c = _first_order(path, np.exp(-self.eta * path.h))
    c['weights'] = _adams_weights(path, self.order, self.eta)
    return c

  def init(self, x: Data) -> Memory:
    return _no_history(x, self.order)

  def update(
    self, rng: Key, denoise: Denoiser, c: OfStep, x: Data, memory: Memory
  ) -> tuple[Update, Memory]:
    mean, memory = _multistep(denoise(x, c['t']), c, x, memory)
    return _add_noise(rng, c, mean) if self.eta else (mean, mean), memory


@dataclasses.dataclass(frozen=True)
class DPMSolver3M:
  """DPM-Solver++(3M) as public codes have it, of which the paper has the first two orders.

    x' = keep x - alpha' (phi_1 D_0 - phi_2 D' + phi_3 D''),
    phi_1 = exp(-h) - 1,    phi_2 = phi_1 / h + 1,    phi_3 = phi_2 / h - 1/2,

  with h in place of (1 + eta) h, and divided differences D' and D'' / 2 of the last three values.
  But D'' stands there without its factor of 2. So the step is of order two, not three, with a
  smaller error than 2M. It begins with steps of the lower orders; `eta` is that of `DPMSolver`.
  """

  eta: float = 0.0
  nfe = 1

  def __post_init__(self) -> None:
    _check_eta(self.eta)

  def coefficients(self, sde: SDE, times: np.ndarray) -> Coefficients:
    path = Path.of(sde, times)
    c = _first_order(path, np.exp(-self.eta * path.h))
    c['weights'] = _adams_weights(path, 3, self.eta, _published_third_order)
    return c

  def init(self, x: Array) -> Memory:
    return _no_history(x, 3)

  def update(self, rng, denoise, c, x, memory) -> tuple[Update, Memory]:
    mean, memory = _multistep(denoise(x, c['t']), c, x, memory)
    return _add_noise(rng, c, mean) if self.eta else (mean, mean), memory


@dataclasses.dataclass(frozen=True)
class DEIS:
  """tAB-DEIS (Zhang & Chen 2022, https://arxiv.org/abs/2204.13902, Sec. 3.3).

  The predicted noise, (x - alpha D) / sigma, is extrapolated as a polynomial in t:
  x_t = alpha_t (x_s / alpha_s + int noise d(sigma / alpha)).
  """

  order: int = 3
  nfe = 1

  def __post_init__(self) -> None:
    check_order(self.order, (1, 2, 3, 4), 'deis')

  def coefficients(self, sde: SDE, times: HostTimes) -> Coefficients:
    path = Path.of(sde, times)
    u, w = _quadrature(path.h[:, None])
    lam = path.lam[:-1, None] + u
    t, ds = in_float64(sde.time_of_log_snr, lam), -w * np.exp(-lam)
    weights = np.zeros((len(path.h), self.order))
    for i in range(len(path.h)):
      nodes = times[max(0, i + 1 - self.order) : i + 1][::-1]
      weights[i, : len(nodes)] = path.alpha[i + 1] * _lagrange(nodes, t[i]) @ ds[i]
    keep = path.alpha[1:] / path.alpha[:-1]
    at_start = {'alpha': path.alpha[:-1], 'sigma': path.sigma[:-1]}
    return {'keep': keep, 'weights': weights, **at_start}

  def init(self, x: Data) -> Memory:
    return _no_history(x, self.order)

  def update(
    self, rng: Key, denoise: Denoiser, c: OfStep, x: Data, memory: Memory
  ) -> tuple[Update, Memory]:
    noise = (x - c['alpha'] * denoise(x, c['t'])) / c['sigma']
    after, memory = _multistep(noise, c, x, memory)
    return (after, after), memory


@dataclasses.dataclass(frozen=True)
class UniPC:
  """UniPC with B_2 (Zhao et al. 2023, https://arxiv.org/abs/2302.04867, Algorithms 5 and 6).

  The evaluation at the end of a step first corrects that step, with an interpolating polynomial,
  and then serves to predict the next one: the corrector costs nothing. B(h) only matters for
  polynomials of degree one; see `_data_weights`.
  """

  order: int = 3
  nfe = 1

  def __post_init__(self) -> None:
    check_order(self.order, (1, 2, 3), 'unipc')

  def coefficients(self, sde: SDE, times: HostTimes) -> Coefficients:
    path = Path.of(sde, times)
    c = _first_order(path, np.ones_like(path.h))
    c['weights'] = _adams_weights(path, self.order, eta=0.0)
    # Step i corrects step i - 1: D_i is new there. Before the first step nothing is to correct.
    c['correct_keep'] = np.concatenate([[1.0], c['keep'][:-1]])
    correct = np.zeros((len(path.h), self.order + 1))
    for i in range(1, len(path.h)):
      nodes = path.lam[max(0, i - self.order) : i + 1][::-1]
      # The node where the step began comes first for `_data_weights`, and second in the history.
      swapped = np.concatenate([nodes[1:2], nodes[:1], nodes[2:]])
      w = _data_weights((swapped - nodes[1]) / path.h[i - 1], path.h[i - 1])
      correct[i, : len(nodes)] = path.alpha[i] * np.concatenate([w[1:2], w[:1], w[2:]])
    return c | {'correct': correct}

  def init(self, x: Data) -> Memory:
    return x, _no_history(x, self.order + 1)

  def update(
    self, rng: Key, denoise: Denoiser, c: OfStep, x: Data, memory: Memory
  ) -> tuple[Update, Memory]:
    before, history = memory
    history = (denoise(x, c['t']), *history)
    x = c['correct_keep'] * before + _combine(c['correct'], history)
    after = c['keep'] * x + _combine(c['weights'], history)
    return (after, after), (x, history[:-1])


# A solver with two evaluations a step.


@dataclasses.dataclass(frozen=True)
class DPMSolver2S:
  """DPM-Solver++(2S): a step by way of the middle in lambda (2211.01095, Algorithm 1, r = 1/2)."""

  nfe = 2

  def coefficients(self, sde: SDE, times: HostTimes) -> Coefficients:
    path = Path.of(sde, times)
    middle = Path.of(sde, in_float64(sde.time_of_log_snr, path.lam[:-1] + path.h / 2))
    c = _first_order(path, np.ones_like(path.h)) | {'middle': middle.t}
    c['half_keep'] = middle.sigma / path.sigma[:-1]
    c['half_weight'] = -middle.alpha * np.expm1(-path.h / 2)
    return c

  def init(self, x: Data) -> Memory:
    return ()

  def update(
    self, rng: Key, denoise: Denoiser, c: OfStep, x: Data, memory: Memory
  ) -> tuple[Update, Memory]:
    half = c['half_keep'] * x + c['half_weight'] * denoise(x, c['t'])
    after = c['keep'] * x + c['weights'][0] * denoise(half, c['middle'])
    return (after, after), memory


# What they are made of.


@dataclasses.dataclass(frozen=True)
class Path:
  """The SDE at descending times t: alpha, sigma, lambda, and h, the steps of lambda."""

  t: HostTimes
  alpha: HostTimes
  sigma: HostTimes
  lam: HostTimes

  @property
  def h(self) -> HostTimes:
    return np.diff(self.lam)

  @classmethod
  def of(cls, sde: SDE, t: HostTimes) -> 'Path':
    """Raises ValueError if the log-SNR is infinite at one of the times."""
    return cls(t, in_float64(sde.alpha, t), in_float64(sde.sigma, t), finite_log_snr(sde, t))


def _first_order(path: Path, kept: np.ndarray) -> Coefficients:
  """The step that takes D as constant and keeps the fraction `kept` [n - 1] of the old noise.

  x' = alpha' D + sigma' (kept (x - alpha D) / sigma + sqrt(1 - kept^2) z)
  """
  return {
    'keep': path.sigma[1:] / path.sigma[:-1] * kept,
    # exp(-h) = sigma' alpha / (sigma alpha'); expm1 of the logarithm keeps the digits.
    'weights': (-path.alpha[1:] * np.expm1(np.log(kept) - path.h))[:, None],
    'noise': path.sigma[1:] * np.sqrt(1 - kept**2),
  }


def _adams_weights(
  path: Path, order: int, eta: float, weigh: Callable[[np.ndarray, float], np.ndarray] | None = None
) -> np.ndarray:
  """Weights [n - 1, order] of the last values of D, newest first.

  D is extrapolated as a polynomial in lambda, of lower degree while there are few values; `weigh`
  integrates it, by default `_data_weights`.
  """
  weights = np.zeros((len(path.h), order))
  for i, h in enumerate(path.h):
    nodes = path.lam[max(0, i + 1 - order) : i + 1][::-1]
    w = (weigh or _data_weights)((nodes - nodes[0]) / h, (1 + eta) * h)
    weights[i, : len(nodes)] = path.alpha[i + 1] * w
  return weights


def _published_third_order(nodes: np.ndarray, h: float) -> np.ndarray:
  """`_data_weights`, but with half the second derivative of a polynomial of degree two."""
  if len(nodes) < 3:
    return _data_weights(nodes, h)
  phi_1 = np.expm1(-h)
  phi_2 = phi_1 / h + 1
  phi_3 = phi_2 / h - 0.5
  newest, older = -nodes[1], nodes[1] - nodes[2]
  first = np.array([1, -1, 0]) / newest
  second = (first - np.array([0, 1, -1]) / older) / (newest + older)
  return -phi_1 * np.array([1, 0, 0]) + phi_2 * (first + newest * second) - phi_3 * second


def _data_weights(nodes: np.ndarray, h: float) -> np.ndarray:
  """int_0^1 h exp(-(1 - v) h) p(v) dv as weights of the values p(nodes), of which nodes[0] = 0.

  p is the polynomial through these values. A polynomial of degree one has the exact integral of
  its slope, 1 - (1 - exp(-h)) / h, replaced by (1 - exp(-h)) / 2, as DPM-Solver++(2M) and UniPC
  with B_2 are defined: it differs by h^2 / 12, and is smaller where h is large.
  """
  total = -np.expm1(-h)
  if len(nodes) == 1:
    return np.array([total])
  if len(nodes) == 2:
    return total * np.array([1 - 0.5 / nodes[1], 0.5 / nodes[1]])
  u, w = _quadrature(h)
  return _lagrange(nodes, u / h) @ (w * np.exp(u - h))


def _quadrature(h: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Gauss-Legendre nodes and weights for integrals from 0 to h, to rounding for exp(u), u < 20."""
  nodes, weights = GAUSS_LEGENDRE
  return h * (nodes + 1) / 2, h * weights / 2


def _lagrange(nodes: np.ndarray, v: np.ndarray) -> np.ndarray:
  """The polynomials [k, m] at v [m] that are 1 at one of the nodes [k] and 0 at the others."""
  basis = np.ones((len(nodes), len(v)))
  for j, node in enumerate(nodes):
    for other in np.delete(nodes, j):
      basis[j] *= (v - other) / (node - other)
  return basis


def _no_history(x: Data, length: int) -> tuple[Data, ...]:
  """Room for all but the newest of `length` values, whose weights are zero until they exist."""
  return (x,) * (length - 1)


def _combine(weights: Float[Array, ' k'], values: tuple[Data, ...]) -> Data:
  return sum(w * v for w, v in zip(weights, values, strict=False))


def _multistep(newest: Data, c: OfStep, x: Data, history: Memory) -> tuple[Data, Memory]:
  values = (newest, *history)
  return c['keep'] * x + _combine(c['weights'], values), values[:-1]


def _add_noise(rng: Key, c: OfStep, mean: Data) -> Update:
  return mean + c['noise'] * jax.random.normal(rng, mean.shape), mean


def check_order(order: int, allowed: tuple[int, ...], method: str) -> None:
  """Raises ValueError unless the order is one of those that a method has."""
  if order not in allowed:
    raise ValueError(f'the order of {method} must be one of {allowed}; got {order}')


def _check_eta(eta: float) -> None:
  if not 0 <= eta <= 1:
    raise ValueError(f'eta must be from 0 (no new noise) to 1 (as the reverse SDE); got {eta}')
