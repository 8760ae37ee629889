"""What `benchmarks.profile` reads in a compiled program, and in the trace of it."""

import argparse

import jax
import jax.numpy as jnp
import pytest

from benchmarks import common, profile

TINY = {
  'model.nf': 8, 'model.ch_mult': (1, 1), 'model.num_res_blocks': 1, 'model.attn_resolutions': (4,),
  'data.image_size': 8,
}  # fmt: skip


def test_convolutions_are_found_with_their_windows():
  def f(x, w):
    y = jax.lax.conv_general_dilated(
      x, w, (2, 1), ((0, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return jnp.tanh(y)

  shapes = (2, 8, 8, 3), (3, 3, 3, 5)
  text = jax.jit(f).lower(*map(jnp.ones, shapes)).compile().as_text()
  assert profile.convolutions(text) == {(*shapes, (2, 1), ((0, 1), (1, 1)), (1, 1)): 1}
  assert profile.alone(text) > 0


@pytest.mark.parametrize(
  'what', [pytest.param('training step', marks=pytest.mark.slow), 'evaluation']
)
def test_the_kinds_of_a_network_are_told_apart(what, monkeypatch):
  path, variant, _ = common.NETWORKS['reduced ddpmpp']
  monkeypatch.setitem(common.NETWORKS, 'tiny', (path, variant, TINY))
  args = argparse.Namespace(network='tiny', batch=2, steps=1)
  seconds = profile.trace(what, args)
  expected = {profile.CONVOLUTIONS, 'attention', 'GroupNorm, swish', '1x1 convolutions, products'}
  if what == 'training step':
    expected |= {'random bits, dropout', profile.REST}
  assert all(seconds[kind] > 0 for kind in expected), seconds
  whole = {'seconds': 2.0, 'convolutions alone': 1.0, 'faults': 3.0}
  table = profile.table({what: {'whole': whole, 'kinds': seconds}})
  assert '50' in table.splitlines()[1] and table.splitlines()[-1].split()[-1] == '100'
