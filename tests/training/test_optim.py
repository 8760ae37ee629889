"""The optimiser is the released code's."""

import jax.numpy as jnp
import numpy as np

from training.optim import adam


def test_weight_decay_is_decoupled_from_adam():
  """Without a gradient a parameter shrinks by lr * weight_decay per step: no moment sees it."""
  tx = adam(lr=0.1, beta1=0.9, eps=1e-8, weight_decay=0.2, warmup=0, grad_clip=1.0)
  params = jnp.array([2.0, -3.0])
  updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
  np.testing.assert_allclose(updates, -0.1 * 0.2 * params, rtol=1e-6)
