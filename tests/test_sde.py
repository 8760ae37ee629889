"""Identities that hold for every SDE: marginals, chains, time reversal, and ancestral steps."""

import dataclasses
import itertools

from analytic import gaussian, moments
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from samplers.steps import GridStep
from sde_lib import Chain, EDMSDE, RectifiedFlow, SDE, subVPSDE, VESDE, VPSDE

RELEASED = [VESDE, VPSDE, subVPSDE]
SDES = [*RELEASED, EDMSDE, RectifiedFlow]
SHAPES = [(6, 3), (6, 2, 4, 3)]
MEAN, STD = 0.7, 0.4  # of the Gaussian data
TIMES = jnp.array([1.0, 0.7, 0.4, 0.1, 1e-2, 1e-3])

every_sde = pytest.mark.parametrize('sde', [cls() for cls in SDES], ids=lambda s: type(s).__name__)
every_shape = pytest.mark.parametrize('shape', SHAPES)


def times_of(sde: SDE) -> jax.Array:
  """From T on down."""
  return sde.T * TIMES


def each(t: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
  """Values per example, with axes to broadcast against data."""
  return np.asarray(t).reshape(-1, *[1] * (len(shape) - 1))


def data(shape: tuple[int, ...]) -> jax.Array:
  return jax.random.normal(jax.random.key(1), shape)


# Marginals.


@every_sde
def test_marginal_solves_the_moment_equations(sde):
  """d alpha / dt = f alpha and d sigma^2 / dt = 2 f sigma^2 + g^2."""
  with jax.enable_x64(True):
    t = jnp.asarray(np.asarray(times_of(sde)), jnp.float64)
    alpha, d_alpha = jax.jvp(sde.alpha, [t], [jnp.ones_like(t)])
    variance, d_variance = jax.jvp(lambda t: sde.sigma(t) ** 2, [t], [jnp.ones_like(t)])
    f, g = sde.drift_coef(t), sde.diffusion_coef(t)
    np.testing.assert_allclose(d_alpha, f * alpha, rtol=1e-10)
    np.testing.assert_allclose(d_variance, 2 * f * variance + g**2, rtol=1e-9, atol=1e-12)


@every_sde
def test_closed_forms_are_what_differentiation_gives(sde):
  """Drift and diffusion by differentiation of alpha and sigma, lambda by their logarithms."""
  with jax.enable_x64(True):
    t = jnp.asarray(np.asarray(times_of(sde)), jnp.float64)
    for name in ('drift_coef', 'diffusion_coef', 'log_snr'):
      derived, closed = (getattr(of, name) for of in (SDE, type(sde)))
      np.testing.assert_allclose(derived(sde, t), closed(sde, t), rtol=1e-7, atol=1e-12)


@dataclasses.dataclass(frozen=True)
class TwoFunctions(SDE):
  """An SDE that says no more than it must: alpha = 1 - t / 2, sigma = t (3 - t) of T = 1."""

  def alpha(self, t):
    return 1 - t / 2

  def sigma(self, t):
    return t * (3 - t)


def test_an_sde_is_two_functions():
  """The rest follows: f = -1 / (2 - t), g^2 = 2 sigma (sigma' - f sigma), the prior's sigma(T)."""
  sde, t = TwoFunctions(), jnp.array([0.0, 0.1, 0.5, 1.0])
  f, sigma = -1 / (2 - t), t * (3 - t)
  np.testing.assert_allclose(sde.drift_coef(t), f, rtol=1e-6)
  np.testing.assert_allclose(
    sde.diffusion_coef(t), jnp.sqrt(2 * sigma * (3 - 2 * t - f * sigma)), rtol=1e-6
  )
  assert sde.prior_std == 2 and sde.chain(7) == Chain(sde, 7)
  np.testing.assert_allclose(sde.time_of_log_snr(sde.log_snr(t[1:])), t[1:], rtol=1e-5)
  drawn = jax.jit(sde.prior_sampling, static_argnums=1)(jax.random.key(0), (10_000,))
  np.testing.assert_allclose(drawn.std(), 2, rtol=0.03)


@pytest.mark.parametrize(
  ('sde', 'alpha', 'sigma'),
  [(VESDE(), 1, 0.01), *((sde, 1, 0) for sde in (VPSDE(), subVPSDE(), EDMSDE(), RectifiedFlow()))],
  ids=lambda v: v.__class__.__name__,
)
def test_marginal_begins_at_the_data(sde, alpha, sigma):
  t = jnp.zeros(1)
  np.testing.assert_allclose(sde.alpha(t), alpha)
  np.testing.assert_allclose(sde.sigma(t), sigma)


@every_sde
def test_marginal_ends_at_the_prior(sde):
  """What is left of data of unit size is 2 % of the prior's standard deviation at most."""
  t = jnp.full(1, sde.T)
  np.testing.assert_allclose(sde.sigma(t), sde.prior_std, rtol=1e-4)
  assert sde.alpha(t) / sde.prior_std <= 0.021


@every_sde
@every_shape
def test_drift_diffusion_and_marginal_apply_to_any_data_shape(sde, shape):
  x, t = data(shape), times_of(sde)
  drift, diffusion = sde.sde(x, t)
  mean, std = sde.marginal_prob(x, t)
  np.testing.assert_allclose(drift, each(sde.drift_coef(t), shape) * x, rtol=1e-6)
  np.testing.assert_allclose(mean, each(sde.alpha(t), shape) * x, rtol=1e-6)
  np.testing.assert_array_equal(diffusion, sde.diffusion_coef(t))
  np.testing.assert_array_equal(std, sde.sigma(t))


def test_variance_is_preserved_and_sub_vp_never_exceeds_it():
  """alpha^2 + sigma^2 = 1 for VP; sub-VP has the same alpha and sigma_subVP = sigma_VP^2."""
  t = jnp.linspace(0, 1, 101)
  vp, sub = VPSDE(), subVPSDE()
  np.testing.assert_allclose(vp.alpha(t) ** 2 + vp.sigma(t) ** 2, 1, rtol=1e-6)
  np.testing.assert_array_equal(sub.alpha(t), vp.alpha(t))
  np.testing.assert_allclose(sub.sigma(t), vp.sigma(t) ** 2, rtol=1e-6)


@every_sde
def test_float32_keeps_its_digits_near_zero(sde):
  """sigma and g to 1e-6 down to t = 1e-7, where 1 - exp(.) would have no digit left."""
  t32 = jnp.array([1e-7, 1e-5, 1e-3])
  with jax.enable_x64(True):
    t64 = jnp.asarray(np.asarray(t32), jnp.float64)
    exact = np.asarray(sde.sigma(t64)), np.asarray(sde.diffusion_coef(t64))
  np.testing.assert_allclose(sde.sigma(t32), exact[0], rtol=1e-6)
  np.testing.assert_allclose(sde.diffusion_coef(t32), exact[1], rtol=1e-6)


@every_sde
def test_log_snr_and_its_inverse(sde):
  """Both ways, by formula and by bisection, in float32; lambda(t) itself changes by 1e-6 there."""
  t = jnp.concatenate([times_of(sde), jnp.array([1e-4, 1e-5])])
  lam = sde.log_snr(t)
  exact = [np.asarray(jax.vmap(f)(t), np.float64) for f in (sde.alpha, sde.sigma)]
  np.testing.assert_allclose(lam, np.log(exact[0] / exact[1]), rtol=2e-6, atol=2e-6)
  for inverse in (sde.time_of_log_snr, lambda lam: SDE.time_of_log_snr(sde, lam)):
    np.testing.assert_allclose(inverse(lam), t, rtol=2e-6, atol=3e-7)
    # What a last bit of t counts: where alpha is 1 - t, lambda changes fast near T.
    last_bit = (
      jnp.finfo(t.dtype).eps * t * jnp.abs(jax.jvp(sde.log_snr, [t], [jnp.ones_like(t)])[1])
    )
    error = np.abs(sde.log_snr(inverse(lam)) - lam)
    assert (error <= 3e-6 * np.abs(lam) + np.maximum(3e-6, last_bit)).all()
  assert (np.diff(lam) > 0).all()  # and t falls


@every_sde
@pytest.mark.parametrize('apart', [1.0, 0.1, 1e-3, 1e-5])
def test_the_fall_of_log_snr_keeps_the_digits_of_neighbours(sde, apart):
  """lambda(s) - lambda(t), where the difference of float32 numbers would have none left."""
  s = np.asarray(times_of(sde)[1:], np.float32)
  t = (s * np.float32(1 + 0.4 * apart)).astype(np.float32)
  with jax.enable_x64(True):
    early, late = (jnp.asarray(v, jnp.float64) for v in (s, t))
    exact = sde.log_snr(early) - sde.log_snr(late)
    np.testing.assert_allclose(sde.log_snr_fall(early, late), exact, rtol=1e-8)
    np.testing.assert_allclose(SDE.log_snr_fall(sde, early, late), exact, rtol=1e-12)
  fall = sde.log_snr_fall(jnp.asarray(s), jnp.asarray(t))
  np.testing.assert_allclose(fall, exact, rtol=1e-6)
  assert (sde.log_snr_fall(jnp.asarray(s), jnp.asarray(s)) == 0).all()


def test_log_snr_of_a_constant_beta():
  """Where the quadratic equation for t is linear."""
  sde = VPSDE(beta_min=5.0, beta_max=5.0)
  np.testing.assert_allclose(sde.time_of_log_snr(sde.log_snr(TIMES)), TIMES, rtol=1e-5)


@every_sde
@every_shape
def test_prior_logp_is_that_of_the_prior(sde, shape):
  """The density of N(0, prior_std^2 I), and of what prior_sampling draws."""
  z = sde.prior_sampling(jax.random.key(0), shape)
  expected = stats.norm(scale=sde.prior_std).logpdf(np.asarray(z, np.float64))
  np.testing.assert_allclose(sde.prior_logp(z), expected.reshape(len(z), -1).sum(1), rtol=1e-5)
  many = np.asarray(sde.prior_sampling(jax.random.key(0), (50_000,)))
  assert stats.kstest(many / sde.prior_std, 'norm').pvalue > 1e-3


# The chain.


@pytest.mark.parametrize('N', [2, 24, 100, 1000, 2000, 4000, 9999])
@pytest.mark.parametrize('cls', SDES)
def test_index_counts_the_steps(cls, N):
  """`index` inverts `time`, compiled or not."""
  chain, i = cls().chain(N), jnp.arange(N)
  for index in (
    lambda i: chain.index(chain.time(i)),
    jax.jit(lambda i: chain.index(chain.time(i))),
  ):
    np.testing.assert_array_equal(index(i), i)


@pytest.mark.parametrize('N', [100, 1000, 1001, 2000])
def test_ddpm_reads_the_noise_of_the_step_before(N):
  """Between two steps the earlier one counts, right up to the later: by truncation, as released."""
  chain = VPSDE().chain(N)
  i = np.arange(1, N)
  just_before = (i - 2e-3) / (N - 1)  # more than float32 rounds
  np.testing.assert_array_equal(chain.index(jnp.float32(just_before)), i - 1)
  assert chain.index(jnp.float32(1e-3)) == int(1e-3 * (N - 1))


@pytest.mark.parametrize('cls', SDES)
def test_chain_begins_and_ends_with_the_sde(cls):
  chain = cls().chain(100)
  np.testing.assert_allclose(chain.time(jnp.array([0, 99])), [0, chain.sde.T])


def compose(chain: Chain) -> tuple[float, float]:
  """alpha and sigma^2 at the end of the chain x_i = x_{i-1} + f_i(x_{i-1}) + G_i z."""
  i = jnp.arange(chain.N)
  f, G = jax.jit(chain.discretize)(jnp.ones((chain.N, 1), chain.time(i).dtype), chain.time(i), i)
  alpha, variance = 1.0, 0.0
  for grow, g in zip(1 + np.asarray(f[:, 0]), np.asarray(G), strict=True):
    alpha, variance = alpha * grow, variance * grow**2 + g**2
  return alpha, variance


@pytest.mark.parametrize('cls', RELEASED)
def test_steps_of_the_chain_converge_to_the_sde(cls):
  """N composed forward steps have the SDE's kernel at T, with an error that halves as N doubles.

  For VE there is none at any N; for VP they compose to `marginal`.
  """
  errors = []
  with jax.enable_x64(True):
    for N in (250, 500, 1000):
      sde = cls()
      alpha, variance = compose(sde.chain(N))
      t = jnp.ones(())
      errors.append([alpha - sde.alpha(t), np.sqrt(variance) / sde.sigma(t) - 1])
      if cls is not subVPSDE:
        exact = [float(v) for v in sde.chain(N).marginal(jnp.asarray(N - 1))]
        np.testing.assert_allclose([alpha, np.sqrt(variance)], exact, rtol=1e-6)
  errors = np.abs(errors)
  assert errors[-1].max() <= 3e-3
  for coarse, fine in itertools.pairwise(errors):
    settled = coarse > 1e-6
    np.testing.assert_allclose(coarse[settled] / fine[settled], 2, atol=0.2)


@pytest.mark.parametrize('cls', RELEASED)
def test_chain_marginal_converges_to_the_sde(cls):
  """At every step alike: to 2 / N of the SDE's kernel, and exactly for VE and sub-VP."""
  for N in (100, 1000):
    sde, chain = cls(), cls().chain(N)
    i = jnp.arange(N)
    alpha, sigma = jax.jit(chain.marginal)(i)
    tolerance = 2 / N if cls is VPSDE else 1e-7
    np.testing.assert_allclose(alpha, sde.alpha(chain.time(i)), atol=tolerance)
    np.testing.assert_allclose(sigma**2, sde.sigma(chain.time(i)) ** 2, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize('cls', SDES)
def test_kernels_are_the_sdes_and_the_chains(cls):
  sde, chain = cls(), cls().chain(100)
  i = jnp.array([0, 1, 50, 99])
  t = chain.time(i)
  for got, want in zip(sde.kernel(t), (sde.alpha(t), sde.sigma(t)), strict=True):
    np.testing.assert_array_equal(got, want)
  for got, want in zip(chain.kernel(t), chain.marginal(i), strict=True):
    np.testing.assert_array_equal(got, want)


# Steps of any grid.

GRIDS = [np.array([1.0, 0.4, 0.35, 1e-3]), np.array([0.9, 1e-5]), np.array([1.0, 0.5, 0.0])]


@every_sde
@pytest.mark.parametrize('times', GRIDS, ids=len)
def test_steps_of_a_grid_compose_to_the_kernel(sde, times):
  """x_t = x_s + f(x_s) + G z, step by step from clean data, has alpha and sigma at every time."""
  times = sde.T * times
  steps = GridStep.of_grid(sde, times)
  f, G = steps.discretize(jnp.ones((len(times), 1)))
  alpha, variance = 1.0, 0.0
  for k in reversed(range(len(times))):  # the last step of the grid is the first forward
    grow = 1 + float(f[k, 0])
    alpha, variance = alpha * grow, variance * grow**2 + float(G[k]) ** 2
    t = jnp.float32(times[k])
    np.testing.assert_allclose(alpha, sde.alpha(t), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.sqrt(variance), sde.sigma(t), rtol=1e-5, atol=1e-12)


@every_sde
@pytest.mark.parametrize('times', GRIDS[:2], ids=len)
def test_ancestral_step_of_a_grid_is_the_posterior(sde, times):
  """p(x_s | x_t, x_0) of one datum, at s = 0 the datum itself, by Tweedie's formula."""
  times = sde.T * times
  steps, x0 = GridStep.of_grid(sde, times), MEAN
  alpha, sigma = (np.asarray(f(jnp.float32(times)), np.float64) for f in (sde.alpha, sde.sigma))
  x = alpha * x0 + sigma * 1.3
  score = (alpha * x0 - x) / sigma**2
  mean, std = steps.ancestral(jnp.float32(x)[:, None], jnp.float32(score)[:, None])
  alpha_s, sigma_s = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
  gain = alpha / alpha_s * sigma_s**2 / sigma**2
  np.testing.assert_allclose(mean[:, 0], alpha_s * x0 + gain * (x - alpha * x0), rtol=2e-4)
  np.testing.assert_allclose(
    std**2, sigma_s**2 * (1 - gain * alpha / alpha_s), rtol=1e-3, atol=1e-12
  )
  np.testing.assert_allclose(mean[-1], x0, rtol=2e-4)
  assert std[-1] == 0


# Time reversal, for Gaussian data, where p_t is a Gaussian and every drift is affine.


def affine(drift, t: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Slope and intercept [B] of a drift (x [B, 1], t [B]) that is affine in x."""
  at = [drift(jnp.full((len(t), 1), float(v)), t)[:, 0] for v in (0, 1)]
  return at[1] - at[0], at[0]


@every_sde
@pytest.mark.parametrize('probability_flow', [False, True])
def test_reverse_process_has_the_same_marginals(sde, probability_flow):
  """Its moments, run backwards, obey dm/dt = A m + b and dv/dt = 2 A v - g^2."""
  with jax.enable_x64(True):
    t = jnp.asarray(np.asarray(times_of(sde)), jnp.float64)
    rsde = sde.reverse(gaussian(jnp.array([MEAN]), STD).score_fn(sde), probability_flow)
    slope, intercept = affine(lambda x, t: rsde.sde(x, t)[0], t)
    _, g = rsde.sde(jnp.zeros((len(t), 1)), t)
    (m, v), (dm, dv) = jax.jvp(lambda t: moments(sde, MEAN, STD, t), [t], [jnp.ones_like(t)])
    np.testing.assert_allclose(dm, slope * m + intercept, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(dv, 2 * slope * v - g**2, rtol=1e-8, atol=1e-8)
    assert probability_flow == bool((g == 0).all())


@every_sde
def test_probability_flow_transports_a_gaussian(sde, shape=SHAPES[-1]):
  """x_t = alpha_t m + sqrt(v_t / v_T) (x_T - alpha_T m) solves the ODE."""
  with jax.enable_x64(True):
    t, x_T = (
      jnp.asarray(np.asarray(times_of(sde)), jnp.float64),
      jnp.asarray(np.asarray(data(shape))),
    )

    def path(t):
      (m, v), (m_T, v_T) = (moments(sde, MEAN, STD, s) for s in (t, jnp.full_like(t, sde.T)))
      m, m_T, ratio = (s.reshape(-1, *[1] * (x_T.ndim - 1)) for s in (m, m_T, jnp.sqrt(v / v_T)))
      return m + ratio * (sde.prior_std * x_T - m_T)

    x, velocity = jax.jvp(path, [t], [jnp.ones_like(t)])
    score_fn = gaussian(jnp.full(shape[1:], MEAN), STD).score_fn(sde)
    drift, _ = sde.reverse(score_fn, probability_flow=True).sde(x, t)
    np.testing.assert_allclose(drift, velocity, rtol=1e-8, atol=1e-8)


@every_sde
@pytest.mark.parametrize('probability_flow', [False, True])
def test_reverse_step_undoes_the_forward_step(sde, probability_flow):
  """x - f + G^2 s of the chain has the drift and the diffusion of the reverse SDE as N grows."""
  rsde = sde.reverse(gaussian(jnp.array([MEAN]), STD).score_fn(sde), probability_flow)
  x, t, N = data((len(TIMES), 1)), times_of(sde), 20_000
  chain = sde.chain(N)
  f, G = rsde.of_forward(x, t, *chain.discretize(x, t, chain.index(t)))
  drift, g = rsde.sde(x, t)
  np.testing.assert_allclose(N * f, sde.T * drift, rtol=0.02, atol=0.02)
  np.testing.assert_allclose(np.sqrt(N) * G, np.sqrt(sde.T) * g, rtol=0.02, atol=0.02)


@every_sde
@every_shape
def test_denoise_is_the_posterior_mean(sde, shape):
  """E[x_0 | x_t] for Gaussian data, by Tweedie's formula."""
  x, t = data(shape), times_of(sde)
  got = sde.reverse(gaussian(jnp.full(shape[1:], MEAN), STD).score_fn(sde)).denoise(x, t)
  alpha, sigma = (each(v, shape).astype(np.float64) for v in (sde.alpha(t), sde.sigma(t)))
  gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
  # sigma^2 s and x all but cancel where little is left of the data: alpha(T) = 0.001 at least.
  np.testing.assert_allclose(got, MEAN + gain * (x - alpha * MEAN), rtol=1e-4, atol=5e-4)


# Ancestral steps.


@pytest.mark.parametrize('N', [24, 100, 1000])
@pytest.mark.parametrize('cls', [VESDE, subVPSDE])
def test_ancestral_step_is_the_posterior_of_a_known_datum(cls, N):
  """With the score of one point x_0: mean and standard deviation of p(x_{i-1} | x_i, x_0)."""
  with jax.enable_x64(True):
    sde = cls()
    chain = sde.chain(N)
    i = np.unique(np.array([1, 2, 3, N // 4, N // 2, N - 1]))
    t = chain.time(jnp.asarray(i)).astype(jnp.float64)
    alpha, sigma = (np.asarray(v) for v in (sde.alpha(t), sde.sigma(t)))
    s = chain.time(jnp.asarray(i - 1)).astype(jnp.float64)
    alpha_s, sigma_s = (np.asarray(v) for v in (sde.alpha(s), sde.sigma(s)))
    x, x0 = alpha * MEAN + sigma * np.linspace(-2, 2, len(i)), MEAN
    score = (alpha * x0 - x) / sigma**2
    mean, std = chain.ancestral(jnp.asarray(x), jnp.asarray(score), jnp.asarray(i))
    # The Gaussian prior p(x_s | x_0) times the likelihood p(x_t | x_s), by conditioning.
    gain = alpha / alpha_s * sigma_s**2 / sigma**2
    exact_mean = alpha_s * x0 + gain * (x - alpha * x0)
    exact_variance = sigma_s**2 * (1 - gain * alpha / alpha_s)
    np.testing.assert_allclose(mean, exact_mean, rtol=2e-6)
    np.testing.assert_allclose(std**2, exact_variance, rtol=1e-4, atol=1e-14)


def test_ancestral_step_of_vp_is_that_of_ddpm():
  """mean = (x + beta s) / sqrt(1 - beta), the posterior's; variance beta, as DDPM chose."""
  chain = VPSDE().chain(100)
  i = jnp.array([0, 1, 50, 99])
  alpha, sigma = chain.marginal(i)
  x, x0, beta = jnp.linspace(-1, 1, 4), MEAN, chain.discrete_betas[i]
  score = (alpha * x0 - x) / sigma**2
  mean, std = chain.ancestral(x, score, i)
  alpha_s = alpha / jnp.sqrt(1 - beta)  # of step i - 1
  posterior = (jnp.sqrt(1 - beta) * (1 - alpha_s**2) * x + alpha_s * beta * x0) / sigma**2
  np.testing.assert_allclose(mean, posterior, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(std, np.sqrt(beta), rtol=1e-6)


@every_sde
@every_shape
def test_every_ancestral_step_is_finite(sde, shape):
  """The last one, which starts from i = 0, too."""
  x = data(shape)
  for i in (0, 1, 99):
    mean, std = sde.chain(100).ancestral(x, x, jnp.full(shape[:1], i))
    assert mean.shape == shape
    assert np.isfinite(mean).all() and np.isfinite(std).all()


# Mistakes.


@pytest.mark.parametrize(
  ('cls', 'fields'),
  [
    (VESDE, {'sigma_min': 0.0}),
    (VESDE, {'sigma_min': -1.0}),
    (VESDE, {'sigma_min': 2.0, 'sigma_max': 1.0}),
    (VPSDE, {'beta_min': 0.0}),
    (subVPSDE, {'beta_min': 3.0, 'beta_max': 2.0}),
  ],
)
def test_impossible_fields_are_refused(cls, fields):
  with pytest.raises(ValueError, match=cls.__name__):
    cls(**fields)


@pytest.mark.parametrize('N', [-1, 0, 1])
@pytest.mark.parametrize('cls', SDES)
def test_a_chain_has_two_steps_at_least(cls, N):
  with pytest.raises(ValueError, match=f'{cls.__name__} needs N >= 2'):
    cls().chain(N)


@pytest.mark.parametrize('N', [10, 20])
@pytest.mark.parametrize('cls', [VPSDE, subVPSDE])
def test_vp_chain_needs_more_steps_than_beta_max(cls, N):
  """Or 1 - beta_i would turn negative; a grid of the SDE itself can have any number of times."""
  chain = cls().chain(N)
  assert not chain.can_be_taken
  for use in (chain.check, lambda: chain.langevin_alpha(jnp.arange(N))):
    with pytest.raises(ValueError, match='more steps than beta_max'):
      use()
  steps = GridStep.of_grid(chain.sde, np.linspace(1, 1e-3, N))
  assert np.isfinite(steps.langevin_alpha).all() and (steps.langevin_alpha > 0).all()
