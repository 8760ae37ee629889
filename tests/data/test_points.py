"""Distributions whose density and score are known: they must agree with their own samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.points import ClassMixture, distribution, DISTRIBUTIONS, load, parzen
from runtime.errors import UserError
from sde_lib import VPSDE

KEY = jax.random.key(0)
PLANAR = [name for name, (_, least, most) in DISTRIBUTIONS.items() if least <= 2 <= most]
ALPHA, STD = 0.8, 0.3


@pytest.fixture(scope='module')
def grid() -> np.ndarray:
  line = np.linspace(-11, 11, 221)
  return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


@pytest.fixture(scope='module')
def densities(grid) -> dict[str, np.ndarray]:
  """Probabilities of the cells of the grid, of data with noise."""
  points, cell = jnp.asarray(grid, jnp.float32), (22 / 220) ** 2

  def of(name: str) -> np.ndarray:
    data = distribution(name, 2)
    log_density = jax.jit(lambda data: data.log_density(points, ALPHA, STD))
    return cell * np.exp(np.float64(log_density(data)))

  return {name: of(name) for name in PLANAR}


@pytest.mark.parametrize('name', PLANAR)
def test_densities_integrate_to_one(densities, name):
  np.testing.assert_allclose(densities[name].sum(), 1, atol=1e-4)


@pytest.mark.parametrize('name', PLANAR)
def test_samples_follow_the_density(grid, densities, name):
  """Expectations of what tells the modes, squares and arms apart."""
  rng_x, rng_z = jax.random.split(KEY)
  x = distribution(name, 2).sample(rng_x, 20_000)
  x = np.asarray(ALPHA * x + STD * jax.random.normal(rng_z, x.shape))

  def features(x: np.ndarray) -> np.ndarray:
    a, b = x.T
    waves = [np.sin(w * a + v * b) for w, v in ((1, 0), (0, 1), (1.6, 1.6), (2, -1), (4, 3))]
    return np.stack([a, b, a * b, a**2, b**2, *waves])

  found = features(x)
  error = 4 * found.std(1) / np.sqrt(len(x)) + 1e-3
  assert (np.abs(found.mean(1) - features(grid) @ densities[name]) < error).all()


@pytest.mark.parametrize('name', DISTRIBUTIONS)
def test_scores_are_gradients_near_and_far(name):
  dim = max(2, min(3, DISTRIBUTIONS[name][2]))
  data = distribution(name, dim)
  of_data = data.score_fn(VPSDE())
  score_fn, log_density = jax.jit(of_data.__call__), jax.jit(of_data.log_density)
  x = 3 * jax.random.normal(KEY, (50, dim))
  t, v, h = jnp.full(50, 0.1), jax.random.normal(jax.random.key(1), (50, dim)), 1e-3
  slope = (log_density(x + h * v, t) - log_density(x - h * v, t)) / (2 * h)
  np.testing.assert_allclose((score_fn(x, t) * v).sum(1), slope, rtol=0.05, atol=0.3)
  far = jnp.stack([20 * jnp.eye(dim)[0], -20 * jnp.ones(dim)])
  for time in (1e-5, 1.0):
    score = score_fn(far, jnp.full(2, time))
    assert np.isfinite(score).all() and (np.asarray(score * far).sum(1) < 0).all()  # back


def test_moments_of_a_mixture_and_a_gaussian():
  for name in ('ring', 'gaussian'):
    data = distribution(name, 3)
    x = np.asarray(data.sample(KEY, 40_000))
    root = np.sqrt(len(x))
    assert (np.abs(x.mean(0) - data.mean()) < 4 * x.std(0) / root).all()
    products = np.einsum('ni,nj->nij', x - data.mean(), x - data.mean())
    assert (np.abs(products.mean(0) - data.cov()) < 4 * products.std(0) / root).all()


def test_the_checkerboard_without_noise_is_uniform_on_half_of_the_board():
  data = distribution('checkerboard', 2)
  x = data.sample(KEY, 1000)
  inside = (jnp.abs(x / 2 - jnp.round(x / 2)) > 1e-3).all(1)  # squares are 2 wide
  x = x[inside]
  log_density = jax.jit(data.log_density)
  np.testing.assert_allclose(log_density(x), -np.log(32), atol=1e-5)
  assert (log_density(jnp.array([[-3.0, -1.0], [5.0, 5.0]])) < -1000).all()


def test_a_parzen_window_is_the_mean_of_its_kernels():
  points = jax.random.normal(KEY, (7, 2))
  x, std = jax.random.normal(jax.random.key(1), (5, 2)), 0.4
  squares = np.square(np.asarray(x)[:, None] - np.asarray(points)).sum(-1)
  density = np.exp(-squares / 2 / std**2).mean(1) / (2 * np.pi * std**2)
  np.testing.assert_allclose(parzen(points).log_density(x, 1.0, std), np.log(density), rtol=1e-4)


def test_a_dataset_is_always_the_same():
  train, test = (load('two_moons', split, 2) for split in ('train', 'test'))
  indices = np.array([3, 3, 0])
  batch = train.batch(indices)['data']
  assert batch.shape == (3, 2) and batch.dtype == np.float32 and len(train) > len(test)
  again = load('two_moons', 'train', 2).batch(indices)['data']
  np.testing.assert_array_equal(batch, again)
  assert (batch != test.batch(indices)['data']).all()


@pytest.mark.parametrize(
  ('name', 'dim', 'said'),
  [('moons', 2, "did you mean 'two_moons'"), ('swiss_roll', 3, 'must be from 2 to 2; got 3')],
)
def test_what_is_not_there_is_said(name, dim, said):
  with pytest.raises(UserError, match=said) as error:
    distribution(name, dim)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('x', 'std'), [(50.0, 1e-3), (5.5, 1e-3), (50.0, 0.05), (4.3, 0.05)])
def test_the_checkerboard_leads_back_from_anywhere(x, std):
  """Far outside, its score is that of the nearest edge, about (4 - x) / std^2; also in float32."""
  data = distribution('checkerboard', 2)
  point = jnp.array([[x, 3.0]])  # beside the square in the corner
  score = jax.jit(jax.grad(lambda x: data.log_density(x, 1.0, std).sum()))(point)
  edge = (4 - x) / std**2
  # Beyond the edge the density falls as the normal tail, whose slope is more by 1 / (x - 4).
  np.testing.assert_allclose(score[0, 0], edge - 1 / (x - 4), rtol=0.01)


def test_points_of_classes_have_their_labels():
  """The classes together are the distribution; the posterior of the own label is calibrated."""
  data, source = distribution('branches', 2), load('branches', 'test', 2)
  assert isinstance(data, ClassMixture) and source.class_names == data.class_names
  batch = source.batch(np.arange(3000))
  x, labels = jnp.asarray(batch['data']), batch['label']
  assert labels.dtype == np.int32 and 0.45 < labels.mean() < 0.55
  np.testing.assert_array_equal(data.sample(jax.random.key(1), len(source))[:3000], x)
  of_class = np.stack([data.of_class(k).log_density(x) for k in (0, 1)])
  np.testing.assert_allclose(np.logaddexp(*of_class) - np.log(2), data.log_density(x), atol=1e-4)
  posterior = np.exp(of_class - np.logaddexp(*of_class))
  own = posterior[labels, np.arange(3000)]
  np.testing.assert_allclose(own.mean(), np.square(posterior).sum(0).mean(), atol=0.02)
  assert own.mean() > 0.85
  assert 'label' not in load('ring', 'test', 2).batch(np.arange(3))
