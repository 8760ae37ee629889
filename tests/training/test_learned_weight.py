"""The weight u(sigma) of EDM2, learned beside the network."""

from functools import partial
import math

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from builders.setup import build, Setup
from builders.training import abstract_state, task_of
from configs.toy import two_moons
import run_lib
from runtime.errors import UserError
from training.checkpoints import Checkpoints
from training.learned_weight import LearnedWeight, WeightedState
from training.optim import adam, LearningRate

KEY = jax.random.key(0)
ADAM = partial(adam, beta1=0.9, eps=1e-8, weight_decay=0.0, grad_clip=1.0)


def test_e_to_the_u_is_the_mean_loss_of_each_level():
  """Of losses that differ a hundredfold between levels, and by chance within a level."""
  learned = LearnedWeight(ADAM(LearningRate(2e-2, decay='cosine', until=600)))

  def profile(log_noise):
    return 3 * jnp.exp(jnp.tanh(log_noise / 2) * math.log(10))

  def step(state, rng):
    rngs = jax.random.split(rng)
    log_noise = jax.random.uniform(rngs[0], (256,), minval=-4.5, maxval=4.5)
    each = profile(log_noise) * 2 * jax.random.uniform(rngs[1], (256,))
    weight, opt_state = state
    gradient = jax.grad(learned.loss)(weight, log_noise, each)
    updates, opt_state = learned.tx.update(gradient, opt_state, weight)
    return (optax.apply_updates(weight, updates), opt_state), None

  first = jnp.zeros(learned.n_features)
  levels = jnp.linspace(-4, 4, 17)
  np.testing.assert_array_equal(learned.u(first, levels), 0)
  (weight, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(KEY, 600)))(
    (first, learned.tx.init(first))
  )
  np.testing.assert_allclose(jnp.exp(learned.u(weight, levels)), profile(levels), rtol=0.15)


def config_of(**fields):
  config = two_moons.get_config('vp')
  config.model.update(nf=8, num_layers=1)
  config.training.update(
    batch_size=8, n_iters=6, n_jitted_steps=3, log_freq=6, eval_freq=6, snapshot_freq=6,
    snapshot_freq_for_preemption=3, snapshot_sampling=False, learned_weight=True,
  )  # fmt: skip
  config.optim.update(warmup=0)
  config.sampling.update(method='ddim', num_steps=5)
  config.eval.update(enable_sampling=False, batch_size=1000)
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
  return config


def one_step(setup: Setup, weight=None):
  task = task_of(setup)
  state = jax.jit(task.init)(setup.keys.key('init'))
  if weight is not None:
    state = state.replace(weight=weight)
  batch = {'data': np.random.default_rng(0).standard_normal((8, 2), np.float32)}
  return jax.jit(task.update)(state, None, setup.devices.put(batch), KEY)


def test_the_gradient_is_that_of_the_loss_over_e_to_the_u():
  """At one level of noise; the loss that is told has no u in it."""
  level = {'training__eps': 0.5 - 1e-6, 'sampling__eps': 0.4, 'training__time_law': 'log_normal'}
  level |= {'training__time_mean': -50.0}  # all times are eps
  plain, weighted = (build(config_of(**level, training__learned_weight=v)) for v in (False, True))
  _, expected = one_step(plain)
  weight = 0.3 * jax.random.normal(KEY, (128,))
  (log_noise,) = -plain.model.sde.log_snr(jnp.array([0.5]))
  (u,) = LearnedWeight(optax.identity()).u(weight, log_noise[None])
  assert abs(u) > 0.5
  state, found = one_step(weighted, weight)
  assert found['loss'] == expected['loss']
  assert found['grad_norm'] == pytest.approx(float(expected['grad_norm'] * jnp.exp(-u)), rel=1e-3)
  both = expected['loss'] * jnp.exp(-u) + u
  assert found['weighted_loss'] == pytest.approx(float(both), rel=1e-3)
  assert not np.array_equal(state.weight, weight)
  in_parts, again = one_step(build(config_of(**level, training__grad_accum=4)), weight)
  assert again['grad_norm'] == pytest.approx(float(found['grad_norm']), rel=1e-5)
  np.testing.assert_allclose(in_parts.weight, state.weight, atol=1e-5)


def state_of(config, folder: epath.Path) -> WeightedState:
  with Checkpoints(folder, create=False) as checkpoints:
    state = checkpoints.restore_latest(abstract_state(build(config)))
  assert isinstance(state, WeightedState)
  return state


def test_it_is_resumed_and_read_by_training_alone(tmp_path):
  """With the same bits; evaluation and sampling do not know it, nor does an average."""
  whole, parts = epath.Path(tmp_path / 'whole'), epath.Path(tmp_path / 'parts')
  run_lib.train(config_of(), str(whole))
  run_lib.train(config_of(training__n_iters=3), str(parts))
  run_lib.train(config_of(), str(parts))
  a, b = (state_of(config_of(), folder) for folder in (whole, parts))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert np.abs(a.weight).max() > 0 and a.weight_opt_state
  assert 'weight' not in str(jax.tree.structure(a.averages))
  unaware = config_of(training__learned_weight=False)
  (report,) = run_lib.evaluate(unaware, str(whole))
  assert report['loss'] > 0 and 'weighted_loss' not in report
  setup, params = run_lib.load(str(whole))
  jax.tree.map(np.testing.assert_array_equal, params, a.averages[0])
  assert setup.config.training.learned_weight
  with pytest.raises(UserError, match='learned_weight: True there, False now'):
    run_lib.train(unaware, str(whole))
  with pytest.raises(UserError, match='learned_weight must be False for --mode import'):
    run_lib.import_released(config_of(), str(tmp_path / 'new'), 'released.checkpoint')
