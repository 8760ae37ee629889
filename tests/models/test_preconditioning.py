"""What a network's output stands for: the score and the denoised x agree, to the last digits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from builders.setup import build
from configs.toy import two_moons
from models import score
from models.preconditioning import ENERGY, Jump, PRECONDITIONINGS
from models.score import ScoreModel
from sde_lib import EDMSDE, RectifiedFlow, SDE, subVPSDE, VESDE, VPSDE

KEY = jax.random.key(0)
LINEAR = [name for name in PRECONDITIONINGS if name != ENERGY]
SIGMA_DATA = 0.5
every_reading = pytest.mark.parametrize('name', LINEAR)


def output_for(name: str, x0, z, alpha, sigma):
  """What the best network would say of x = alpha x_0 + sigma z, where x_0 and z are known."""
  r = np.hypot(alpha, sigma)
  return {
    'score': -z / sigma,
    'scaled_score': -z,
    'noise': z,
    'denoised': x0,
    'v': (alpha * z - sigma * x0) / r,
    'edm': edm_output(x0, z, alpha, sigma),
    'flow': z - x0,
  }[name]


def edm_output(x0, z, alpha, sigma):
  """(x_0 - c_skip y) / c_out with y = x / alpha and s = sigma / alpha (Table 1, Eq. 8 of EDM)."""
  y, s = x0 + sigma / alpha * z, sigma / alpha
  c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
  return (x0 - c_skip * y) / (s * SIGMA_DATA / np.sqrt(s**2 + SIGMA_DATA**2))


def says(output):
  """A network that says `output`, whatever it sees."""
  return lambda x: (output, x)


def at(x, kernel, dtype):
  """x, and alpha and sigma of each of its rows."""
  return jnp.asarray(x, dtype), *(jnp.full((len(x), 1), v, dtype) for v in kernel)


def points():
  x0, z = np.asarray(jax.random.normal(KEY, (2, 6, 3)), np.float64)
  return x0, z


# alpha and sigma of VE, VP and sub-VP SDEs, early and late.
KERNELS = [(1.0, 1e-5), (1.0, 0.3), (1.0, 50.0), (0.9, 0.436), (0.01, 0.9999), (0.7, 0.51)]


@every_reading
@pytest.mark.parametrize('kernel', KERNELS)
def test_readings_say_the_same(name, kernel):
  """The score -z / sigma and the x_0 that were put in, in float64."""
  (x0, z), (alpha, sigma) = points(), kernel
  x, reading = alpha * x0 + sigma * z, PRECONDITIONINGS[name]
  output = output_for(name, x0, z, alpha, sigma)
  with jax.enable_x64(True):
    given = says(jnp.asarray(output, jnp.float64)), *at(x, kernel, jnp.float64)
    np.testing.assert_allclose(reading.score(*given), -z / sigma, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reading.denoised(*given), x0, rtol=1e-9, atol=1e-9)
    velocity = reading.noise_minus_data(*given)
    np.testing.assert_allclose(velocity, z - x0, rtol=1e-5, atol=1e-5)


@every_reading
def test_nothing_cancels_where_the_noise_is_small(name):
  """At sigma = 1e-5 in float32: x itself has z to 1 %, and outputs of unit scale to 1e-6."""
  (x0, z), alpha, sigma = points(), 1.0, 1e-5
  exact = alpha * x0 + sigma * z
  x = jnp.asarray(exact, jnp.float32)
  output = jnp.asarray(output_for(name, x0, z, alpha, sigma), jnp.float32)
  reading = PRECONDITIONINGS[name]
  given = says(output), *at(x, (alpha, sigma), jnp.float32)
  score = np.asarray(reading.score(*given))
  tolerance = 0.02 if name == 'denoised' else 2e-6
  if name in ('v', 'edm', 'flow'):
    # F carries z to its own rounding, and x counts for 1e-5 of the score.
    tolerance = 1e-5
  assert np.abs(score * sigma + z).max() < tolerance
  denoised = reading.denoised(*given)
  assert np.abs(denoised - x0).max() < 1e-6


@every_reading
@pytest.mark.parametrize('kernel', KERNELS)
def test_float32_loses_no_more_than_its_own_digits(name, kernel):
  """a and b of the score and of the denoised x, against float64, from the weights of x and of F."""
  reading, x = PRECONDITIONINGS[name], np.array([[0.0], [1.0]])
  for read in (reading.score, reading.denoised):
    rows = {}
    for x64 in (False, True):
      with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        output = says(jnp.asarray(1 - x, dtype))
        rows[x64] = np.asarray(read(output, *at(x, kernel, dtype)), np.float64)  # b, then a
    np.testing.assert_allclose(rows[False], rows[True], rtol=1e-6)


# Jumps along the probability flow.

JUMPING = [VESDE(0.01, 50.0), VPSDE(), subVPSDE(), EDMSDE(), RectifiedFlow()]
every_jump = pytest.mark.parametrize('sde', JUMPING, ids=lambda sde: type(sde).__name__)
END = 0.002


def jump(sde: SDE, t, end=END) -> Jump:
  """From times t to `end`, of rows of points."""
  ends = jnp.full_like(t, end)
  of_row = (*sde.kernel(t), *sde.kernel(ends), sde.log_snr_fall(ends, t))
  return Jump(*(v[:, None] for v in of_row))


@every_reading
@every_jump
def test_a_jump_leads_nowhere_from_its_end(name, sde):
  """f(x, eps) = x to the bit, whatever the network says."""
  x = jax.random.normal(KEY, (6, 3))
  there = PRECONDITIONINGS[name].consistency(says(100 * x), x, jump(sde, jnp.full(6, END)))
  np.testing.assert_array_equal(there, x)


@every_reading
@every_jump
def test_a_jump_keeps_x0_and_noise(name, sde):
  """If the network knows x_0 and z, it ends at alpha_eps x_0 + sigma_eps z.

  But for what the first coefficient of EDM has of s_eps / sigma_data.
  """
  x0, z = points()
  with jax.enable_x64(True):
    t = sde.T * jnp.array([1.0, 0.9, 0.5, 0.1, 0.03, 0.01])
    of_row = jump(sde, t)
    alpha, sigma, end_alpha, end_sigma, _ = (np.asarray(v) for v in of_row)
    output = jnp.asarray(output_for(name, x0, z, alpha, sigma), jnp.float64)
    x = jnp.asarray(alpha * x0 + sigma * z)
    end = PRECONDITIONINGS[name].consistency(says(output), x, of_row)
  bound = np.abs(x / alpha).max(1, keepdims=True) * end_sigma / SIGMA_DATA / 4
  error = np.abs(end - (end_alpha * x0 + end_sigma * z))
  assert (error <= (bound if name == 'edm' else 1e-9)).all()


@every_reading
@every_jump
def test_the_coefficients_of_a_jump_keep_their_digits(name, sde):
  """Those of x and of F against float64, right beside the end and far away."""
  times = END * np.array([1 + 1e-5, 1.001, 1.02, 2.0]), sde.T * np.array([0.01, 0.3, 1.0])
  t, rows = np.repeat(np.float32(np.concatenate(times)), 2), {}
  x = np.tile([[0.0], [1.0]], (7, 1))
  for x64 in (False, True):
    with jax.enable_x64(x64):
      dtype = jnp.float64 if x64 else jnp.float32
      # The same two times in both, which are no more exact than float32.
      of_row = jump(sde, jnp.asarray(t, dtype), jnp.asarray(np.float32(END), dtype))
      output, seen = says(jnp.asarray(1 - x, dtype)), jnp.asarray(x, dtype)
      rows[x64] = np.asarray(PRECONDITIONINGS[name].consistency(output, seen, of_row), np.float64)
  np.testing.assert_allclose(rows[False], rows[True], rtol=3e-6)


def test_the_jump_of_edm_is_that_of_the_paper():
  """c_skip and c_out of Appendix C, at alpha = 1."""
  t = np.array([END, 0.01, 0.4, 80.0], np.float32)
  of_row = jump(EDMSDE(), jnp.asarray(t))
  x = jnp.ones((4, 1))
  reading, d = PRECONDITIONINGS['edm'], np.float64(t) - np.float32(END)
  skip = reading.consistency(says(0 * x), x, of_row)[:, 0]
  np.testing.assert_allclose(skip, 0.25 / (d**2 + 0.25), rtol=1e-6)
  out = reading.consistency(says(x), 0 * x, of_row)[:, 0]
  np.testing.assert_allclose(out, d * 0.5 / np.sqrt(np.float64(t) ** 2 + 0.25), rtol=1e-6)


@pytest.mark.parametrize('sigma_data', [0.25, 0.5, 1.7])
def test_edm_is_its_table(sigma_data):
  """c_skip, c_out, c_in at alpha = 1 (Table 1 of https://arxiv.org/abs/2206.00364)."""
  reading = PRECONDITIONINGS['edm'].for_data(sigma_data)
  sigma = np.array([[1e-3], [0.4], [80.0]], np.float32)
  s2 = np.float64(sigma) ** 2 + sigma_data**2
  x, one, sigma = jnp.ones((3, 1)), jnp.ones((3, 1)), jnp.asarray(sigma)
  c_skip = reading.denoised(says(0 * x), x, one, sigma)
  np.testing.assert_allclose(c_skip, sigma_data**2 / s2, rtol=1e-6)
  c_out = reading.denoised(says(x), 0 * x, one, sigma)
  np.testing.assert_allclose(c_out, sigma * sigma_data / np.sqrt(s2), rtol=1e-6)
  seen = []
  reading.denoised(lambda y: (seen.append(y) or y, y), x, one, sigma)
  np.testing.assert_allclose(seen[0], 1 / np.sqrt(s2), rtol=1e-6)


@pytest.mark.parametrize('end', [0.0, 1.0])
def test_velocity_of_flow_matching_is_finite_at_both_ends(end):
  """Where the score, or the denoised x by Tweedie's formula, is infinite."""
  config = two_moons.get_config('flow')
  config.model.nf = 8
  model = build(config).model
  score_fn = model.bind(model.init(KEY, (1, 2)))
  x, t = jax.random.normal(KEY, (3, 2)), jnp.full(3, end)
  flow = model.sde.probability_flow(score_fn, x, t)
  near = model.sde.probability_flow(score_fn, x, jnp.abs(t - 1e-4))
  assert np.isfinite(flow).all()
  np.testing.assert_allclose(flow, near, rtol=0.05, atol=0.01)


def test_v_is_the_velocity_of_the_angle():
  """Of x = cos(phi) x_0 + sin(phi) z by phi, for a variance of 1 (Salimans & Ho 2022)."""
  x0, z = points()
  with jax.enable_x64(True):

    def path(phi):
      return jnp.cos(phi) * x0 + jnp.sin(phi) * z

    x, velocity = jax.jvp(path, (jnp.float64(0.4),), (jnp.float64(1.0),))
    found = output_for('v', x0, z, np.cos(0.4), np.sin(0.4))
    np.testing.assert_allclose(velocity, found, rtol=1e-12)
    given = says(velocity), *at(x, (np.cos(0.4), np.sin(0.4)), jnp.float64)
    np.testing.assert_allclose(PRECONDITIONINGS['v'].denoised(*given), x0, rtol=1e-9)


@pytest.mark.parametrize(
  ('sde', 'continuous'),
  [
    *itertools.product([VESDE(), VPSDE(), subVPSDE()], [True, False]),
    *((sde, True) for sde in (EDMSDE(), RectifiedFlow())),
  ],
  ids=lambda v: type(v).__name__ if isinstance(v, SDE) else str(v),
)
@pytest.mark.parametrize('name', PRECONDITIONINGS)
def test_what_a_model_denoises_is_tweedies_mean(sde, name, continuous):
  """Of the kernels that it was trained with, the SDE's or its chain's."""
  config = two_moons.get_config('vp')
  config.model.nf = 8
  net = build(config).model.net
  model = ScoreModel(
    net, sde.chain(100), score.scaled_time, PRECONDITIONINGS[name], continuous, True
  )
  score_fn = model.bind(model.init(KEY, (1, 2)))
  x, t = jax.random.normal(KEY, (5, 2)), jnp.array([0.1, 0.2, 0.4, 0.6, 0.7])
  alpha, sigma = (v[:, None] for v in model.trained_with.kernel(t))
  tweedie = (x + sigma**2 * score_fn(x, t)) / alpha
  np.testing.assert_allclose(score_fn.denoised(x, t), tweedie, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('name', ['denoised', ENERGY])
def test_rounding_of_bfloat16_is_not_divided_by_the_variance(name):
  """They compute in float32 whatever model.dtype: at sigma = 1e-5 nothing else would do."""

  def score_at(dtype: str) -> np.ndarray:
    config = two_moons.get_config('energy')
    config.model.update(nf=16, dtype=dtype, output=name, sigma_min=1e-5)
    config.training.single_scale, config.sampling.method = True, 'langevin'
    model = build(config).model
    params = jax.tree.map(lambda p: p + 0.1, model.init(KEY, (1, 2)))
    x = jax.random.normal(KEY, (5, 2))
    return np.asarray(model.bind(params)(x, jnp.zeros(5)))

  np.testing.assert_array_equal(score_at('bfloat16'), score_at('float32'))


def test_other_networks_keep_their_type():
  config = two_moons.get_config('vp')
  config.model.dtype = 'bfloat16'
  assert build(config).model.net.dtype == 'bfloat16'
