"""An optimisation barrier for CPUs alone, which is decided where a program is lowered.

Who asks for JAX's default backend while a function is traced gets the machine that traces, not the
device that the program is for. So it is a primitive: the identity, which CPUs lower to a barrier.
"""

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_stored_p = Primitive('stored')
_stored_p.def_impl(lambda x: x)
_stored_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_stored_p, lambda gradient, x: [_stored_p.bind(gradient)])
batching.defvectorized(_stored_p)
mlir.register_lowering(_stored_p, lambda context, x: [x])
_barrier = mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False)
mlir.register_lowering(_stored_p, _barrier, platform='cpu')


def stored(x: Array) -> Array:
  """x, computed once; XLA:CPU would fuse it into all that uses it, and so compute it for each.

  So are its gradients. It takes `training.loop.compiler_options`, and has no effect without. Other
  devices never see it: their compilers fuse well, and a barrier would keep them from it.
  """
  result: Array = _stored_p.bind(x)
  return result
