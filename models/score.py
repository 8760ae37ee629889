"""From a network and an SDE to a score: the one place that knows how networks are read.

A network sees neither the SDE nor the config. What it is conditioned on is one of the functions
(sde, t [B]) -> [B] below; what its output means is one of `OUTPUTS`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax
import flax.linen as nn
from jax import Array
import jax.numpy as jnp

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


# What the output o of a network stands for, as the score that it gives at noise scale std.
OUTPUTS: dict[str, Callable[[Array, Array], Array]] = {
  'score': lambda o, std: o,
  'scaled_score': lambda o, std: o / std,  # std times the score, of unit scale at every std
  'noise': lambda o, std: -o / std,
}


@dataclasses.dataclass(frozen=True)
class ScoreModel:
  """score(x, t), from a network whose `net.apply` takes (x in [-1, 1], conditioning, train).

  Attributes:
    net: the network.
    sde: the SDE that it was trained with; its N is the number of training noise scales.
    conditioning: what the network is told of t.
    output: a key of `OUTPUTS`.
    continuous: trained at all times, or at those of the chain; the latter take their noise scale
      from the chain.
    centered: data lie in [-1, 1] already, not in [0, 1].
  """

  net: nn.Module
  sde: SDE
  conditioning: Conditioning
  output: str
  continuous: bool
  centered: bool

  def init(self, rng: Array, shape: tuple[int, ...]) -> Params:
    """Draws parameters for data of `shape` [B, ...]."""
    variables = self.net.init(rng, jnp.zeros(shape), jnp.ones(shape[:1]), False)
    return variables['params']

  def bind(self, params: Params, dropout_rng: Array | None = None) -> 'ModelScore':
    """The score function at `params`, with dropout if `dropout_rng` is given."""
    return ModelScore(params, dropout_rng, self)


@flax.struct.dataclass
class ModelScore:
  """A `ScoreFn` that is a pytree of its arrays.

  It can be an argument of a jitted function, which then compiles once for all parameters.
  """

  params: Params
  dropout_rng: Array | None
  model: ScoreModel = flax.struct.field(pytree_node=False)

  def __call__(self, x: Array, t: Array) -> Array:
    model, train = self.model, self.dropout_rng is not None
    cond = model.conditioning(model.sde, t)
    out = model.net.apply(
      {'params': self.params},
      x if model.centered else 2 * x - 1,
      cond,
      train,
      rngs={'dropout': self.dropout_rng} if train else None,
    )
    std = (
      model.sde.sigma(t) if model.continuous else model.sde.chain_marginal(model.sde.index(t))[1]
    )
    return OUTPUTS[model.output](out, expand(std, x))
