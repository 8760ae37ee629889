"""From stored data to what a network is trained on, and labels that are hidden."""

import jax
import jax.numpy as jnp
import numpy as np

from data.codec import drop_labels, preprocess


def test_preprocessing():
  """Scaling is exact, half of the images are mirrored, and dequantisation can be undone."""
  images = np.random.default_rng(0).integers(0, 256, (400, 4, 4, 3), np.uint8)
  key = jax.random.key(0)
  plain = preprocess(key, images, False, False, False)
  np.testing.assert_array_equal(np.round(255 * plain), images)
  centred = preprocess(key, images, True, False, False)
  np.testing.assert_allclose(centred, 2 * plain - 1, atol=1e-6)
  flipped = np.round(255 * preprocess(key, images, False, True, False))
  as_is = (flipped == images).all((1, 2, 3))
  mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
  assert (as_is ^ mirrored).all() and 150 < mirrored.sum() < 250
  spread = preprocess(key, images, False, False, True)
  np.testing.assert_array_equal(np.floor(256 * spread), images)


def test_labels_are_hidden_as_often_as_asked():
  labels = jnp.arange(20_000) % 10
  hidden = drop_labels(jax.random.key(0), labels, 0.1, 10)
  at = np.asarray(hidden) == 10
  assert abs(at.mean() - 0.1) < 4 * (0.09 / 20_000) ** 0.5
  np.testing.assert_array_equal(np.asarray(hidden)[~at], np.asarray(labels)[~at])
  assert (drop_labels(jax.random.key(0), labels, 0.0, 10) == labels).all()
  assert (drop_labels(jax.random.key(0), labels, 1.0, 10) == 10).all()
