"""Adaptive integration of an ODE on the device, in compiled segments.

The loop over steps is one `while_loop` around diffrax's solver and step size controller. It
leaves the device once in `SEGMENT` steps, so that a long run shows how far it is and can be
interrupted; where it is cut does not change the result.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

State = Any  # x, an array or a tree of arrays
Drift = Callable[[State, Array], State]  # (x, t []) -> dx/dt, like x; a pytree of its arrays
Observer = Callable[[float, State], None]  # told the fraction that is done, and x there

SEGMENT = 10
MAX_STEPS = 10_000
SOLVERS = {
  'dopri5': diffrax.Dopri5(),  # the same pair of orders 5 and 4 as SciPy's RK45
  'tsit5': diffrax.Tsit5(),  # orders 5 and 4, with smaller constants
  'heun': diffrax.Heun(),  # orders 2 and 1, for loose tolerances
}


def integrate(
  drift: Drift,
  x: State,
  t0: float,
  t1: float,
  *,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  solver: str = 'dopri5',
  observe: Observer | None = None,
) -> tuple[State, int]:
  """Solves dx/dt = drift(x, t) from t0 to t1, forwards or backwards in time.

  The step size keeps the root mean square over all of x of error / (atol + rtol |x|) below one.
  `solver` is a key of `SOLVERS`. `observe` is called after every segment.

  Returns:
    x at t1, and the number of evaluations of the drift.

  Raises:
    FloatingPointError: if the solver needs more than `MAX_STEPS` steps, or x is not finite.
  """
  sign = 1.0 if t1 > t0 else -1.0  # the solver's own time s = sign t always grows
  s0, s1 = np.float32(sign * t0), np.float32(sign * t1)
  carry = _start(solver, drift, x, s0, s1, sign, rtol, atol)
  while True:
    carry = _segment(solver, drift, carry, s1, sign, rtol, atol)
    s, steps = float(carry['s']), int(carry['steps'])
    if observe:
      observe((s - float(s0)) / (float(s1) - float(s0)), carry['x'])
    if s >= float(s1):
      break
    if steps >= MAX_STEPS:
      raise FloatingPointError(
        f'the ODE solver took {steps} steps and is only at t = {sign * s:.3g}; raise '
        'sampling.rtol and sampling.atol, or look for non-finite values in the score'
      )
  return carry['x'], _evaluations(solver, int(carry['steps']))


def _evaluations(solver: str, steps: int) -> int:
  """How often the drift is evaluated in so many steps."""
  tableau = SOLVERS[solver].tableau
  # Two choose the first step size. If a step's last stage is the first of the next ("fsal"), that
  # one is evaluated once before the first step.
  return 2 + tableau.fsal + (tableau.num_stages - tableau.fsal) * steps


def _pieces(drift: Drift, sign: Array, rtol: Array, atol: Array):

  def forwards(s, x, args):
    return jax.tree.map(lambda dx: sign * dx, drift(x, sign * s))

  term = diffrax.ODETerm(forwards)
  return term, diffrax.PIDController(rtol=rtol, atol=atol)


@partial(jax.jit, static_argnums=0)
def _start(solver, drift, x, s0, s1, sign, rtol, atol):
  solver = SOLVERS[solver]
  term, controller = _pieces(drift, sign, rtol, atol)
  next_s, controller_state = controller.init(
    term, s0, s1, x, None, None, solver.func, solver.error_order(term)
  )
  # Its second evaluation may lie beyond s1, where the drift need not exist.
  next_s = jnp.where(jnp.isfinite(next_s), next_s, s0 + 0.01 * (s1 - s0))
  return {
    's': s0,
    'next_s': jnp.minimum(next_s, s1),
    'x': x,
    'solver': solver.init(term, s0, next_s, x, None),
    'controller': controller_state,
    'jump': jnp.array(False),
    'steps': jnp.zeros((), jnp.int32),
  }


@partial(jax.jit, static_argnums=0)
def _segment(solver, drift, carry, s1, sign, rtol, atol):
  solver = SOLVERS[solver]
  term, controller = _pieces(drift, sign, rtol, atol)
  last = carry['steps'] + SEGMENT

  def step(c):
    x, error, _, solver_state, _ = solver.step(
      term, c['s'], c['next_s'], c['x'], None, c['solver'], c['jump']
    )
    error = jax.tree.map(lambda e: jnp.where(jnp.isnan(e), jnp.inf, e), error)  # a shorter step
    keep, s, next_s, jump, controller_state, _ = controller.adapt_step_size(
      c['s'], c['next_s'], c['x'], x, None, error, solver.error_order(term), c['controller']
    )

    def kept(new, old):
      return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)

    # Within rounding of the end is at the end: a last step of that length would be lost.
    tolerance = 4 * jnp.finfo(s.dtype).eps * jnp.maximum(1.0, jnp.abs(s1))
    return {
      's': jnp.where(s >= s1 - tolerance, s1, s),
      'next_s': jnp.where(next_s >= s1 - tolerance, s1, next_s),
      'x': kept(x, c['x']),
      'solver': kept(solver_state, c['solver']),
      'controller': controller_state,
      'jump': jump,
      'steps': c['steps'] + 1,
    }

  return jax.lax.while_loop(lambda c: (c['s'] < s1) & (c['steps'] < last), step, carry)
