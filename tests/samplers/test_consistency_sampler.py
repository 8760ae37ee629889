"""Few jumps of consistency models, against a Gaussian whose flow is known."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from controllable_generation import Gray, Known, Mask
from runtime.errors import UserError
from samplers.consistency import ConsistencySampler
from samplers.time_grids import in_float64
from sde_lib import EDMSDE, expand, RectifiedFlow, SDE, subVPSDE, VESDE, VPSDE

KEY = jax.random.key(0)
MEAN, STD, EPS = 0.3, 0.2, 0.01
SDES = [VESDE(0.01, 20.0), VPSDE(), subVPSDE(), EDMSDE(20.0), RectifiedFlow()]
every_sde = pytest.mark.parametrize('sde', SDES, ids=lambda sde: type(sde).__name__)
N = 8192


@flax.struct.dataclass
class GaussianEnd:
  """Where the flow of N(MEAN, STD^2) ends: quantiles stay what they are."""

  sde: SDE = flax.struct.field(pytree_node=False)

  def consistency(self, x, t, eps):
    (alpha, sigma), (end_alpha, end_sigma) = (
      (expand(v, x) for v in self.sde.kernel(at)) for at in (t, jnp.full_like(t, eps))
    )
    spread, end_spread = jnp.hypot(alpha * STD, sigma), jnp.hypot(end_alpha * STD, end_sigma)
    return end_alpha * MEAN + end_spread / spread * (x - alpha * MEAN)

  def __call__(self, x, t):
    raise AssertionError('a consistency model has no score')


def check_moments(x, sde: SDE) -> None:
  s = np.exp(-float(sde.log_snr(jnp.float32(EPS))))
  np.testing.assert_allclose(x.mean(), MEAN, atol=6 * STD / np.sqrt(x.size) + 0.01)
  np.testing.assert_allclose(x.std(), np.hypot(STD, s), rtol=0.03)


@every_sde
@pytest.mark.parametrize('n', [1, 3])
def test_exact_jumps_give_samples_of_the_data(sde, n):
  """In any number of steps, with the noise that eps leaves."""
  times = tuple(sde.T * share for share in (0.6, 0.05)[: n - 1])
  sampler = ConsistencySampler(sde, EPS, times)
  x, nfe = sampler(KEY, GaussianEnd(sde), (N, 1))
  assert nfe == n
  check_moments(np.asarray(x), sde)


@every_sde
def test_each_jump_begins_at_the_noise_of_its_time(sde):
  """Data at eps, scaled, and what is added have the noise of that time together; none at eps."""
  times = (0.5 * sde.T, 2 * EPS, 1.001 * EPS)
  levels = ConsistencySampler(sde, EPS, times)._levels()
  np.testing.assert_array_equal(levels['t'], [sde.T, *times])
  after = np.array([*times, EPS])
  alpha, sigma = (in_float64(f, after) for f in (sde.alpha, sde.sigma))
  kept = alpha / levels['end_alpha'] * sigma[-1]
  np.testing.assert_allclose(levels['alpha'], alpha)
  np.testing.assert_allclose(levels['added'] ** 2, sigma**2 - kept**2, rtol=1e-7, atol=1e-12)
  assert levels['added'][-1] == 0


def test_what_leaves_the_range_of_data_is_cut():
  x, _ = ConsistencySampler(SDES[3], EPS, (1.0,), low=0.0, high=0.5)(
    KEY, GaussianEnd(SDES[3]), (N, 1)
  )
  assert x.min() == 0 and x.max() == 0.5


@pytest.mark.parametrize('sde', SDES[3:])
@pytest.mark.parametrize('operator', [Mask(jnp.array([1.0, 0.0, 1.0])), Gray()])
def test_what_is_known_is_in_the_samples(sde, operator):
  """Inpainting and colorization in three steps; the rest is drawn as ever."""
  y = operator(jnp.broadcast_to(jnp.array([0.1, 0.9, 0.4]), (4096, 2, 2, 3)))
  sampler = ConsistencySampler(sde, EPS, (0.5 * sde.T, 0.2 * sde.T))
  x, nfe = sampler(KEY, GaussianEnd(sde), y.shape, constraint=Known(y, operator, sde))
  assert nfe == 3
  np.testing.assert_allclose(operator(x), y, atol=1e-6)
  if isinstance(operator, Mask):
    check_moments(np.asarray(x)[..., 1], sde)


def test_an_observer_sees_every_jump():
  seen = []
  sampler = ConsistencySampler(SDES[3], EPS, (1.0, 0.5))
  x, _ = sampler(KEY, GaussianEnd(SDES[3]), (4, 2), observe=lambda *now: seen.append(now))
  assert [fraction for fraction, _ in seen] == pytest.approx([0, 1 / 3, 2 / 3, 1])
  np.testing.assert_array_equal(seen[-1][1], x)
  assert seen[0][1].std() > 5 > 1.5 > seen[1][1].std()
  again, _ = sampler(KEY, GaussianEnd(SDES[3]), (4, 2))
  np.testing.assert_array_equal(x, again)


@pytest.mark.parametrize(
  'times', [(0.5, 0.5), (0.2, 0.5), (20.0,), (30.0,), (EPS,), (0.001,), (np.nan,)]
)
def test_times_must_fall(times):
  with pytest.raises(ValueError, match=r'must fall between T = 20\.0 and eps = 0\.01'):
    ConsistencySampler(EDMSDE(20.0), EPS, times)


def test_scores_are_refused():
  with pytest.raises(UserError, match='those of a consistency model'):
    ConsistencySampler(SDES[3], EPS)(KEY, lambda x, t: x, (4, 2))
