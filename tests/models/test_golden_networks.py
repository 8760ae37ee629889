"""The networks, losses and training steps give the numbers of the released code.

What the arrays are stands in tests/golden/README.md. All parameters come in through
`released_checkpoints`, as those of a checkpoint would.
"""

import agreement
from flax import serialization, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from released_networks import setup_of, shapes_of, torch_content

from benchmarks.golden import (
  load,
  loss_inputs,
  mean_losses,
  NETWORKS,
  parameters,
  released_state,
  score_of,
)
from builders.training import make_averages
import losses
from training import flat_tables, released_checkpoints
from training.released_checkpoints import from_jax
from training.released_torch import from_torch
from training.step import optimize


@pytest.fixture(scope='module', params=NETWORKS)
def golden(request):
  arrays = load(request.param)
  setup = setup_of(arrays)
  return arrays, setup, parameters(arrays, setup)


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
  x, t = jnp.asarray(arrays['io/x']), jnp.asarray(arrays['io/t'])
  told = setup.model.conditioning(setup.model.chain, t)
  fourier = setup.config.model.get('embedding_type') == 'fourier'
  fourier = fourier and setup.config.model.name == 'ncsnpp'
  labels = np.log(arrays['io/model_labels']) if fourier else arrays['io/model_labels']
  np.testing.assert_allclose(told, labels, rtol=1e-5, atol=1e-5)
  score = score_of(setup.model.bind(params), x, t)
  assert agreement.error(score, arrays['io/score_ema'], quantity='score') < 1e-4


def test_losses_and_gradients(golden):
  arrays, setup, params = golden
  found = mean_losses(arrays, setup, params)
  assert len(found) == (4 if setup.model.continuous else 2)
  for ours, theirs in found.values():
    assert agreement.error(ours, theirs, quantity='loss') < 1e-4

  x0, t, z = loss_inputs(arrays, setup)

  def mean_loss(params):
    return losses.dsm_loss(setup.objective, setup.model.bind(params), x0, t, z).mean()

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
    lambda state, x0, t, z: optimize(
      state, x0, t, z, jax.random.key(0),
      model=setup.model, objective=setup.objective, tx=setup.tx,
      averages=make_averages(setup.config),
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
    theirs = flat_tables.fit(average, shapes_of(setup), what)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      agreement.error(a, b, quantity=f'{what} after three steps')
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize('case', ['pytorch_ddpm_vp_cont', 'pytorch_npp_ve_cont_resid_in_fir'])
def test_scores_of_pytorch_checkpoints(case):
  arrays = load(case)
  setup = setup_of(arrays)
  found = from_torch(torch_content(arrays), shapes_of(setup))
  params = flat_tables.fit(found.ema_params, shapes_of(setup), 'moving averages')
  x, t = arrays['io/x'].transpose(0, 2, 3, 1), arrays['io/t']
  score = score_of(setup.model.bind(params), x, t)
  theirs = arrays['io/score_ema'].transpose(0, 2, 3, 1)
  assert agreement.error(score, theirs, quantity='score') < 1e-4
