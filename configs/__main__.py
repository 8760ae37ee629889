"""`python -m configs` prints a table of every config and variant, with its number of parameters."""

from collections.abc import Iterator
from functools import cache
import importlib
import inspect
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from builders.setup import build
from configs import base
from runtime.shapes import Told


def all_configs() -> Iterator[tuple[str, ConfigDict]]:
  """Each config of images, with its name as --config takes it: configs/ve/cifar10.py:ncsnpp."""
  here = Path(__file__).parent
  for path in sorted(path for sde in (*base.SDES, 'distill') for path in here.glob(f'{sde}/*.py')):
    name = path.relative_to(here.parent)
    module = importlib.import_module('.'.join(name.with_suffix('').parts))
    if not inspect.signature(module.get_config).parameters:
      yield str(name), module.get_config()
    else:
      for variant in module.VARIANTS:
        yield f'{name}:{variant}', module.get_config(variant)


def _without_dropout(net: nn.Module) -> nn.Module:
  """The same network, as far as its parameters go."""
  return net.clone(dropout=0.0) if hasattr(net, 'dropout') else net


@cache  # most variants share a network
def parameters(
  net: nn.Module, shape: tuple[int, ...], condition_channels: int = 0
) -> tuple[int, int]:
  """The numbers of parameters and of arrays of a network, which is not initialised."""
  told = Told()
  if condition_channels:
    told['condition'] = jnp.zeros((*shape[:-1], condition_channels))
  shapes = jax.eval_shape(
    lambda: net.init(jax.random.key(0), jnp.zeros(shape), jnp.ones(shape[:1]), False, **told)
  )
  leaves = jax.tree.leaves(shapes)
  return sum(leaf.size for leaf in leaves), len(leaves)


def row(name: str, config: ConfigDict) -> str:
  """A row of the table, in Markdown."""
  setup, pixels = build(config), config.data.image_size
  net, channels = _without_dropout(setup.model.net), setup.model.condition_channels
  size, leaves = parameters(net, (1, *setup.data_shape), channels)
  return f'| `{name}` | {config.model.name} | {pixels}x{pixels} | {size:,} | {leaves} |'


def table() -> str:
  """The table, in Markdown."""
  head = ['| config | network | image | parameters | arrays |', '|---|---|---|---|---|']
  return '\n'.join([*head, *(row(name, config) for name, config in all_configs())])


if __name__ == '__main__':
  print(table())
