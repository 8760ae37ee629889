"""The networks, losses and training steps give the numbers of the released code.

What the arrays are stands in tests/golden/README.md. All parameters come in through
`released_checkpoints`, as those of a checkpoint would.
"""

from functools import cache, partial
import json
from pathlib import Path

import agreement
from flax import serialization, traverse_util
import jax
from jax import Array
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest

from builders.setup import build, Setup
from configs import base
import losses
from losses import Objective
from sde_lib import ScoreFn
from training import released_checkpoints
from training.released_checkpoints import from_jax, from_torch, network_parameters

GOLDEN = Path(__file__).parent.parent / 'golden'
CASES = (
  'npp_ve_cont_resid_in_fir',
  'npp_ve_disc',
  'npp_ve_outskip_inskip_sum',
  'npp_vp_cont_ddpmpp',
  'ddpm_vp_disc',
  'ncsn',
  'ncsnv2_64',
)


def load(case: str) -> dict[str, np.ndarray]:
  with np.load(GOLDEN / f'{case}.npz') as arrays:
    return dict(arrays)


def config_of(arrays: dict[str, np.ndarray]) -> ConfigDict:
  """The config here of a released configuration, which is stored with the arrays as JSON."""
  released = ConfigDict(json.loads(str(arrays['config'])))
  if 'num_classes' in released.model:
    del released.model.num_classes  # noise scales of NCSN there, classes of images here
  make = {'vesde': base.ve, 'vpsde': base.vp}[released.training.sde]
  config = make(released.model.name)
  for section in config:
    if section in released and isinstance(config[section], ConfigDict):
      known = {k: v for k, v in released[section].items() if k in config[section]}
      config[section].update({k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})
  return config


def setup_of(arrays: dict[str, np.ndarray]) -> Setup:
  return build(config_of(arrays))


def shapes_of(setup: Setup) -> released_checkpoints.Shapes:
  return shapes_once(setup.model, (1, *setup.data_shape))


shapes_once = cache(network_parameters)


def tree(arrays: dict[str, np.ndarray], prefix: str) -> dict:
  """The arrays under a prefix, as a tree."""
  inside = {k.removeprefix(prefix + '/'): v for k, v in arrays.items() if k.startswith(prefix)}
  return traverse_util.unflatten_dict(inside, sep='/')


def released_state(arrays: dict[str, np.ndarray]) -> dict:
  """The released State of a case; what the case lacks of it is zero, or the moving average."""
  average = tree(arrays, 'ema')
  zeros = jax.tree.map(np.zeros_like, average)
  params = tree(arrays, 'params') or average
  mu, nu = tree(arrays, 'mu') or zeros, tree(arrays, 'nu') or zeros
  moments = jax.tree.map(lambda m, v: {'grad_ema': m, 'grad_sq_ema': v}, mu, nu)
  return {
    'step': arrays.get('step', np.int32(0)),
    'optimizer': {
      'target': params,
      'state': {'step': arrays.get('adam_step', np.int32(0)), 'param_states': moments},
    },
    'lr': np.float32(2e-4),
    'model_state': {},
    'ema_rate': np.float32(0.999),
    'params_ema': average,
    'rng': np.zeros(2, np.uint32),
  }


@jax.jit
def score_of(score_fn: ScoreFn, x: Array, t: Array) -> Array:
  """The score, compiled once for all tests of a network."""
  return score_fn(x, t)


@pytest.fixture(scope='module', params=CASES)
def golden(request):
  arrays = load(request.param)
  setup = setup_of(arrays)
  average = from_jax(released_state(arrays)).ema_params
  params = released_checkpoints.fit(average, shapes_of(setup), 'moving averages')
  return arrays, setup, params


def test_parameters_have_the_released_names_and_shapes(golden):
  """Names fit by renaming some blocks, and shapes but for the leading ones of normalisations."""
  arrays, setup, params = golden
  theirs = {k.removeprefix('ema/'): v.shape for k, v in arrays.items() if k.startswith('ema/')}
  ours = {k: v.shape for k, v in shapes_of(setup).items()}
  assert len(theirs) == len(ours) == len(jax.tree.leaves(params))
  renamed = {k for k in ours if k not in theirs}
  assert all(any(b in k for b in ('Resnet', 'Attn', 'Residual', 'Refine')) for k in renamed)
  for name in ours.keys() & theirs.keys():
    assert theirs[name] in (ours[name], (1, 1, 1, *ours[name]))


def test_conditioning_and_score(golden):
  arrays, setup, params = golden
  x, t = arrays['io/x'], arrays['io/t']
  told = setup.model.conditioning(setup.model.sde, t)
  fourier = setup.config.model.get('embedding_type') == 'fourier'
  fourier = fourier and setup.config.model.name == 'ncsnpp'
  labels = np.log(arrays['io/model_labels']) if fourier else arrays['io/model_labels']
  np.testing.assert_allclose(told, labels, rtol=1e-5, atol=1e-5)
  score = score_of(setup.model.bind(params), x, t)
  assert agreement.error(score, arrays['io/score_ema'], quantity='score') < 1e-4


def test_losses_and_gradients(golden):
  arrays, setup, params = golden
  sde, continuous = setup.model.sde, setup.objective.continuous
  x0, z, t = (jnp.asarray(arrays[f'io/{name}']) for name in ('data', 'z', 't'))
  if not continuous:
    labels = arrays['io/loss_labels']
    # SMLD counts its noise scales from the largest, DDPM its steps from the smallest.
    t = sde.time(
      jnp.asarray(sde.N - 1 - labels if setup.config.training.sde == 'vesde' else labels)
    )

  score_fn = partial(score_of, setup.model.bind(params))

  checked = 0
  for name in arrays:
    if name.startswith('io/loss_') and name != 'io/loss_labels':
      objective = Objective(
        continuous=continuous, reduce_mean='rm1' in name, likelihood_weighting='lw1' in name
      )
      loss = losses.dsm_loss(sde, score_fn, x0, t, z, objective).mean()
      assert agreement.error(loss, arrays[name], quantity='loss') < 1e-4
      checked += 1
  assert checked == (4 if continuous else 2)

  def mean_loss(params):
    return losses.dsm_loss(sde, setup.model.bind(params), x0, t, z, setup.objective).mean()

  @jax.jit
  def gradients(params):
    grads = jax.grad(mean_loss)(params)
    return grads, optax.tree.norm(grads)

  grads, norm = gradients(params)
  assert agreement.error(norm, arrays['io/grad_global_norm'], quantity='gradient norm') < 1e-3
  ours = traverse_util.flatten_dict(grads, sep='/')
  theirs = {k.removeprefix('io/grad/'): v for k, v in arrays.items() if k.startswith('io/grad/')}
  assert theirs
  for name, grad in theirs.items():
    ours_here = ours[released_checkpoints.ours(name)]
    np.testing.assert_allclose(ours_here, grad.reshape(ours_here.shape), 1e-3, 1e-4 * float(norm))


@pytest.mark.parametrize('case', ['train_npp_ve_cont'])
def test_three_training_steps_from_a_released_checkpoint(case, tmp_path):
  """Warm-up, clipping, Adam and the moving average, from a state in mid-training."""
  arrays = load(case)
  setup = setup_of(arrays)
  path = tmp_path / 'checkpoint_1'
  path.write_bytes(serialization.msgpack_serialize(released_state(arrays)))
  state = released_checkpoints.load(
    path, setup.model, (1, *setup.data_shape), setup.tx, setup.config.model.ema_rate
  )
  update = jax.jit(
    lambda state, x0, t, z: losses.optimize(
      state, x0, t, z, jax.random.key(0),
      model=setup.model, objective=setup.objective, tx=setup.tx,
      ema_rate=setup.config.model.ema_rate,
    )
  )  # fmt: skip
  for i in range(3):
    x0, t, z = (arrays[f'io/{name}_{i}'] for name in ('data', 't', 'z'))
    state, metrics = update(state, x0, t, z)
    assert agreement.error(metrics['loss'], arrays[f'io/loss_{i}'], quantity='losses') < 1e-4
  assert int(state.step) == int(arrays['end_step'])
  for what, ours in (('params', state.params), ('ema', state.ema_params)):
    prefix = f'end_{what}/'
    end = {f'ema/{k.removeprefix(prefix)}': arrays[k] for k in arrays if k.startswith(prefix)}
    average = from_jax(released_state(end)).ema_params
    theirs = released_checkpoints.fit(average, shapes_of(setup), what)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      agreement.error(a, b, quantity=f'{what} after three steps')
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize('case', ['pytorch_ddpm_vp_cont', 'pytorch_npp_ve_cont_resid_in_fir'])
def test_scores_of_pytorch_checkpoints(case):
  arrays = load(case)
  setup = setup_of(arrays)
  found = from_torch(torch_content(arrays), shapes_of(setup))
  params = released_checkpoints.fit(found.ema_params, shapes_of(setup), 'moving averages')
  x, t = arrays['io/x'].transpose(0, 2, 3, 1), arrays['io/t']
  score = score_of(setup.model.bind(params), x, t)
  theirs = arrays['io/score_ema'].transpose(0, 2, 3, 1)
  assert agreement.error(score, theirs, quantity='score') < 1e-4


def torch_content(arrays: dict[str, np.ndarray]) -> dict:
  """A PyTorch checkpoint with the moving averages of a case, as NumPy arrays.

  What is trained is twice those, the moments three and four times those.
  """
  average = {k.split('/')[2]: v for k, v in arrays.items() if k.startswith('ema/')}
  trained = {k: v for k, v in average.items() if not k.endswith('all_modules.0.W')}
  moments = {
    i: {'step': 7, 'exp_avg': 3 * average[k], 'exp_avg_sq': 4 * average[k]}
    for i, k in enumerate(average)
    if k in trained
  }
  return {
    'optimizer': {'state': moments, 'param_groups': [{'params': list(range(len(average)))}]},
    'model': {'module.sigmas': np.ones(3), **average, **{k: 2 * v for k, v in trained.items()}},
    'ema': {'decay': 0.999, 'num_updates': 9, 'shadow_params': list(trained.values())},
    'step': 9,
  }
