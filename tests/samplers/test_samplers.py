"""What holds for all samplers: counts, cuts, observers, constraints, devices. Adaptive steps."""

from collections.abc import Callable
import dataclasses
import os
from pathlib import Path
import subprocess
import sys

from analytic import check_moments
from analytic import TWO_MODES as DATA
import flax
import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import pytest

from models import score
from models.preconditioning import PRECONDITIONINGS
from runtime.errors import UserError
from samplers import adaptive_sde, base
from samplers.adaptive_sde import AdaptiveSDESampler
from samplers.base import GridSampler
from samplers.edm import EDM
from samplers.multistep import DPMSolver, DPMSolver2S, UniPC
from samplers.time_grids import TimeGrid
from sampling import CORRECTORS, ODESampler, PCSampler, PREDICTORS
from sde_lib import SDE, subVPSDE, VESDE, VPSDE

KEY = jax.random.key(0)
SMALL = (3, 2)


class Calls:
  """Counts."""

  def __init__(self):
    self.n = 0


@flax.struct.dataclass
class CountingScore:
  """The score of DATA; counts how often it is evaluated."""

  sde: SDE = flax.struct.field(pytree_node=False)
  calls: Calls = flax.struct.field(pytree_node=False, default_factory=Calls)

  def __call__(self, x: Array, t: Array) -> Array:
    jax.debug.callback(self._count, t[0])
    return DATA.score_fn(self.sde)(x, t)

  def _count(self, t: Array) -> None:
    self.calls.n += 1


VP, EPS = VPSDE(beta_max=5.0), 1e-2
GRID = TimeGrid(6, EPS)
SAMPLERS = [
  GridSampler(VP, DPMSolver(3, 1.0), GRID),
  GridSampler(VP, UniPC(3), GRID),
  GridSampler(VP, EDM(churn=3.0), GRID),
  GridSampler(VP, DPMSolver2S(), GRID, noise_removal=False),
  AdaptiveSDESampler(VP, EPS),
  PCSampler(VP, PREDICTORS['euler_maruyama'](), CORRECTORS['langevin'](0.1, 1), GRID),
  ODESampler(VP, EPS, 1e-6, 1e-6),
]
every_sampler = pytest.mark.parametrize(
  'sampler', SAMPLERS, ids=lambda s: f'{type(s).__name__}-{getattr(s, "solver", "")}'
)


@every_sampler
def test_samplers_count_their_score_evaluations(sampler):
  score_fn = CountingScore(VP)
  _, nfe = sampler(KEY, score_fn, SMALL)
  jax.effects_barrier()
  assert nfe == score_fn.calls.n


@every_sampler
def test_samples_do_not_depend_on_where_the_run_is_cut(sampler, monkeypatch):
  expected = sampler(KEY, DATA.score_fn(VP), SMALL)[0]
  monkeypatch.setattr(base, 'SEGMENTS', 2)
  monkeypatch.setattr(adaptive_sde, 'SEGMENT', 1000)
  adaptive_sde._segment.clear_cache()
  np.testing.assert_array_equal(sampler(KEY, DATA.score_fn(VP), SMALL)[0], expected)
  adaptive_sde._segment.clear_cache()  # of segments of 1000


@every_sampler
def test_an_observer_sees_the_trajectory(sampler):
  """It begins with the prior if the number of steps is fixed, and ends with the samples."""
  seen = []
  x, _ = sampler(KEY, DATA.score_fn(VP), SMALL, observe=lambda *now: seen.append(now))
  fractions = [fraction for fraction, _ in seen]
  assert len(seen) > 1
  assert fractions == sorted(set(fractions)) and fractions[0] >= 0 and fractions[-1] == 1
  np.testing.assert_array_equal(seen[-1][1], x)
  assert all(state.shape == SMALL for _, state in seen)
  if fractions[0] == 0:
    unobserved = sampler(KEY, DATA.score_fn(VP), SMALL)[0]
    np.testing.assert_array_equal(x, unobserved)
    assert np.abs(seen[0][1]).mean() > 0.3


@flax.struct.dataclass
class Known:
  """Where `mask` is one, x_0 is `data`."""

  data: Array
  mask: Array

  def __call__(self, rng, update, t):
    x, mean = update
    alpha, sigma = (v[:, None] for v in (VP.alpha(t), VP.sigma(t)))
    noisy = alpha * self.data + sigma * jax.random.normal(rng, x.shape)
    return tuple(jnp.where(self.mask, a, b) for a, b in ((noisy, x), (alpha * self.data, mean)))


@every_sampler
def test_constraints_hold_all_the_way(sampler):
  """In the samples what is known is noise-free; and the rest follows from it."""
  constraint = Known(jnp.array([[1.0, 0.0]]), jnp.array([True, False]))
  if isinstance(sampler, ODESampler):
    with pytest.raises(UserError, match='takes no constraint'):
      sampler(KEY, DATA.score_fn(VP), SMALL, constraint=constraint)
    return
  grid = {'grid': TimeGrid(60, EPS)} if hasattr(sampler, 'grid') else {}
  sampler = dataclasses.replace(sampler, noise_removal=True, **grid)
  x, _ = sampler(KEY, DATA.score_fn(VP), (500, 2), constraint=constraint)
  np.testing.assert_array_equal(x[:, 0], 1)
  # p(second | first = 1) is all but the first mode, whose mean is 0.5; unconstrained it is -0.13.
  assert np.mean(x[:, 1]) > 0.2


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from likelihood import Likelihood
from samplers import ode, time_grids
from test_samplers import DATA, EPS, KEY, SAMPLERS, VP
batch = NamedSharding(Mesh(np.array(jax.devices()), ('data',)), PartitionSpec('data'))
for sampler in SAMPLERS[1], *SAMPLERS[4::2]:  # a solver with a history, and the adaptive ones
  (one, n), (four, m) = (
    sampler(KEY, DATA.score_fn(VP), (8, 2), sharding=sharding) for sharding in (None, batch)
  )
  assert four.sharding == batch and n == m, (sampler, four.sharding, n, m)
  np.testing.assert_allclose(four, one, rtol=1e-4, atol=1e-5)
# Of very many, a few have a step that is accepted here, and not there; were step sizes not
# rounded, errors of rounding would grow so fast that this were a tenth of all, or even all.
one, many = (SAMPLERS[4](KEY, DATA.score_fn(VP), (600, 2), sharding=s)[0] for s in (None, batch))
assert (np.abs(many - one).max(1) > 1e-4).mean() < 0.02
measure, compiled = Likelihood(VP, EPS), ode._slope._cache_size()
(one, z, n), (four, _, m) = (
  measure(KEY, DATA.score_fn(VP), x) for x in (np.asarray(four), jax.device_put(four, batch))
)
assert four.sharding == batch and n == m
np.testing.assert_allclose(four, one, rtol=1e-4, atol=1e-5)
assert ode._slope._cache_size() == compiled + 2, 'once for each sharding'

def where(t):
  seen.append(t.sharding.device_set)
  return VP.log_snr(t)

seen, cpu = [], jax.devices()[0]
with jax.default_device(jax.devices()[3]):
  time_grids._call = lambda f, v: f(v)
  (value,) = time_grids.in_float64(where, np.array([0.5]))
assert seen == [{cpu}] and value.dtype == np.float64, 'a time grid is of the CPU'
"""


def test_samples_do_not_depend_on_the_number_of_devices():
  here = Path(__file__).parent
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=4'
  paths = {'PYTHONPATH': f'{here}:{here.parent}:{here.parent.parent}', 'XLA_FLAGS': flags}
  done = subprocess.run(
    [sys.executable, '-c', SHARDED], env=os.environ | paths, capture_output=True, text=True,
    check=False, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr


class Listening(nn.Module):
  """A network that notes what it is told of t."""

  tell: Callable[[Array], None]

  def __call__(self, x, cond, train):
    jax.debug.callback(self.tell, cond[0])
    return x


@pytest.mark.parametrize('solver', ['pc', UniPC(2)])
@pytest.mark.parametrize(
  ('sde', 'conditioning', 'output'),
  [
    (VESDE(), score.noise_label, 'scaled_score'),
    (VPSDE(beta_max=5.0), score.chain_time, 'noise'),
  ],
)
def test_models_of_few_noise_scales_take_many_steps(sde, conditioning, output, solver):
  """Twice the steps of the training chain: VE asks for the nearest label, twice for each of them;
  VP for times in between, as its positional features allow.
  """
  heard, grid = [], TimeGrid(20, 1e-3)
  reading = PRECONDITIONINGS[output]
  model = score.ScoreModel(
    Listening(heard.append), sde.chain(10), conditioning, reading, False, True
  )
  if solver == 'pc':
    sampler = PCSampler(sde, PREDICTORS['reverse_diffusion'](), CORRECTORS['none'](0.1, 1), grid)
  else:
    sampler = GridSampler(sde, solver, grid)
  x, nfe = sampler(KEY, model.bind({}), SMALL)
  jax.effects_barrier()
  assert np.isfinite(x).all() and nfe == len(heard) == 20
  if output == 'noise':
    np.testing.assert_allclose(np.sort(heard), np.linspace(9e-3, 9, 20), atol=1e-5)
  else:
    np.testing.assert_array_equal(np.sort(heard), np.repeat(np.arange(10), 2))


# Adaptive steps.


@pytest.mark.parametrize(
  ('sde', 'eps'),
  [(VESDE(sigma_max=20.0), 1e-3), (VPSDE(), 1e-2), (subVPSDE(), 1e-2)],
  ids=lambda s: type(s).__name__,
)
def test_adaptive_steps_recover_the_data(sde, eps):
  """Variances are up to 4 % too small at this tolerance, of which eps is 1 %."""
  x, _ = AdaptiveSDESampler(sde, eps, rtol=0.2, atol=0.02)(KEY, DATA.score_fn(sde), (2000, 2))
  check_moments(x, DATA, bias=0.04)


def test_a_step_size_that_finds_no_way_raises(monkeypatch):
  monkeypatch.setattr(adaptive_sde, 'MAX_STEPS', 30)
  with pytest.raises(FloatingPointError, match='30 steps'):
    AdaptiveSDESampler(VP, EPS)(KEY, lambda x, t: 1e4 * jnp.sin(1e4 * x), SMALL)


@flax.struct.dataclass
class BrokenScore:
  """Right but for one sample, below a time."""

  value: float
  below: float

  def __call__(self, x, t):
    broken = (jnp.arange(len(x)) == 1) & (t < self.below)
    return jnp.where(broken[:, None], self.value, DATA.score_fn(VP)(x, t))


@pytest.mark.parametrize('below', [2.0, 0.5])
@pytest.mark.parametrize('value', [jnp.nan, jnp.inf])
def test_one_sample_that_is_not_finite_ends_adaptive_steps_at_once(value, below):
  """Not after 10,000 steps, in which the others are long done."""
  with pytest.raises(FloatingPointError, match=r'^1 of 3 samples .* after (\d\d|1\d\d) steps'):
    AdaptiveSDESampler(VP, EPS)(KEY, BrokenScore(value, below), SMALL)
