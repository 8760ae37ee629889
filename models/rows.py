"""Rows of a batch stay on their devices while a network works on them.

Where the parameters of a layer lie in parts on several devices, a compiler may bring the parts
together, or have each device compute the features that its own part gives, for the rows of all of
them. The latter moves activations, again and again, which for all but the widest networks are far
larger than the parameters. So it is told, after each layer, where the rows are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import NamedSharding


@contextmanager
def rows_stay(rows: NamedSharding | None, n: int) -> Iterator[None]:
  """What the layers make of n rows [n, ...] lies on the devices as `rows` says; None: anywhere.

  No value changes. Where the devices cannot share so many rows, nothing is said.
  """
  if rows is None or n % rows.num_devices:
    yield
    return

  def stay(x: Any) -> Any:
    of_rows = isinstance(x, jax.Array) and x.ndim > 0 and len(x) == n
    return jax.lax.with_sharding_constraint(x, rows) if of_rows else x

  def layer(call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    made = call(*args, **kwargs)
    return jax.tree.map(stay, made) if context.method_name == '__call__' else made

  with nn.intercept_methods(layer):
    yield
