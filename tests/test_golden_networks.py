"""The networks, losses and training steps give the numbers of the released code.

What the arrays are stands in tests/golden/README.md.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest

import build_lib
from configs import base
import losses
from losses import Objective, TrainState

GOLDEN = Path(__file__).parent / 'golden'
CASES = (
  'npp_ve_cont_resid_in_fir',
  'npp_ve_disc',
  'npp_ve_outskip_inskip_sum',
  'npp_vp_cont_ddpmpp',
  'ddpm_vp_disc',
)


def load(case: str) -> dict[str, np.ndarray]:
  with np.load(GOLDEN / f'{case}.npz') as arrays:
    return dict(arrays)


def setup_of(arrays: dict[str, np.ndarray]) -> build_lib.Setup:
  """The setup of a released configuration, which is stored with the arrays as JSON."""
  released = ConfigDict(json.loads(str(arrays['config'])))
  make = {'vesde': base.ve, 'vpsde': base.vp}[released.training.sde]
  config = make(released.model.name)
  for section in config:
    if isinstance(config[section], ConfigDict):
      known = {k: v for k, v in released[section].items() if k in config[section]}
      config[section].update({k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})
  return build_lib.build(config)


def tree(arrays: dict[str, np.ndarray], prefix: str) -> dict:
  """The parameters under a prefix, with the names and shapes of ours.

  There a GroupNorm's parameters are [1, 1, 1, C], and DDPM's blocks have names of their own.
  """
  root: dict = {}
  for name, value in arrays.items():
    if name.startswith(prefix + '/'):
      *path, leaf = name.split('/')[1:]
      node = root
      for part in path:
        ours = part.replace('ResnetBlockDDPM_', 'ResnetBlockDDPMpp_')
        node = node.setdefault(ours.replace('AttnBlock_', 'AttnBlockpp_'), {})
      node[leaf] = value.reshape(-1) if value.shape[:-1] == (1, 1, 1) else value
  return root


@pytest.fixture(scope='module', params=CASES)
def golden(request):
  arrays = load(request.param)
  return arrays, setup_of(arrays), tree(arrays, 'ema')


def assert_close(ours, theirs, rtol=1e-4):
  """Agreement relative to the largest value of each example."""
  scale = np.abs(theirs).reshape(len(theirs), -1).max(-1)
  error = np.abs(np.asarray(ours) - theirs).reshape(len(theirs), -1).max(-1)
  np.testing.assert_array_less(error, rtol * scale)


def test_parameters_have_the_released_names_and_shapes(golden):
  arrays, setup, params = golden
  shape = arrays['io/x'].shape
  ours = jax.eval_shape(lambda: setup.model.init(jax.random.key(0), shape))
  assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)


def test_conditioning_and_score(golden):
  arrays, setup, params = golden
  x, t = arrays['io/x'], arrays['io/t']
  told = setup.model.conditioning(setup.model.sde, t)
  fourier = setup.model.net.embedding_type == 'fourier'
  labels = np.log(arrays['io/model_labels']) if fourier else arrays['io/model_labels']
  np.testing.assert_allclose(told, labels, rtol=1e-5, atol=1e-5)
  assert_close(jax.jit(lambda f: f(x, t))(setup.model.bind(params)), arrays['io/score_ema'])


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

  score_fn = jax.jit(setup.model.bind(params).__call__)

  checked = 0
  for name in arrays:
    if name.startswith('io/loss_') and name != 'io/loss_labels':
      objective = Objective(
        continuous=continuous, reduce_mean='rm1' in name, likelihood_weighting='lw1' in name
      )
      loss = losses.dsm_loss(sde, score_fn, x0, t, z, objective).mean()
      np.testing.assert_allclose(loss, arrays[name], rtol=1e-4)
      checked += 1
  assert checked == (4 if continuous else 2)

  @jax.jit
  @jax.grad
  def gradients(params):
    return losses.dsm_loss(sde, setup.model.bind(params), x0, t, z, setup.objective).mean()

  grads = gradients(params)
  norm = optax.tree.norm(grads)
  np.testing.assert_allclose(norm, arrays['io/grad_global_norm'], rtol=1e-3)
  theirs = tree({k.removeprefix('io/'): v for k, v in arrays.items()}, 'grad')
  assert theirs
  for path, grad in jax.tree_util.tree_leaves_with_path(theirs):
    ours = grads
    for key in path:
      ours = ours[key.key]
    np.testing.assert_allclose(ours, grad, rtol=1e-3, atol=1e-4 * float(norm))


def test_three_training_steps():
  """Warm-up, clipping, Adam and the moving average, from a state in mid-training."""
  arrays = load('train_npp_ve_cont')
  setup = setup_of(arrays)
  params, step = tree(arrays, 'params'), jnp.int32(arrays['step'])
  opt_state = setup.tx.init(params)
  count = jnp.int32(arrays['adam_step'])
  adam = optax.tree_utils.tree_set(opt_state, mu=tree(arrays, 'mu'), nu=tree(arrays, 'nu'))
  state = TrainState(
    step, params, tree(arrays, 'ema'), optax.tree_utils.tree_set(adam, count=count)
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
    np.testing.assert_allclose(metrics['loss'], arrays[f'io/loss_{i}'], rtol=1e-4)
  assert int(state.step) == int(arrays['end_step'])
  for ours, theirs in ((state.params, 'end_params'), (state.ema_params, 'end_ema')):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), ours, tree(arrays, theirs)
    )
