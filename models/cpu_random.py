"""Random bits that XLA:CPU computes in one pass over memory.

JAX draws them by Threefry-2x32 of 20 rounds (Salmon et al. 2011). On CPUs it lowers these to a loop
of 5 turns, which compiles sooner, and of which each writes all that was drawn to memory and reads
it back: in a training step, masks of dropout. Here large draws are unrolled, so that XLA fuses all
rounds, and what is done with the bits after them; the bits are the same. Small ones, such as keys
that are split, keep the loop.
"""

from typing import Any

import jax
from jax import Array
from jax.extend.random import threefry2x32_p
from jax.interpreters import mlir
import numpy as np

LARGE = 2**14  # words: below, time to compile counts for more
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def register() -> None:
  """Makes this how JAX lowers Threefry for CPUs."""
  mlir.register_lowering(
    threefry2x32_p, mlir.lower_fun(_threefry2x32, multiple_results=True), platform='cpu'
  )


def _threefry2x32(key0: Array, key1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
  """The two words of each counter (x0, x1) under the key, all of them uint32."""
  keys = (key0, key1, key0 ^ key1 ^ np.uint32(_PARITY))
  state = (x0 + key0, x1 + key1, (*keys[1:], keys[0]), np.array(_ROTATIONS, np.uint32))
  if max(x0.size, key0.size) >= LARGE:
    for i in range(5):
      state = _four_rounds(np.uint32(i), state)
  else:
    state = jax.lax.fori_loop(np.uint32(0), np.uint32(5), _four_rounds, state)
  return state[:2]


def _four_rounds(i: Any, state: Any) -> Any:
  """Four rounds, and the i-th injection of the key, whose words take turns, as the rotations do."""
  x0, x1, (key0, key1, key2), rotations = state
  for r in rotations[0]:
    x0 = x0 + x1
    x1 = x0 ^ (x1 << r | x1 >> (np.uint32(32) - r))
  return x0 + key0, x1 + key1 + (i + np.uint32(1)), (key1, key2, key0), rotations[::-1]
