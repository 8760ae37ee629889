"""Small parameters side by side in one array, as GPUs and TPUs train them.

Of the 571 arrays of NCSN++, 384 are biases, scales and shifts of a few hundred numbers, two
thousandths of all parameters. A device starts a kernel for each array and each purpose: clipping,
Adam, averages, norms. So the training loop joins them, in parameters, averages and moments alike,
and these take one kernel together. All that is done number by number stays what it was, to the bit;
a norm over all parameters adds up in another order.

CPUs do without: there a kernel costs nothing to start. Nor do checkpoints know of it.
"""

from functools import partial
import math
from typing import Any

import flax
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

SMALL = 4096  # numbers, at most, of an array that is joined to others


@flax.struct.dataclass
class Packed:
  """A tree of arrays, whose small ones are parts of one."""

  small: Array  # float32 [numbers of all small leaves], in the order of the leaves
  large: Any  # the tree, with None in place of each small leaf
  shapes: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)  # of small leaves


def pack_like(parameters: Any, tree: Any) -> Any:
  """A tree like parameters that may be packed, such as their gradient, packed if they are."""
  return _pack(tree) if isinstance(parameters, Packed) else tree


def packed(state: Any) -> Any:
  """A training state, with all that is a tree like its parameters packed."""
  like: Any = jax.tree.structure(state.params)

  def is_like(tree: Any) -> bool:
    return bool(jax.tree.structure(tree) == like)

  if sum(map(_is_small, jax.tree.leaves(state.params))) < 2:
    return state
  return jax.tree.map(lambda x: _pack(x) if is_like(x) else x, state, is_leaf=is_like)


def unpacked(tree: Any) -> Any:
  """What was packed, a whole state or parameters alone, with trees as they were; others stay."""

  def is_packed(x: Any) -> bool:
    return isinstance(x, Packed)

  return jax.tree.map(lambda x: _unpack(x) if is_packed(x) else x, tree, is_leaf=is_packed)


def _is_small(leaf: Any) -> bool:
  return leaf.dtype == np.float32 and leaf.size <= SMALL


def _pack(tree: Any) -> Packed:
  small = [leaf for leaf in jax.tree.leaves(tree) if _is_small(leaf)]
  large = jax.tree.map(lambda leaf: None if _is_small(leaf) else leaf, tree)
  return Packed(_joined(small), large, tuple(leaf.shape for leaf in small))


def _unpack(tree: Packed) -> Any:
  parts = iter(_parts(tree.small, tree.shapes))
  leaves, structure = jax.tree.flatten(tree.large, is_leaf=lambda leaf: leaf is None)
  return jax.tree.unflatten(structure, [next(parts) if leaf is None else leaf for leaf in leaves])


@jax.jit
def _joined(arrays: list[Array]) -> Array:
  return jnp.concatenate([x.reshape(-1) for x in arrays])


@partial(jax.jit, static_argnums=1)
def _parts(flat: Array, shapes: tuple[tuple[int, ...], ...]) -> list[Array]:
  """The arrays that are joined in a flat one."""
  ends = np.cumsum([math.prod(shape) for shape in shapes])
  return [x.reshape(shape) for x, shape in zip(jnp.split(flat, ends[:-1]), shapes, strict=True)]
