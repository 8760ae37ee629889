"""EDM's solvers: Heun's method in sigma / alpha, with churn, and in x and t.

In y = x / alpha and s = sigma / alpha the probability flow of every SDE is

  dy/ds = (y - D) / s

(Karras et al. 2022, https://arxiv.org/abs/2206.00364, Eq. 1), where D = E[x_0 | x_t = x] is the
data prediction: so one solver serves VE, VP and sub-VP. Its grid is `samplers.time_grids.Karras`.
"""

import dataclasses
import math

import jax
import numpy as np

from runtime.shapes import Data, HostTimes, Key
from samplers.base import Coefficients, Denoiser, Memory, OfStep, Update
from samplers.multistep import check_order, Path
from samplers.time_grids import in_float64
from sde_lib import SDE


@dataclasses.dataclass(frozen=True)
class EDM:
  """Heun's method with churn (Algorithm 2).

  Noise is added until s is (1 + gamma) s, and a step of dy/ds = (y - D) / s leads down to the next
  time. Noise never exceeds that of time T, where the model was trained last. Without churn the
  first order is DDIM with eta = 0.

  Attributes:
    order: 2 for Heun's method, 1 for Euler's.
    churn: S_churn; gamma = min(S_churn / n, sqrt(2) - 1) with n times in the grid.
    tmin: S_tmin, the least s at which noise is added.
    tmax: S_tmax, the largest.
    noise: S_noise, which scales the standard deviation of the added noise.
  """

  order: int = 2
  churn: float = 0.0
  tmin: float = 0.0
  tmax: float = math.inf
  noise: float = 1.0

  def __post_init__(self) -> None:
    check_order(self.order, (1, 2), 'heun')

  @property
  def nfe(self) -> int:
    return self.order

  def coefficients(self, sde: SDE, times: HostTimes) -> Coefficients:
    path = Path.of(sde, times)
    s = np.exp(-path.lam)
    gamma = min(self.churn / len(times), math.sqrt(2) - 1)
    within = (s[:-1] >= self.tmin) & (s[:-1] <= self.tmax)
    raised = np.where(within, np.minimum((1 + gamma) * s[:-1], s[0]), s[:-1])
    start = np.where(raised > s[:-1], in_float64(sde.time_of_log_snr, -np.log(raised)), times[:-1])
    return {
      'start': start,
      'start_alpha': in_float64(sde.alpha, start),
      'start_s': raised,
      'added': self.noise * np.sqrt(raised**2 - s[:-1] ** 2),
      'alpha': path.alpha[:-1],
      'end_alpha': path.alpha[1:],
      'end_s': s[1:],
    }

  def init(self, x: Data) -> Memory:
    return ()

  def update(
    self, rng: Key, denoise: Denoiser, c: OfStep, x: Data, memory: Memory
  ) -> tuple[Update, Memory]:
    y = x / c['alpha']
    if self.churn:
      y += c['added'] * jax.random.normal(rng, x.shape)
    ds = c['end_s'] - c['start_s']
    slope = (y - denoise(c['start_alpha'] * y, c['start'])) / c['start_s']
    end = y + ds * slope
    if self.order == 2:
      end_slope = (end - denoise(c['end_alpha'] * end, c['s'])) / c['end_s']
      end = y + ds * (slope + end_slope) / 2
    x = c['end_alpha'] * end
    return (x, x), memory


@dataclasses.dataclass(frozen=True)
class FlowSolver:
  """Euler's or Heun's method in x and t (Algorithm 1): straight steps along the probability flow.

  With D = E[x_0 | x_t = x] the flow of any SDE is

    dx/dt = (f + g^2 / (2 sigma^2)) x - alpha g^2 / (2 sigma^2) D,

  which for flow matching is (x - D) / t: its first order is Euler's method for x' = v.

  Attributes:
    order: 2 for Heun's method, 1 for Euler's.
  """

  order: int = 2

  def __post_init__(self) -> None:
    check_order(self.order, (1, 2), 'flow_heun')

  @property
  def nfe(self) -> int:
    return self.order

  def coefficients(self, sde: SDE, times: np.ndarray) -> Coefficients:
    alpha, sigma, f, g = (
      in_float64(v, times) for v in (sde.alpha, sde.sigma, sde.drift_coef, sde.diffusion_coef)
    )
    if not sigma[-1] > 0:
      raise ValueError(f'{type(sde).__name__} has no noise left at t = {times[-1]}; choose eps > 0')
    rate = np.square(g / sigma) / 2
    of_x, of_data = f + rate, -alpha * rate
    return {
      'dt': np.diff(times),
      'of_x': of_x[:-1],
      'of_data': of_data[:-1],
      'end_of_x': of_x[1:],
      'end_of_data': of_data[1:],
    }

  def init(self, x: Data) -> Memory:
    return ()

  def update(
    self, rng: Key, denoise: Denoiser, c: OfStep, x: Data, memory: Memory
  ) -> tuple[Update, Memory]:
    slope = c['of_x'] * x + c['of_data'] * denoise(x, c['t'])
    end = x + c['dt'] * slope
    if self.order == 2:
      end_slope = c['end_of_x'] * end + c['end_of_data'] * denoise(end, c['s'])
      end = x + c['dt'] * (slope + end_slope) / 2
    return (end, end), memory
