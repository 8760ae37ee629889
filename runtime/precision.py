"""How precisely GPUs and TPUs multiply float32 matrices; it changes nothing on CPUs.

JAX's default is speed: GPUs round factors to TF32, 11 significant bits, and TPUs to bfloat16, 8
bits. Networks take what `model.precision` says. Where a solver or a number of a report depends on
every digit, products are in full float32, those of the network included. What the user sets for all
of JAX, with JAX_DEFAULT_MATMUL_PRECISION, stays. Precision is settled when a function is traced.
"""

from collections.abc import Iterator
import contextlib

import jax

# 'high' is three products of bfloat16 on TPUs, and still TF32 on GPUs.
PRECISIONS = ('default', 'high', 'highest')


@contextlib.contextmanager
def products_at(precision: str) -> Iterator[None]:
  """Matrix products and convolutions within have a precision, one of `PRECISIONS`.

  A context or a decorator of what is traced. What is settled around it already, by the user for all
  of JAX or by `full_precision`, stays; so a network is at full precision in a likelihood.
  """
  around = getattr(jax.config, 'jax_default_matmul_precision')  # noqa: B009  # types don't know it
  if precision == 'default' or around is not None:
    yield
  else:
    with jax.default_matmul_precision(precision):
      yield


full_precision = products_at('highest')  # a decorator
