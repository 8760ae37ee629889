"""Consistency models: against the probability flow of a mixture, integrated in float64."""

import dataclasses
import functools

from analytic import TWO_MODES
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from data.codec import PointCodec
from models import score
from models.mlp import MLP
from models.preconditioning import PRECONDITIONINGS
from models.score import ScoreModel
from samplers.time_grids import Karras
from sde_lib import EDMSDE, expand, RectifiedFlow, SDE, VPSDE
from training import consistency
from training.averages import ConstantRate
from training.consistency import (
  consistency_distillation,
  consistency_loss,
  consistency_training,
  easy_tuning,
  improved_training,
  noise_levels,
  perturbed,
  PseudoHuber,
)
from training.curricula import Approaching, Constant, Doubling, Grid, Growing, NormalLaw
from training.step import init_state

KEY = jax.random.key(0)
EPS = 0.01
SDES = [VPSDE(), EDMSDE(10.0), RectifiedFlow(0.99)]
some_sdes = pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)


# A flow that is known.


def denoised(sde: SDE, x, t):
  """E[x_0 | x_t = x] of the mixture."""
  alpha, sigma = (expand(v, x) for v in sde.kernel(t))
  return (x + sigma**2 * TWO_MODES.score_fn(sde)(x, t)) / alpha


@functools.partial(jax.jit, static_argnums=(0, 1))
def flow_end(sde: SDE, steps: int, x, t):
  """Where the probability flow through x at times t is at EPS: Runge-Kutta in log s.

  In y = x / alpha it is dy / dlog(s) = y - D.
  """
  end = jnp.full_like(t, EPS)
  first, last = -sde.log_snr(t), -sde.log_snr(end)
  h = expand((last - first) / steps, x)

  def slope(y, log_s):
    time = sde.time_of_log_snr(-log_s)
    return y - denoised(sde, expand(sde.alpha(time), x) * y, time)

  def step(i, y):
    s = first + (last - first) * i / steps

    def stage(carry, at_and_share):
      slope_before, total = carry
      at, share = at_and_share
      k = slope(y + at * h * slope_before, s + at * h.reshape(s.shape))
      return (k, total + share * k), None

    stages = jnp.array([0.0, 0.5, 0.5, 1.0], y.dtype), jnp.array([1, 2, 2, 1], y.dtype) / 6
    return y + h * jax.lax.scan(stage, (0 * y, 0 * y), stages)[0][1]

  y = jax.lax.fori_loop(0, steps, step, x / expand(sde.alpha(t), x))
  return expand(sde.alpha(end), x) * y


def pairs_of(objective: consistency.Consistency, n: int):
  rng_x, rng_t, rng_z = jax.random.split(KEY, 3)
  x0, z = TWO_MODES.sample(rng_x, n), jax.random.normal(rng_z, (n, 2))
  return x0, *objective.curriculum.pairs(rng_t, jnp.int32(0), n), z


@pytest.mark.parametrize(('solver', 'order'), [('euler', 2), ('heun', 3)])
def test_a_perfect_function_has_the_error_of_the_solver_as_its_loss(solver, order):
  """A step of order p is wrong by h^(p + 1): so is the distance, and the square of that its l2."""
  sde, errors = EDMSDE(10.0), []
  with jax.enable_x64(True):
    flow = functools.partial(flow_end, sde, 400)
    for n in (41, 81):
      objective = consistency_distillation(sde, EPS, n, solver, consistency.l1)
      x0, t, r, z = (jnp.asarray(v, jnp.float64) for v in pairs_of(objective, 400))
      exact = functools.partial(denoised, sde)
      errors.append(consistency_loss(objective, flow, flow, exact, x0, t, r, z).mean())
  assert errors[1] < 1e-3
  np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order, atol=0.35)


@some_sdes
@pytest.mark.parametrize('solver', ['none', 'heun'])
def test_a_perfect_function_has_no_loss(sde, solver):
  """Where the data are one point, paths are straight in s: every step is exact, for every SDE."""
  x0 = jnp.broadcast_to(jnp.array([0.8, -0.3]), (64, 2))
  grid = Grid(sde, EPS, Constant(12))
  t, r = grid.pairs(KEY, jnp.int32(0), 64)
  objective = consistency.Consistency(
    grid, consistency.PREVIOUS[solver], consistency.l1, consistency.WEIGHTS['uniform']
  )

  def end_of(x, t):
    end = jnp.full_like(t, EPS)
    s, _, gap = noise_levels(sde, t, end)
    z = (x - expand(sde.alpha(t), x) * x0) / expand(sde.sigma(t), x)
    return expand(sde.alpha(end), x) * (x0 + expand(s - gap, x) * z)

  z = jax.random.normal(KEY, x0.shape)
  loss = consistency_loss(objective, end_of, end_of, lambda x, t: x0, x0, t, r, z)
  assert loss.max() < 1e-4
  away = consistency_loss(objective, lambda x, t: x, end_of, lambda x, t: x0, x0, t, r, z)
  assert away.mean() > 0.1


def test_distillation_has_a_teacher():
  x, t = jnp.ones((3, 2)), jnp.ones(3)
  with pytest.raises(ValueError, match='needs a teacher'):
    consistency.heun_step(EDMSDE(10.0), None, x, x, x, t, t)


def test_no_gradient_goes_through_the_target():
  objective = consistency_distillation(EDMSDE(10.0), EPS, solver='none', distance=consistency.l2)
  x0, t = jnp.ones((3, 2)), jnp.array([1.0, 2.0, 3.0])

  def loss(both):
    f, target = (functools.partial(lambda a, x, t: a * x, a) for a in both)
    return consistency_loss(objective, f, target, None, x0, t, 0.9 * t, x0).mean()

  of_f, of_target = jax.grad(loss)(jnp.array([1.0, 2.0]))
  assert of_f != 0 and of_target == 0


@pytest.mark.parametrize('c', [0.0, 0.06])
def test_pseudo_huber(c):
  """Near zero it is a square over 2 c, far away the norm; its gradient is finite at zero."""
  distance = PseudoHuber(c)
  a = jnp.zeros((3, 4, 4, 3)).at[1, 0, 0, 0].set(1e-7).at[2, 0, 0].set(10.0)
  in_use = c or 0.00054 * np.sqrt(48)
  exact = [0.0, 1e-14 / (2 * in_use), np.sqrt(300 + in_use**2) - in_use]
  np.testing.assert_allclose(distance(a, 0 * a), exact, rtol=1e-6)
  assert np.isfinite(jax.grad(lambda a: distance(a, 0 * a).sum())(a)).all()


# Pairs of times.


@some_sdes
@pytest.mark.parametrize(
  'curriculum',
  [
    lambda sde: Grid(sde, EPS, Constant(17)),
    lambda sde: Grid(sde, EPS, Growing(100, 2, 50)),
    lambda sde: Grid(sde, EPS, Doubling(100, 10, 1280), law=NormalLaw()),
    lambda sde: Approaching(sde, EPS, 100),
  ],
  ids=['constant', 'growing', 'doubling', 'approaching'],
)
def test_pairs_lie_in_order_between_the_ends(sde, curriculum):
  for step in (0, 37, 1000):  # past the end, too
    t, r = curriculum(sde).pairs(KEY, jnp.int32(step), 2000)
    assert (r < t).all() and (r >= EPS).all() and (t <= sde.T).all()
    _, _, gap = noise_levels(sde, t, r)
    assert (gap > 0).all() and np.isfinite(1 / gap).all()


def test_the_grid_is_that_of_edm():
  sde = EDMSDE(80.0)
  grid = Grid(sde, 0.002, Constant(17))
  times = grid.time(jnp.arange(18.0), jnp.int32(17))
  np.testing.assert_allclose(times, Karras(7.0)(sde, 18, 0.002), rtol=2e-6)
  assert times[0] == 80 and times[-1] == jnp.float32(0.002)


def test_levels_of_improved_training_are_normal():
  """Each interval has the probability that Eq. 10 gives it."""
  sde, n, draws = EDMSDE(80.0), 10, 40_000
  grid = Grid(sde, 0.002, Constant(n), law=NormalLaw(-1.1, 2.0))
  t, _ = grid.pairs(KEY, jnp.int32(0), draws)
  times = np.asarray(grid.time(jnp.arange(n + 1.0), jnp.int32(n)))
  seen = np.array([(np.asarray(t) == time).sum() for time in times[:-1]])
  assert seen.sum() == draws
  mass = -np.diff(stats.norm.cdf((np.log(times) + 1.1) / 2))
  expected = draws * mass / mass.sum()
  assert (np.abs(seen - expected) < 4.5 * np.sqrt(expected) + 1).all()


def test_the_number_of_intervals_doubles():
  """From 10 to 1280 in eight equal parts of 400,000 steps (Table 1 of the paper)."""
  counts = Doubling(400_000)
  steps = jnp.array([0, 49_999, 50_000, 349_999, 350_000, 399_999, 10_000_000, 2_000_000_000])
  np.testing.assert_array_equal(counts(steps), [10, 10, 20, 640, 1280, 1280, 1280, 1280])
  np.testing.assert_array_equal(Doubling(10, 10, 10)(steps[:3]), [10, 10, 10])
  np.testing.assert_array_equal(Doubling(8, 3, 10)(jnp.arange(9)), [3] * 3 + [6] * 3 + [10] * 3)


def test_easy_tuning_comes_close_in_stages():
  """r / t = 1 - 2^-a (1 + 8 / (1 + e^t)), or r = eps."""
  curriculum = Approaching(EDMSDE(80.0), 0.002, 800)
  for step, stage in ((0, 1), (99, 1), (100, 2), (799, 8), (5000, 8)):
    t, r = (np.float64(v) for v in curriculum.pairs(KEY, jnp.int32(step), 500))
    share = 1 - 2.0**-stage * (1 + 8 / (1 + np.exp(t)))
    np.testing.assert_allclose(r, np.maximum(share * t, 0.002), rtol=1e-4)
  assert (r > 0.002).mean() > 0.9


# Training.


def mlp_model(sde: SDE, output: str = 'edm') -> ScoreModel:
  return ScoreModel(
    MLP(nf=32, num_layers=2),
    sde.chain(100),
    score.quarter_log_noise,
    PRECONDITIONINGS[output].for_data(0.7),
    continuous=True,
    centered=True,
  )


STEPS = 300
OBJECTIVES = {
  'cd': lambda sde: consistency_distillation(sde, EPS, 12),
  'ct': lambda sde: consistency_training(sde, EPS, STEPS, 2, 20),  # whose target is an average
  'ict': lambda sde: improved_training(sde, EPS, STEPS, 10, 40),
  'ect': lambda sde: easy_tuning(sde, EPS, STEPS, distance=PseudoHuber(0.03)),
}
OUTPUTS = {EDMSDE(10.0): 'edm', VPSDE(): 'v'}


class ExactTeacher(ScoreModel):
  """The score of the mixture, where a network's is asked for."""

  def bind(self, params, dropout_rng=None, **told):
    return Denoiser(self.sde) if params == 'exact' else super().bind(params, dropout_rng, **told)


@dataclasses.dataclass(frozen=True)
class Denoiser:
  sde: SDE

  def denoised(self, x, t):
    return denoised(self.sde, x, t)


def distance_to_flow(model, params, x, t, ends) -> float:
  f = consistency.jumps(model, params, EPS)
  return float(jnp.abs(jax.jit(f)(x, t) - ends).mean())


@pytest.mark.parametrize(
  ('sde', 'name'), [*((EDMSDE(10.0), name) for name in OBJECTIVES), (VPSDE(), 'cd')], ids=str
)
def test_training_leads_to_the_end_of_the_flow(sde, name):
  output = OUTPUTS[sde]
  plain = mlp_model(sde, output)
  model = ExactTeacher(*(getattr(plain, f.name) for f in dataclasses.fields(plain)))
  objective = OBJECTIVES[name](sde)
  averages = (ConstantRate(0.9), *objective.target_averages)
  tx = optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))
  state = init_state(KEY, model, tx, (1, 2), len(averages))
  teacher = 'exact' if name.startswith('cd') else None

  @jax.jit
  def train(state):
    def step(state, rng):
      batch = {'data': TWO_MODES.sample(rng, 128)}
      return consistency.train_step(
        state, teacher, batch, KEY,
        model=model, codec=PointCodec((2,)), objective=objective, tx=tx, averages=averages,
      )  # fmt: skip

    return jax.lax.scan(step, state, jax.random.split(KEY, STEPS))

  grid = Grid(sde, EPS, Constant(40))
  t, _ = grid.pairs(KEY, jnp.int32(0), 400)
  x = perturbed(sde, TWO_MODES.sample(KEY, 400), jax.random.normal(KEY, (400, 2)), t)
  with jax.enable_x64(True):
    exact = flow_end(sde, 400, *(jnp.asarray(v, jnp.float64) for v in (x, t)))
  ends = jnp.asarray(np.asarray(exact), jnp.float32)
  before = distance_to_flow(model, state.params, x, t, ends)
  state, metrics = train(state)
  after = distance_to_flow(model, state.params, x, t, ends)
  assert np.isfinite(metrics['loss']).all()
  assert after < 0.6 * before
