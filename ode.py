"""Adaptive integration of an ODE on the device, in compiled segments.

The loop over steps is one `while_loop` around diffrax's solver and step size controller. It
leaves the device once in `SEGMENT` steps, so that a long run shows how far it is and can be
interrupted; where it is cut does not change the result.
"""

from collections.abc import Callable

import diffrax
import jax
from jax import Array
import jax.numpy as jnp

Drift = Callable[[Array, Array], Array]  # (x, t []) -> dx/dt, like x; a pytree of its arrays
Progress = Callable[[float], None]  # called with the fraction that is done

SEGMENT = 10
MAX_STEPS = 10_000
SOLVER = diffrax.Dopri5()  # the same pair of orders 5 and 4 as SciPy's RK45
STAGES = 6  # of SOLVER, whose last stage is the first of the next step
FIRST = 3  # evaluations before that: two choose the first step size, one begins the first step


def integrate(
  drift: Drift,
  x: Array,
  t0: float,
  t1: float,
  *,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  progress: Progress | None = None,
) -> tuple[Array, int]:
  """Solves dx/dt = drift(x, t) from t0 to t1, forwards or backwards in time.

  The step size keeps the root mean square over all of x of error / (atol + rtol |x|) below one.

  Returns:
    x at t1, and the number of evaluations of the drift.

  Raises:
    FloatingPointError: if the solver needs more than `MAX_STEPS` steps, or x is not finite.
  """
  sign = 1.0 if t1 > t0 else -1.0  # the solver's own time s = sign t always grows
  s0, s1 = sign * jnp.float32(t0), sign * jnp.float32(t1)
  carry = _start(drift, x, s0, s1, sign, rtol, atol)
  while True:
    carry = _segment(drift, carry, s1, sign, rtol, atol)
    s, steps = float(carry['s']), int(carry['steps'])
    if progress:
      progress((s - float(s0)) / (float(s1) - float(s0)))
    if s >= float(s1):
      break
    if steps >= MAX_STEPS:
      raise FloatingPointError(
        f'the ODE solver took {steps} steps and is only at t = {sign * s:.3g}; raise '
        'sampling.rtol and sampling.atol, or look for non-finite values in the score'
      )
  return carry['x'], FIRST + STAGES * int(carry['steps'])


def _pieces(drift: Drift, sign: Array, rtol: Array, atol: Array):
  term = diffrax.ODETerm(lambda s, x, args: sign * drift(x, sign * s))
  return term, diffrax.PIDController(rtol=rtol, atol=atol)


@jax.jit
def _start(drift, x, s0, s1, sign, rtol, atol):
  term, controller = _pieces(drift, sign, rtol, atol)
  next_s, controller_state = controller.init(
    term, s0, s1, x, None, None, SOLVER.func, SOLVER.error_order(term)
  )
  return {
    's': s0,
    'next_s': jnp.minimum(next_s, s1),
    'x': x,
    'solver': SOLVER.init(term, s0, next_s, x, None),
    'controller': controller_state,
    'jump': jnp.array(False),
    'steps': jnp.zeros((), jnp.int32),
  }


@jax.jit
def _segment(drift, carry, s1, sign, rtol, atol):
  term, controller = _pieces(drift, sign, rtol, atol)
  last = carry['steps'] + SEGMENT

  def step(c):
    x, error, _, solver_state, _ = SOLVER.step(
      term, c['s'], c['next_s'], c['x'], None, c['solver'], c['jump']
    )
    keep, s, next_s, jump, controller_state, _ = controller.adapt_step_size(
      c['s'], c['next_s'], c['x'], x, None, error, SOLVER.error_order(term), c['controller']
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
