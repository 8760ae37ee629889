"""From a network and an SDE to a score: the one place that knows how networks are read.

A network sees neither the SDE nor the config. What it is conditioned on is one of the functions
(chain, t) -> a number for each row, below; what its output means is a `Preconditioning`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Unpack

import flax
import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import NamedSharding

from models.preconditioning import Jump, Network, Preconditioning
from models.rows import rows_stay
from runtime.precision import products_at
from runtime.shapes import Data, Key, PerRow, PerRowExpanded, Time, Told
from sde_lib import Chain, expand, SDE

Params = Any  # a tree of arrays
Conditioning = Callable[[Chain, PerRow], PerRow]


def log_sigma(chain: Chain, t: PerRow) -> PerRow:
  """log sigma(t), for Fourier features under the VE SDE."""
  return jnp.log(chain.sde.sigma(t))


def noise_time(chain: Chain, t: PerRow) -> PerRow:
  """(N - 1) (T - t): SMLD's label made continuous, counted from the largest noise scale."""
  return (chain.N - 1) * (chain.sde.T - t)


def noise_label(chain: Chain, t: PerRow) -> PerRow:
  """SMLD's label: the index of the noise scale nearest to t, counted from the largest."""
  return jnp.round(noise_time(chain, t))


def scaled_time(chain: Chain, t: PerRow) -> PerRow:
  """999 t, DDPM's time step made continuous."""
  del chain
  return 999.0 * t


def log_scaled_time(chain: Chain, t: PerRow) -> PerRow:
  """log(999 t), for Fourier features under the VP and sub-VP SDEs."""
  return jnp.log(scaled_time(chain, t))


def log_chain_time(chain: Chain, t: PerRow) -> PerRow:
  """log(1 + (N - 1) t), for Fourier features on DDPM's chain, whose first step is at t = 0."""
  return jnp.log1p(chain_time(chain, t))


def chain_time(chain: Chain, t: PerRow) -> PerRow:
  """(N - 1) t, DDPM's time step: a whole number at the times of the chain."""
  return (chain.N - 1) * t


def time(chain: Chain, t: PerRow) -> PerRow:
  """t itself, for Fourier features under flow matching, whose log(999 t) would have no end."""
  del chain
  return t


def quarter_log_noise(chain: Chain, t: PerRow) -> PerRow:
  """1/4 log(sigma / alpha), EDM's c_noise (https://arxiv.org/abs/2206.00364, Table 1)."""
  return -0.25 * chain.sde.log_snr(t)


@dataclasses.dataclass(frozen=True)
class ScoreModel:
  """score(x, t), from a network whose `net.apply` takes (x in [-1, 1], conditioning, train).

  What it is told beside these, `Told`, it takes as keywords. A label-conditional one, with
  `num_classes`, takes `labels`: its null label num_classes, or none, makes it the score of all
  classes together. One that is trained on augmented images, with `augmented`, takes
  `augment_labels`, which say what was done to each. One with `condition_channels` takes a
  `condition`: it is the score of p_t(x | condition).

  Attributes:
    net: the network.
    chain: the chain that it was trained with, whose N is the number of training noise scales, or
      whose SDE.
    conditioning: what the network is told of t.
    preconditioning: what its output stands for.
    continuous: trained at all times, or at those of the chain; the latter take their noise scale
      from the chain.
    centered: data lie in [-1, 1] already, not in [0, 1].
    num_classes: of the labels that the network takes; 0 if it takes none.
    precision: of the network's products, one of `runtime.precision.PRECISIONS`.
    augmented: the network takes labels that say how images were augmented.
    rows: where the rows of a batch lie, if the parameters lie in parts; see `models.rows`.
    condition_channels: of the images that the network is told, in [-1, 1]; 0 if it is told none.
  """

  net: nn.Module
  chain: Chain
  conditioning: Conditioning
  preconditioning: Preconditioning
  continuous: bool
  centered: bool
  num_classes: int = 0
  precision: str = 'default'
  augmented: bool = False
  rows: NamedSharding | None = None
  condition_channels: int = 0

  @property
  def sde(self) -> SDE:
    """The SDE, in continuous time."""
    return self.chain.sde

  @property
  def trained_with(self) -> SDE | Chain:
    """Whose perturbation kernels it was trained on."""
    return self.chain.sde if self.continuous else self.chain

  def init(self, rng: Key, shape: tuple[int, ...]) -> Params:
    """Draws parameters for data of `shape`, a batch's."""
    told = Told()
    if self.condition_channels:
      told['condition'] = jnp.zeros((*shape[:-1], self.condition_channels))
    variables = self.net.init(rng, jnp.zeros(shape), jnp.ones(shape[:1]), False, **told)
    return variables['params']

  def bind(
    self, params: Params, dropout_rng: Key | None = None, **told: Unpack[Told]
  ) -> 'ModelScore':
    """The score function at `params`: grad_x log p_t(x), or grad_x log p_t(x | y) with labels.

    Args:
      params: of the network.
      dropout_rng: of dropout; None for no dropout.
      told: `labels`, `augment_labels` and `condition`, as far as the network takes them, of each
        row of the x that the score is then evaluated at. None is as good as not given.

    Raises:
      ValueError: if there is something that the network does not take, or no condition where it
        needs one.
    """
    given: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    if 'labels' in given and not self.num_classes:
      raise ValueError('this score model takes no labels: its num_classes is 0')
    if 'augment_labels' in given and not self.augmented:
      raise ValueError('this score model is not told of augmentation')
    channels = given['condition'].shape[-1] if 'condition' in given else 0
    if channels != self.condition_channels:
      raise ValueError(
        f'this score model takes a condition of {self.condition_channels} channels; got {channels}'
      )
    return ModelScore(params, dropout_rng, given, self)


@flax.struct.dataclass
class ModelScore:
  """A `ScoreFn` that is a pytree of its arrays.

  It can be an argument of a jitted function, which then compiles once for all parameters.
  """

  params: Params
  dropout_rng: Key | None
  told: dict[str, Any]  # `Told`, without what it is not told
  model: ScoreModel = flax.struct.field(pytree_node=False)

  def __call__(self, x: Data, t: PerRow) -> Data:
    return self.model.preconditioning.score(self._network(t), x, *self._kernel(x, t))

  def denoised(self, x: Data, t: PerRow) -> Data:
    """E[x_0 | x_t = x]."""
    return self.model.preconditioning.denoised(self._network(t), x, *self._kernel(x, t))

  def noise_minus_data(self, x: Data, t: PerRow) -> Data:
    """E[z - x_0 | x_t = x]: the velocity of flow matching."""
    return self.model.preconditioning.noise_minus_data(self._network(t), x, *self._kernel(x, t))

  def consistency(self, x: Data, t: PerRow, eps: float | Time) -> Data:
    """Where the probability flow through x at times t is at time eps, if it was trained to tell.

    At t = eps that is x, and the kernels are those of the SDE, at all times.
    """
    sde, end = self.model.sde, jnp.full_like(t, eps)
    of_row = (*sde.kernel(t), *sde.kernel(end), sde.log_snr_fall(end, t))
    jump = Jump(*(expand(v, x) for v in of_row))
    return self.model.preconditioning.consistency(self._network(t), x, jump)

  def energy(self, x: Data, t: PerRow) -> PerRow:
    """E(x, t), where p_t(x) is proportional to exp(-E(x, t)).

    Raises:
      ValueError: if the network was not trained as an energy.
    """
    return self.model.preconditioning.energy(self._network(t), x, *self._kernel(x, t))

  def log_density(self, x: Data, t: PerRow) -> PerRow:
    """log p_t(x) up to a constant for each t: minus the energy."""
    return -self.energy(x, t)

  def _kernel(self, x: Data, t: PerRow) -> tuple[PerRowExpanded, PerRowExpanded]:
    alpha, sigma = self.model.trained_with.kernel(t)
    return expand(alpha, x), expand(sigma, x)

  def _network(self, t: PerRow) -> Network:
    """The network at times t, as a function of x."""
    model, rng = self.model, self.dropout_rng

    def network(x: Data) -> tuple[Data, Data]:
      seen = x if model.centered else 2 * x - 1
      with products_at(model.precision), rows_stay(model.rows, len(x)):
        output: Any = model.net.apply(
          {'params': self.params},
          seen,
          model.conditioning(model.chain, t),
          rng is not None,
          **self.told,
          rngs=None if rng is None else {'dropout': rng},
        )
      return output, seen

    return network
