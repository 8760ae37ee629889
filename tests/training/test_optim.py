"""Optimisers and learning rates; the default is the released code's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from builders.setup import make_learning_rate
from configs.toy import two_moons
from training.optim import adam, LearningRate, OPTIMIZERS


@pytest.mark.parametrize('grad_clip', [0.0, -1.0])
def test_gradients_are_not_clipped_at_0_or_below(grad_clip):
  """A norm of 0 would leave no gradient at all."""
  choice = {'lr': LearningRate(0.1), 'beta1': 0.9, 'eps': 1e-8, 'weight_decay': 0.0}
  params, grads = jnp.array([2.0, -3.0]), jnp.array([3.0, -4e-3])
  tx = adam(**choice, grad_clip=grad_clip)
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates, [-0.1, 0.1], rtol=1e-4)


def test_weight_decay_is_decoupled_from_adam():
  """Without a gradient a parameter shrinks by lr * weight_decay per step: no moment sees it."""
  tx = adam(LearningRate(0.1), beta1=0.9, eps=1e-8, weight_decay=0.2, grad_clip=1.0)
  params = jnp.array([2.0, -3.0])
  updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
  np.testing.assert_allclose(updates, -0.1 * 0.2 * params, rtol=1e-6)


def rates(lr: LearningRate, steps) -> np.ndarray:
  return np.array([float(lr.schedule()(jnp.int32(n))) for n in steps])


@pytest.mark.parametrize(
  ('decay', 'shares'),
  [
    ('constant', [0, 0.5, 1, 1, 1, 1]),
    ('cosine', [0, 0.5, 1, 0.5, 0, 0]),
    ('linear', [0, 0.5, 1, 0.5, 0, 0]),
    ('inverse_sqrt', [0, 0.5, 1, 1, 1, 0.5]),
  ],
)
def test_learning_rates_warm_up_and_decay(decay, shares):
  """To 0 at step 30; or from step 30 on, as 1 / sqrt(t / 30)."""
  lr = LearningRate(2e-3, warmup=10, decay=decay, until=30)
  np.testing.assert_allclose(rates(lr, [0, 5, 10, 20, 30, 120]), 2e-3 * np.array(shares), atol=1e-9)


def test_images_are_counted_in_steps():
  config = two_moons.get_config('ve')
  config.training.batch_size, config.training.n_iters = 50, 400
  config.optim.warmup, config.optim.decay, config.optim.decay_until = 5000, 'inverse_sqrt', 10_000
  config.optim.unit = 'images'
  assert make_learning_rate(config) == LearningRate(config.optim.lr, 100, 'inverse_sqrt', 200)
  config.optim.decay, config.optim.decay_until, config.optim.unit = 'cosine', 0, 'steps'
  assert make_learning_rate(config).until == 400


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimisers_go_downhill_and_decay_weights(name):
  """A quadratic bowl; and without a gradient a parameter shrinks by lr * weight_decay."""
  choice = {'beta1': 0.9, 'eps': 1e-8, 'grad_clip': 1.0}
  tx = OPTIMIZERS[name](LearningRate(0.05), weight_decay=0.0, **choice)
  params = jnp.array([2.0, -3.0])

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(2 * params, state, params)
    return (params + updates, state), None

  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=400)
  assert jnp.abs(params).max() < 0.02
  tx = OPTIMIZERS[name](LearningRate(0.1), weight_decay=0.2, **choice)
  updates, _ = tx.update(jnp.zeros(2), tx.init(params), jnp.ones(2))
  np.testing.assert_allclose(updates, -0.02, rtol=1e-6)
