"""The steps of a predictor-corrector sampler: what predictors and correctors ask for their numbers.

A step leads from time t to the earlier time s. There are two kinds. `GridStep` is that of any time
grid: its numbers are of the SDE's exact transition from s to t,

  p(x_t | x_s) = N(r x_s, v I),    r = alpha_t / alpha_s,    v = sigma_t^2 - r^2 sigma_s^2.

`ChainStep` is the released code's step of a chain: on the grid of the chain's own N times, it is
what published samples were drawn with.
"""

from typing import Protocol, runtime_checkable

import flax
import jax.numpy as jnp
import numpy as np

from runtime.shapes import Data, HostTimes, PerRow, StepPerRow
from samplers.time_grids import in_float64
from sde_lib import Chain, expand, SDE


@runtime_checkable
class Step(Protocol):
  """One step, from times t to times t - dt; a pytree of its arrays."""

  t: PerRow
  dt: PerRow

  @property
  def known_at(self) -> PerRow:
    """The times at whose noise a constraint puts what is known, once the step is taken."""

  @property
  def langevin_alpha(self) -> PerRow:
    """alpha in the step size of a Langevin corrector at t (Algorithms 4 and 5)."""

  def discretize(self, x: Data) -> tuple[Data, PerRow]:
    """f and G of the forward step, x_t = x_s + f(x_s) + G z (Appendix E)."""

  def ancestral(self, x: Data, score: Data) -> tuple[Data, PerRow]:
    """Mean and standard deviation of p(x_s | x_t, x_0), x_0 from the score."""


@flax.struct.dataclass
class GridStep:
  """A step of any grid, of every row; or n steps, before one is taken out for all rows."""

  t: PerRow
  dt: PerRow
  s: PerRow
  ratio: PerRow  # r
  variance: PerRow  # v
  kept: PerRow  # sigma_s / sigma_t

  @classmethod
  def of_grid(cls, sde: SDE, times: HostTimes) -> 'GridStep':
    """The n steps that begin at descending `times`; the last one ends in clean data, at 0."""
    alpha, sigma, lam = (in_float64(f, times) for f in (sde.alpha, sde.sigma, sde.log_snr))
    ends = np.append(times[1:], 0.0)
    alpha_s, sigma_s, lam_s = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0), lam[1:]
    # v = sigma_t^2 (1 - exp(-2 h)) does not subtract what is almost equal; clean data: h = inf.
    h = np.append(lam_s - lam[:-1], np.inf)
    variance = -np.square(sigma) * np.expm1(-2 * h)
    kept = np.divide(sigma_s, sigma, out=np.zeros_like(sigma), where=sigma > 0)
    arrays = times, times - ends, ends, alpha / alpha_s, variance, kept
    return cls(*(jnp.asarray(v, jnp.float32) for v in arrays))

  @property
  def known_at(self) -> PerRow:
    return self.s

  @property
  def langevin_alpha(self) -> PerRow:
    return jnp.square(self.ratio)  # 1 - beta of the VP SDE

  def discretize(self, x: Data) -> tuple[Data, PerRow]:
    return expand(self.ratio - 1, x) * x, jnp.sqrt(self.variance)

  def ancestral(self, x: Data, score: Data) -> tuple[Data, PerRow]:
    mean = (x + expand(self.variance, x) * score) / expand(self.ratio, x)
    return mean, jnp.sqrt(self.variance) * self.kept


@flax.struct.dataclass
class ChainStep:
  """A step of a chain, as released, of every row; or N, before one is taken out for all rows."""

  t: PerRow
  dt: PerRow
  number: PerRow  # i of the chain, in float32
  chain: Chain = flax.struct.field(pytree_node=False)

  @classmethod
  def of_chain(cls, chain: Chain, times: HostTimes) -> 'ChainStep':
    """The N steps that begin at `times`; the last one is as long as the one before."""
    dts = -np.diff(times)
    arrays = times, np.append(dts, dts[-1]), np.arange(chain.N - 1, -1, -1)
    t, dt, number = (jnp.asarray(v, jnp.float32) for v in arrays)
    return cls(t, dt, number, chain)

  @property
  def i(self) -> StepPerRow:
    """The step of the chain, int32; of this form, since XLA then rounds what is made of it as of a
    time's index, and samples stay what they always were to the bit.
    """
    return jnp.clip(jnp.round(self.number), 0, self.chain.N - 1).astype(jnp.int32)

  @property
  def known_at(self) -> PerRow:
    return self.t  # as in the released code, though x is at the next time

  @property
  def langevin_alpha(self) -> PerRow:
    return self.chain.langevin_alpha(self.i)

  def discretize(self, x: Data) -> tuple[Data, PerRow]:
    return self.chain.discretize(x, self.t, self.i)

  def ancestral(self, x: Data, score: Data) -> tuple[Data, PerRow]:
    return self.chain.ancestral(x, score, self.i)
