"""Identities that the networks keep, whatever their parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ncsn import halvings, RefineNet, STAGES
from models.normalization import (
  ConditionalInstanceNorm2dPlus,
  InstanceNorm2d,
  InstanceNorm2dPlus,
  NORMALIZATIONS,
  normalize,
  VarianceNorm2d,
)
from models.wideresnet import WideResnet

IMAGES = 2 + 3 * jax.random.normal(jax.random.key(0), (2, 8, 8, 6)) * jnp.arange(1.0, 7.0)
X = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


def test_instance_norm_standardizes_every_channel_of_every_image():
  y, params = InstanceNorm2d().init_with_output(jax.random.key(0), IMAGES)
  np.testing.assert_allclose(y.mean((1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(y.std((1, 2)), 1, rtol=1e-4)
  assert params['params']['scale'].shape == (6,)


def test_variance_norm_keeps_the_direction_of_the_mean():
  params = {'params': {'scale': jnp.full(6, 2.0)}}
  y = VarianceNorm2d().apply(params, IMAGES)
  np.testing.assert_allclose(y.std((1, 2)), 2, rtol=1e-4)
  ratio = IMAGES.mean((1, 2)) / IMAGES.std((1, 2))
  np.testing.assert_allclose(y.mean((1, 2)), 2 * ratio, rtol=1e-4, atol=1e-5)


def test_instance_norm_plus_adds_the_standardized_means():
  """mean(y) = gamma alpha m + beta, with m the channels' means at mean 0 and variance 1."""
  alpha, gamma, beta = 0.5, 2.0, jnp.arange(6.0)
  params = {'alpha': jnp.full(6, alpha), 'gamma': jnp.full(6, gamma), 'beta': beta}
  y = InstanceNorm2dPlus().apply({'params': params}, IMAGES)
  m = (y.mean((1, 2)) - beta) / (alpha * gamma)
  np.testing.assert_allclose(m.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(m.std(-1), 1, rtol=1e-3)  # within EPSILON of a small variance
  np.testing.assert_allclose(y.std((1, 2)), gamma, rtol=1e-4)
  # Without alpha it is instance normalisation.
  params['alpha'] = jnp.zeros(6)
  plain = InstanceNorm2d().apply({'params': {'scale': params['gamma'], 'bias': beta}}, IMAGES)
  np.testing.assert_allclose(
    InstanceNorm2dPlus().apply({'params': params}, IMAGES), plain, rtol=1e-5, atol=1e-5
  )


def test_conditional_norm_takes_the_parameters_of_its_class():
  norm, labels = ConditionalInstanceNorm2dPlus(5), jnp.array([4, 1])
  y, variables = norm.init_with_output(jax.random.key(0), IMAGES, labels)
  table = variables['params']['Embed_0']['embedding']
  for i, label in enumerate(labels):
    gamma, alpha, beta = jnp.split(table[label], 3)
    one = InstanceNorm2dPlus().apply(
      {'params': {'gamma': gamma, 'alpha': alpha, 'beta': beta}}, IMAGES[i : i + 1]
    )
    np.testing.assert_allclose(y[i : i + 1], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', STAGES)
@pytest.mark.parametrize('normalization', sorted(NORMALIZATIONS))
def test_every_refinenet_makes_what_it_is_given(name, normalization):
  """With a feature map at half the resolution for every halving; only NCSN has classes."""
  classes = 3 if name == 'ncsn' else None
  net = RefineNet(32, STAGES[name], normalization=normalization, num_classes=classes)
  shapes = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), X, X[:, 0, 0, 0], False))
  assert shapes[0].shape == X.shape
  names = set(shapes[1]['params'])
  assert sum('ConvMeanPool_0' in block for block in shapes[1]['params'].values()) == halvings(name)
  assert ('ConditionalInstanceNorm2dPlus_0' in names) == (name == 'ncsn')


@pytest.mark.parametrize('normalization', sorted(NORMALIZATIONS))
def test_normalizations_keep_the_dtype(normalization):
  """What follows would compute in float32 otherwise."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return normalize(x, normalization)

  half = IMAGES.astype(jnp.bfloat16)
  y = jax.eval_shape(lambda: Net().init_with_output(jax.random.key(0), half)[0])
  assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize('classes', [None, 3])
def test_half_precision_and_conditioning(classes):
  cond = jnp.array([0.0, 2.0])

  def net(dtype: str) -> RefineNet:
    return RefineNet(4, STAGES['ncsn'][:2], num_classes=classes, dtype=dtype)

  # Step by step: most of its convolutions are alike, and are compiled once.
  variables = net('float32').init(jax.random.key(0), X, cond, False)

  def apply(cond: jax.Array, dtype: str) -> jax.Array:
    return net(dtype).apply(variables, X, cond, False)

  full, half = apply(cond, 'float32'), apply(cond, 'bfloat16')
  assert full.dtype == half.dtype == jnp.float32
  # bfloat16 has 8 bits, hence 0.4 % per operation, and dozens of them follow each other.
  assert jnp.linalg.norm(half - full) < 0.1 * jnp.linalg.norm(full)
  other = apply(jnp.array([0.0, 1.0]), 'float32')
  assert jnp.allclose(other[0], full[0], atol=1e-5)
  assert jnp.allclose(other[1], full[1], atol=1e-5) == (classes is None)


def test_the_classifier_sees_neither_brightness_nor_contrast_but_the_noise_scale():
  net = WideResnet(num_outputs=7, blocks_per_group=1, channel_multiplier=1)
  log_sigma = jnp.array([0.3, -1.0])
  variables = jax.jit(lambda key: net.init(key, X, log_sigma, False))(jax.random.key(0))
  logits = jax.jit(lambda x, s: net.apply(variables, x, s, False))
  y = logits(X, log_sigma)
  assert y.shape == (2, 7)
  np.testing.assert_allclose(logits(5 * X + 2, log_sigma), y, rtol=1e-3, atol=1e-4)
  assert jnp.abs(logits(X, log_sigma + 1) - y).max() > 1e-2
  assert jnp.isfinite(logits(jnp.zeros_like(X), log_sigma)).all()
