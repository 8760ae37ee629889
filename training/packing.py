"""Parameters side by side in a few arrays, as GPUs and TPUs train them.

A device starts a kernel for each array and each purpose: clipping, Adam, averages, norms. NCSN++
has 571 arrays, of which 384 are biases, scales and shifts of a few hundred numbers. So the training
loop joins these in one vector, in parameters, averages and moments alike. A network gets slices of
them, each cast as it is read. All that is done number by number stays what it was, to the bit; a
norm over all parameters adds up in another order.

GPUs stack the others too, all of one shape in one array, and keep kernels of convolutions there
outputs first, [O, H, W, I], as cuDNN reads and writes them: otherwise gradients, moments and
parameters are transposed in each step. TPUs do not: they start a kernel at little cost, and a stack
makes them move a third more bytes (docs/compiled.md).

Very large arrays stay alone, since a kernel of their own costs nothing there and a copy much; so do
all but the small where `training.fsdp` spreads them over devices. CPUs join nothing: there a kernel
costs nothing to start. Nor do checkpoints know of it.
"""

from functools import partial
import math
from typing import Any

import flax
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

SMALL = 4096  # numbers, at most, of an array that is part of the vector
STACKED = 2**22  # of one that is stacked with others, where any are

Shape = tuple[int, ...]


@flax.struct.dataclass
class Packed:
  """A tree of arrays, of which most are parts of a few."""

  small: Array  # float32 [numbers of all small leaves], in the order of the leaves
  stacks: tuple[Array, ...]  # float32 [n, ...], one for each shape, in the order of the first leaf
  rest: Any  # the tree, with None in place of each leaf that is joined
  shapes: tuple[Shape, ...] = flax.struct.field(pytree_node=False)  # of leaves that are joined
  largest: int = flax.struct.field(pytree_node=False)  # numbers of an array that is joined


def pack_like(parameters: Any, tree: Any) -> Any:
  """A tree like parameters that may be packed, such as their gradient, packed if they are."""
  return _pack(tree, parameters.largest) if isinstance(parameters, Packed) else tree


def packed(state: Any, largest: int) -> Any:
  """A training state, with all that is a tree like its parameters packed.

  Arrays of up to `largest` numbers are joined: `SMALL`, or `STACKED`.
  """
  like: Any = jax.tree.structure(state.params)

  def is_like(tree: Any) -> bool:
    return bool(jax.tree.structure(tree) == like)

  if sum(_is_joined(leaf, largest) for leaf in jax.tree.leaves(state.params)) < 2:
    return state
  return jax.tree.map(lambda x: _pack(x, largest) if is_like(x) else x, state, is_leaf=is_like)


def unpacked(tree: Any) -> Any:
  """What was packed, a whole state or parameters alone, with trees as they were; others stay."""

  def is_packed(x: Any) -> bool:
    return isinstance(x, Packed)

  return jax.tree.map(lambda x: _unpack(x) if is_packed(x) else x, tree, is_leaf=is_packed)


def _pack(tree: Any, largest: int) -> Packed:
  joined = [leaf for leaf in jax.tree.leaves(tree) if _is_joined(leaf, largest)]
  shapes = tuple(leaf.shape for leaf in joined)
  small, stacks = _joined(joined)
  rest = jax.tree.map(lambda leaf: None if _is_joined(leaf, largest) else leaf, tree)
  return Packed(small, stacks, rest, shapes, largest)


def _unpack(tree: Packed) -> Any:
  parts = iter(_parts(tree.small, tree.stacks, tree.shapes))
  leaves, structure = jax.tree.flatten(tree.rest, is_leaf=lambda leaf: leaf is None)
  return jax.tree.unflatten(structure, [next(parts) if leaf is None else leaf for leaf in leaves])


def _is_joined(leaf: Any, largest: int) -> bool:
  """Whether an array, or its shape and dtype, is part of another."""
  return leaf.dtype == np.float32 and leaf.size <= largest


def _is_small(shape: Shape) -> bool:
  return math.prod(shape) <= SMALL


def _outputs_first(x: Array) -> Array:
  """The kernel of a convolution, [H, W, I, O], as it lies in a stack; others as they are."""
  return jnp.moveaxis(x, -1, 0) if x.ndim == 4 else x


def _outputs_last(x: Array) -> Array:
  """What `_outputs_first` made, as it was."""
  return jnp.moveaxis(x, 0, -1) if x.ndim == 4 else x


@jax.jit
def _joined(arrays: list[Array]) -> tuple[Array, tuple[Array, ...]]:
  """The vector of the small of some arrays, and the stacks of the others."""
  small = [x.reshape(-1) for x in arrays if _is_small(x.shape)]
  stacks: dict[Shape, list[Array]] = {}
  for x in arrays:
    if not _is_small(x.shape):
      stacks.setdefault(x.shape, []).append(_outputs_first(x))
  return jnp.concatenate(small or [jnp.zeros(0)]), tuple(map(jnp.stack, stacks.values()))


@partial(jax.jit, static_argnums=2)
def _parts(small: Array, stacks: tuple[Array, ...], shapes: tuple[Shape, ...]) -> list[Array]:
  """The arrays that `_joined` joined, in their order."""
  ends = np.cumsum([math.prod(shape) for shape in shapes if _is_small(shape)])
  vectors = iter(jnp.split(small, ends[:-1]))
  kinds = dict.fromkeys(shape for shape in shapes if not _is_small(shape))
  layers = {kind: iter(jnp.unstack(stack)) for kind, stack in zip(kinds, stacks, strict=True)}
  return [
    next(vectors).reshape(shape) if _is_small(shape) else _outputs_last(next(layers[shape]))
    for shape in shapes
  ]
