"""Samplers recover what they sample from, where the score is known exactly.

The data are a mixture of two Gaussians of unequal weight, or one Gaussian. Moments of samples are
compared by `check_moments`, with the bias that a test states for its sampler.
"""

from collections.abc import Callable
import dataclasses
import itertools

from analytic import check_moments, gaussian, given_noise, moments
from analytic import TWO_MODES as DATA
import flax
import jax
from jax import Array
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np
import pytest
import scipy.integrate

from samplers import base, ode, time_grids
from samplers.steps import ChainStep, GridStep
from samplers.time_grids import Spacing, TimeGrid, uniform
from sampling import CORRECTORS, ODESampler, PCSampler, PREDICTORS, ProbabilityFlow
from sde_lib import EDMSDE, RectifiedFlow, SDE, subVPSDE, VESDE, VPSDE

SHAPE = (4000, 2)
SDES = [VESDE(sigma_max=20.0), VPSDE(), subVPSDE()]
LATER = [EDMSDE(20.0), RectifiedFlow()]  # whose samplers take other grids than uniform ones
EPS = {VESDE: 1e-5, VPSDE: 1e-3, subVPSDE: 1e-3, EDMSDE: 1e-2, RectifiedFlow: 1e-3}
every_sde = pytest.mark.parametrize('sde', SDES, ids=lambda s: type(s).__name__)
later_too = pytest.mark.parametrize('sde', [*SDES, *LATER], ids=lambda s: type(s).__name__)


def grid(sde: SDE, n: int, spacing: Spacing = uniform) -> TimeGrid:
  return TimeGrid(n, EPS[type(sde)], spacing)


# Every sampler.


@every_sde
@pytest.mark.parametrize(
  ('predictor', 'corrector'), [(p, c) for p in PREDICTORS for c in CORRECTORS if p != 'none']
)
def test_pc_samplers_recover_the_data(sde, predictor, corrector):
  """200 steps; a Langevin step at snr = 0.1 adds a bias of snr^2 = 1 % to variances.

  The steps of the predictors have a bias of order 1 / n, at most 4 % here; see the slopes below.
  """
  sampler = PCSampler(sde, PREDICTORS[predictor](), CORRECTORS[corrector](0.1, 1), grid(sde, 200))
  x, _ = sampler(jax.random.key(0), DATA.score_fn(sde), SHAPE)
  check_moments(x, DATA, bias=0.04)


@pytest.mark.parametrize('sde', [*SDES[1:], *LATER], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize('predictor', ['euler_maruyama', 'reverse_diffusion', 'ancestral_sampling'])
def test_predictors_take_any_grid(sde, predictor):
  """Equal steps of the log-SNR: 150 have a bias of up to 6 % in variances."""
  sampler = PCSampler(
    sde, PREDICTORS[predictor](), CORRECTORS['none'](0.1, 1), grid(sde, 150, time_grids.log_snr)
  )
  x, _ = sampler(jax.random.key(0), DATA.score_fn(sde), SHAPE)
  check_moments(x, DATA, bias=0.06)


@pytest.mark.parametrize(
  'times', [TimeGrid(99, 1e-3), TimeGrid(100, 1e-3, time_grids.log_snr)], ids=['99', 'log_snr']
)
def test_steps_of_a_chain_are_those_of_its_own_times(times):
  sde = VPSDE()
  with pytest.raises(ValueError, match='has as many times, uniform in t'):
    PCSampler(
      sde, PREDICTORS['reverse_diffusion'](), CORRECTORS['none'](0.1, 1), times,
      chain=sde.chain(100),
    )  # fmt: skip


# A point at 0.3 in a space of one dimension: what is left of the noise is seen exactly.
POINT = gaussian(jnp.array([0.3]), 0.0)


@pytest.mark.parametrize(
  ('sde', 'n', 'eps'),
  [
    *itertools.product(SDES, [2, 200], [1e-5, 0.03]),
    *itertools.product(LATER, [2, 50], [1e-3]),
  ],
  ids=lambda v: type(v).__name__ if isinstance(v, SDE) else str(v),
)
@pytest.mark.parametrize('predictor', ['euler_maruyama', 'reverse_diffusion', 'ancestral_sampling'])
def test_every_grid_ends_in_clean_data(sde, predictor, n, eps):
  """However long its last step is; the released step overshoots where eps is not its length."""
  sampler = PCSampler(sde, PREDICTORS[predictor](), CORRECTORS['none'](0.1, 1), TimeGrid(n, eps))
  x, nfe = sampler(jax.random.key(0), POINT.score_fn(sde), (1000, 1))
  assert nfe == n
  assert np.sqrt(np.square(x - 0.3).mean()) < 2e-3


@every_sde
@pytest.mark.parametrize('predictor', ['euler_maruyama', 'reverse_diffusion', 'ancestral_sampling'])
def test_without_noise_removal_the_noise_of_eps_is_left(sde, predictor):
  """Of one point: sigma(eps) around alpha(eps) times it."""
  eps = 0.03
  sampler = PCSampler(
    sde, PREDICTORS[predictor](), CORRECTORS['langevin'](0.1, 3), TimeGrid(300, eps),
    noise_removal=False,
  )  # fmt: skip
  x, nfe = sampler(jax.random.key(0), POINT.score_fn(sde), (4000, 1))
  assert nfe == 299 + 300 * 3
  alpha, sigma = (float(f(jnp.float32(eps))) for f in (sde.alpha, sde.sigma))
  np.testing.assert_allclose(x.mean(), 0.3 * alpha, atol=4 * sigma / np.sqrt(4000))
  np.testing.assert_allclose(x.std(), sigma, rtol=0.2)  # of the last steps of the sub-VP SDE


@every_sde
@pytest.mark.parametrize('predictor', ['euler_maruyama', 'reverse_diffusion'])
def test_probability_flow_steps_recover_the_data(sde, predictor):
  """Nothing corrects the discretisation here: 200 steps have a bias of up to 14 % in variances."""
  sampler = PCSampler(
    sde, PREDICTORS[predictor](), CORRECTORS['none'](0.1, 1), grid(sde, 200), True
  )
  x, _ = sampler(jax.random.key(0), DATA.score_fn(sde), SHAPE)
  check_moments(x, DATA, bias=0.14)


@every_sde
@pytest.mark.parametrize(
  ('corrector', 'snr', 'bias'), [('langevin', 0.15, 0.06), ('ald', 0.3, 0.12)]
)
def test_correctors_alone_recover_the_data(sde, corrector, snr, bias):
  """1200 Langevin steps follow the marginals down from the prior, without a predictor.

  A step at signal-to-noise ratio snr moves the fraction 2 snr^2 of the way to equilibrium, which is
  itself off by snr^2 of the variance, 2 % at snr = 0.15. The steps of annealed Langevin dynamics
  shrink with the noise. Their own bias fades for that reason, so that they may be larger, but late
  in the run they no longer follow: under the sub-VP SDE variances stay 11 % too small.
  """
  sampler = PCSampler(sde, PREDICTORS['none'](), CORRECTORS[corrector](snr, 4), grid(sde, 300))
  x, _ = sampler(jax.random.key(0), DATA.score_fn(sde), (2000, 2))
  check_moments(x, DATA, bias)


@every_sde
def test_without_predictor_and_corrector_the_prior_stays(sde):
  """Samples of the prior, and with noise removal their posterior means."""
  score_fn, key = DATA.score_fn(sde), jax.random.key(0)
  sampler = PCSampler(
    sde, PREDICTORS['none'](), CORRECTORS['none'](0.1, 1), grid(sde, 24), noise_removal=False
  )
  x, nfe = sampler(key, score_fn, SHAPE)
  assert nfe == 0
  check_moments(x, gaussian(jnp.zeros(2), sde.prior_std), bias=0)
  denoised, nfe = dataclasses.replace(sampler, noise_removal=True)(key, score_fn, SHAPE)
  expected = sde.reverse(score_fn).denoise(x, jnp.full(len(x), EPS[type(sde)]))
  np.testing.assert_allclose(denoised, expected, rtol=1e-4, atol=1e-4)
  assert nfe == 1


@every_sde
@pytest.mark.parametrize(
  ('solver', 'tolerance'), [('dopri5', 1e-5), ('tsit5', 1e-5), ('heun', 1e-3)]
)
def test_ode_sampler_recovers_the_data(sde, solver, tolerance):
  """Only the noise that is left at eps, and the float32 tolerance, stand in between."""
  x, _ = ODESampler(sde, EPS[type(sde)], tolerance, tolerance, solver=solver)(
    jax.random.key(0), DATA.score_fn(sde), SHAPE
  )
  check_moments(x, DATA, bias=0.005)


@later_too
def test_ode_solution_for_a_gaussian_is_affine(sde):
  """x_eps = alpha_eps m + sqrt(v_eps / v_T) (x_T - alpha_T m), to fifty times the tolerance."""
  eps = EPS[type(sde)]
  mean, std, x = 0.7, 0.4, sde.prior_sampling(jax.random.key(0), SHAPE)
  twice = DATA.replace(means=jnp.full_like(DATA.means, mean), stds=jnp.full_like(DATA.stds, std))
  got, _ = ode.integrate(ProbabilityFlow(twice.score_fn(sde), sde), x, sde.T, eps)
  (m, v), (m_T, v_T) = (moments(sde, mean, std, jnp.asarray(t)) for t in (eps, sde.T))
  np.testing.assert_allclose(got, m + jnp.sqrt(v / v_T) * (x - m_T), atol=5e-4, rtol=0)


def test_flow_matching_and_edm_are_one_probability_flow():
  """x / alpha at sigma / alpha: the same noise ends in the same samples, to solver tolerance."""
  first, last = 80.0, 1e-2
  x = first * jax.random.normal(jax.random.key(0), SHAPE)
  edm, flow = EDMSDE(first), RectifiedFlow(first / (1 + first))
  ends = []
  for sde, scale in ((edm, lambda s: 1.0), (flow, lambda s: 1 + s)):
    drift = ProbabilityFlow(DATA.score_fn(sde), sde)
    times = (s / scale(s) for s in (first, last))
    end, _ = ode.integrate(drift, x / scale(first), *times)
    ends.append(end * scale(last))
  np.testing.assert_allclose(ends[1], ends[0], atol=2e-3)


# Order of convergence.

MOST = 800  # steps


def path_error(
  sde: SDE, predictor: str, n: int, released: bool, mean: float, std: float
) -> list[float]:
  """Largest error on the way of the mean, in standard deviations, and of the variance, relative.

  For Gaussian data an update is affine in x: evaluating it at x = 0 and 1 with noise 1 gives the
  whole of it, and the moments are propagated with no Monte-Carlo noise.
  """

  def score_fn(x: Array, t: Array) -> Array:
    m, v = moments(sde, mean, std, t)
    return (m[:, None] - x) / v[:, None]

  times = np.linspace(sde.T, 0.0, n)
  chain = ChainStep.of_chain(sde.chain(n), times)
  steps = chain if released else GridStep.of_grid(sde, times)
  # One shape, to share compiled code.
  steps = jax.tree.map(lambda v: jnp.pad(jnp.float64(v), (0, MOST - n), mode='edge'), steps)
  padded, rsde = jnp.pad(jnp.asarray(times), (0, MOST - n), mode='edge'), sde.reverse(score_fn)

  def update(x: float) -> np.ndarray:
    x = jnp.full((MOST, 1), x)
    with given_noise([jnp.ones_like(x)]):
      out = PREDICTORS[predictor]().update_fn(jax.random.key(0), rsde, x, steps)
    return np.asarray(out)[:, : n - 1, 0]

  (noisy, intercept), (_, at_one) = update(0.0), update(1.0)
  exact = [np.asarray(s)[:n] for s in moments(sde, mean, std, padded)]
  m, v = exact[0][0], exact[1][0]
  path = []
  for a, b, g in zip(at_one - intercept, intercept, noisy - intercept, strict=True):
    m, v = a * m + b, a**2 * v + g**2
    path.append([m, v])
  m, v = np.transpose(path)
  away = (m - exact[0][1:]) / np.sqrt(exact[1][1:]), v / exact[1][1:] - 1
  return [np.abs(error).max() for error in away]


@every_sde
@pytest.mark.parametrize('released', [True, False])
@pytest.mark.parametrize('predictor', ['euler_maruyama', 'reverse_diffusion', 'ancestral_sampling'])
def test_predictors_converge_with_weak_order_one(sde, predictor, released):
  """The errors of mean and variance fall as 1 / N as the steps double, if there are any."""
  steps = np.array([MOST // 4, MOST // 2, MOST])
  with jax.enable_x64(True):
    errors = [path_error(sde, predictor, int(n), released, 0.7, 0.4) for n in steps]
  for error in np.transpose(errors):
    if error.max() > 1e-5:
      slope = -np.polyfit(np.log(steps), np.log(error), 1)[0]
      assert 0.8 <= slope <= 1.2


# What samples do not depend on.


class Calls:
  """Counts."""

  def __init__(self):
    self.n = 0


@flax.struct.dataclass
class CountingScore:
  """A score of Gaussian data N(mean, 1), as a pytree; counts how often it is called or traced."""

  mean: Array
  sde: SDE = flax.struct.field(pytree_node=False)
  calls: Calls = flax.struct.field(pytree_node=False, default_factory=Calls)

  def __call__(self, x: Array, t: Array) -> Array:
    self.calls.n += 1
    alpha, v = moments(self.sde, 1.0, 1.0, t)
    return (alpha[:, None] * self.mean - x) / v[:, None]


SMALL = (3, 2)


@pytest.fixture(scope='module')
def pc() -> PCSampler:
  return PCSampler(
    VPSDE(), PREDICTORS['reverse_diffusion'](), CORRECTORS['langevin'](0.1, 2), TimeGrid(30, 1e-3)
  )


@pytest.fixture(scope='module')
def score(pc) -> CountingScore:
  return CountingScore(jnp.array([0.5, -0.5]), pc.sde)


def test_samples_do_not_depend_on_where_the_run_is_cut(pc, score, monkeypatch):
  key = jax.random.key(0)
  expected = pc(key, score, SMALL)[0]
  for segments in (1, 4, 1000):
    monkeypatch.setattr(base, 'SEGMENTS', segments)
    np.testing.assert_array_equal(pc(key, score, SMALL)[0], expected)


def test_plain_and_pytree_scores_agree(pc, score):
  def plain(x, t):
    return score(x, t)

  key = jax.random.key(0)
  got, expected = (pc(key, score_fn, SMALL)[0] for score_fn in (plain, score))
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['pc', 'ode'])
def test_samplers_compile_once_for_all_parameters(kind, pc, score):
  """Other parameters and keys trace nothing new, and give other samples."""
  sampler = pc if kind == 'pc' else ODESampler(pc.sde, 1e-3)
  x, _ = sampler(jax.random.key(0), score, SMALL)
  before = score.calls.n
  again, _ = sampler(jax.random.key(0), score.replace(mean=score.mean + 3), SMALL)
  sampler(jax.random.key(1), score, SMALL)
  assert score.calls.n == before
  assert np.abs(again - x).min() > 0.5


@pytest.mark.parametrize('sampler', ['pc', 'ode'])
def test_progress_grows_to_one(sampler, pc):
  fractions = []
  sampler = pc if sampler == 'pc' else ODESampler(pc.sde, 1e-3)
  sampler(
    jax.random.key(0),
    DATA.score_fn(pc.sde),
    SMALL,
    observe=lambda fraction, x: fractions.append(fraction),
  )
  assert len(fractions) > 1
  assert fractions == sorted(set(fractions))
  assert fractions[0] >= 0 and fractions[-1] == 1


@pytest.mark.parametrize(
  ('predictor', 'corrector', 'noise_removal'),
  [*itertools.product(PREDICTORS, CORRECTORS, [True]), ('none', 'ald', False)],
)
@pytest.mark.parametrize('released', [True, False])
def test_pc_samplers_count_their_score_evaluations(predictor, corrector, noise_removal, released):
  sde = VESDE()
  sampler = PCSampler(
    sde, PREDICTORS[predictor](), CORRECTORS[corrector](0.1, 2), TimeGrid(2, 1e-5),
    noise_removal=noise_removal, chain=sde.chain(2) if released else None,
  )  # fmt: skip
  score_fn = CountingScore(jnp.zeros(2), sde)
  with jax.disable_jit():
    _, nfe = sampler(jax.random.key(0), score_fn, SMALL)
  assert nfe == score_fn.calls.n


# The ODE solver.


def oscillator(frequency: float = 3.0) -> Callable[[Array, Array], Array]:
  """x'' = -frequency^2 x, in x [2, ...] = (position, velocity / frequency)."""

  def drift(w, x, t):
    del t
    return w * jnp.stack([x[1], -x[0]])

  return Partial(drift, jnp.float32(frequency))


START = jnp.array([[1.0, 0.2], [0.0, -0.5]])


def rotated(x: Array, angle: float) -> Array:
  c, s = np.cos(angle), np.sin(angle)
  return jnp.stack([c * x[0] + s * x[1], c * x[1] - s * x[0]])


def test_ode_error_falls_with_the_tolerance():
  drift, errors, work = oscillator(), [], []
  for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
    x, nfe = ode.integrate(drift, START, 0.0, 2.0, rtol=tolerance, atol=tolerance)
    errors.append(float(np.abs(x - rotated(START, 6.0)).max()))
    work.append(nfe)
    assert errors[-1] <= 20 * tolerance
  assert errors == sorted(errors, reverse=True)
  assert work == sorted(work)
  assert errors[-1] <= errors[0] / 100


@pytest.mark.parametrize(('t0', 't1'), [(0.0, 1.5), (1.0, 1e-5), (-0.5, 0.5)])
def test_ode_forwards_then_backwards_is_the_identity(t0, t1):
  def drift(x, t):
    return jnp.sin(x) + jnp.cos(5 * t)

  drift = Partial(drift)
  there, _ = ode.integrate(drift, START, t0, t1, rtol=1e-6, atol=1e-6)
  back, _ = ode.integrate(drift, there, t1, t0, rtol=1e-6, atol=1e-6)
  assert np.abs(there - START).max() > 0.1
  np.testing.assert_allclose(back, START, atol=1e-4)


@pytest.mark.parametrize('sde', SDES[1:], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize('std', [1.0, 1.01])
def test_ode_begins_where_the_drift_all_but_vanishes(sde, std):
  """As it does for VP at t = T. A first step that long would leave [0, T], where nothing is."""
  score_fn = gaussian(jnp.zeros(2), std).score_fn(sde)
  x, nfe = ODESampler(sde, EPS[type(sde)], 1e-3, 1e-3)(jax.random.key(0), score_fn, (2000, 2))
  check_moments(x, gaussian(jnp.zeros(2), std), bias=0.02)
  assert nfe < 100


@pytest.mark.parametrize('solver', ode.SOLVERS)
@pytest.mark.parametrize('tolerance', [1e-2, 1e-4])
def test_ode_counts_its_evaluations(solver, tolerance):
  times = []

  def drift(x, t):
    jax.debug.callback(times.append, t)
    return jnp.cos(20 * t) * x

  tolerances = {'rtol': tolerance, 'atol': tolerance}
  _, nfe = ode.integrate(Partial(drift), START, 0.0, 2.0, solver=solver, **tolerances)
  jax.effects_barrier()
  assert nfe == len(times)


@pytest.mark.parametrize('name', ode.SOLVERS)
def test_tableaus_satisfy_the_order_conditions(name):
  """Of all trees up to order 3, and of the bushy ones beyond: sum_i b_i c_i^k = 1 / (k + 1).

  The embedded method, b - e, is of one order less.
  """
  pair = ode.SOLVERS[name]
  n = len(pair.b)
  a = np.array([[*row, *[0.0] * (n - len(row))] for row in pair.a])
  b, c = np.array(pair.b), a.sum(1)
  for weights, order in ((b, pair.order), (b - pair.e, pair.order - 1)):
    for k in range(order):
      assert weights @ c**k == pytest.approx(1 / (k + 1), abs=1e-12)
    if order >= 3:
      assert weights @ a @ c == pytest.approx(1 / 6, abs=1e-12)
  assert pair.fsal == (name != 'heun')


@pytest.mark.parametrize('tolerance', [1e-2, 1e-3, 1e-5])
def test_dopri5_takes_the_steps_of_scipy(tolerance):
  """Both have the pair and the rules of Hairer, Norsett & Wanner; here in float32."""
  x, nfe = ode.integrate(oscillator(), START, 0.0, 2.0, rtol=tolerance, atol=tolerance)

  def drift(t, x):
    return 3 * np.stack([x[2:], -x[:2]]).ravel()

  theirs = scipy.integrate.solve_ivp(
    drift, (0.0, 2.0), np.ravel(START), rtol=tolerance, atol=tolerance
  )
  assert nfe == theirs.nfev
  np.testing.assert_allclose(np.ravel(x), theirs.y[:, -1], atol=2e-5)


@pytest.mark.parametrize(
  'drift',
  [
    pytest.param(lambda x, t: x**2, id='blow-up'),
    pytest.param(lambda x, t: x * jnp.where(t > 0.5, jnp.nan, 1.0), id='nan later'),
    pytest.param(lambda x, t: x * jnp.nan, id='nan at once'),
    pytest.param(lambda x, t: x / 0.0, id='infinite'),
  ],
)
def test_ode_that_cannot_be_solved_raises(drift):
  with pytest.raises(FloatingPointError, match='not finite'):
    ode.integrate(Partial(drift), jnp.ones((2, 2)), 0.0, 2.0)


def test_ode_that_takes_too_many_steps_raises(monkeypatch):
  monkeypatch.setattr(ode, 'MAX_STEPS', 3)
  with pytest.raises(FloatingPointError, match=r'came to t = 0\.'):
    ode.integrate(oscillator(), START, 0.0, 2.0)
