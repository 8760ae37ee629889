"""Controlled generation against Gaussians and mixtures whose conditionals are known."""

from analytic import check_moments, given, TWO_MODES
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from controllable_generation import (
  Autoguidance,
  BlockMean,
  BoundedMean,
  ClassifierFreeGuidance,
  ClassifierGuidance,
  conjugate_gradients,
  GaussianBlur,
  Gray,
  Known,
  Mask,
  NoiseInterval,
  PosteriorGuidance,
)
from data.points import Gaussian
from samplers import multistep as fast
from samplers.base import GridSampler
from samplers.edm import EDM
from samplers.time_grids import log_snr, TimeGrid
from sampling import Langevin, PCSampler, ReverseDiffusion
from sde_lib import EDMSDE, expand, SDE, subVPSDE, VESDE, VPSDE

KEY = jax.random.key(0)
SHAPE = (2, 2, 3)
SDES = {
  've': VESDE(0.01, 20.0),
  'vp': VPSDE(),
  'subvp': subVPSDE(),
}
EPS = {VESDE: 1e-5, VPSDE: 1e-3, subVPSDE: 1e-3}
OPERATORS = {'mask': Mask(jnp.array([[[1.0], [0.0]], [[0.0], [1.0]]])), 'gray': Gray()}
OPERATORS |= {'block': BlockMean(2), 'blur': GaussianBlur(0.8)}


def image_gaussian() -> Gaussian:
  """Images whose pixels and channels are correlated, as those of natural images are."""
  rng = np.random.default_rng(0)
  dim = np.prod(SHAPE)
  factor = rng.normal(size=(dim, 5))  # five directions with most of the variance
  cov = 0.06 * factor @ factor.T + 0.02 * np.eye(dim)
  return Gaussian.of(jnp.float32(rng.uniform(0.2, 0.8, SHAPE)), jnp.float32(cov))


DATA = image_gaussian()
TRUTH = DATA.mu + 0.3 * jax.random.normal(KEY, SHAPE)  # what is measured


def matrix_of(operator) -> np.ndarray:
  """The operator as a matrix [D, D] of flattened images."""
  basis = jnp.eye(np.prod(SHAPE)).reshape(-1, *SHAPE)
  return np.asarray(operator(basis), np.float64).reshape(len(basis), -1).T


@pytest.mark.parametrize('name', ['mask', 'gray', 'block'])
def test_constraints_are_orthogonal_projections(name):
  matrix = matrix_of(OPERATORS[name])
  np.testing.assert_allclose(matrix @ matrix, matrix, atol=1e-6)
  np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
  assert 0 < np.trace(matrix) < len(matrix)


def test_a_blur_keeps_constants_and_is_wider_with_its_std():
  spread = [np.diag(matrix_of(GaussianBlur(std))).mean() for std in (0.3, 0.8, 2.0)]
  assert spread[0] > spread[1] > spread[2]
  np.testing.assert_allclose(GaussianBlur(0.8)(jnp.ones((1, *SHAPE))), 1, rtol=1e-6)


def test_conjugate_gradients_solve_each_example():
  """In as many iterations as there are dimensions; one whose right side is zero stays there."""
  rng = np.random.default_rng(0)
  factors = rng.normal(size=(3, 4, 4))
  matrices = jnp.float32(factors @ factors.transpose(0, 2, 1) + np.eye(4))
  b = jnp.float32(rng.normal(size=(3, 4))).at[1].set(0)
  x = conjugate_gradients(lambda v: jnp.einsum('bij,bj->bi', matrices, v), b, 4)
  np.testing.assert_allclose(x, np.linalg.solve(matrices, b[..., None])[..., 0], atol=1e-5)


# Guided scores.


@flax.struct.dataclass
class Component:
  """log p_t(k | x) of the two modes, the classifier of noisy data that is exact."""

  sde: SDE = flax.struct.field(pytree_node=False)

  def __call__(self, x, t, labels):
    alpha, sigma = self.sde.alpha(t)[:, None], self.sde.sigma(t)[:, None]
    variance = (alpha * TWO_MODES.stds) ** 2 + sigma**2
    squares = jnp.square(alpha[..., None] * TWO_MODES.means - x[:, None]).sum(-1)
    logits = jnp.log(TWO_MODES.weights) - jnp.log(variance) - 0.5 * squares / variance
    return jax.nn.log_softmax(logits)[jnp.arange(len(x)), labels]


def mode(k: int) -> Gaussian:
  return Gaussian.of(TWO_MODES.means[k], TWO_MODES.stds[k] ** 2 * jnp.eye(2))


@flax.struct.dataclass
class ModeScore:
  """The score of the mode that each example is labelled with."""

  labels: jax.Array
  sde: SDE = flax.struct.field(pytree_node=False)

  def __call__(self, x, t):
    scores = jnp.stack([mode(k).score_fn(self.sde)(x, t) for k in (0, 1)])
    return scores[self.labels, jnp.arange(len(x))]


@pytest.mark.parametrize('sde', SDES.values(), ids=SDES)
def test_both_guidances_are_that_of_the_class(sde):
  """With a scale of 1 the score of the class; with others, the two of them agree."""
  t = jnp.linspace(0.05, 0.95, 64)
  labels = jnp.arange(64) % 2
  x = 1.5 * sde.sigma(t)[:, None] * jax.random.normal(KEY, (64, 2))
  score_fn, of_class = TWO_MODES.score_fn(sde), ModeScore(labels, sde)
  scale_of = jnp.abs(of_class(x, t)).max(1, keepdims=True)
  for scale in (0.0, 1.0, 3.0):
    by_classifier = ClassifierGuidance(score_fn, Component(sde), labels, scale)(x, t)
    free = ClassifierFreeGuidance(of_class, score_fn, scale)(x, t)
    np.testing.assert_allclose(by_classifier / scale_of, free / scale_of, atol=1e-5)
    if scale == 1:
      np.testing.assert_allclose(free / scale_of, of_class(x, t) / scale_of, atol=1e-6)
    if scale == 0:
      np.testing.assert_array_equal(free, score_fn(x, t))


@pytest.mark.parametrize('sde', SDES.values(), ids=SDES)
def test_guidance_ends_with_its_interval(sde):
  """The score of the class, but the guided one where low < sigma / alpha <= high."""
  t = jnp.linspace(0.05, 0.95, 64)
  labels, x = jnp.arange(64) % 2, jax.random.normal(KEY, (64, 2))
  score_fn, of_class = TWO_MODES.score_fn(sde), ModeScore(labels, sde)
  noise = np.asarray(sde.sigma(t) / sde.alpha(t))
  low, high = noise[20] * 1.001, noise[40] * 1.001
  interval = NoiseInterval(sde, float(low), float(high))
  inside = (noise > low) & (noise <= high)
  assert inside.sum() == 20
  guided, free = (
    ClassifierFreeGuidance(of_class, score_fn, 3.0, limits)(x, t) for limits in (None, interval)
  )
  np.testing.assert_array_equal(free[inside], guided[inside])
  tolerance = 1e-5 * np.abs(of_class(x, t)).max(1, keepdims=True)
  assert (np.abs(free - of_class(x, t)) <= tolerance)[~inside].all()
  assert (np.abs(guided - free) > tolerance)[~inside].any()
  by_classifier = ClassifierGuidance(score_fn, Component(sde), labels, 3.0, interval)(x, t)
  assert (np.abs(by_classifier - free) <= 10 * tolerance).all()


@pytest.mark.parametrize('sde', SDES.values(), ids=SDES)
def test_autoguidance_leads_away_from_its_guide(sde):
  """The denoised is D_guide + scale (D - D_guide); the model's to the bit where that is nothing."""
  t, x = jnp.linspace(0.05, 0.95, 64), jax.random.normal(KEY, (64, 2))
  score_fn, weak = mode(0).score_fn(sde), mode(1).score_fn(sde)
  alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
  strong, weaker = (np.float64((x + sigma**2 * f(x, t)) / alpha) for f in (score_fn, weak))
  for scale in (0.0, 2.5):
    found = (x + sigma**2 * Autoguidance(score_fn, weak, scale)(x, t)) / alpha
    expected = weaker + scale * (strong - weaker)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
  noise = np.asarray(sde.sigma(t) / sde.alpha(t))
  interval = NoiseInterval(sde, float(noise[20] * 1.001), float(noise[40] * 1.001))
  limited = Autoguidance(score_fn, weak, 2.5, interval)(x, t)
  guided, plain = Autoguidance(score_fn, weak, 2.5)(x, t), score_fn(x, t)
  inside = (np.arange(64) > 20) & (np.arange(64) <= 40)
  np.testing.assert_array_equal(limited, np.where(inside[:, None], guided, plain))
  np.testing.assert_array_equal(Autoguidance(score_fn, weak, 1.0)(x, t), plain)
  np.testing.assert_array_equal(Autoguidance(score_fn, score_fn, 7.0)(x, t), plain)


def test_an_autoguided_score_is_conditioned_on_a_measurement():
  """As any other: by a guide that is the model itself, nothing changes."""
  sde, t = SDES['vp'], jnp.full(3, 0.4)
  x, y = jax.random.normal(KEY, (3, *SHAPE)), jnp.broadcast_to(TRUTH, (3, *SHAPE))
  score_fn = DATA.score_fn(sde)
  plain, guided = (
    PosteriorGuidance(f, Gray(), Gray()(y), sde, 0.1)(x, t)
    for f in (score_fn, Autoguidance(score_fn, score_fn, 3.0))
  )
  np.testing.assert_allclose(guided, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('limits', [(0.0, np.inf), (0.1, 2.0)])
def test_autoguided_samples_of_a_gaussian_are_those_of_theory(limits):
  """N(m, v) guided by N(m, u): x_0 - m = (x_T - m) exp(-G), along the flow of sigma from T to eps.

  There G' = sigma (w / (v + sigma^2) - (w - 1) / (u + sigma^2)), so that both are logarithms; where
  guidance does not count, w = 1. Samples are narrower than the data where the guide is wider.
  """
  sde, (v, u), m, w, eps = EDMSDE(), (0.5, 0.8), 1.5, 2.0, 1e-3
  score_fn, weak = (
    Gaussian.of(jnp.array([m]), jnp.array([[s]])).score_fn(sde) for s in (v, u)
  )  # fmt: skip
  guided = Autoguidance(score_fn, weak, w, NoiseInterval(sde, *limits))

  def narrowing(low: float, high: float, scale: float) -> float:
    of = lambda s: 0.5 * np.log((s + high**2) / (s + low**2))  # noqa: E731
    return scale * of(v) - (scale - 1) * of(u)

  low, high = (float(np.clip(limit, 0, sde.T)) for limit in limits)
  exponent = narrowing(0, low, 1) + narrowing(low, high, w) + narrowing(high, sde.T, 1)
  shape = (500, 1)
  sampler = GridSampler(sde, EDM(), TimeGrid(400, eps, log_snr))
  x, _ = sampler(KEY, guided, shape)
  plain, _ = sampler(KEY, score_fn, shape)
  start = m + (np.asarray(plain, np.float64) - m) * np.exp(narrowing(0, sde.T, 1))
  np.testing.assert_allclose(x, m + (start - m) * np.exp(-exponent), atol=3e-3)
  assert np.var(x) < 0.95 * np.var(plain)


@pytest.mark.parametrize('ends', [(-1.0, 2.0), (2.0, 2.0), (3.0, 1.0)])
def test_an_interval_without_noise_is_refused(ends):
  with pytest.raises(ValueError, match='0 <= low < high'):
    NoiseInterval(SDES['vp'], *ends)


@pytest.mark.parametrize('k', [0, 1])
def test_guided_samples_are_of_their_class(k):
  sde = SDES['vp']
  labels = jnp.full(2000, k)
  score_fn = ClassifierGuidance(TWO_MODES.score_fn(sde), Component(sde), labels)
  sampler = GridSampler(sde, fast.DPMSolver(2), TimeGrid(40, 1e-3, log_snr))
  x, nfe = sampler(KEY, score_fn, (2000, 2))
  assert nfe == 40
  check_moments(x, mode(k), 0.03)


@pytest.mark.parametrize('sde', SDES.values(), ids=SDES)
@pytest.mark.parametrize(
  ('name', 'noise_std'),
  [*((name, 0.0) for name in ('mask', 'gray', 'block')), *((name, 0.1) for name in OPERATORS)],
)  # without noise, what a blur left of the details would count as much as all else
def test_posterior_guidance_is_exact_for_a_gaussian(sde, name, noise_std):
  """Where all of its directions are searched: the score of the posterior, after diffusion."""
  operator, t = OPERATORS[name], jnp.linspace(0.1, 0.95, 8)
  y = operator(TRUTH[None])
  posterior = given(DATA, matrix_of(operator), y, noise_std)
  x = sde.alpha(t)[:, None, None, None] * TRUTH + sde.sigma(t)[:, None, None, None] * (
    jax.random.normal(KEY, (8, *SHAPE))
  )
  guided = PosteriorGuidance(DATA.score_fn(sde), operator, y, sde, noise_std, iterations=8)(x, t)
  exact = posterior.score_fn(sde)(x, t)
  size = np.abs(exact).max((1, 2, 3), keepdims=True)
  np.testing.assert_allclose(guided / size, exact / size, atol=2e-3)  # float32, badly conditioned


# Posterior samples.


def posterior(name: str, n: int, noise_std: float = 0.0) -> tuple[jax.Array, Gaussian]:
  """What is measured of each of n samples, and what the samples then follow."""
  y = OPERATORS[name](TRUTH[None])
  truth = given(DATA, matrix_of(OPERATORS[name]), y, noise_std)
  return jnp.broadcast_to(y, (n, *SHAPE)), truth


def check_posterior(x: jax.Array, truth: Gaussian, bias: float) -> None:
  """Mean and covariance, as `check_moments` does, of flattened images."""
  flat = Gaussian.of(truth.mu.ravel(), truth.cov())
  check_moments(x.reshape(len(x), -1), flat, bias)


@pytest.mark.parametrize('name', ['mask', 'gray'])
def test_constraints_come_near_the_posterior(name):
  """Within 20 %, with correctors; the constraint itself is an approximation.

  It draws what is known with its noise at time t, where the posterior would have it without; the
  mean of what is unknown therefore lags behind, here by up to 0.15 of a standard deviation.
  """
  sde = SDES['ve']
  y, truth = posterior(name, 500)
  sampler = PCSampler(sde, ReverseDiffusion(), Langevin(0.16, 5), TimeGrid(100, 1e-5))
  known = Known(y, OPERATORS[name], sde)
  x, _ = sampler(KEY, DATA.score_fn(sde), y.shape, constraint=known)
  check_posterior(x, truth, 0.2)
  np.testing.assert_allclose(OPERATORS[name](x), y, atol=1e-5)  # what is known is kept


@pytest.mark.parametrize('sde', SDES.values(), ids=SDES)
@pytest.mark.parametrize(
  ('name', 'noise_std'), [('mask', 0.0), ('gray', 0.0), ('block', 0.1), ('blur', 0.1)]
)
def test_guided_samples_have_the_posterior_moments(sde, name, noise_std):
  y, truth = posterior(name, 2000, noise_std)
  score_fn = PosteriorGuidance(DATA.score_fn(sde), OPERATORS[name], y, sde, noise_std, iterations=6)
  sampler = GridSampler(sde, fast.DPMSolver(2), TimeGrid(60, EPS[type(sde)], log_snr))
  x, _ = sampler(KEY, score_fn, y.shape)
  check_posterior(x, truth, 0.03)


@pytest.mark.parametrize('sde', SDES.values(), ids=SDES)
def test_a_bounded_mean_is_cut_to_where_data_lie(sde):
  t = jnp.linspace(0.1, 1.0, 8)
  z = jax.random.normal(KEY, (8, *SHAPE))
  x = expand(sde.alpha(t), z) * 0.5 + expand(sde.sigma(t), z) * z
  score_fn = DATA.score_fn(sde)
  free = sde.reverse(score_fn).denoise(x, t)
  cut = sde.reverse(BoundedMean(score_fn, sde, 0.4, 0.6)).denoise(x, t)
  assert ((free < 0.4) | (free > 0.6)).any()
  np.testing.assert_allclose(cut, jnp.clip(free, 0.4, 0.6), atol=5e-3)
