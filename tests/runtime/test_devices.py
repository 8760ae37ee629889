"""Where the arrays of a run lie, and the keys of its parts."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from runtime.devices import all_devices, in_groups, InParts, Keys, PURPOSES
from runtime.errors import UserError

# Of seed 42 at step 7, by purpose. Every run depends on them: they never change.
KEY_DATA = (
  (441521444, 805305679), (520833650, 68019029), (1096897035, 320463389),
  (3534823363, 3798478818), (694899629, 1513739272), (536800120, 2521138273),
  (2655281864, 1909181706), (148220864, 3498104918), (2030664706, 127179315),
  (3510121740, 4220229153), (165428447, 3735167667),
)  # fmt: skip


@pytest.mark.parametrize(('purpose', 'data'), list(zip(PURPOSES[:11], KEY_DATA, strict=True)))
def test_keys_are_what_they_always_were(purpose, data):
  key = Keys(42, all_devices()).key(purpose, 7)
  assert tuple(jax.random.key_data(key).tolist()) == data
  assert key.sharding.is_fully_replicated


def test_a_state_lies_where_a_function_of_its_leaves_puts_it():
  def placement(path, leaf):
    split = jax.tree_util.keystr(path).endswith("['kernel']") and leaf.ndim == 2
    return PartitionSpec(None, 'data') if split else PartitionSpec()

  state = {'kernel': jnp.zeros((2, 4)), 'bias': jnp.zeros(4), 'step': jnp.int32(3)}
  by_default = all_devices().state_shardings(state)
  assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(by_default))
  shardings = all_devices(placement).state_shardings(jax.eval_shape(lambda: state))
  specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
  assert specs == {
    'kernel': PartitionSpec(None, 'data'),
    'bias': PartitionSpec(),
    'step': PartitionSpec(),
  }


def test_rows_come_to_the_devices_as_they_are():
  rows = {'data': np.arange(6).reshape(2, 3), 'label': np.arange(2)}
  put = all_devices().put(rows)
  several = all_devices().put_several({'data': np.arange(12).reshape(2, 2, 3)})
  assert put['label'].sharding.spec == PartitionSpec('data')
  assert several['data'].sharding.spec == PartitionSpec(None, 'data')
  np.testing.assert_array_equal(put['data'], rows['data'])
  np.testing.assert_array_equal(several['data'].ravel(), np.arange(12))


@pytest.mark.parametrize(
  ('shape', 'axis'),
  [
    ((3, 3, 128, 256), 3),  # the largest axis
    ((3, 3, 256, 128), 2),
    ((3, 3, 128, 128), 3),  # of equal ones the last
    ((3, 3, 130, 128), 3),  # the largest that 4 divides
    ((3, 3, 129, 130), None),  # none
    ((3, 3, 32, 32), None),  # too small
    ((2**20,), None),  # a vector
    ((), None),
  ],
)
def test_large_arrays_are_split_along_their_largest_axis_that_can_be(shape, axis):
  spec = InParts(4)((), jax.ShapeDtypeStruct(shape, np.float32))
  assert spec == (PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, 'fsdp'))


def test_groups_that_the_devices_do_not_make_are_refused():
  with pytest.raises(UserError, match=r'fsdp = 3 must divide the number of devices'):
    in_groups(3)
  assert in_groups(1).mesh.axis_names == ('data',)


@dataclasses.dataclass(frozen=True)
class Chip:
  """As much of a TPU chip as a mesh asks for."""

  id: int
  slice_index: int
  platform: str = 'tpu'
  process_index: int = 0
  device_kind: str = 'TPU v5 lite'


def test_groups_lie_inside_slices():
  """Of two slices of eight chips, which come in any order."""
  chips = [Chip(i, slice_index=i % 2) for i in range(16)]
  devices = in_groups(4, devices=chips)
  slices = [[chip.slice_index for chip in group] for group in devices.mesh.devices]
  assert devices.mesh.axis_names == ('data', 'fsdp') and slices == 2 * [4 * [0]] + 2 * [4 * [1]]
  with pytest.raises(UserError, match=r'fsdp = 16 must .* each slice, 8 of 16'):
    in_groups(16, devices=chips)
  uneven = [*chips[:12], *(Chip(i, slice_index=0) for i in range(16, 20))]  # of ten and six
  with pytest.raises(UserError, match=r'fsdp = 4 must .* each slice, 10 of 16'):
    in_groups(4, devices=uneven)


def test_slices_are_of_tpus_alone():
  """Each machine with GPUs calls itself one, and groups may be of several."""
  cards = [Chip(i, slice_index=i // 4, platform='gpu') for i in range(8)]
  assert in_groups(8, devices=cards).mesh.shape == {'data': 1, 'fsdp': 8}


def test_layers_are_told_where_rows_are_only_where_parameters_lie_in_parts():
  chips = [Chip(i, slice_index=0) for i in range(4)]
  assert in_groups(1, devices=chips).rows is None
  split = in_groups(2, devices=chips)
  assert split.rows == split.batch and split.batch.spec == PartitionSpec(('data', 'fsdp'))
