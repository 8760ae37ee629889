"""Consistency models as they were released: jumps, losses, samples, schedules, training steps.

golden/README.md says what the arrays are. Tolerances are ten times what float32 and float64 of the
released code differ by, as a part of the largest value. The network alone is compiled, once for all
tests, at the largest of their batches.
"""

import dataclasses
from functools import partial
from pathlib import Path

from flax import serialization, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden_edm import check, CHECKPOINT, config_of_case, GOLDEN

from builders.setup import build, Setup
from models.score import ModelScore
from runtime.errors import UserError
from training import consistency, released_checkpoints
from training.averages import ConstantRate
from training.consistency import (
  Consistency,
  consistency_distillation,
  consistency_loss,
  consistency_training,
  jumps,
  PREVIOUS,
  WEIGHTS,
)
from training.curricula import Constant, Grid, Growing
from training.optim import LearningRate, radam
from training.packing import packed, STACKED, unpacked
from training.step import TrainState

EPS = 0.002
ROWS = 5  # of every batch that the network sees
OF = {name: GOLDEN / f'jcm_{name}.checkpoint' for name in ('cd', 'ct')}


@pytest.fixture(scope='module', autouse=True)
def compiled_network():
  """One program for all: the denoiser is the jump to time 0, exactly that of EDM."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ModelScore, 'consistency', jax.jit(ModelScore.consistency))
    patch.setattr(ModelScore, 'denoised', lambda self, x, t: self.consistency(x, t, 0.0))
    yield


@pytest.fixture(scope='module')
def golden() -> dict[str, np.ndarray]:
  with np.load(GOLDEN / 'jcm_consistency.npz') as arrays:
    return dict(arrays)


@pytest.fixture(scope='module')
def setup() -> Setup:
  return build(config_of_case())


def radam_of(lr: float):
  return radam(LearningRate(lr), beta1=0.9, eps=1e-8, weight_decay=0.0, grad_clip=-1.0)


def load(setup: Setup, path: Path, lr: float = 4e-4, **kind) -> TrainState:
  shape = (1, *setup.data_shape)
  return released_checkpoints.load(path, setup.model, shape, radam_of(lr), 0.9999, **kind)


@pytest.fixture(scope='module')
def states(setup) -> dict[str, TrainState]:
  return {
    'cd': load(setup, OF['cd'], consistency=True),
    'ct': load(setup, OF['ct'], 2e-4, consistency=True, has_target=True),
    'edm': released_checkpoints.load(
      CHECKPOINT, setup.model, (1, *setup.data_shape), setup.tx, 2 ** (-512 / 500_000)
    ),
  }


def test_the_consistency_function(setup, states, golden):
  """At noise from 0.002 to 80, and with another time for the identity."""
  x, t = (jnp.asarray(golden[f'wrappers/{name}']) for name in ('x', 't'))
  state, model = states['cd'], setup.model
  averaged, trained = (jumps(model, params, EPS) for params in (state.ema_params, state.params))
  check(averaged(x, t), golden['wrappers/consistency/params_ema'], 2e-4)
  check(trained(x, t), golden['wrappers/consistency/params'], 2e-4)
  other = jumps(model, state.ema_params, 0.5)(x, t)
  check(other, golden['wrappers/consistency_pred_t_0.5/params_ema'], 2e-4)


LOSSES = [
  # case, distance, solver, weight, kind (with a teacher or not), target
  ('cd', 'l1', 'heun', 'uniform', 'cd', 'self'),
  ('cd', 'l2', 'heun', 'uniform', 'cd', 'self'),
  ('cd', 'l2', 'euler', 'uniform', 'cd', 'self'),
  ('cd', 'l1', 'heun', 'snr', 'cd', 'self'),
  ('ct', 'l1', 'euler', 'uniform', 'ct', 'given'),
  ('ct', 'l2', 'euler', 'uniform', 'ct', 'given'),
  ('ct', 'linf', 'heun', 'snrp1', 'ct', 'given'),
  ('ct', 'l2', 'heun', 'uniform', 'cd', 'given'),
]


@pytest.mark.parametrize(('case', 'distance', 'solver', 'weight', 'kind', 'target'), LOSSES)
def test_losses_and_their_gradients(
  setup, states, golden, case, distance, solver, weight, kind, target
):
  """Steps of the teacher, distances and weights; without a teacher both solvers are the same."""
  name = f'{case}/loss/{distance}__{solver}__{weight}__{kind}__target_{target}__stopgrad1'
  data, z, t, r = (jnp.asarray(golden[f'{case}/loss/{k}']) for k in ('data', 'z', 't', 't2'))
  state, sde = states[case], setup.model.sde
  grid = Grid(sde, EPS, Constant(int(golden[f'{case}/loss/num_scales']) - 1))
  i = jnp.asarray(golden[f'{case}/loss/indices'], jnp.float32)
  np.testing.assert_allclose(grid.time(i, grid.counts(jnp.int32(0))), t, rtol=4e-6)
  np.testing.assert_allclose(grid.time(i + 1, grid.counts(jnp.int32(0))), r, rtol=4e-6)
  previous = PREVIOUS[solver if kind == 'cd' else 'none']
  objective = Consistency(grid, previous, consistency.DISTANCES[distance](0.0), WEIGHTS[weight])

  def loss(params):
    f = jumps(setup.model, params, EPS, jax.random.key(0))  # of dropout, which is 0
    of_target = params if target == 'self' else state.averages[-1]
    denoise = setup.model.bind(states['edm'].ema_params).denoised
    each = consistency_loss(
      objective, f, jumps(setup.model, of_target, EPS, jax.random.key(0)), denoise, data, t, r, z
    )
    return each.mean(), each

  (mean, each), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
  check(each, golden[f'{name}/each'], 4e-5)
  check(mean, golden[f'{name}/mean'], 4e-5)
  if distance == 'linf':  # whose gradient is that of near ties
    return
  gradient = traverse_util.flatten_dict(gradient, sep='/')
  names = golden[f'{case}/loss/leaf_names']
  norms = [float(jnp.linalg.norm(gradient[leaf])) for leaf in names]
  check(norms, golden[f'{name}/leaf_norms'], 1e-4)
  check(gradient['Conv_1/kernel'], golden[f'{name}/grad/Conv_1/kernel'], 1e-4)


@pytest.mark.parametrize(('start', 'end', 'mu', 'steps'), [
  (2, 150, 0.9, 800_000), (2, 20, 0.9, 1000), (2, 200, 0.95, 600_000),
])  # fmt: skip
def test_the_schedules_of_times_and_of_the_target(golden, start, end, mu, steps):
  """The first step of each number of times, and steps past the end."""
  name, counts = f'schedules/adaptive__start{start}__end{end}__ema{mu}__iters{steps}', Growing(
    steps, start, end, mu)  # fmt: skip
  for at, n, rate in (('first_step_with_N', 'N', 'mu'), ('probe_steps', 'probe_N', 'probe_mu')):
    k = jnp.asarray(golden[f'{name}/{at}'], jnp.int32)
    np.testing.assert_array_equal(counts(k) + 1, golden[f'{name}/{n}'])
    target = counts.target
    assert target is not None
    np.testing.assert_allclose(1 - target.weight(k + 1), golden[f'{name}/{rate}'], rtol=2e-7)
  # Where the root is a whole number but for 1e-5, rounding decides between two steps.
  before = counts(jnp.asarray(golden[f'{name}/first_step_with_N'][1:] - 2, jnp.int32)) + 1
  np.testing.assert_array_equal(before[2:], golden[f'{name}/N'][2:-1])


@pytest.mark.parametrize('case', ['cd', 'ct'])
def test_training_goes_on_from_a_released_checkpoint(setup, states, golden, case):
  """Three steps: gradients, RAdam, the average and then the target with the new parameters."""
  sde, state = setup.model.sde, packed(states[case], STACKED)
  lr, teacher, objective = {
    'cd': (4e-4, states['edm'].ema_params, consistency_distillation(sde, EPS, 18)),
    'ct': (2e-4, None, consistency_training(sde, EPS, 1000, 2, 20, distance=consistency.l1)),
  }[case]
  grid = objective.curriculum
  assert isinstance(grid, Grid)

  # Of the rows some are there to fill the batch, and count nothing.
  objective = dataclasses.replace(objective, weight=lambda s, gap: jnp.array([1.25] * 4 + [0.0]))
  averages, tx = (ConstantRate(0.9999), *objective.target_averages), radam_of(lr)
  for i, expected in enumerate(golden[f'{case}/train/losses']):
    image, indices, z = (
      jnp.resize(v, (ROWS, *v.shape[1:]))
      for v in (golden[f'{case}/train/{k}'][i] for k in ('image', 'indices', 'z'))
    )
    count = grid.counts(state.step)
    t, r = grid.time(indices.astype(float), count), grid.time(indices + 1.0, count)
    state, metrics = consistency.optimize(
      state, teacher, image, t, r, z, jax.random.key(0),
      model=setup.model, objective=objective, tx=tx, averages=averages,
    )  # fmt: skip
    np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-4)
  assert int(state.step) == int(golden[f'{case}/after/step'])
  state = unpacked(state)
  of_average = {'cd': 'params_ema', 'ct': 'target_params'}[case]
  for part, tree in (('params', state.params), (of_average, state.averages[-1])):
    for name, value in traverse_util.flatten_dict(tree, sep='/').items():
      expected = golden[f'{case}/after/{part}/{name}']
      np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=f'{part} {name}')


# Checkpoints.


def test_what_a_checkpoint_holds_goes_where_it_belongs(setup, states):
  content = serialization.msgpack_restore(OF['ct'].read_bytes())
  state, flat = states['ct'], partial(traverse_util.flatten_dict, sep='/')
  adam = state.opt_state[1]
  assert (int(state.step), int(adam.count)) == (300, 300)
  for theirs, ours in (
    (content['params'], state.params), (content['params_ema'], state.averages[0]),
    (content['target_params'], state.averages[1]), (content['opt_state']['0']['mu'], adam.mu),
    (content['opt_state']['0']['nu'], adam.nu),
  ):  # fmt: skip
    assert flat(theirs).keys() == flat(ours).keys()
    for name, value in flat(theirs).items():
      np.testing.assert_array_equal(value, flat(ours)[name])


def test_a_target_is_there_if_it_is_asked_for(setup, states):
  """A model without one is its own; one that is not asked for is left out."""
  own = load(setup, OF['cd'], consistency=True, has_target=True)
  jax.tree.map(np.testing.assert_array_equal, own.averages[1], own.params)
  assert len(load(setup, OF['ct'], consistency=True).averages) == 1


def test_models_of_the_other_kind_are_refused(setup):
  for path in OF.values():
    with pytest.raises(UserError, match=r'it is a consistency model, .* config\.distill\.method'):
      load(setup, path)
  with pytest.raises(UserError, match=r'it is a score model, .* --teacher'):
    load(setup, CHECKPOINT, consistency=True)
