"""Adaptive Runge-Kutta methods, for an ODE whose drift is a network.

The device evaluates the drift and Python decides: one compiled program serves all stages of all
steps, and the host waits for one number a step, the error. A network takes far longer than these
calls. Inside a compiled loop, XLA:CPU would run the gradients of its convolutions many times
slower; stages written out one after another would be compiled as often.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from runtime.precision import full_precision

State = Any  # x, an array or a tree of arrays
Drift = Callable[[State, Array], State]  # (x, t []) -> dx/dt, like x; a pytree of its arrays
Observer = Callable[[float, State], object]  # told the fraction that is done, and x there

MAX_STEPS = 10_000


@dataclasses.dataclass(frozen=True)
class Pair:
  """An explicit embedded Runge-Kutta pair, by its Butcher tableau.

  A step of length h has slopes k_i = f(x + h sum_j a_ij k_j, t + c_i h), with c_i = sum_j a_ij. It
  ends at x + h sum_i b_i k_i, whose error is about h sum_i e_i k_i.
  """

  order: int
  a: tuple[tuple[float, ...], ...]
  b: tuple[float, ...]
  e: tuple[float, ...]

  @property
  def fsal(self) -> bool:
    """The last slope is the first of the next step."""
    return self.b[:-1] == self.a[-1]


# Dormand & Prince 1980, https://doi.org/10.1016/0771-050X(80)90013-3: SciPy's RK45.
_DOPRI5 = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
# Tsitouras 2011, https://doi.org/10.1016/j.camwa.2011.06.002, with smaller constants.
_TSIT5 = (
  0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081,
  2.324710524099774,
)  # fmt: skip
SOLVERS = {
  'dopri5': Pair(
    order=5,
    a=(
      (),
      (1 / 5,),
      (3 / 40, 9 / 40),
      (44 / 45, -56 / 15, 32 / 9),
      (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
      (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
      _DOPRI5,
    ),
    b=(*_DOPRI5, 0.0),
    e=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
  ),
  'tsit5': Pair(
    order=5,
    a=(
      (),
      (0.161,),
      (-0.008480655492356989, 0.335480655492357),
      (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
      (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
      (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401,
       -0.028269050394068383),
      _TSIT5,
    ),
    b=(*_TSIT5, 0.0),
    e=(0.0017800110522257773, 0.0008164344596567463, -0.007880878010261994, 0.1447110071732629,
       -0.5823571654525552, 0.45808210592918686, -1 / 66),
  ),
  'heun': Pair(order=2, a=((), (1.0,)), b=(0.5, 0.5), e=(0.5, -0.5)),  # for loose tolerances
}  # fmt: skip


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
  `solver` is a key of `SOLVERS`. `observe` is called after every step.

  Returns:
    x at t1, and the number of evaluations of the drift.

  Raises:
    FloatingPointError: if the solver needs more than `MAX_STEPS` steps, or x is not finite.
  """
  pair, tolerances = SOLVERS[solver], (rtol, atol)
  n = len(pair.b)
  slopes = [_slope_at(n, drift, x, [], (), t0)]
  h = _first_step(pair, drift, x, slopes[0], t0, t1, tolerances)
  t, nfe, longer = t0, 2, 10.0
  for _ in range(MAX_STEPS):
    last = abs(h) >= abs(t1 - t)
    h = t1 - t if last else h
    for i in range(len(slopes), n):
      weights = h * np.array(pair.a[i])
      slopes.append(_slope_at(n, drift, x, slopes, weights, t + weights.sum()))
      nfe += 1
    following = _move(x, slopes, _row(n, h * np.array(pair.b)))
    error = float(_size(slopes, _row(n, h * np.array(pair.e)), x, following, tolerances))
    # An error of order h^order; what is not finite asks for the shortest step.
    change = 0.9 * max(error, 1e-10) ** (-1 / pair.order) if np.isfinite(error) else 0.0
    if error < 1:
      t, x = t1 if last else t + h, following
      slopes = slopes[-1:] if pair.fsal else []
      if observe:
        observe((t - t0) / (t1 - t0), x)
      if t == t1:
        return x, nfe
    else:
      slopes = slopes[:1]
    h *= min(max(change, 0.2), longer if error < 1 else 1.0)
    longer = 10.0 if error < 1 else 1.0  # none is longer after one that failed
    if np.float32(t + h) == np.float32(t):
      break
  raise FloatingPointError(
    f'the ODE solver came to t = {t:.3g} and no further; raise sampling.rtol and sampling.atol, or '
    'look for values of the score that are not finite'
  )


def _first_step(
  pair: Pair,
  drift: Drift,
  x: State,
  slope: State,
  t0: float,
  t1: float,
  tolerances: tuple[float, float],
) -> float:
  """A cautious first step; takes one evaluation.

  From Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, Sec. II.4: an explicit
  Euler step of 1 % of x measures the second derivative.
  """
  n, span = len(pair.b), abs(t1 - t0)

  def size(v: Sequence[State], weights: Sequence[float]) -> float:
    return float(_size([*v, *[x] * (n - len(v))], _row(n, weights), x, x, tolerances))

  of_x, of_slope = size([x], [1.0]), size([slope], [1.0])
  probe = 0.01 * of_x / of_slope if min(of_x, of_slope) > 1e-5 else 1e-6 * span
  probe = np.copysign(min(probe, span), t1 - t0)  # beyond t1 the drift need not exist
  ahead = _slope_at(n, drift, x, [slope], (probe,), t0 + probe)
  largest = max(of_slope, size([ahead, slope], [1.0, -1.0]) / abs(probe))
  h = (0.01 / largest) ** (1 / pair.order) if largest > 1e-15 else 1e-3 * span
  h = min(h, 100 * abs(probe), span)
  return float(np.copysign(h if np.isfinite(h) else 0.01 * span, t1 - t0))


def _row(n: int, weights: Sequence[float] | np.ndarray) -> np.ndarray:
  """The weights [n], of which the missing ones are 0."""
  return np.pad(np.asarray(weights, np.float32), (0, n - len(weights)))


def _slope_at(
  n: int,
  drift: Drift,
  x: State,
  slopes: list[State],
  weights: Sequence[float] | np.ndarray,
  t: float,
) -> State:
  """The drift at (x + sum_i weights[i] slopes[i], t), of less than n slopes so far."""
  # Always n, so that it is compiled once; those that are missing weigh nothing.
  slopes = [*slopes, *[x] * (n - len(slopes))]
  return _slope(drift, x, slopes, _row(n, weights), np.float32(t))


@jax.jit
@full_precision  # or rounded products look like errors of the step
def _slope(drift: Drift, x: State, slopes: list[State], weights: Array, t: Array) -> State:
  return drift(_move(x, slopes, weights), t)


@jax.jit
def _move(x: State, slopes: list[State], weights: Array) -> State:
  """x + sum_i weights[i] slopes[i]."""
  return jax.tree.map(jnp.add, x, _sum(slopes, weights))


@jax.jit
def _size(
  v: list[State], weights: Array, x: State, y: State, tolerances: tuple[Array, Array]
) -> Array:
  """The root mean square [] of sum_i weights[i] v[i] over atol + rtol max(|x|, |y|)."""
  rtol, atol = tolerances

  def squares(v: Array, x: Array, y: Array) -> Array:
    scale = atol + rtol * jnp.maximum(jnp.abs(x), jnp.abs(y))
    return jnp.square(v / scale).sum()

  total = jax.tree.reduce(jnp.add, jax.tree.map(squares, _sum(v, weights), x, y))
  return jnp.sqrt(total / sum(leaf.size for leaf in jax.tree.leaves(x)))


def _sum(v: list[State], weights: Array) -> State:
  return jax.tree.map(lambda *leaves: sum(w * a for w, a in zip(weights, leaves, strict=True)), *v)
