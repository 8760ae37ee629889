"""What GPUs and TPUs would be given to compile: nothing that is meant for CPUs alone."""

import re

import jax
import jax.numpy as jnp
import lowered
import pytest

from likelihood import Likelihood
from models.barriers import stored

METHODS = ('pc', 'dpm_solver++', 'adaptive_sde', 'ode')


def check(text: str, platform: str = 'cuda') -> None:
  """Fails if a program holds what only CPUs, or not all devices, can compute."""
  assert not re.search(r'tensor<[^>]*f64>', text)
  if platform == 'tpu':  # GPUs have some of `models.barriers`; `model.remat` is off
    assert 'optimization_barrier' not in text
  calls = set(re.findall(r'custom_call @(\w+)', text))
  assert not {name for name in calls if re.search('cpu|lapack|eigen|onednn|ynn', name, re.I)}
  assert calls <= {'Sharding', 'cu_threefry2x32_ffi', 'SPMDFullToShardShape'}


@pytest.mark.parametrize('platform', lowered.PLATFORMS)
def test_a_training_step_has_nothing_of_the_cpu(platform):
  check(lowered.training_step(lowered.tiny(), platform), platform)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('platform', lowered.PLATFORMS)
def test_samplers_have_nothing_of_the_cpu(method, platform):
  texts = lowered.sampler(lowered.tiny(sampling__method=method), platform)
  assert texts
  for text in texts.values():
    check(text, platform)


@pytest.mark.parametrize('platform', lowered.PLATFORMS)
def test_a_likelihood_has_nothing_of_the_cpu(platform):
  setup = lowered.tiny()
  with lowered.programs_of(platform, *lowered.MODULES) as texts:
    x = jnp.zeros((2, *setup.data_shape))
    Likelihood(setup.model.sde)(jax.random.key(0), lowered.score_of(setup), x)
  assert any(lowered.precisions(text) for text in texts.values())
  for text in texts.values():
    check(text, platform)


def test_what_is_of_the_cpu_is_found():
  with pytest.raises(AssertionError):
    check(lowered.lower(stored, 'cpu', jnp.eye(3)), 'tpu')
  with pytest.raises(AssertionError):
    check(lowered.lower(jnp.linalg.eigh, 'cpu', jnp.eye(3)))
  with jax.enable_x64(True), pytest.raises(AssertionError):
    check(lowered.lower(lambda x: 2 * x, 'cuda', jnp.ones(3, 'float64')))
