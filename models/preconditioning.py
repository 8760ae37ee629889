"""How the output of a network is read as a score, and as a denoised image.

At x_t = alpha x_0 + sigma z the output F of a network may stand for the score itself, for the
noise, for the denoised image, or for a mixture of these. They say the same:

  E[x_0 | x_t] = (x + sigma^2 s) / alpha,    E[z | x_t] = -sigma s,    s = grad log p_t(x).

Both the score and the denoised image are a x + b F, whose a and b stand here in closed form: one is
not computed from the other, so that nothing cancels where sigma is small. An energy is the other
kind: its score is a gradient.
"""

import abc
from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from runtime.shapes import Data, PerRow, PerRowExpanded

# x -> what the network makes of it, and x as the network saw it.
Network = Callable[[Data], tuple[Data, Data]]
# (F, x, alpha, sigma) -> a x + b F.
Reading = Callable[[Data, Data, PerRowExpanded, PerRowExpanded], Data]


class Jump(NamedTuple):
  """From which time to which a consistency function leads, in numbers for each row.

  Attributes:
    alpha, sigma: of the noise kernel at the time of x.
    end_alpha, end_sigma: of that at eps.
    fall: of the log-SNR from eps to the time of x, `sde_lib.SDE.log_snr_fall`: what depends on the
      difference of the two keeps its digits.
  """

  alpha: PerRowExpanded
  sigma: PerRowExpanded
  end_alpha: PerRowExpanded
  end_sigma: PerRowExpanded
  fall: PerRowExpanded


@dataclasses.dataclass(frozen=True)
class Preconditioning(abc.ABC):
  """What the output of a network stands for.

  Attributes:
    in_float32: the score divides the rounding of the output by sigma^2, or differentiates it, so
      that a network of fewer digits than float32 is of no use where sigma is small.
  """

  in_float32: bool = dataclasses.field(default=False, kw_only=True)

  @abc.abstractmethod
  def score(self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded) -> Data:
    """grad log p_t(x); alpha and sigma are those of the noise kernel."""

  @abc.abstractmethod
  def denoised(
    self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded
  ) -> Data:
    """E[x_0 | x_t = x]."""

  def noise_minus_data(
    self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded
  ) -> Data:
    """E[z - x_0 | x_t = x]: the velocity of flow matching."""
    noise = -sigma * self.score(network, x, alpha, sigma)
    return noise - self.denoised(network, x, alpha, sigma)

  def consistency(self, network: Network, x: Data, jump: Jump) -> Data:
    """f(x, t), the end of the jump: by default one step of DDIM with the denoised x, D.

      f = sigma_eps / sigma_t x + (alpha_eps - alpha_t sigma_eps / sigma_t) D

    At t = eps it is x. The second factor is alpha_eps (1 - exp(-fall)), and D = a x + b F with a >=
    0 in every reading, so that neither the coefficient of x nor that of F is a difference.
    """
    of_data = -jump.end_alpha * jnp.expm1(-jump.fall)
    return jump.end_sigma / jump.sigma * x + of_data * self.denoised(
      network, x, jump.alpha, jump.sigma
    )

  def for_data(self, sigma_data: float) -> 'Preconditioning':
    """The same for data whose standard deviation is `sigma_data`, where that makes a difference."""
    del sigma_data
    return self

  def energy(
    self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded
  ) -> PerRow:
    """E(x, t), where p_t(x) is proportional to exp(-E(x, t)).

    Raises:
      ValueError: if the output is not read as an energy.
    """
    raise ValueError('this score model has no energy: its output is not "energy"')


@dataclasses.dataclass(frozen=True)
class Linear(Preconditioning):
  """The score and the denoised x are each a x + b F."""

  score_of: Reading
  denoised_of: Reading

  def score(self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded) -> Data:
    return self.score_of(network(x)[0], x, alpha, sigma)

  def denoised(
    self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded
  ) -> Data:
    return self.denoised_of(network(x)[0], x, alpha, sigma)


@dataclasses.dataclass(frozen=True)
class EDM(Preconditioning):
  """F of unit variance in and out, if data have the standard deviation sigma_data.

  With s = sigma / alpha and y = x / alpha it is

    D = c_skip y + c_out F(c_in y),    c_skip = sigma_data^2 / (s^2 + sigma_data^2),
    c_out = s sigma_data / sqrt(s^2 + sigma_data^2),    c_in = 1 / sqrt(s^2 + sigma_data^2)

  (Karras et al. 2022, https://arxiv.org/abs/2206.00364, Table 1), which for r^2 = sigma^2 + alpha^2
  sigma_data^2, the variance of x, reads as below.
  """

  sigma_data: float = 0.5

  def score(self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded) -> Data:
    r = self._std_of_x(alpha, sigma)
    return -x / r**2 + self.sigma_data * alpha / (sigma * r) * network(x / r)[0]

  def denoised(
    self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded
  ) -> Data:
    r = self._std_of_x(alpha, sigma)
    return alpha * self.sigma_data**2 / r**2 * x + self.sigma_data * sigma / r * network(x / r)[0]

  def consistency(self, network: Network, x: Data, jump: Jump) -> Data:
    """f(x, t) of Song et al. 2023, https://arxiv.org/abs/2303.01469, Appendix C.

    In y = x / alpha and s = sigma / alpha, with d = s - s_eps, it is

      f = alpha_eps (sigma_data^2 / (d^2 + sigma_data^2) y
                     + d sigma_data / sqrt(s^2 + sigma_data^2) F(c_in y)).

    Its second coefficient is that of DDIM's step; the first differs by less than s_eps /
    sigma_data, and published checkpoints are read so.
    """
    r = self._std_of_x(jump.alpha, jump.sigma)
    away = -jump.sigma / jump.alpha * jnp.expm1(-jump.fall)  # d
    skip = jump.end_alpha / jump.alpha / (1 + jnp.square(away / self.sigma_data))
    of_output = jump.end_alpha * jump.alpha * away * self.sigma_data / r
    return skip * x + of_output * network(x / r)[0]

  def for_data(self, sigma_data: float) -> 'Preconditioning':
    return dataclasses.replace(self, sigma_data=sigma_data)

  def _std_of_x(self, alpha: PerRowExpanded, sigma: PerRowExpanded) -> PerRowExpanded:
    return jnp.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)


@dataclasses.dataclass(frozen=True)
class Flow(Preconditioning):
  """F = E[z - x_0 | x_t = x], the velocity of flow matching; see `sde_lib.RectifiedFlow`.

  From x = alpha x_0 + sigma z follow E[z] = (x + alpha F) / (alpha + sigma) and E[x_0] = (x - sigma
  F) / (alpha + sigma), for any SDE. The sum of alpha and sigma is 1 for that of flow matching.
  """

  def score(self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded) -> Data:
    return -(x + alpha * network(x)[0]) / ((alpha + sigma) * sigma)

  def denoised(
    self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded
  ) -> Data:
    return (x - sigma * network(x)[0]) / (alpha + sigma)

  def noise_minus_data(
    self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded
  ) -> Data:
    return network(x)[0]


@dataclasses.dataclass(frozen=True)
class Energy(Preconditioning):
  """E(x) = ||x - F(x)||^2 / (2 sigma), which grows without bound unless F does as well.

  After Salimans & Ho 2021, https://openreview.net/forum?id=9AS-TF2jRNb.
  """

  def energy(
    self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded
  ) -> PerRow:
    output, seen = network(x)
    away = (seen - output).reshape(len(x), -1)
    return 0.5 * jnp.square(away).sum(-1) / sigma.reshape(len(x))

  def score(self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded) -> Data:
    return -jax.grad(lambda x: self.energy(network, x, alpha, sigma).sum())(x)

  def denoised(
    self, network: Network, x: Data, alpha: PerRowExpanded, sigma: PerRowExpanded
  ) -> Data:
    return (x + sigma**2 * self.score(network, x, alpha, sigma)) / alpha


ENERGY = 'energy'

PRECONDITIONINGS: dict[str, Preconditioning] = {
  'score': Linear(
    score_of=lambda F, x, alpha, sigma: F,
    denoised_of=lambda F, x, alpha, sigma: (x + sigma**2 * F) / alpha,
  ),
  # Of unit scale at every sigma: NCSN's division by sigma.
  'scaled_score': Linear(
    score_of=lambda F, x, alpha, sigma: F / sigma,
    denoised_of=lambda F, x, alpha, sigma: (x + sigma * F) / alpha,
  ),
  # DDPM's epsilon.
  'noise': Linear(
    score_of=lambda F, x, alpha, sigma: -F / sigma,
    denoised_of=lambda F, x, alpha, sigma: (x - sigma * F) / alpha,
  ),
  # A denoising autoencoder, F = r(x): (r(x) - x) / sigma^2 at alpha = 1 (Vincent 2011).
  'denoised': Linear(
    score_of=lambda F, x, alpha, sigma: (alpha * F - x) / sigma**2,
    denoised_of=lambda F, x, alpha, sigma: F,
    in_float32=True,
  ),
  # v = (alpha z - sigma x_0) / r, r^2 = alpha^2 + sigma^2, which is 1 for the VP SDE (Salimans &
  # Ho 2022, https://arxiv.org/abs/2202.00512, Appendix D).
  'v': Linear(
    score_of=lambda F, x, alpha, sigma: (
      -(x / (alpha**2 + sigma**2)) - alpha / (sigma * jnp.sqrt(alpha**2 + sigma**2)) * F
    ),
    denoised_of=lambda F, x, alpha, sigma: (
      alpha / (alpha**2 + sigma**2) * x - sigma / jnp.sqrt(alpha**2 + sigma**2) * F
    ),
  ),
  'edm': EDM(),
  'flow': Flow(),
  ENERGY: Energy(in_float32=True),
}
