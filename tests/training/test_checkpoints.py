"""Checkpoints without a run: which is taken, what becomes of damaged ones, what is no damage."""

import dataclasses
import os
from pathlib import Path
import subprocess
import sys

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime.errors import Failure, UserError
from training import checkpoints as checkpoints_lib
from training.checkpoints import Checkpoints
from training.optim import adam, LearningRate
from training.step import TrainState
from workdir import best
from workdir.best import Best

ROOT = Path(__file__).parent.parent.parent


def state_at(step: int) -> TrainState:
  """A state of two numbers, which tell the step."""
  params = {'w': jnp.full(2, float(step))}
  return TrainState(jnp.int32(step), params, (params,), ())


def save(root: Path, *steps: int, keep: bool = False) -> None:
  with Checkpoints(root) as checkpoints:
    for step in steps:
      checkpoints.save(state_at(step), keep=keep)


def damage(folder: Path) -> None:
  for file in [path for path in folder.rglob('*') if path.is_file()]:
    file.write_bytes(file.read_bytes()[:5])


def newest(root: Path) -> int:
  with Checkpoints(root) as checkpoints:
    state = checkpoints.restore_latest(state_at(0))
  np.testing.assert_array_equal(state.params['w'], float(state.step))
  return int(state.step)


def test_after_a_damaged_checkpoint_earlier_steps_are_saved(tmp_path):
  """They lie below the damaged one, which Orbax would take for newer; again, and it is again so."""
  meta = tmp_path / 'checkpoints-meta'
  save(tmp_path, 4, 6)
  for steps, aside in (((5, 6), '6.damaged'), ((5, 6), '6.damaged-2')):
    damage(meta / '6')
    with Checkpoints(tmp_path) as checkpoints:
      begun = int(checkpoints.restore_latest(state_at(0)).step)
      for step in range(begun + 1, 7):
        checkpoints.save(state_at(step), keep=False)
    assert {path.name for path in meta.iterdir()} >= {'5', '6', aside}, steps
    assert newest(tmp_path) == 6


def test_a_step_below_a_later_one_is_not_left_out_in_silence(tmp_path):
  save(tmp_path, 6, keep=True)
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(Failure, match='there is one of step 6'):
    checkpoints.save(state_at(4), keep=True)


@pytest.mark.parametrize(
  ('raised', 'told'),
  [
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 GB'), jax.errors.JaxRuntimeError),
    (PermissionError(13, 'Permission denied'), Failure),
    (ValueError('UNAVAILABLE: Error opening "zarr" driver'), Failure),
    (ValueError('DATA_LOSS: Error decoding'), UserError),
  ],
)
def test_only_damage_is_damage(tmp_path, monkeypatch, raised, told):
  """Where memory is short or a disk out of reach, no older checkpoint is taken instead."""
  save(tmp_path, 4, 6)
  before = sorted(tmp_path.rglob('*'))
  with Checkpoints(tmp_path) as checkpoints:

    def fail(*_, **__):
      raise raised

    monkeypatch.setattr(checkpoints_lib.ocp.CheckpointManager, 'restore', fail)
    with pytest.raises(told):
      checkpoints.restore_latest(state_at(0))
  assert sorted(tmp_path.rglob('*')) == before


def test_the_optimiser_can_be_changed_in_mid_run():
  """The tree of its state is the same whatever is clipped or warmed up."""
  params = {'w': jnp.ones(2)}
  fixed = {'beta1': 0.9, 'eps': 1e-8, 'weight_decay': 0.0}
  rates = LearningRate(1e-3), LearningRate(1e-3, 5), LearningRate(1e-3, 0, 'cosine', 9)
  choices = [{'lr': rate, 'grad_clip': c} for rate in rates for c in (-1.0, 1.0)]
  trees = {str(jax.tree.structure(adam(**fixed, **c).init(params))) for c in choices}
  assert len(trees) == 1
  for choice in choices:  # the first step is of size lr, or 0 where it warms up
    tx = adam(**fixed, **choice)
    updates, _ = tx.update({'w': jnp.full(2, 7.0)}, tx.init(params), params)
    size = 0.0 if choice['lr'].warmup else 1e-3
    np.testing.assert_allclose(updates['w'], -size, rtol=1e-5)


def test_averages_are_restored_alone_and_verified(tmp_path):
  params = {'w': jnp.arange(6.0).reshape(2, 3)}
  averages = {'w': params['w'] + 1}, {'w': params['w'].astype(jnp.bfloat16)}
  state = TrainState(jnp.int32(3), params, averages, (jnp.ones(4),))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, keep=True)
  with Checkpoints(tmp_path) as checkpoints:
    step, restored = checkpoints.restore_latest_averages(state)
    jax.tree.map(np.testing.assert_array_equal, restored, averages)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(3, state), state)
  assert step == 3

  moved = dict(checkpoints_lib.checksums({'ema_params': {'w': averages[0]['w'].at[0, 1].add(1)}}))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoints_lib, 'checksums', lambda parts: dict.fromkeys(parts, *moved.values()))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match='does not match'):
      checkpoints.restore_averages(3, state)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_a_checksum_sees_every_bit_and_every_place(dtype):
  x = jnp.arange(24).reshape(2, 3, 4).astype(dtype)
  sums = [x, x.at[1, 2, 3].add(1), x[::-1], x.swapaxes(1, 2), x.at[0, 0, 0].set(7)]
  sums = [int(checkpoints_lib.checksums({'x': [v]})['x']) for v in sums]
  sums += [int(checkpoints_lib.checksums({'x': v})['x']) for v in ([x, x], [0 * x, x])]
  assert len(set(sums)) == len(sums)


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from etils import epath
from data.points import load
from runtime.devices import in_groups, Keys
from training import checkpoints, loop
from training.averages import ConstantRate
from training.step import apply_gradients, TrainState
import optax

root, n_iters, group = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

tx = optax.adam(0.01)

def init(rng):
  w = {'a': jax.random.normal(rng, (2, 8)), 'b': jax.random.normal(rng, (8, 2))}
  return TrainState(jnp.int32(0), w, (jax.tree.map(jnp.copy, w),), tx.init(w))

def update(state, frozen, batch, rng):
  def loss(w):
    x = batch['data']
    return jnp.square(jnp.tanh(x @ w['a']) @ w['b'] - x).mean(), {}
  return apply_gradients(state, jax.value_and_grad(loss, has_aux=True), tx, (ConstantRate(0.9),))

devices = in_groups(group, least=16)
task = loop.Task('model', init, update, lambda p, b, r: {}, ('init', 'train', 'eval'), 16)
schedule = loop.Schedule(n_iters, 1, 5, 1000, 5, 1000)
source = load('two_moons', 'train', 2)
state = loop.train(task, schedule, devices, Keys(0, devices), epath.Path(root), source, source)
b = state.params['b']
assert len({str(shard.index) for shard in b.addressable_shards}) == group
moments = state.opt_state[0].mu['a'], state.averages[0]['a']
assert all(x.sharding.spec == state.params['a'].sharding.spec for x in moments)
parts = checkpoints.checksums(checkpoints.on_disk(state))
whole = jax.device_get(checkpoints.on_disk(state))
assert {k: int(v) for k, v in parts.items()} == {
  k: int(v) for k, v in checkpoints.checksums(whole).items()}
np.savez(root + '/end.npz', *jax.tree.leaves(jax.device_get((state.params, state.averages))))
"""


def test_a_state_that_is_split_over_devices_trains_as_a_whole_one(tmp_path):
  """On 8 devices in groups of 4, then from its checkpoint on 4 in groups of 2, then on 2 whole."""

  def train(name: str, n_iters: int, devices: int, group: int) -> list[np.ndarray]:
    flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
    root = tmp_path / name
    done = subprocess.run(
      [sys.executable, '-c', SHARDED, str(root), str(n_iters), str(group)],
      env=os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)},
      capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(root / 'end.npz') as arrays:
      return list(arrays.values())

  for n_iters, devices, group in ((5, 8, 4), (10, 4, 2), (15, 2, 1)):
    ours = train('split', n_iters, devices, group)
  theirs = train('whole', 15, 2, 1)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('most', 'left'), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_the_newest_snapshots_are_kept(tmp_path, most, left):
  with Checkpoints(tmp_path, most=most) as checkpoints:
    for step in (1, 2, 3, 4):
      checkpoints.save(state_at(step), keep=True)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == left
  assert newest(tmp_path) == 4


def test_the_best_snapshot_is_kept_beside_the_newest(tmp_path):
  """As long as it is the best."""

  def kept_after(step: int, named: int) -> list[int]:
    best.write(epath.Path(tmp_path), Best(named, 'fid', 1.0, None, 10, 1, ''))
    with Checkpoints(tmp_path, most=1) as checkpoints:
      checkpoints.save(state_at(step), keep=True)
      checkpoints.wait()
      return checkpoints.steps()

  assert [kept_after(step, 2) for step in (1, 2, 3, 4)] == [[1], [2], [2, 3], [2, 4]]
  assert kept_after(5, 4) == [4, 5]


def test_fewer_are_kept_where_a_run_goes_on_so(tmp_path):
  save(tmp_path, 1, 2, 3, keep=True)
  save(tmp_path, 3)
  with Checkpoints(tmp_path, most=2) as checkpoints:
    assert checkpoints.steps() == [1, 2, 3]  # none is lost before a newer one is whole
    checkpoints.save(state_at(4), keep=True)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [3, 4]


NOTES = checkpoints_lib.Notes(('cat', 'd\udcff'), 'abc', {'step': 3})


def test_notes_stand_with_each_checkpoint(tmp_path):
  """Names that are not UTF-8, too, as folders may have them; none where nothing was written."""
  for step, notes in ((1, None), (2, NOTES), (3, dataclasses.replace(NOTES, images='def'))):
    with Checkpoints(tmp_path, notes) as checkpoints:
      checkpoints.save(state_at(step), keep=step < 3)
  assert checkpoints_lib.notes(tmp_path, 1) == checkpoints_lib.Notes()
  assert checkpoints_lib.notes(tmp_path, 2) == NOTES
  assert checkpoints_lib.notes(tmp_path).images == 'def'
  damage(tmp_path / 'checkpoints-meta' / '3')
  assert checkpoints_lib.notes(tmp_path) == NOTES
  assert checkpoints_lib.notes(tmp_path / 'nowhere') == checkpoints_lib.Notes()
