"""Random bits on CPUs are those of JAX, drawn without a loop where there are many."""

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import pytest

from models import cpu_random

# Of the paper's reference implementation (Random123, kat_vectors): key, counter, words, for
# Threefry-2x32 of 20 rounds.
KNOWN = [
  ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
  ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
  ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.fixture(autouse=True)
def registered():
  cpu_random.register()  # what is tested


@pytest.mark.parametrize('size', [1, cpu_random.LARGE])
@pytest.mark.parametrize('key, counter, words', KNOWN)
def test_known_words(key, counter, words, size):
  arguments = [jnp.full(size, word, jnp.uint32) for word in (*key, *counter)]
  for found, word in zip(jax.jit(cpu_random._threefry2x32)(*arguments), words, strict=True):
    np.testing.assert_array_equal(found, np.uint32(word))


def test_many_bits_are_drawn_without_a_loop_and_few_with():
  def draw(key: Array, size: int) -> Array:
    return jax.random.bits(key, (size,))

  for size, loops in ((cpu_random.LARGE, False), (cpu_random.LARGE - 1, True)):
    text = jax.jit(draw, static_argnums=1).lower(jax.random.key(0), size).as_text()
    assert ('stablehlo.while' in text) == loops
  few = jax.random.bits(jax.random.key(3), (cpu_random.LARGE - 1,))
  many = jax.random.bits(jax.random.key(3), (cpu_random.LARGE + 5,))
  np.testing.assert_array_equal(few, many[: few.size])  # JAX counts from 0 in both


def test_keys_in_a_batch_draw_what_each_draws_alone():
  keys = jax.random.split(jax.random.key(1), 3)
  together = jax.vmap(lambda key: jax.random.normal(key, (cpu_random.LARGE,)))(keys)
  for key, row in zip(keys, together, strict=True):
    np.testing.assert_array_equal(row, jax.random.normal(key, (cpu_random.LARGE,)))
