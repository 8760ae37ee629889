"""From a network and an SDE to p_t(y | x), the probability of a class given a noisy image."""

import dataclasses
from typing import Any

import flax
import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Float

from models.rows import rows_stay
from models.score import Params
from runtime.precision import products_at
from runtime.shapes import Data, Key, Labels, PerRow
from sde_lib import SDE


@dataclasses.dataclass(frozen=True)
class Classifier:
  """p_t(y | x), from a network whose `net.apply` takes (x, log(sigma / alpha) [B], train).

  sigma / alpha is the noise scale of x / alpha, so that what one SDE makes of an image and what
  another does look alike to the network. It is sigma for the VE SDE, as in the released code.

  Attributes:
    net: the network; its output are logits [B, K].
    sde: the SDE that perturbs the images.
    precision: of the network's products, one of `runtime.precision.PRECISIONS`.
    rows: where the rows of a batch lie, if the parameters lie in parts; see `models.rows`.
  """

  net: nn.Module
  sde: SDE
  precision: str = 'default'
  rows: NamedSharding | None = None

  def init(self, rng: Key, shape: tuple[int, ...]) -> Params:
    """Draws parameters for data of `shape`, a batch's."""
    variables = self.net.init(rng, jnp.zeros(shape), jnp.zeros(shape[:1]), False)
    return variables['params']

  def bind(self, params: Params) -> 'ClassLogProb':
    """log p_t(y | x) at `params`."""
    return ClassLogProb(params, self)


@flax.struct.dataclass
class ClassLogProb:
  """log p_t(y | x) of (x, t, labels y), a pytree of its arrays.

  Its gradient in x is what class-conditional sampling adds to the score (Eq. 14).
  """

  params: Params
  classifier: Classifier = flax.struct.field(pytree_node=False)

  def __call__(self, x: Data, t: PerRow, labels: Labels) -> PerRow:
    return jnp.take_along_axis(self.of_all(x, t), labels[:, None], axis=-1)[:, 0]

  def of_all(self, x: Data, t: PerRow) -> Float[Array, ' b classes']:
    """log p_t(y | x) of every class y."""
    net, sde = self.classifier.net, self.classifier.sde
    with products_at(self.classifier.precision), rows_stay(self.classifier.rows, len(x)):
      logits: Any = net.apply({'params': self.params}, x, -sde.log_snr(t), False)
    return jax.nn.log_softmax(logits)
