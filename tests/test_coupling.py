"""Noise that is paired with data by optimal transport, for flow matching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from builders.evaluation import make_held_out_loss
from builders.setup import build, Setup
from builders.training import make_schedule, score_task
from configs.toy import two_gaussians
from data import points
from losses import independent, OptimalTransport
from training import loop

KEY = jax.random.key(0)
SHAPES = {'points': (48, 2), 'images': (24, 4, 4, 1)}


def distances(x0, z) -> np.ndarray:
  x0, z = (np.float64(v).reshape(len(v), -1) for v in (x0, z))
  return np.square(z[:, None] - x0).sum(-1)


@pytest.mark.parametrize('name', SHAPES)
def test_the_order_is_the_best_there_is(name):
  """As SciPy assigns; also where all data are the same, and every order is as good."""
  keys = jax.random.split(KEY)
  x0, z = (jax.random.normal(key, SHAPES[name]) for key in keys)
  order = jax.jit(OptimalTransport(len(x0)))
  for data in (0.5 * x0, x0.at[1:].set(x0[0]), 0 * x0):
    ordered = order(data, z)
    each = distances(data, z)
    np.testing.assert_allclose(
      np.trace(distances(data, ordered)), each[linear_sum_assignment(each)].sum(), rtol=1e-5
    )
    np.testing.assert_array_equal(np.sort(ordered, axis=0), np.sort(z, axis=0))


def test_noise_stays_in_its_group():
  """Of 20 rows in groups of 8 the last is of 4; a group of one row orders nothing."""
  x0, z = jax.random.normal(KEY, (2, 20, 3))
  groups = (8, 1, 99, 20)
  order = jax.jit(lambda: [OptimalTransport(n)(x0, z) for n in groups])
  ordered, each_alone, *all_together = order()
  ordered = np.asarray(ordered)
  for rows in (slice(8), slice(8, 16), slice(16, 20)):
    each = distances(x0[rows], z[rows])
    best = each[linear_sum_assignment(each)].sum()
    assert np.trace(distances(x0[rows], ordered[rows])) == pytest.approx(best, rel=1e-5)
    assert {tuple(row) for row in ordered[rows]} == {tuple(row) for row in np.asarray(z[rows])}
  np.testing.assert_array_equal(each_alone, z)
  np.testing.assert_array_equal(*all_together)


def test_paths_are_straighter():
  """Euler's samples of two clusters, in 2 steps beside 64, by the velocity that pairs define.

  E[z - x_0 | x_t] is a mean over the pairs that pass near x.
  """
  group, n = 32, 32 * 32
  sample = points.distribution('two_gaussians', 2).sample
  x0 = 0.3 * jnp.asarray(sample(KEY, n))
  z = jax.random.normal(jax.random.key(1), x0.shape)
  start = jax.random.normal(jax.random.key(2), (128, 2))
  bend, ends = [], []
  for coupling in (independent, OptimalTransport(group)):
    noise = jax.jit(coupling)(x0, z)

    def velocity(x, t, noise=noise):
      passing = (1 - t) * x0 + t * noise
      near = jax.nn.softmax(-jnp.square((x[:, None] - passing) / 0.2).sum(-1) / 2)
      return near @ (noise - x0)

    @jax.jit
    def euler(steps, velocity=velocity):
      def step(i, x):
        return x - velocity(x, 1 - i / steps) / steps

      return jax.lax.fori_loop(0, steps, step, start)

    few, many = euler(2), euler(64)
    bend.append(float(jnp.square(few - many).sum(-1).mean()))
    ends.append(many)
  assert bend[1] < bend[0] / 4
  for end in ends:
    np.testing.assert_allclose(end.mean(0), x0.mean(0), atol=0.15)
    np.testing.assert_allclose(end.std(0), x0.std(0), atol=0.15)


def setup_of() -> Setup:
  config = two_gaussians.get_config('flow')
  config.model.update(nf=32, num_layers=1)
  config.training.update(
    coupling='optimal_transport', coupling_batch=16, batch_size=128, n_iters=300
  )
  return build(config)


def test_samples_of_what_was_trained_with_it_are_as_the_data():
  setup = setup_of()
  assert setup.true_score_fn is None and set(make_held_out_loss(setup).losses) == {'loss'}
  source, task = points.load('two_gaussians', 'train', 2), score_task(setup)
  first = jax.jit(task.init)(setup.keys.key('init'))
  *_, (state, _, measured) = loop.updates(
    task, make_schedule(setup.config), setup.devices, setup.keys, source, first
  )
  assert np.isfinite(measured['loss']).all()
  x, _ = setup.sampler(KEY, setup.model.bind(state.ema_params), (4000, 2))
  data = setup.codec.for_evaluation(KEY, jnp.asarray(source.batch(np.arange(4000))['data']))
  np.testing.assert_allclose(x.mean(0), data.mean(0), atol=0.6)
  np.testing.assert_allclose(x.std(0), data.std(0), rtol=0.15)
