"""What a network's output stands for: the score and the denoised x agree, to the last digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from builders.setup import build
from configs.toy import two_moons
from models import score
from models.preconditioning import ENERGY, Linear, PRECONDITIONINGS
from models.score import ScoreModel
from sde_lib import subVPSDE, VESDE, VPSDE

KEY = jax.random.key(0)
LINEAR = [name for name, reading in PRECONDITIONINGS.items() if isinstance(reading, Linear)]
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
  }[name]


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
    arguments = [jnp.asarray(v, jnp.float64) for v in (output, x, alpha, sigma)]
    np.testing.assert_allclose(reading.score_of(*arguments), -z / sigma, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reading.denoised_of(*arguments), x0, rtol=1e-9, atol=1e-9)


@every_reading
def test_nothing_cancels_where_the_noise_is_small(name):
  """At sigma = 1e-5 in float32: x itself has z to 1 %, and outputs of unit scale to 1e-6."""
  (x0, z), alpha, sigma = points(), 1.0, 1e-5
  exact = alpha * x0 + sigma * z
  x = jnp.asarray(exact, jnp.float32)
  output = jnp.asarray(output_for(name, x0, z, alpha, sigma), jnp.float32)
  reading = PRECONDITIONINGS[name]
  score = np.asarray(reading.score_of(output, x, jnp.float32(alpha), jnp.float32(sigma)))
  tolerance = 0.02 if name == 'denoised' else 2e-6
  if name == 'v':
    # F carries z to its own rounding, and x counts for 1e-5 of the score.
    tolerance = 1e-5
  assert np.abs(score * sigma + z).max() < tolerance
  denoised = reading.denoised_of(output, x, jnp.float32(alpha), jnp.float32(sigma))
  assert np.abs(denoised - x0).max() < 1e-6


def test_v_is_the_velocity_of_the_angle():
  """Of x = cos(phi) x_0 + sin(phi) z by phi, for a variance of 1 (Salimans & Ho 2022)."""
  x0, z = points()
  with jax.enable_x64(True):

    def path(phi):
      return jnp.cos(phi) * x0 + jnp.sin(phi) * z

    x, velocity = jax.jvp(path, (jnp.float64(0.4),), (jnp.float64(1.0),))
    found = output_for('v', x0, z, np.cos(0.4), np.sin(0.4))
    np.testing.assert_allclose(velocity, found, rtol=1e-12)
    reading = PRECONDITIONINGS['v']
    np.testing.assert_allclose(
      reading.denoised_of(velocity, x, jnp.cos(0.4), jnp.sin(0.4)), x0, rtol=1e-9
    )


@pytest.mark.parametrize('sde', [VESDE(), VPSDE(), subVPSDE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize('name', PRECONDITIONINGS)
@pytest.mark.parametrize('continuous', [True, False])
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
    config.training.single_scale = True
    model = build(config).model
    params = jax.tree.map(lambda p: p + 0.1, model.init(KEY, (1, 2)))
    x = jax.random.normal(KEY, (5, 2))
    return np.asarray(model.bind(params)(x, jnp.zeros(5)))

  np.testing.assert_array_equal(score_at('bfloat16'), score_at('float32'))


def test_other_networks_keep_their_type():
  config = two_moons.get_config('vp')
  config.model.dtype = 'bfloat16'
  assert build(config).model.net.dtype == 'bfloat16'
