"""From a network and an SDE to a score: the one place that knows how networks are read.

A network sees neither the SDE nor the config. What it is conditioned on is one of the functions
(sde, t [B]) -> [B] below; what its output means is one of `OUTPUTS`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax
import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp

from runtime.precision import products_at
from sde_lib import expand, SDE

Params = Any  # a tree of arrays
Conditioning = Callable[[SDE, Array], Array]


def log_sigma(sde: SDE, t: Array) -> Array:
  """log sigma(t), for Fourier features under the VE SDE."""
  return jnp.log(sde.sigma(t))


def noise_time(sde: SDE, t: Array) -> Array:
  """(N - 1) (T - t): SMLD's label made continuous, counted from the largest noise scale."""
  return (sde.N - 1) * (sde.T - t)


def noise_label(sde: SDE, t: Array) -> Array:
  """SMLD's label: the index of the noise scale nearest to t, counted from the largest."""
  return jnp.round(noise_time(sde, t))


def scaled_time(sde: SDE, t: Array) -> Array:
  """999 t, DDPM's time step made continuous."""
  del sde
  return 999.0 * t


def log_scaled_time(sde: SDE, t: Array) -> Array:
  """log(999 t), for Fourier features under the VP and sub-VP SDEs."""
  return jnp.log(scaled_time(sde, t))


def chain_time(sde: SDE, t: Array) -> Array:
  """(N - 1) t, DDPM's time step: a whole number at the times of the chain."""
  return (sde.N - 1) * t


# What the output o of a network at x stands for, as the score that it gives where the kernel of the
# noise is N(alpha x_0, std^2 I).
OUTPUTS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
  'score': lambda o, x, alpha, std: o,
  'scaled_score': lambda o, x, alpha, std: o / std,  # of unit scale at every std
  'noise': lambda o, x, alpha, std: -o / std,
  # A denoising autoencoder o = r(x): (r(x) - x) / std^2 at alpha = 1 (Vincent 2011).
  'denoised': lambda o, x, alpha, std: (alpha * o - x) / std**2,
}
ENERGY = 'energy'  # the other output: the score is minus the gradient of an energy


@dataclasses.dataclass(frozen=True)
class ScoreModel:
  """score(x, t), from a network whose `net.apply` takes (x in [-1, 1], conditioning, train).

  A label-conditional one, with `num_classes`, takes labels [B] or None after these. Its null label
  num_classes, or None, makes it the score of all classes together.

  Attributes:
    net: the network.
    sde: the SDE that it was trained with; its N is the number of training noise scales.
    conditioning: what the network is told of t.
    output: a key of `OUTPUTS`, or `ENERGY`.
    continuous: trained at all times, or at those of the chain; the latter take their noise scale
      from the chain.
    centered: data lie in [-1, 1] already, not in [0, 1].
    num_classes: of the labels that the network takes; 0 if it takes none.
    precision: of the network's products, one of `runtime.precision.PRECISIONS`.
  """

  net: nn.Module
  sde: SDE
  conditioning: Conditioning
  output: str
  continuous: bool
  centered: bool
  num_classes: int = 0
  precision: str = 'default'

  def init(self, rng: Array, shape: tuple[int, ...]) -> Params:
    """Draws parameters for data of `shape` [B, ...]."""
    variables = self.net.init(rng, jnp.zeros(shape), jnp.ones(shape[:1]), False)
    return variables['params']

  def bind(
    self, params: Params, dropout_rng: Array | None = None, labels: Array | None = None
  ) -> 'ModelScore':
    """The score function at `params`: grad_x log p_t(x), or grad_x log p_t(x | y) with labels.

    Args:
      params: of the network.
      dropout_rng: of dropout; None for no dropout.
      labels: y, int32 [B], one for each row of the x that the score is then evaluated at.

    Raises:
      ValueError: if there are labels, and the network takes none.
    """
    if labels is not None and not self.num_classes:
      raise ValueError('this score model takes no labels: its num_classes is 0')
    return ModelScore(params, dropout_rng, labels, self)


@flax.struct.dataclass
class ModelScore:
  """A `ScoreFn` that is a pytree of its arrays.

  It can be an argument of a jitted function, which then compiles once for all parameters.
  """

  params: Params
  dropout_rng: Array | None
  labels: Array | None
  model: ScoreModel = flax.struct.field(pytree_node=False)

  def __call__(self, x: Array, t: Array) -> Array:
    if self.model.output == ENERGY:
      return -jax.grad(lambda x: self.energy(x, t).sum())(x)
    alpha, std = (expand(v, x) for v in self._kernel(t))
    return OUTPUTS[self.model.output](self._network(x, t), x, alpha, std)

  def energy(self, x: Array, t: Array) -> Array:
    """E(x, t) [B], where p_t(x) is proportional to exp(-E(x, t)).

    Any network f gives one, ||x - f(x, t)||^2 / (2 std(t)), which grows without bound unless f does
    as well (after Salimans & Ho 2021, https://openreview.net/forum?id=9AS-TF2jRNb).

    Raises:
      ValueError: if the network was not trained as an energy.
    """
    if self.model.output != ENERGY:
      raise ValueError(f'this score model has no energy: its output is {self.model.output}')
    away = (self._scale(x) - self._network(x, t)).reshape(len(x), -1)
    return 0.5 * jnp.square(away).sum(-1) / self._kernel(t)[1]

  def log_density(self, x: Array, t: Array) -> Array:
    """log p_t(x) [B] up to a constant for each t: minus the energy."""
    return -self.energy(x, t)

  def _kernel(self, t: Array) -> tuple[Array, Array]:
    return self.model.sde.kernel(t, self.model.continuous)

  def _scale(self, x: Array) -> Array:
    """x in [-1, 1], as the network sees it."""
    return x if self.model.centered else 2 * x - 1

  def _network(self, x: Array, t: Array) -> Array:
    model, rng = self.model, self.dropout_rng
    with products_at(model.precision):
      output: Any = model.net.apply(
        {'params': self.params},
        self._scale(x),
        model.conditioning(model.sde, t),
        rng is not None,
        *([self.labels] if model.num_classes else []),
        rngs=None if rng is None else {'dropout': rng},
      )
    return output
