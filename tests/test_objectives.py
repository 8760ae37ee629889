"""Every way to train a score asks for the same: the minimiser of its loss is the true denoiser.

The data are three points on a line, so that p_t is a mixture of Gaussians; expectations over the
noise are sums over a grid, exact to rounding, in float64.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from data.points import parzen
import losses
from losses import LogNormalTimes, Objective, score_matching_loss, UniformTimes, Weight
from models.preconditioning import ENERGY, PRECONDITIONINGS
from sde_lib import EDMSDE, expand, RectifiedFlow, SDE, subVPSDE, VESDE, VPSDE

KEY = jax.random.key(0)
POINTS = np.array([[-0.9], [0.1], [0.7]])
SDES = [VESDE(), VPSDE(), subVPSDE(), EDMSDE(), RectifiedFlow()]
WEIGHTS: dict[str, Weight] = {
  'variance': losses.by_variance,
  'likelihood': losses.by_likelihood,
  'edm': losses.ByUnitLoss(0.4),
  'flow': losses.by_velocity,
  'min_snr': losses.ByMinSNR(3.0),
  'soft_min_snr': losses.BySoftMinSNR(3.0),
  'sigmoid': losses.BySigmoid(1.0),
}
LAWS = {
  'uniform': lambda sde: UniformTimes(1e-3, sde.T),
  'log_normal': lambda sde: LogNormalTimes(sde, eps=1e-3),
}
every_sde = pytest.mark.parametrize('sde', SDES, ids=lambda s: type(s).__name__)


def nodes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """x_0, z, and their probability."""
  line = np.linspace(-9, 9, 181)
  weight = stats.norm.pdf(line)
  x0, z = np.repeat(POINTS, len(line), axis=0), np.tile(line, len(POINTS))[:, None]
  return x0, z, np.tile(weight / weight.sum(), len(POINTS)) / len(POINTS)


def ideal_output(name: str, data, noise, alpha, sigma):
  """F where E[x_0 | x] and E[z | x] are known: each output is linear in the two."""
  r, sd = jnp.hypot(alpha, sigma), 0.5
  return {
    'score': lambda: -noise / sigma,
    'scaled_score': lambda: -noise,
    'noise': lambda: noise,
    'denoised': lambda: data,
    'v': lambda: (alpha * noise - sigma * data) / r,
    'edm': lambda: (sigma * data - sd**2 * alpha * noise) / (sd * jnp.hypot(sigma, sd * alpha)),
    'flow': lambda: noise - data,
  }[name]()


@every_sde
@pytest.mark.parametrize(
  ('name', 'law'),
  [
    *zip((name for name in PRECONDITIONINGS if name != ENERGY), itertools.cycle(LAWS), strict=False)
  ],
)
def test_the_minimiser_is_the_true_denoiser(sde: SDE, law: str, name: str):
  """A network that is right but for theta has the loss least + curvature theta^2, at any weight."""
  reading = PRECONDITIONINGS[name]
  with jax.enable_x64(True):
    x0, z, probability = (jnp.asarray(v) for v in nodes())
    times = jnp.asarray(np.asarray(LAWS[law](sde)(KEY, 4)), jnp.float64)
    t = jnp.repeat(times, len(x0))
    x0, z = jnp.tile(x0, (len(times), 1)), jnp.tile(z, (len(times), 1))
    probability = jnp.tile(probability, len(times))
    true_score = parzen(jnp.asarray(POINTS)).score_fn(sde)

    def loss(weight: Weight, theta: float) -> float:
      def score_fn(x, t):
        alpha, sigma = (expand(v, x) for v in sde.kernel(t))
        noise = -sigma * true_score(x, t)
        right = ideal_output(name, (x - sigma * noise) / alpha, noise, alpha, sigma)
        wrong = right + theta * jnp.cos(3 * x)
        return reading.score(lambda seen: (wrong, seen), x, alpha, sigma)

      each = score_matching_loss(Objective(sde, weight=weight), score_fn, x0, t, z, KEY)
      return float((probability * each).sum())

    for weight in WEIGHTS.values():
      least, above, below = (loss(weight, theta) for theta in (0.0, 0.1, -0.1))
      curvature = (above + below) / 2 - least
      assert curvature > 0
      # Of a linear term nothing is left but rounding, and what the grid of noise leaves.
      assert abs(above - below) < 1e-4 * curvature + 1e-10 * above


@every_sde
@pytest.mark.parametrize('law', LAWS)
def test_times_lie_where_they_are_asked_for(sde: SDE, law: str):
  eps, n = 1e-3, 20_000
  times = np.asarray(LAWS[law](sde)(KEY, n))
  assert times.min() >= np.float32(eps) and times.max() <= np.float32(sde.T)
  inner = times[(times > eps) & (times < sde.T)]
  log_noise = -np.asarray(sde.log_snr(jnp.asarray(inner)))
  expected = {
    'uniform': lambda: stats.kstest(inner, stats.uniform(eps, sde.T - eps).cdf),
    'log_normal': lambda: stats.kstest(log_noise, truncated(sde, eps)),
  }[law]()
  assert expected.pvalue > 1e-3


def truncated(sde: SDE, eps: float):
  """The law of log(sigma / alpha) between the ends, which some of the mass has moved to."""
  low, high = (-float(sde.log_snr(jnp.float32(t))) for t in (eps, sde.T))
  return stats.truncnorm((low + 1.2) / 1.2, (high + 1.2) / 1.2, -1.2, 1.2).cdf


def test_log_normal_noise_is_logit_normal_time():
  """Of flow matching: logit(t) is normal."""
  times = np.float64(LogNormalTimes(RectifiedFlow(), 0.3, 0.8)(KEY, 20_000))
  assert stats.kstest(np.log(times / (1 - times)), stats.norm(0.3, 0.8).cdf).pvalue > 1e-3


def loss_of_data(weight: Weight, sde: SDE, t: jax.Array) -> np.ndarray:
  """What an error of 1 in the denoised x costs: half the square of the weight, as a loss has it."""
  x0, z = jnp.full((len(t), 1), 0.3), jnp.full((len(t), 1), -0.8)

  def score_fn(x, t):
    alpha, sigma = (expand(v, x) for v in sde.kernel(t))
    return (alpha * (x0 + 1) - x) / sigma**2

  return 2 * np.asarray(score_matching_loss(Objective(sde, weight=weight), score_fn, x0, t, z, KEY))


@every_sde
def test_weights_are_what_they_are_called(sde: SDE):
  """As factors of ||D - x_0||^2, which is how the papers write most of them."""
  with jax.enable_x64(True):
    t = sde.T * jnp.linspace(0.1, 0.95, 7, dtype=jnp.float64)
    alpha, sigma = (np.asarray(v) for v in sde.kernel(t))
    snr, g = (alpha / sigma) ** 2, np.asarray(sde.diffusion_coef(t))
    rate = (g / sigma) ** 2  # -dlambda / dt
    lam, slope = jax.jvp(lambda t: 2 * sde.log_snr(t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(rate, -slope, rtol=1e-6)
    expected = {
      'variance': snr,
      'likelihood': snr * rate,
      'edm': (1 / snr + 0.4**2) / (1 / snr * 0.4**2),
      'flow': snr * (1 + sigma / alpha) ** 2,
      'min_snr': np.minimum(snr, 3.0),
      'soft_min_snr': snr * 3.0 / (snr + 3.0),
      'sigmoid': snr * rate / (1 + np.exp(np.asarray(lam) - 1.0)),
    }
    for name, weight in WEIGHTS.items():
      np.testing.assert_allclose(loss_of_data(weight, sde, t), expected[name], rtol=1e-6)


def test_flow_matching_counts_the_velocity():
  """For alpha = 1 - t, sigma = t its loss is ||v - (z - x_0)||^2."""
  sde, t = RectifiedFlow(), jnp.linspace(0.05, 0.95, 6)
  x0, z = jax.random.normal(KEY, (2, 6, 3))
  flow = PRECONDITIONINGS['flow']

  def score_fn(x, t):
    alpha, sigma = (expand(v, x) for v in sde.kernel(t))
    return flow.score(lambda seen: (jnp.sin(x), seen), x, alpha, sigma)

  objective = Objective(sde, weight=losses.by_velocity, reduce_mean=True)
  x = (1 - t)[:, None] * x0 + t[:, None] * z
  np.testing.assert_allclose(
    score_matching_loss(objective, score_fn, x0, t, z, KEY),
    jnp.square(jnp.sin(x) - (z - x0)).mean(1),
    rtol=1e-4,
  )
