"""The optimiser is the released code's."""

import jax.numpy as jnp
import numpy as np
import pytest

from training.optim import adam


@pytest.mark.parametrize('grad_clip', [0.0, -1.0])
def test_gradients_are_not_clipped_at_0_or_below(grad_clip):
  """A norm of 0 would leave no gradient at all."""
  choice = {'lr': 0.1, 'beta1': 0.9, 'eps': 1e-8, 'weight_decay': 0.0, 'warmup': 0}
  params, grads = jnp.array([2.0, -3.0]), jnp.array([3.0, -4e-3])
  tx = adam(**choice, grad_clip=grad_clip)
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates, [-0.1, 0.1], rtol=1e-4)


def test_weight_decay_is_decoupled_from_adam():
  """Without a gradient a parameter shrinks by lr * weight_decay per step: no moment sees it."""
  tx = adam(lr=0.1, beta1=0.9, eps=1e-8, weight_decay=0.2, warmup=0, grad_clip=1.0)
  params = jnp.array([2.0, -3.0])
  updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
  np.testing.assert_allclose(updates, -0.1 * 0.2 * params, rtol=1e-6)
