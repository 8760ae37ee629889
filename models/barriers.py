"""Optimisation barriers for some devices alone, which are decided where a program is lowered.

Who asks for JAX's default backend while a function is traced gets the machine that traces, not the
device that the program is for. So each is a primitive: the identity, which the devices that it is
for lower to a barrier.
"""

from collections.abc import Callable

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Identity = Callable[[Array], Array]


def _barrier_on(
  platforms: tuple[str, ...], name: str, gradient: Identity | None = None
) -> Identity:
  """The identity, which these platforms lower to a barrier.

  Its gradient passes the identity `gradient`; by default the same one.
  """
  primitive = Primitive(name)
  backwards = gradient or primitive.bind
  primitive.def_impl(lambda x: x)
  primitive.def_abstract_eval(lambda x: x)
  ad.deflinear2(primitive, lambda gradient, x: [backwards(gradient)])
  batching.defvectorized(primitive)
  mlir.register_lowering(primitive, lambda context, x: [x])
  barrier = mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False)
  for platform in platforms:
    mlir.register_lowering(primitive, barrier, platform=platform)
  return primitive.bind


_GPUS = ('cuda', 'rocm')
_stored_gradient = _barrier_on(('cpu',), 'stored_gradient')
_stored = _barrier_on(('cpu', *_GPUS), 'stored', _stored_gradient)
_apart = _barrier_on(_GPUS, 'apart')
_as_made = _barrier_on(_GPUS, 'as_made', lambda gradient: gradient)


def stored(x: Array) -> Array:
  """x, computed once; XLA would fuse it into all that uses it, and so compute it for each.

  So are its gradients, on CPUs alone; there it takes `training.loop.compiler_options`, and has no
  effect without. TPUs never see it: their compiler would be kept from fusing what it fuses well.
  """
  return _stored(x)


def apart(x: Array) -> Array:
  """x, which XLA then takes for another array than the one that it is; on GPUs alone.

  What is computed of both is computed twice, rather than written to memory and read again. Nor does
  XLA merge what x is computed of with what is computed of x; the same holds for their gradients.
  """
  return _apart(x)


def as_made(x: Array) -> Array:
  """x as a library writes it; on GPUs XLA adds nothing to it there, but where it is read.

  There an addition costs nothing. The library would read what is added as an array of its own.
  """
  return _as_made(x)
