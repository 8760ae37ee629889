"""Checksums of states: numbers that tell of any changed bit, wherever the arrays lie."""

from collections.abc import Mapping, Sequence
from functools import partial
import itertools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from runtime import processes


def checksums(parts: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Of each part of a state, a tree of arrays, a number that tells of any changed bit, uint32 [].

  It is the sum modulo 2^32 of all words, each mixed with its place. A sum may be taken in any
  order: so each device sums up the words that it holds, of those that lie on several devices one
  copy, and processes tell each other nothing but their sums.
  """
  leaves = {name: jax.tree.leaves(part) for name, part in parts.items()}
  whole, own = (
    np.array([sum(map(int, of_part)) % 2**32 for of_part in jax.device_get(sums)], np.uint32)
    for sums in (
      [_own_sums(of_part, split) for of_part in leaves.values()] for split in (False, True)
    )
  )
  if any(map(_is_split, itertools.chain(*leaves.values()))):
    whole += processes.gather(own).reshape(-1, len(parts)).sum(axis=0, dtype=np.uint32)
  return {name: np.asarray(number) for name, number in zip(parts, whole, strict=True)}


def _is_split(leaf: Any) -> bool:
  """Whether an array lies on devices of several processes."""
  return isinstance(leaf, Array) and not leaf.is_fully_addressable


def _own_sums(leaves: Sequence[Any], split: bool) -> list[Array]:
  """Sums of words over what this process holds of the leaves that are, or are not, split."""
  return [
    _mixed_sum(
      part.data, np.uint32(i), tuple(np.uint32(at.start or 0) for at in part.index), leaf.shape
    )
    for i, leaf in enumerate(leaves)
    if _is_split(leaf) == split
    for part in jnp.asarray(leaf).addressable_shards
    if part.replica_id == 0
  ]


@partial(jax.jit, static_argnums=3)
def _mixed_sum(
  part: Array, number: Array, begin: tuple[Array, ...], shape: tuple[int, ...]
) -> Array:
  """The sum over a part of an array of its words mixed with their places in the whole.

  Args:
    part: of an array, the leaf of this `number`.
    begin: the indices, in the whole, at which the part begins.
    shape: of the whole.
  """
  words = {1: jnp.uint8, 2: jnp.uint16}.get(part.dtype.itemsize, jnp.uint32)
  bits = jax.lax.bitcast_convert_type(part, words).astype(jnp.uint32)
  place = number * np.uint32(0x9E3779B1)
  for axis, size in enumerate(shape):  # the place in the flat array, where the word is
    index = begin[axis] + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place = place * np.uint32(size) + index
  mixed = bits ^ (place * np.uint32(0x85EBCA6B) + np.uint32(1))
  for factor in (0x85EBCA6B, 0xC2B2AE35):  # MurmurHash3's, https://github.com/aappleby/smhasher
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(factor)
  return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)
