"""The solvers of samplers/multistep.py and samplers/edm.py, and time grids.

The orders of convergence are measured on Gaussian data, for which the probability flow is known:
x_t = m_t + s_t / s_T (x_T - m_T), with mean m_t and standard deviation s_t of p_t.
"""

from collections.abc import Callable

from analytic import check_moments
from analytic import TWO_MODES as DATA
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samplers import time_grids
from samplers.base import GridSampler, Solver
from samplers.edm import EDM, FlowSolver
from samplers.multistep import DDIM, DEIS, DPMSolver, DPMSolver2S, DPMSolver3M, UniPC
from samplers.time_grids import SPACINGS, TimeGrid
from sde_lib import Chain, EDMSDE, RectifiedFlow, SDE, subVPSDE, VESDE, VPSDE


def alpha_of_linear_beta(t: float) -> float:
  """exp of -1/2 the integral of beta(t) = 0.1 + 19.9 t."""
  return np.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1)


# With alpha and sigma at time t, in NumPy.
SDES = {
  VESDE(0.01, 20.0): lambda t: (1.0, 0.01 * 2000**t),
  VPSDE(): lambda t: (
    alpha_of_linear_beta(t),
    np.sqrt(-np.expm1(2 * np.log(alpha_of_linear_beta(t)))),
  ),
  subVPSDE(): lambda t: (
    alpha_of_linear_beta(t),
    -np.expm1(2 * np.log(alpha_of_linear_beta(t))),
  ),
  EDMSDE(): lambda t: (1.0, t),
  RectifiedFlow(): lambda t: (1 - t, t),
}
EPS = {VESDE: 1e-3, VPSDE: 1e-2, subVPSDE: 1e-2, EDMSDE: 1e-2, RectifiedFlow: 1e-2}
VE, VP, SUBVP, EDM_SDE, FLOW = SDES
every_sde = pytest.mark.parametrize('sde', SDES, ids=lambda s: type(s).__name__)
KEY = jax.random.key(0)
SMALL = (3, 2)

# Deterministic solvers, and their orders. UniPC's corrector adds one (Theorem 3.1 there).
ORDERS = {
  DDIM(): 1, DPMSolver(1): 1, DPMSolver(2): 2, DPMSolver(3): 3, DPMSolver2S(): 2, DPMSolver3M(): 2,
  DEIS(1): 1, DEIS(2): 2, DEIS(3): 3, UniPC(1): 2, UniPC(2): 3, UniPC(3): 4,
  EDM(1): 1, EDM(2): 2, FlowSolver(1): 1, FlowSolver(2): 2,
}  # fmt: skip
every_solver = pytest.mark.parametrize('solver', ORDERS, ids=str)


def walk(
  solver: Solver, sde: SDE, times: np.ndarray, x: np.ndarray, denoise: Callable
) -> np.ndarray:
  """What `GridSampler` does in between prior and noise removal, in float64."""
  coefficients = {'t': times[:-1], 's': times[1:], **solver.coefficients(sde, times)}
  with jax.enable_x64(True):
    at = jnp.asarray(x)
    memory = solver.init(at)
    for i in range(len(times) - 1):
      c = {name: jnp.asarray(values[i]) for name, values in coefficients.items()}
      (at, _), memory = solver.update(KEY, denoise, c, at, memory)
    return np.asarray(at)


def denoiser(sde: SDE, mean: float, std: float):
  """E[x_0 | x_t = x] for data N(mean, std^2)."""

  def denoise(x: np.ndarray, t: float) -> np.ndarray:
    alpha, sigma = SDES[sde](t)
    return mean + alpha * std**2 * (x - alpha * mean) / ((alpha * std) ** 2 + sigma**2)

  return denoise


def exact_flow(sde: SDE, mean: float, std: float, x: np.ndarray) -> np.ndarray:
  """Where the probability flow takes x from T to eps."""
  (a, s), (a_T, s_T) = SDES[sde](EPS[type(sde)]), SDES[sde](sde.T)
  return a * mean + np.hypot(a * std, s) / np.hypot(a_T * std, s_T) * (x - a_T * mean)


# Accuracy.


@every_sde
@every_solver
def test_solvers_converge_with_their_order(sde, solver):
  """Over equal steps of the log-SNR, to 0.3 of an order; fourth order is seen with small steps.

  Third-order extrapolation does better where its error changes sign.
  """
  mean, std, x = 0.7, 0.4, np.array([-1.3, 0.2, 2.0]) * sde.prior_std
  steps = np.array([40, 80]) * (4 if ORDERS[solver] == 4 else 1)
  errors = []
  for n in steps:
    times = time_grids.log_snr(sde, int(n) + 1, EPS[type(sde)])
    got = walk(solver, sde, times, x, denoiser(sde, mean, std))
    errors.append(np.abs(got - exact_flow(sde, mean, std, x)).max())
  slope = np.log2(errors[0] / errors[1])
  assert slope >= ORDERS[solver] - 0.3


@every_sde
@pytest.mark.parametrize('solver', [s for s in ORDERS if not isinstance(s, FlowSolver)], ids=str)
def test_solvers_are_exact_for_a_single_point(sde, solver):
  """Data at one point, in one step and in four: x_t - alpha_t x_0 is proportional to sigma_t."""
  x, eps = np.array([-1.3, 0.2, 2.0]) * sde.prior_std, EPS[type(sde)]
  for times in (np.array([sde.T, eps]), time_grids.quadratic(sde, 5, eps)):
    got = walk(solver, sde, times, x, lambda x, t: jnp.full_like(x, 0.7))
    np.testing.assert_allclose(got, exact_flow(sde, 0.7, 0.0, x), rtol=0, atol=1e-7)


@pytest.mark.parametrize('order', [1, 2])
@pytest.mark.parametrize('n', [2, 5])
def test_straight_paths_to_a_point_take_one_step(order, n):
  """Flow matching's x' is constant along them: Euler's method is exact."""
  x, times = np.array([-1.3, 0.2, 2.0]), time_grids.uniform(FLOW, n, EPS[RectifiedFlow])
  got = walk(FlowSolver(order), FLOW, times, x, lambda x, t: jnp.full_like(x, 0.7))
  np.testing.assert_allclose(got, exact_flow(FLOW, 0.7, 0.0, x), rtol=0, atol=1e-10)


@every_sde
def test_first_orders_are_one_method(sde):
  """DDIM, first-order DPM-Solver++ and Euler's method in (x / alpha, sigma / alpha)."""
  times, x = time_grids.uniform(sde, 9, EPS[type(sde)]), np.array([-1.0, 0.5]) * sde.prior_std
  first, *others = (
    walk(solver, sde, times, x, denoiser(sde, 0.7, 0.4))
    for solver in (DDIM(), DPMSolver(1), DEIS(1), EDM(1))
  )
  for other in others:
    np.testing.assert_allclose(other, first, rtol=1e-9, atol=1e-12)
  ddim, dpm = (s.coefficients(sde, times) for s in (DDIM(1.0), DPMSolver(1, 1.0)))
  for name, values in ddim.items():
    np.testing.assert_allclose(dpm[name], values, rtol=1e-9)


@every_sde
def test_ddim_with_eta_one_is_ancestral_sampling(sde):
  """Between the times of the chain: the same mean, and the same noise."""
  chain, i = Chain(sde, 20), np.arange(19, 0, -1)
  times = np.asarray(chain.time(jnp.asarray(i)), np.float64)
  x = jax.random.normal(KEY, (len(times) - 1, 2)) * sde.prior_std
  t = jnp.asarray(times[:-1], jnp.float32)
  score = DATA.score_fn(sde)(x, t)
  mean, std = chain.ancestral(x, score, jnp.asarray(i[:-1]))
  c = DDIM(1.0).coefficients(sde, times)
  denoised = sde.reverse(DATA.score_fn(sde)).denoise(x, t)
  np.testing.assert_allclose(c['keep'][:, None] * x + c['weights'] * denoised, mean, rtol=2e-3)
  np.testing.assert_allclose(c['noise'], std, rtol=2e-3)


def test_ddim_with_eta_one_is_almost_the_ancestral_step_of_ddpm():
  """Whose steps differ by O(beta), and whose variance is beta, not the posterior's."""
  chain, i = VPSDE().chain(1000), np.arange(999, 100, -1)
  c = DDIM(1.0).coefficients(chain.sde, np.asarray(chain.time(jnp.asarray(i)), np.float64))
  x = jnp.zeros((len(i) - 1, 1))
  _, std = chain.ancestral(x, x, jnp.asarray(i[:-1]))
  np.testing.assert_allclose(c['noise'], std, rtol=0.02)


def published_third_order(D, lam, alpha, sigma, x):
  """A step to times [3] from the last three, as public codes of DPM-Solver++ write it."""
  h, h_0, h_1 = lam[3] - lam[2], lam[2] - lam[1], lam[1] - lam[0]
  r0, r1 = h_0 / h, h_1 / h
  D1_0, D1_1 = (D[2] - D[1]) / r0, (D[1] - D[0]) / r1
  D1 = D1_0 + (r0 / (r0 + r1)) * (D1_0 - D1_1)
  D2 = (1 / (r0 + r1)) * (D1_0 - D1_1)
  phi_1 = np.expm1(-h)
  phi_2 = phi_1 / h + 1
  phi_3 = phi_2 / h - 0.5
  first = sigma[3] / sigma[2] * x - alpha[3] * phi_1 * D[2]
  return first + alpha[3] * phi_2 * D1 - alpha[3] * phi_3 * D2


@pytest.mark.parametrize('sde', list(SDES)[:3], ids=lambda s: type(s).__name__)
def test_the_third_order_of_public_codes_is_not_unip(sde):
  """Steps are as there; on the way down UniP-3 and UniPC's predictor agree, and are nearer."""
  times = time_grids.quadratic(sde, 8, EPS[type(sde)])
  alpha, sigma = np.transpose([SDES[sde](t) for t in times])
  lam, rng = np.log(alpha / sigma), np.random.default_rng(0)
  c = DPMSolver3M().coefficients(sde, times)
  for i in range(2, 7):
    D, x = rng.normal(size=3), rng.normal()
    expected = published_third_order(D, *(v[i - 2 : i + 2] for v in (lam, alpha, sigma)), x)
    np.testing.assert_allclose(c['keep'][i] * x + c['weights'][i] @ D[::-1], expected, rtol=1e-7)
  exact, two = DPMSolver(3).coefficients(sde, times), DPMSolver(2).coefficients(sde, times)
  np.testing.assert_allclose(c['weights'][:2, :2], two['weights'][:2], rtol=1e-12)
  np.testing.assert_array_equal(exact['weights'], UniPC(3).coefficients(sde, times)['weights'])
  times, x = time_grids.log_snr(sde, 41, EPS[type(sde)]), np.array([-1.3, 2.0]) * sde.prior_std
  errors = [
    np.abs(walk(s, sde, times, x, denoiser(sde, 0.7, 0.4)) - exact_flow(sde, 0.7, 0.4, x)).max()
    for s in (DPMSolver(2), DPMSolver3M(), DPMSolver(3))
  ]
  assert errors[0] > errors[1] > errors[2]


# Noise.


@pytest.mark.parametrize(
  ('sde', 'solver', 'n', 'bias'),
  [
    *((sde, DDIM(1.0), 150, 0.05) for sde in (VE, VP, SUBVP, FLOW)),
    (VP, DDIM(0.5), 150, 0.05),
    (VE, DPMSolver(2, 1.0), 60, 0.02),
    (SUBVP, DPMSolver(2, 1.0), 60, 0.02),
    (VP, DPMSolver(3, 0.5), 60, 0.02),
    (VP, DPMSolver3M(1.0), 60, 0.02),
    (VE, EDM(2, churn=40.0), 60, 0.02),
    (SUBVP, EDM(2, churn=40.0), 60, 0.02),
    (EDM_SDE, EDM(2, churn=40.0), 60, 0.02),
    (FLOW, EDM(2, churn=40.0), 60, 0.02),
  ],
  ids=str,
)
def test_noisy_solvers_recover_the_data(sde, solver, n, bias):
  """First-order steps have a bias of order 1 / n; what is lost at eps is 1 % of the variance."""
  sampler = GridSampler(sde, solver, TimeGrid(n, EPS[type(sde)], time_grids.log_snr))
  x, _ = sampler(KEY, DATA.score_fn(sde), (2000, 2))
  check_moments(x, DATA, bias)


def test_churn_has_its_limits():
  """None, or only where no noise level lies, is the deterministic method; else noise is added."""
  sde, grid = SUBVP, TimeGrid(8, 1e-2, SPACINGS['edm'](7.0))

  def draw(**limits):
    return GridSampler(sde, EDM(**limits), grid)(KEY, DATA.score_fn(sde), SMALL)[0]

  expected = draw()
  np.testing.assert_allclose(draw(churn=4.0, tmin=1e6), expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(draw(churn=4.0, tmax=1e-6), expected, rtol=1e-5, atol=1e-6)
  assert np.abs(draw(churn=4.0) - expected).max() > 1e-2
  c = EDM(churn=4.0).coefficients(sde, grid.times(sde))
  assert c['start'].max() <= sde.T  # no noise beyond what the model has seen


# Time grids.


@every_sde
@pytest.mark.parametrize('spacing', SPACINGS)
def test_grids_fall_evenly_from_T_to_eps(sde, spacing):
  """Evenly in their own variable."""
  eps = EPS[type(sde)]
  times = TimeGrid(20, eps, SPACINGS[spacing](7.0)).times(sde)
  assert times[0] == sde.T and times[-1] == eps and len(times) == 20
  assert (np.diff(times) < 0).all()
  lam = time_grids.in_float64(sde.log_snr, times)
  own = {'uniform': times, 'quadratic': np.sqrt(times), 'log_snr': lam, 'edm': np.exp(-lam / 7)}
  own['cosine'] = np.arctan(np.exp(-lam))
  np.testing.assert_allclose(np.diff(own[spacing], 2), 0, atol=1e-9)


@pytest.mark.parametrize('sde', [VPSDE(), subVPSDE()], ids=lambda s: type(s).__name__)
def test_infinite_log_snr_is_told_in_one_line(sde):
  with pytest.raises(ValueError, match='choose eps > 0'):
    GridSampler(sde, DDIM(), TimeGrid(10, 0.0))(KEY, DATA.score_fn(sde), SMALL)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: DPMSolver(4), 'the order of dpm_solver'),
    (lambda: UniPC(0), 'the order of unipc'),
    (lambda: DDIM(1.5), 'eta must be'),
    (lambda: TimeGrid(1, 1e-3), 'at least 2 times'),
    (lambda: GridSampler(VP, DDIM(), TimeGrid(5, 1.0)), '0 <= eps < T'),
  ],
)
def test_choices_that_cannot_be(make, message):
  with pytest.raises(ValueError, match=message):
    make()
