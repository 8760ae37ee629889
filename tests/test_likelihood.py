"""Likelihoods and encodings, where the density and the flow are known exactly."""

import dataclasses
import math

import agreement
from analytic import gaussian
from etils import epath
from flax import linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest
from scipy.stats import norm
from scipy.stats.distributions import rv_frozen
from test_golden_sde import DATA, golden, numbers
from test_time_laws import of_score_flow

from builders.evaluation import make_bits_per_dim, make_measurements
from builders.setup import build
from configs import base, own
from data import sources
from data.codec import ImageCodec
from data.images import ImageSource, Source
from data.points import Mixture
from evaluation import dequantization
from evaluation.bits_per_dim import BitsPerDim, Estimator
import likelihood
from likelihood import (
  bits_per_dim,
  decode,
  draw_probes,
  encode,
  importance_weighted,
  interpolate,
  Likelihood,
)
from models.preconditioning import PRECONDITIONINGS
from models.score import ScoreModel
from sde_lib import EDMSDE, RectifiedFlow, SDE, subVPSDE, VESDE, VPSDE

SDES = [VESDE(sigma_max=20.0), VPSDE(), subVPSDE(), EDMSDE(20.0), RectifiedFlow()]
EPS = 1e-5
KEY = jax.random.key(0)
TWO = Mixture(jnp.array([0.3, 0.7]), jnp.array([[0.5, -0.2], [-0.6, 0.3]]), jnp.array([0.25, 0.4]))
POINT = gaussian(jnp.array([0.3, -0.5, 0.1]), 0.4)


def log_density(data: Mixture, sde: SDE, x: np.ndarray, t: float) -> np.ndarray:
  """log p_t(x) [B] of a mixture diffused by an SDE; x [B, d]."""
  alpha, sigma = (np.float64(f(jnp.float32(t))) for f in (sde.alpha, sde.sigma))
  away = np.asarray(x, np.float64)[:, None] - alpha * np.asarray(data.means)
  variances = (alpha * np.asarray(data.stds, np.float64)) ** 2 + sigma**2
  logs = np.log(data.weights) - 0.5 * (away**2).sum(-1) / variances
  return np.logaddexp.reduce(logs - 0.5 * away.shape[-1] * np.log(2 * np.pi * variances), axis=-1)


def points(dim: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(0).normal(0, 0.4, (5, dim)), jnp.float32)


@pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize('data', [POINT, TWO], ids=['gaussian', 'mixture'])
def test_the_exact_trace_gives_the_change_of_volume(sde, data):
  """log p_eps(x) - log p_T(z), to 0.001 bits per dimension."""
  x = points(data.means.shape[-1])
  logp, z, _ = Likelihood(sde, probe='exact')(KEY, data.score_fn(sde), x)
  change = log_density(data, sde, x, EPS) - log_density(data, sde, z, sde.T)
  bits = (logp - sde.prior_logp(z) - change) / (x.shape[1] * math.log(2))
  assert np.abs(bits).max() < 0.001


@pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize('probe', ['rademacher', 'exact'])
def test_bits_per_dimension_of_a_gaussian(sde, probe):
  """Within 0.005 of exact, prior and all.

  That p_T is not quite the prior is the model's own error: with the mean of the data away from
  zero it would be up to 0.04 for the VE SDE at sigma_max = 20.
  """
  x, data = points(3), gaussian(jnp.zeros(3), 0.4)
  logp, *_ = Likelihood(sde, probe=probe)(KEY, data.score_fn(sde), x)
  exact = log_density(data, sde, x, EPS)
  assert np.abs(bits_per_dim(logp, 3, 1 / 256) - bits_per_dim(exact, 3, 1 / 256)).max() < 0.005


@pytest.mark.parametrize('probe', ['rademacher', 'gaussian'])
def test_probes_are_unbiased_and_more_of_them_vary_less(probe):
  """The variance of a mean over n probes is 1/n of that of one."""
  matrix = jnp.array([[1.0, 0.5], [-0.2, 2.0]])

  def variance(n: int) -> float:
    rngs = jax.random.split(KEY, 4000)
    v = jax.vmap(lambda rng: draw_probes(rng, jnp.zeros((1, 2)), probe, n)[:, 0])(rngs)
    traces = jnp.einsum('rni,ij,rnj->r', v, matrix, v) / n
    assert abs(traces.mean() - 3.0) < 4 * traces.std() / math.sqrt(4000)
    return traces.var()

  # The relative standard error of a variance from 4000 draws is 2 to 6 %.
  assert variance(1) / variance(8) == pytest.approx(8, rel=0.2)


def test_the_axes_of_space_give_the_trace():
  v = draw_probes(KEY, jnp.zeros((1, 2, 2, 1)), 'exact', 1).reshape(4, 4)
  np.testing.assert_allclose(v.T @ v / 4, jnp.eye(4), atol=1e-6)


def test_a_rademacher_probe_is_exact_for_an_isotropic_gaussian():
  """There the Jacobian is a multiple of the identity, and v^T v = D."""
  sde, x = SDES[1], jnp.full((2, 3), 0.2)
  exact, *_ = Likelihood(sde, probe='exact')(KEY, POINT.score_fn(sde), x)
  probed, *_ = Likelihood(sde)(KEY, POINT.score_fn(sde), x)
  np.testing.assert_allclose(probed, exact, atol=1e-4)


def test_estimated_likelihoods_average_to_the_exact_one():
  """Of one image [2, 2, 1] with 400 probes, or 400 times four, whose variance is a quarter."""
  sde, n = SDES[1], 400
  image = jnp.array([0.1, 0.3, -0.2, 0.1]).reshape(2, 2, 1)
  score_fn = DATA.score_fn(sde)
  exact, *_ = Likelihood(sde, probe='exact')(KEY, score_fn, image[None])
  variances = []
  for n_probes in (1, 4):
    measure = Likelihood(sde, probe='gaussian', n_probes=n_probes)
    logp, *_ = measure(KEY, score_fn, jnp.broadcast_to(image, (n, *image.shape)))
    assert abs(logp.mean() - exact[0]) < 4 * logp.std() / math.sqrt(n)
    variances.append(logp.var())
  # The relative standard error of a ratio of variances from 400 draws is about 10 %.
  assert variances[0] / variances[1] == pytest.approx(4, rel=0.4)


@pytest.mark.parametrize('eps', [1e-3, 0.05])
def test_the_data_are_taken_to_be_at_eps(eps):
  sde, x, data = SDES[1], points(3), gaussian(jnp.zeros(3), 0.4)
  logp, *_ = Likelihood(sde, eps, probe='exact')(KEY, data.score_fn(sde), x)
  exact = log_density(data, sde, x, eps)
  np.testing.assert_allclose(logp, exact, atol=2e-3 * 3)
  with pytest.raises(ValueError, match='0 <= eps < T'):
    Likelihood(sde, -eps)


def test_splitting_the_batch_changes_nothing_beyond_the_tolerance():
  sde = SDES[1]
  x = 0.4 * jax.random.normal(KEY, (6, 2))
  measure = Likelihood(sde, probe='exact')
  whole, *_ = measure(KEY, TWO.score_fn(sde), x)
  parts = [measure(KEY, TWO.score_fn(sde), part)[0] for part in (x[:1], x[1:4], x[4:])]
  np.testing.assert_allclose(jnp.concatenate(parts), whole, atol=5e-4)


@pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
def test_decoding_undoes_encoding(sde):
  x = jax.random.normal(KEY, (4, 2))
  z, nfe = encode(sde, TWO.score_fn(sde), x)
  back, _ = decode(sde, TWO.score_fn(sde), z)
  assert nfe > 10
  # The flow of the VE SDE is stiff near 0: an error in z of rtol sigma_max comes back smaller.
  np.testing.assert_allclose(back, x, atol=2e-3)


def test_the_flow_of_a_gaussian_is_known():
  """x_T - m_T = (x_0 - m) s_T / s_0: the flow keeps how many standard deviations x is away."""
  sde, x = SDES[1], jax.random.normal(KEY, (4, 3))
  z, _ = encode(sde, POINT.score_fn(sde), x)
  (alpha, sigma), mean = (f(jnp.float32(1.0)) for f in (sde.alpha, sde.sigma)), POINT.means[0]
  expected = alpha * mean + (x - mean) / 0.4 * jnp.sqrt((0.4 * alpha) ** 2 + sigma**2)
  np.testing.assert_allclose(z, expected, atol=1e-3)


def test_spherical_interpolation():
  z0, z1 = jnp.array([[3.0, 0.0], [1.0, 2.0]]), jnp.array([[0.0, 3.0], [1.0, 2.0]])
  np.testing.assert_allclose(interpolate(z0, z1, jnp.zeros(2)), z0, atol=1e-5)
  np.testing.assert_allclose(interpolate(z0, z1, jnp.ones(2)), z1, atol=1e-5)
  halfway = interpolate(z0, z1, jnp.full(2, 0.5))
  np.testing.assert_allclose(halfway, [[3 / 2**0.5, 3 / 2**0.5], [1.0, 2.0]], rtol=1e-5)


@pytest.mark.parametrize('centered', [False, True])
def test_the_offset_is_the_change_of_volume_of_the_scaling(centered):
  """A uniform density over the levels of a pixel has 8 bits, however pixels are scaled."""
  codec = ImageCodec((2, 2, 3), centered=centered)
  black_and_white = codec.scaled(np.array([[[[0, 0, 0]]], [[[255, 255, 255]]]], np.uint8))
  logp = jnp.full(3, -12 * math.log(np.ptp(black_and_white)))
  bits = bits_per_dim(logp, codec.dim, codec.level_width)
  np.testing.assert_allclose(bits, 8.0, rtol=1e-6)


@pytest.mark.parametrize(('name', 'key'), numbers('likelihood'))
def test_golden(name, key, monkeypatch):
  """z, bits/dim and evaluations of the released code for a given probe, whose solver is float64."""
  if key in ('data', 'rademacher', 'gaussian', 'true_logp_at_eps'):
    return  # inputs
  what, probe, tolerance, *centered = key.split('_')
  tolerance = float(tolerance.removeprefix('tol'))
  file, sde = golden(name), {'ve': VESDE, 'vp': VPSDE}[name.split('_')[1]]()
  given = jnp.asarray(file[probe.lower()], jnp.float32)[None]
  x0 = jnp.asarray(file['data'], jnp.float32)
  monkeypatch.setattr(likelihood, '_begin', lambda *_: ((x0, jnp.zeros((1, len(x0)))), given))
  logp, z, nfe = Likelihood(sde, EPS, tolerance, tolerance)(KEY, DATA.score_fn(sde), x0)
  if what == 'nfe':
    assert abs(nfe - file[key]) <= 6  # a step, where rounding decides
  elif what == 'z':
    error = agreement.error(z, file[key], quantity=f'z, tolerance {tolerance:g}')
    assert error < 50 * tolerance  # the errors of two solvers, after some fifty steps
  else:
    width = ImageCodec((2, 2, 1), centered=centered == ['centered1']).level_width
    bits = bits_per_dim(logp, 4, width)
    agreement.error(bits[:, None], file[key][:, None], quantity=f'bits/dim, {tolerance:g}')
    np.testing.assert_allclose(bits, file[key], atol=50 * tolerance)


def levels_of_a_gaussian(std: float) -> tuple[np.ndarray, np.ndarray, rv_frozen]:
  """Levels y [N, 3] with independent values, log P(y) [N], and the density of what is rounded."""
  law = norm(0.3, std)
  y = np.floor(law.rvs((2000, 3), np.random.default_rng(0)))
  return y, np.log(law.cdf(y + 1) - law.cdf(y)).sum(-1), law


@pytest.mark.parametrize('std', [0.4, 3.0])  # in levels: uniform noise costs much, or little
def test_uniform_noise_bounds_the_probability_of_levels_and_more_of_it_bounds_it_better(std):
  y, exact, law = levels_of_a_gaussian(std)
  u = np.random.default_rng(1).uniform(size=(64, *y.shape))
  logp = jnp.asarray(law.logpdf(y + u).sum(-1), jnp.float32)[:, None]
  below = []
  for k in (1, 4, 64):
    estimate = importance_weighted(logp[:k], jnp.zeros((k, len(y))))[0]
    below.append(float((exact - estimate).mean()))
    # Its exponential is unbiased, whatever k is.
    ratio = np.exp(np.asarray(estimate, np.float64) - exact)
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(len(y))
  assert below[0] > 1.3 * below[1] > 1.3 * 1.3 * below[2] > 0


def test_noise_of_the_law_that_the_density_has_of_it_meets_the_probability_of_levels():
  y, exact, law = levels_of_a_gaussian(0.4)
  v = np.random.default_rng(1).uniform(size=(4, *y.shape))
  x = law.ppf(law.cdf(y) + v * (law.cdf(y + 1) - law.cdf(y)))
  logp = jnp.asarray(law.logpdf(x).sum(-1), jnp.float32)[:, None]
  log_q = logp[:, 0] - exact
  for k in (1, 4):
    estimate = importance_weighted(logp[:k], log_q[:k])
    np.testing.assert_allclose(estimate[0], exact, atol=1e-3)
  # Without their own density such samples would flatter.
  assert (importance_weighted(logp, 0 * log_q)[0] - exact).mean() > 0.1


def test_what_all_samples_err_by_is_what_the_estimates_differ_by():
  """Three estimates that err alike for all samples: the weights do not see it."""
  rng = np.random.default_rng(0)
  logp, errors = rng.normal(size=(5, 1, 7)), 10 * rng.normal(size=(3, 7))
  log_q = jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)
  of_one = importance_weighted(jnp.asarray(logp, jnp.float32), log_q)
  of_three = importance_weighted(jnp.asarray(logp + errors, jnp.float32), log_q)
  np.testing.assert_allclose(of_three, of_one + errors, atol=1e-4)


FLAT = gaussian(jnp.zeros((8, 8, 1)), 0.5)


@dataclasses.dataclass(frozen=True)
class KnownModel(ScoreModel):
  """A model of scaled images whose density is known; its network is not asked."""

  data: Mixture = FLAT

  def bind(self, params, dropout_rng=None, **told):
    return self.data.score_fn(self.sde)


def known_model(sde: SDE, data: Mixture = FLAT) -> KnownModel:
  return KnownModel(
    nn.Module(), sde.chain(10), lambda chain, t: t, PRECONDITIONINGS['score'], True, True, data=data
  )


def few_digits() -> ImageSource:
  images = sources.load('digits', 'test', image_size=8, num_channels=1).gather(np.arange(10))
  return ImageSource((8, 8, 1), 10, lambda i: (images[i], 0))


def bits_of_known(config: ConfigDict, source: Source, data: Mixture = FLAT) -> BitsPerDim:
  """What measures the bits per dimension of images by a density that is known."""
  setup = build(config)
  bits = make_bits_per_dim(setup)
  return dataclasses.replace(bits, source=source, model=known_model(setup.model.sde, data))


@pytest.mark.parametrize('centered', [False, True])
def test_evaluation_counts_every_image_once_per_repeat(centered, tmp_path):
  """Ten images in batches of four; what is lost is made again, and the rest kept."""
  config = own.digits(base.vp('ddpmpp'))
  config.eval.update(enable_bpd=True, bpd_repeats=2, batch_size=4)
  config.data.centered = centered
  few = few_digits()
  images = few.gather(np.arange(10))
  bits = bits_of_known(config, few)
  report = bits.measure({}, 0, epath.Path(tmp_path))
  assert (report['bpd_test_images'], report['bpd_test_repeats']) == (10, 2)
  assert bits.is_in(report) and not bits.is_in({**report, 'bpd_test_repeats': 1})
  # A level is so narrow that the density at its middle is the mean over it.
  x = (images.reshape(10, -1) + 0.5) / 256
  x = 2 * x - 1 if centered else x
  log2 = (-0.5 * (x / 0.5) ** 2 - 0.5 * math.log(2 * math.pi * 0.25)) / math.log(2)
  exact = -log2.mean(-1) + (7 if centered else 8)
  assert report['bpd_test'] == pytest.approx(exact.mean(), abs=0.01)
  assert report['bpd_test_std_error'] == pytest.approx(exact.std(ddof=1) / 10**0.5, rel=0.05)

  rounds = sorted(tmp_path.glob('bpd_test_*.npz'))
  assert len(rounds) == 6
  stamps = [path.stat().st_mtime_ns for path in rounds]
  rounds[2].unlink()
  again = bits.measure({}, 0, epath.Path(tmp_path))
  kept = [path.stat().st_mtime_ns == stamp for path, stamp in zip(rounds, stamps, strict=True)]
  assert kept == [True, True, False, True, True, True]
  timeless = [name for name in report if not name.endswith('seconds')]
  assert [again[name] for name in timeless] == [report[name] for name in timeless]


@dataclasses.dataclass(frozen=True)
class KnownDensity:
  """Of scaled images, in closed form, by the probe of an image: what is left of its key."""

  std: float

  def estimates(self, rng, score_fn, x0):
    offsets = jax.vmap(jax.random.normal)(rng)
    logp = -0.5 * jnp.square(x0 / self.std) - math.log(self.std * math.sqrt(2 * math.pi))
    return (logp.reshape(len(x0), -1).sum(-1) + offsets)[None], 3


def test_more_samples_of_the_noise_lower_bits_per_dimension(tmp_path):
  """Each repeat has its own samples, with the probe that one sample had."""
  config, known = own.digits(base.vp('ddpmpp')), KnownDensity(0.003)  # about a third of a level
  config.eval.update(enable_bpd=True, bpd_repeats=2, batch_size=4)
  black = ImageSource((8, 8, 1), 10, lambda i: (np.full((8, 8, 1), 128, np.uint8), 0))

  def measured(samples: int) -> tuple[BitsPerDim, dict]:
    config.eval.bpd_importance_samples = samples
    bits = make_bits_per_dim(build(config))
    bits = dataclasses.replace(
      bits, source=black, estimator=Estimator('bpd', known, 'probes', 1, {})
    )
    return bits, bits.measure({}, 0, epath.Path(tmp_path))

  (one, of_one), (many, of_many) = measured(1), measured(64)
  assert (of_one['bpd_test_nfe'], of_many['bpd_test_nfe']) == (3, 192)
  assert of_many['bpd_test_importance_samples'] == 64
  assert one.is_in(of_one) and not many.is_in(of_one) and not one.is_in(of_many)
  del of_one['bpd_test_importance_samples']  # as in reports of earlier
  assert one.is_in(of_one) and not many.is_in(of_one)
  # Level 128 is x from 0 to 1/128, of which half of the density is above 0.
  exact = -math.log2(norm(0, 0.003).cdf(1 / 128) - 0.5)
  errors = [3 * report['bpd_test_std_error'] for report in (of_one, of_many)]
  assert of_one['bpd_test'] - of_many['bpd_test'] > 0.2
  assert exact - errors[1] < of_many['bpd_test'] < of_one['bpd_test']


def test_bits_per_dimension_of_an_image_do_not_depend_on_its_batch(tmp_path):
  """Beyond the tolerance: whatever the batch, an image has its own noise and probe.

  Others change the bits by 0.15. The flow has two modes, since all probes give the same for a
  Jacobian that is a multiple of the identity.
  """
  stripes = jnp.broadcast_to(jnp.array([0.25, -0.25] * 4), (8, 8))[..., None]
  modes = Mixture(jnp.array([0.5, 0.5]), jnp.stack([stripes, -stripes]), jnp.array([0.5, 0.5]))

  def bits(batch_size: int, seed: int = 0) -> np.ndarray:
    """Of each image and repeat."""
    config = own.digits(base.vp('ddpmpp'))
    config.seed = seed
    config.eval.update(enable_bpd=True, bpd_repeats=2, batch_size=batch_size)
    folder = tmp_path / f'{batch_size}_{seed}'
    bits_of_known(config, few_digits(), modes).measure({}, 0, epath.Path(folder))
    rounds = (folder / f'bpd_test_{k}.npz' for k in range(2 * math.ceil(10 / batch_size)))
    return np.concatenate([np.load(path)['bpd'] for path in rounds])

  whole = bits(10)
  np.testing.assert_allclose(bits(4), whole, atol=3e-4)
  assert np.abs(bits(10, seed=1) - whole).mean() > 0.05
  assert np.abs(whole[:10] - whole[10:]).mean() > 0.05


def test_the_exact_likelihood_is_that_of_score_flow(monkeypatch):
  """For its probe, at the same tolerance."""
  file, key = of_score_flow('ode_likelihood'), 'vp__eps1e-05__centered1'
  x0, probe = jnp.asarray(file['data'], jnp.float32), jnp.asarray(file['probe'], jnp.float32)
  monkeypatch.setattr(likelihood, '_begin', lambda *_: ((x0, jnp.zeros((1, len(x0)))), probe))
  logp, z, nfe = Likelihood(VPSDE(), EPS)(KEY, DATA.score_fn(VPSDE()), x0)
  bits = bits_per_dim(logp, 4, ImageCodec((2, 2, 1), centered=True).level_width)
  np.testing.assert_allclose(bits, file[f'{key}/bpd'], atol=5e-4)
  np.testing.assert_allclose(z, file[f'{key}/z'], atol=5e-4)
  assert abs(nfe - file[f'{key}/nfe']) <= 6


def test_learned_noise_begins_as_uniform_noise_and_its_density_is_exact():
  """Whatever its place and scale, the mean of p / q is the probability of the level."""
  y, exact, law = levels_of_a_gaussian(0.4)
  rng = np.random.default_rng(2)
  v = jnp.asarray(rng.uniform(size=(16, *y.shape)), jnp.float32)
  below = {}
  # The density falls away from 0.3, in the levels beside it to one of their ends.
  for name, slope, log_scale in (('uniform', 0.0, 0.0), ('wrong', 1.5, 0.2), ('near', -1.5, -0.2)):
    told = jnp.stack([jnp.float32(slope * y), jnp.full(y.shape, log_scale)], -1)
    draws = [dequantization.noise_of(told, row) for row in v]
    u, log_q = (np.asarray(jnp.stack(values), np.float64) for values in zip(*draws, strict=True))
    log_ratio = law.logpdf(y + u).sum(-1) - log_q - exact
    ratio = np.exp(log_ratio).mean(0)
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(len(y))
    below[name] = -log_ratio.mean()
    if name == 'uniform':
      np.testing.assert_allclose(u, v, atol=1e-6)
      np.testing.assert_allclose(log_q, 0, atol=1e-5)
  assert 0 < below['near'] < below['uniform'] < below['wrong']


def test_noise_learned_by_the_score_comes_near_to_what_a_known_density_says_of_it():
  """Of level 128, x from 0 to 1/128, where the density falls to nothing within the level."""
  codec, std = ImageCodec((4, 4, 1), centered=True), 0.003
  images, tx = jnp.full((4, 4, 4, 1), 128, jnp.uint8), optax.adam(0.01)
  params = dequantization.NETWORK.init(KEY, jnp.zeros((1, 4, 4, 1)))

  def score_fn(x, t):
    return -x / std**2

  @jax.jit
  def step(state, rng):
    params, moments = state
    gradient = jax.grad(dequantization.loss)(params, images, rng, score_fn, EPS, codec)
    updates, moments = tx.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments

  def above(params) -> float:
    """Bits/dim above those of the levels."""
    x, log_q = dequantization.Learned(codec, params, 60)(jax.random.split(KEY, 4), images)
    logp = norm(0, std).logpdf(np.asarray(x, np.float64)).reshape(4, -1).sum(-1)
    exact = -math.log2(norm(0, std).cdf(1 / 128) - 0.5)
    return float(bits_per_dim(logp - np.asarray(log_q), 16, codec.level_width).mean()) - exact

  state = params, tx.init(params)
  for i in range(60):
    state = step(state, jax.random.fold_in(KEY, i))
  assert above(params) > 0.4
  assert -0.02 < above(state[0]) < 0.1


def test_evaluation_fits_noise_to_a_checkpoint_where_it_is_asked_for(tmp_path):
  """By the command's own measurements; with a density known within a level, it comes near."""
  config, known = own.digits(base.vp('ddpmpp')), KnownDensity(0.003)
  config.eval.update(enable_bpd=True, enable_loss=False, enable_sampling=False, bpd_repeats=2)
  config.eval.update(batch_size=8, bpd_dequantization='variational', bpd_dequantization_steps=40)
  black = ImageSource((8, 8, 1), 10, lambda i: (np.full((8, 8, 1), 128, np.uint8), 0))
  (fitted,) = make_measurements(build(config))
  estimator = Estimator('bpd', known, 'probes', 1, {})
  model = known_model(VPSDE(), gaussian(jnp.zeros((8, 8, 1)), 0.003))
  uniform = dataclasses.replace(fitted.bits, source=black, estimator=estimator, model=model)
  fitted = dataclasses.replace(fitted, bits=uniform, source=black)
  report = fitted.measure({}, 0, epath.Path(tmp_path))
  assert report['bpd_test_dequantization'] == 'variational, 40 steps'
  assert fitted.is_in(report) and not uniform.is_in(report)
  assert not dataclasses.replace(fitted, steps=41).is_in(report)
  before = uniform.measure({}, 0, epath.Path(tmp_path))
  assert uniform.is_in(before) and not fitted.is_in(before)
  exact = -math.log2(norm(0, 0.003).cdf(1 / 128) - 0.5)
  error = 3 * report['bpd_test_std_error']
  assert exact - error < report['bpd_test'] < before['bpd_test'] - 0.1
