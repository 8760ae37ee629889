"""The transformer over patches: its sizes, its beginning, what its blocks do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from builders.setup import build
from configs.flow import digits, imagenet_64
from models import dit
from models.dit import DiT, DiTBlock, positions
from runtime.errors import UserError

X = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
T = jnp.array([0.1, 0.7])
NET = DiT(patch_size=2, nf=16, num_layers=3, num_heads=2, num_classes=3)


def randomized(net: DiT, scale: float = 0.2) -> dict:
  """Parameters none of which is zero."""
  params = jax.eval_shape(lambda: net.init(jax.random.key(0), X, T, False))
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  drawn = [scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(structure, drawn)


PARAMS = randomized(NET)


def count(net: DiT, shape: tuple[int, ...]) -> int:
  made = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros(shape), jnp.ones(1), False))
  return sum(x.size for x in jax.tree.leaves(made))


def test_dit_xl_2_has_the_published_parameters():
  """675,129,632 in the released code, with its fixed positions and variances that it learns too."""
  net = build(imagenet_64.get_config('dit_xl')).model.net
  ours = count(net.copy(patch_size=2), (1, 32, 32, 4))
  of_positions, of_variances = 16 * 16 * 1152, 2 * 2 * 4 * (1152 + 1)
  assert ours + of_positions + of_variances == 675_129_632


@pytest.mark.parametrize(('size', 'millions'), [('dit_s', 33), ('dit_b', 130), ('dit_l', 458)])
def test_other_sizes_are_those_of_the_paper(size, millions):
  net = build(imagenet_64.get_config(size)).model.net
  assert count(net.copy(patch_size=2), (1, 32, 32, 4)) == pytest.approx(1e6 * millions, rel=5e-3)


def test_it_begins_as_zero_and_its_blocks_as_the_identity():
  params = jax.jit(lambda: NET.init(jax.random.key(0), X, T, False))()
  np.testing.assert_array_equal(NET.apply(params, X, T, False), 0)
  of_block = jax.tree.map(lambda x: x[0], params['params']['blocks'])
  tokens, level = jax.random.normal(jax.random.key(3), (2, 4, 16)), jnp.ones((2, 16))
  after, _ = DiTBlock(2, 0.0, False, False).apply({'params': of_block}, tokens, level)
  np.testing.assert_array_equal(after, tokens)


def test_patches_go_through_one_block_after_another_and_come_back_to_their_places():
  """The network patch by patch and block by block, with the paper's embedding of the noise."""
  params = PARAMS['params']

  def dense(name, x):
    return x @ params[name]['kernel'] + params[name]['bias']

  k = jnp.exp(-jnp.log(10_000.0) * jnp.arange(128) / 127)
  features = jnp.concatenate([jnp.sin(T[:, None] * k), jnp.cos(T[:, None] * k)], axis=1)
  level = dense('Dense_1', jax.nn.silu(dense('Dense_0', features)))
  level += params['Embed_0']['embedding'][3]
  corners = [(row, column) for row in range(0, 8, 2) for column in range(0, 8, 2)]
  patches = [X[:, r : r + 2, c : c + 2].reshape(2, -1) for r, c in corners]
  tokens = dense('Dense_2', jnp.stack(patches, axis=1)) + positions(4, 4, 16)
  for i in range(3):
    of_block = jax.tree.map(lambda x, i=i: x[i], params['blocks'])
    tokens, _ = DiTBlock(2, 0.0, False, False).apply({'params': of_block}, tokens, level)
  shift, scale = jnp.split(dense('Dense_3', jax.nn.silu(level))[:, None], 2, axis=-1)
  mean, std = tokens.mean(-1, keepdims=True), tokens.std(-1, keepdims=True)
  out = dense('Dense_4', (tokens - mean) / std * (1 + scale) + shift)
  y = NET.apply(PARAMS, X, T, False)
  for i, (r, c) in enumerate(corners):
    ours = y[:, r : r + 2, c : c + 2].reshape(2, -1)
    np.testing.assert_allclose(ours, out[:, i], rtol=1e-3, atol=1e-4)


def test_without_positions_patches_that_change_places_take_their_images_along(monkeypatch):
  """And not with them, which are different for each place."""

  def swapped(x):
    return x.at[:, :2].set(x[:, 2:4]).at[:, 2:4].set(x[:, :2])

  def change(x):
    return np.abs(NET.apply(PARAMS, swapped(x), T, False) - swapped(NET.apply(PARAMS, x, T, False)))

  assert change(X).max() > 0.01
  monkeypatch.setattr(dit, 'positions', lambda h, w, n: np.zeros((h * w, n), np.float32))
  np.testing.assert_allclose(change(X), 0, atol=1e-4)


def test_positions_are_told_apart_by_waves_of_rows_and_columns():
  p = positions(4, 6, 16)
  assert p.shape == (24, 16)
  assert np.abs(p[:, None] - p[None]).max(-1)[~np.eye(24, dtype=bool)].min() > 0.1
  row, column = 3, 5
  at = p[6 * row + column]
  np.testing.assert_allclose(
    [at[0], at[4], at[8], at[12]], [np.sin(5), np.cos(5), np.sin(3), np.cos(3)], rtol=1e-6
  )


def test_no_label_is_the_null_label():
  def of(labels):
    return NET.apply(PARAMS, X, T, False, labels)

  np.testing.assert_array_equal(of(None), of(jnp.array([3, 3])))
  assert np.abs(of(jnp.array([0, 1])) - of(None)).min(initial=1, where=np.abs(of(None)) > 0.1) > 0


def test_gradients_that_compute_blocks_again_are_the_same():
  def gradient(net):
    return jax.grad(lambda p: jnp.square(net.apply(p, X, T, True)).sum())(PARAMS)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    gradient(NET), gradient(NET.copy(remat=True)),
  )  # fmt: skip


def test_bfloat16_is_near_and_comes_back_as_float32():
  y, z = (net.apply(PARAMS, X, T, False) for net in (NET, NET.copy(dtype='bfloat16')))
  assert z.dtype == jnp.float32
  assert np.abs(y - z).max() < 0.1 * np.abs(y).max()


def test_it_has_forward_derivatives_as_likelihoods_take_them():
  def f(x):
    return NET.apply(PARAMS, x, T, False)

  v = jnp.ones_like(X)
  slope = jax.jvp(f, [X], [v])[1]
  np.testing.assert_allclose(slope, (f(X + 1e-2 * v) - f(X - 1e-2 * v)) / 2e-2, atol=0.05)


def test_sizes_that_do_not_fit_are_told_in_one_line():
  config = digits.get_config('dit')
  config.model.patch_size = 3
  with pytest.raises(UserError, match=r'must be a multiple of 3: the network \(dit\) cuts them'):
    build(config)
  config = digits.get_config('dit')
  config.model.flash_attention = True
  with pytest.raises(UserError, match=r'is for config.model.dtype = bfloat16'):
    build(config)
  config.model.dtype, config.training.objective = 'bfloat16', 'ssm'
  with pytest.raises(UserError, match=r'no second or forward derivatives'):
    build(config)
  with pytest.raises(ValueError, match='patches of 3x3 do not make up images of 8x8'):
    NET.copy(patch_size=3).init(jax.random.key(0), X, T, False)
  with pytest.raises(ValueError, match='multiple of 4 and of the heads'):
    NET.copy(num_heads=3).init(jax.random.key(0), X, T, False)
