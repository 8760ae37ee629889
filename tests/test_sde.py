"""Identities that hold for every SDE: marginals, chains, time reversal, and ancestral steps."""

import dataclasses
import itertools

from analytic import gaussian, moments
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sde_lib import SDE, subVPSDE, VESDE, VPSDE

SDES = [VESDE, VPSDE, subVPSDE]
SHAPES = [(6, 3), (6, 2, 4, 3)]
MEAN, STD = 0.7, 0.4  # of the Gaussian data
TIMES = jnp.array([1.0, 0.7, 0.4, 0.1, 1e-2, 1e-3])

every_sde = pytest.mark.parametrize(
  'sde', [cls(N=100) for cls in SDES], ids=lambda s: type(s).__name__
)
every_shape = pytest.mark.parametrize('shape', SHAPES)


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
    t = jnp.asarray(np.asarray(TIMES), jnp.float64)
    alpha, d_alpha = jax.jvp(sde.alpha, [t], [jnp.ones_like(t)])
    variance, d_variance = jax.jvp(lambda t: sde.sigma(t) ** 2, [t], [jnp.ones_like(t)])
    f, g = sde.drift_coef(t), sde.diffusion_coef(t)
    np.testing.assert_allclose(d_alpha, f * alpha, rtol=1e-10)
    np.testing.assert_allclose(d_variance, 2 * f * variance + g**2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
  ('sde', 'alpha', 'sigma'),
  [(VESDE(), 1, 0.01), (VPSDE(), 1, 0), (subVPSDE(), 1, 0)],
  ids=lambda v: v.__class__.__name__,
)
def test_marginal_begins_at_the_data(sde, alpha, sigma):
  t = jnp.zeros(1)
  np.testing.assert_allclose(sde.alpha(t), alpha)
  np.testing.assert_allclose(sde.sigma(t), sigma)


@every_sde
def test_marginal_ends_at_the_prior(sde):
  """What is left of data of unit size is 2 % of the prior's standard deviation at most."""
  t = jnp.ones(1)
  np.testing.assert_allclose(sde.sigma(t), sde.prior_std, rtol=1e-4)
  assert sde.alpha(t) / sde.prior_std <= 0.021


@every_sde
@every_shape
def test_drift_diffusion_and_marginal_apply_to_any_data_shape(sde, shape):
  x = data(shape)
  drift, diffusion = sde.sde(x, TIMES)
  mean, std = sde.marginal_prob(x, TIMES)
  np.testing.assert_allclose(drift, each(sde.drift_coef(TIMES), shape) * x, rtol=1e-6)
  np.testing.assert_allclose(mean, each(sde.alpha(TIMES), shape) * x, rtol=1e-6)
  np.testing.assert_array_equal(diffusion, sde.diffusion_coef(TIMES))
  np.testing.assert_array_equal(std, sde.sigma(TIMES))


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
  t = jnp.concatenate([TIMES, jnp.array([1e-4, 1e-5])])
  lam = sde.log_snr(t)
  exact = [np.asarray(jax.vmap(f)(t), np.float64) for f in (sde.alpha, sde.sigma)]
  np.testing.assert_allclose(lam, np.log(exact[0] / exact[1]), rtol=2e-6, atol=2e-6)
  for inverse in (sde.time_of_log_snr, lambda lam: SDE.time_of_log_snr(sde, lam)):
    np.testing.assert_allclose(inverse(lam), t, rtol=2e-6, atol=3e-7)
    np.testing.assert_allclose(sde.log_snr(inverse(lam)), lam, rtol=3e-6, atol=3e-6)
  assert (np.diff(lam) > 0).all()  # and t falls


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


@pytest.mark.parametrize('eps', [1e-5, 1e-3])
@pytest.mark.parametrize('N', [24, 100, 1000, 2000, 4000])
@pytest.mark.parametrize('cls', SDES)
def test_index_counts_the_steps(cls, N, eps):
  """`index` inverts `time`; a sampler on linspace(T, eps, N) visits every step exactly once."""
  sde, i = cls(N=N, eps=eps), np.arange(N)

  @jax.jit
  def indices(i):
    return sde.index(sde.time(i)), sde.sampling_index(jnp.linspace(sde.T, sde.eps, N))

  inverse, visited = indices(i)
  np.testing.assert_array_equal(inverse, i)
  np.testing.assert_array_equal(visited, i[::-1])


@every_sde
def test_chain_begins_and_ends_with_the_sde(sde):
  i = jnp.array([0, sde.N - 1])
  np.testing.assert_allclose(sde.time(i), [0, sde.T])


def compose(sde: SDE) -> tuple[float, float]:
  """alpha and sigma^2 at the end of the chain x_i = x_{i-1} + f_i(x_{i-1}) + G_i z."""
  t = sde.time(jnp.arange(sde.N))
  f, G = jax.jit(sde.discretize)(jnp.ones((sde.N, 1), t.dtype), t)
  alpha, variance = 1.0, 0.0
  for grow, g in zip(1 + np.asarray(f[:, 0]), np.asarray(G), strict=True):
    alpha, variance = alpha * grow, variance * grow**2 + g**2
  return alpha, variance


@pytest.mark.parametrize('cls', SDES)
def test_steps_of_the_chain_converge_to_the_sde(cls):
  """N composed forward steps have the SDE's kernel at T, with an error that halves as N doubles.

  For VE there is none at any N; for VP they compose to `chain_marginal`.
  """
  errors = []
  with jax.enable_x64(True):
    for N in (250, 500, 1000):
      sde = cls(N=N)
      alpha, variance = compose(sde)
      t = jnp.ones(())
      errors.append([alpha - sde.alpha(t), np.sqrt(variance) / sde.sigma(t) - 1])
      if cls is not subVPSDE:
        exact = [float(v) for v in sde.chain_marginal(jnp.asarray(N - 1))]
        np.testing.assert_allclose([alpha, np.sqrt(variance)], exact, rtol=1e-6)
  errors = np.abs(errors)
  assert errors[-1].max() <= 3e-3
  for coarse, fine in itertools.pairwise(errors):
    settled = coarse > 1e-6
    np.testing.assert_allclose(coarse[settled] / fine[settled], 2, atol=0.2)


@pytest.mark.parametrize('cls', SDES)
def test_chain_marginal_converges_to_the_sde(cls):
  """At every step alike: to 2 / N of the SDE's kernel, and exactly for VE and sub-VP."""
  for N in (100, 1000):
    sde = cls(N=N)
    i = jnp.arange(N)
    alpha, sigma = jax.jit(sde.chain_marginal)(i)
    tolerance = 2 / N if cls is VPSDE else 1e-7
    np.testing.assert_allclose(alpha, sde.alpha(sde.time(i)), atol=tolerance)
    np.testing.assert_allclose(sigma**2, sde.sigma(sde.time(i)) ** 2, rtol=1e-6, atol=tolerance)


@every_sde
def test_kernel_is_the_sdes_or_the_chains(sde):
  t = sde.time(jnp.array([0, 1, 50, sde.N - 1]))
  for got, want in zip(sde.kernel(t, True), (sde.alpha(t), sde.sigma(t)), strict=True):
    np.testing.assert_array_equal(got, want)
  chain = sde.chain_marginal(jnp.array([0, 1, 50, sde.N - 1]))
  for got, want in zip(sde.kernel(t, False), chain, strict=True):
    np.testing.assert_array_equal(got, want)


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
    t = jnp.asarray(np.asarray(TIMES), jnp.float64)
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
    t, x_T = jnp.asarray(np.asarray(TIMES), jnp.float64), jnp.asarray(np.asarray(data(shape)))

    def path(t):
      (m, v), (m_T, v_T) = (moments(sde, MEAN, STD, s) for s in (t, jnp.ones_like(t)))
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
  rsde = dataclasses.replace(sde, N=20_000).reverse(
    gaussian(jnp.array([MEAN]), STD).score_fn(sde), probability_flow
  )
  x, t, N = data((len(TIMES), 1)), TIMES, rsde.forward.N
  (f, G), (drift, g) = rsde.discretize(x, t), rsde.sde(x, t)
  np.testing.assert_allclose(N * f, drift, rtol=0.02, atol=0.02)
  np.testing.assert_allclose(np.sqrt(N) * G, g, rtol=0.02, atol=0.02)


@every_sde
@every_shape
def test_denoise_is_the_posterior_mean(sde, shape):
  """E[x_0 | x_t] for Gaussian data, by Tweedie's formula."""
  x, t = data(shape), TIMES
  got = sde.reverse(gaussian(jnp.full(shape[1:], MEAN), STD).score_fn(sde)).denoise(x, t)
  alpha, sigma = (each(v, shape).astype(np.float64) for v in (sde.alpha(t), sde.sigma(t)))
  gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
  # sigma^2 s and x all but cancel where little is left of the data: alpha(1) = 0.007 for VP.
  np.testing.assert_allclose(got, MEAN + gain * (x - alpha * MEAN), rtol=1e-4, atol=2e-4)


# Ancestral steps.


@pytest.mark.parametrize('N', [24, 100, 1000])
@pytest.mark.parametrize('cls', [VESDE, subVPSDE])
def test_ancestral_step_is_the_posterior_of_a_known_datum(cls, N):
  """With the score of one point x_0: mean and standard deviation of p(x_{i-1} | x_i, x_0)."""
  with jax.enable_x64(True):
    sde = cls(N=N)
    i = np.unique(np.array([1, 2, 3, N // 4, N // 2, N - 1]))
    t = sde.time(jnp.asarray(i)).astype(jnp.float64)
    alpha, sigma = (np.asarray(v) for v in (sde.alpha(t), sde.sigma(t)))
    s = sde.time(jnp.asarray(i - 1)).astype(jnp.float64)
    alpha_s, sigma_s = (np.asarray(v) for v in (sde.alpha(s), sde.sigma(s)))
    x, x0 = alpha * MEAN + sigma * np.linspace(-2, 2, len(i)), MEAN
    score = (alpha * x0 - x) / sigma**2
    mean, std = sde.ancestral(jnp.asarray(x), t, jnp.asarray(score))
    # The Gaussian prior p(x_s | x_0) times the likelihood p(x_t | x_s), by conditioning.
    gain = alpha / alpha_s * sigma_s**2 / sigma**2
    exact_mean = alpha_s * x0 + gain * (x - alpha * x0)
    exact_variance = sigma_s**2 * (1 - gain * alpha / alpha_s)
    np.testing.assert_allclose(mean, exact_mean, rtol=2e-6)
    np.testing.assert_allclose(std**2, exact_variance, rtol=1e-4, atol=1e-14)


def test_ancestral_step_of_vp_is_that_of_ddpm():
  """mean = (x + beta s) / sqrt(1 - beta), the posterior's; variance beta, as DDPM chose."""
  sde = VPSDE(N=100)
  i = jnp.array([0, 1, 50, 99])
  alpha, sigma = sde.chain_marginal(i)
  x, x0, beta = jnp.linspace(-1, 1, 4), MEAN, sde.discrete_betas[i]
  score = (alpha * x0 - x) / sigma**2
  mean, std = sde.ancestral(x, sde.time(i), score)
  alpha_s = alpha / jnp.sqrt(1 - beta)  # of step i - 1
  posterior = (jnp.sqrt(1 - beta) * (1 - alpha_s**2) * x + alpha_s * beta * x0) / sigma**2
  np.testing.assert_allclose(mean, posterior, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(std, np.sqrt(beta), rtol=1e-6)


@every_sde
@every_shape
def test_every_ancestral_step_is_finite(sde, shape):
  """The last one, which starts from i = 0, too."""
  x = data(shape)
  for t in (sde.eps, 1e-2, sde.T):
    mean, std = sde.ancestral(x, jnp.full(shape[:1], t), x)
    assert mean.shape == shape
    assert np.isfinite(mean).all() and np.isfinite(std).all()


# Mistakes.


@pytest.mark.parametrize(
  ('cls', 'fields'),
  [
    (VESDE, {'sigma_min': 0.0}),
    (VESDE, {'sigma_min': -1.0}),
    (VESDE, {'sigma_min': 2.0, 'sigma_max': 1.0}),
    (VESDE, {'N': 1}),
    (VPSDE, {'N': 0}),
    (subVPSDE, {'N': 1}),
    (VPSDE, {'beta_min': 0.0}),
    (subVPSDE, {'beta_min': 3.0, 'beta_max': 2.0}),
  ],
)
def test_impossible_fields_are_refused(cls, fields):
  with pytest.raises(ValueError, match=cls.__name__):
    cls(**fields)


@pytest.mark.parametrize('N', [10, 20])
def test_vp_chain_needs_more_steps_than_beta_max(N):
  """Or 1 - beta_i would turn negative; the SDE itself can take any N."""
  sde = VPSDE(N=N)
  t, x = jnp.ones(2), jnp.ones((2, 3))
  assert np.isfinite(sde.sde(x, t)[0]).all()
  for use in (sde.discretize, lambda x, t: sde.ancestral(x, t, x)):
    with pytest.raises(ValueError, match='more steps than beta_max'):
      use(x, t)
