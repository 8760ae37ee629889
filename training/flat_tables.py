"""Parameters as flat tables, name -> array: of a network, and of a released checkpoint."""

from collections.abc import Iterable
import dataclasses
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from models.score import Params, ScoreModel
from runtime.errors import UserError

# By name, with slashes: ResnetBlockBigGANpp_0/Conv_0/kernel.
Arrays = dict[str, np.ndarray]
Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Released:
  """What a released checkpoint holds, under the names of this code.

  Attributes:
    step: training steps taken.
    adam_step: steps that Adam counted.
    ema_rate: of the moving average.
    params, ema_params: the parameters and their moving average.
    mu, nu: Adam's first and second moments.
    consistency: whether it is a consistency model, not a score model.
    target: its target parameters, if it has any.
  """

  step: int
  adam_step: int
  ema_rate: float
  params: Arrays
  ema_params: Arrays
  mu: Arrays
  nu: Arrays
  consistency: bool = False
  target: Arrays | None = None


def network_parameters(model: ScoreModel, shape: tuple[int, ...]) -> Shapes:
  """The parameters of a network by name, in the order of their creation."""
  names: list[str] = []  # JAX returns trees sorted by name

  def init() -> Params:
    params = model.init(jax.random.key(0), shape)
    names.extend(flat(params))
    return params

  shapes = flat(jax.eval_shape(init))
  return {name: shapes[name] for name in names}


def flat(tree: Any) -> dict[str, Any]:
  """Name, with slashes -> array, of a tree."""
  return traverse_util.flatten_dict(tree, sep='/')


def fit(found: Arrays, names: Shapes, what: str) -> Params:
  """The tree of the arrays, once their names and shapes are those of the network.

  Normalisations of the JAX release hold [1, 1, 1, C] where ours hold [C].

  Raises:
    UserError: naming what differs first.
  """
  fitted = {}
  for name, wanted in names.items():
    if name not in found:
      extra = [f'{k} {v.shape}' for k, v in found.items() if k not in names][:1]
      instead = f'; it has {extra[0]} instead' if extra else ''
      raise UserError(f'its {what} lack {name} {wanted.shape}{instead}')
    x = np.asarray(found[name])
    if wanted.ndim == 1 and x.shape == (1, 1, 1, *wanted.shape):
      x = x.reshape(wanted.shape)
    if x.shape != wanted.shape:
      raise UserError(
        f'{name} of its {what} has shape {x.shape}, the network of the config {wanted.shape}'
      )
    fitted[name] = jnp.asarray(x, wanted.dtype)
  for name in found:
    if name not in names:
      raise UserError(f'its {what} have {name} {found[name].shape}, the network of the config not')
  return traverse_util.unflatten_dict(fitted, sep='/')


def is_conditional(names: Iterable[str]) -> bool:
  """Whether a network embeds the time."""
  return 'Dense_0/kernel' in names
