"""Checkpoints without a run: which is taken, what becomes of damaged ones, what is no damage."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runtime.errors import Failure, UserError
from training import checkpoints as checkpoints_lib
from training.checkpoints import Checkpoints
from training.optim import adam
from training.step import TrainState


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
  fixed = {'lr': 1e-3, 'beta1': 0.9, 'eps': 1e-8, 'weight_decay': 0.0}
  choices = [{'warmup': w, 'grad_clip': c} for w in (0, 5) for c in (-1.0, 1.0)]
  trees = {str(jax.tree.structure(adam(**fixed, **c).init(params))) for c in choices}
  assert len(trees) == 1
  for choice in choices:  # the first step is of size lr, or 0 where it warms up
    tx = adam(**fixed, **choice)
    updates, _ = tx.update({'w': jnp.full(2, 7.0)}, tx.init(params), params)
    size = 0.0 if choice['warmup'] else 1e-3
    np.testing.assert_allclose(updates['w'], -size, rtol=1e-5)
