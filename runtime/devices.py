"""The devices that a run is spread over, and its random keys.

Data parallelism is `jax.jit` over a mesh of all devices of all processes, with the batch spread
over them and every leaf of the training state where a function of the leaf puts it: whole on every
device, or in parts over groups of devices, which XLA brings together where a layer needs them
(fully sharded data parallelism, https://arxiv.org/abs/2304.11277; ZeRO, arXiv 1910.02054). The
mathematics knows nothing of it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
import dataclasses
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
import numpy as np

from runtime.errors import UserError

# What the keys of a run are for. A key is a function of seed, purpose and step: nothing random is
# stored. The order is part of every run's result.
PURPOSES = (
  'init', 'train', 'eval', 'snapshot', 'sample', 'bpd',
  'classifier_init', 'classifier_train', 'classifier_eval', 'classifier_report', 'draw',
  'bpd_samples', 'dequantization',
)  # fmt: skip

# (path in the state, array or its shape and dtype) -> how it lies on the mesh
Placement = Callable[[KeyPath, Any], PartitionSpec]


# Numbers of an array that is worth splitting: to bring the parts of less together takes longer than
# it saves.
LARGE = 2**16


def everywhere(path: KeyPath, leaf: Any) -> PartitionSpec:
  """The placement of a leaf that every device has whole."""
  return PartitionSpec()


@dataclasses.dataclass(frozen=True)
class InParts:
  """Large arrays lie in parts on the devices of a group, along their largest axis that allows it.

  Attributes:
    n: devices of a group, the axis 'fsdp' of the mesh.
    least: numbers of the smallest array that is split; vectors never are.
  """

  n: int
  least: int = LARGE

  def __call__(self, path: KeyPath, leaf: Any) -> PartitionSpec:
    sizes = [size if size % self.n == 0 else 0 for size in leaf.shape]
    if leaf.ndim < 2 or leaf.size < self.least or not any(sizes):
      return PartitionSpec()
    # Of equal axes the last, which is that of a layer's outputs.
    axis = max(range(leaf.ndim), key=lambda i: (sizes[i], i))
    return PartitionSpec(*(None,) * axis, 'fsdp')


@dataclasses.dataclass(frozen=True)
class Devices:
  """Where the arrays of a run lie.

  Attributes:
    mesh: the devices, along the axis 'data', or in groups, along the axes 'data' and 'fsdp'.
    placement: of each leaf of a training state.
  """

  mesh: Mesh
  placement: Placement = everywhere

  @property
  def platform(self) -> str:
    """Of the devices: cpu, gpu or tpu."""
    platform: str = self.mesh.devices.flat[0].platform
    return platform

  @property
  def batch(self) -> NamedSharding:
    """Of a batch [B, ...]: each device has a part of the rows."""
    return NamedSharding(self.mesh, rows_over(self.mesh))

  @property
  def rows(self) -> NamedSharding | None:
    """`batch`, where large arrays of the state lie in parts; elsewhere None."""
    return None if self.placement is everywhere else self.batch

  @property
  def batches(self) -> NamedSharding:
    """Of several batches [n, B, ...]: each device has a part of the rows of every one."""
    return NamedSharding(self.mesh, PartitionSpec(None, *rows_over(self.mesh)))

  @property
  def replicated(self) -> NamedSharding:
    """Of what every device has whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  def state_sharding(self, path: KeyPath, leaf: Any) -> NamedSharding:
    """Of the leaf at a path of a training state."""
    return NamedSharding(self.mesh, self.placement(path, leaf))

  def state_shardings(self, state: Any) -> Any:
    """Those of all leaves, as a tree like the state; its arrays may be shapes and dtypes alone."""
    return jax.tree.map_with_path(self.state_sharding, state)

  def put(self, rows: Any) -> Any:
    """This process's rows of a batch, a tree of arrays, as part of the global batch on devices."""
    return jax.tree.map(partial(jax.make_array_from_process_local_data, self.batch), rows)

  def put_several(self, rows: Any) -> Any:
    """Like `put`, of several batches: arrays [n, rows of this process, ...]."""
    return jax.tree.map(partial(jax.make_array_from_process_local_data, self.batches), rows)


def rows_over(mesh: Mesh) -> PartitionSpec:
  """Of rows [B, ...] that are spread over all devices of a mesh."""
  return PartitionSpec(mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0])


def all_devices(placement: Placement = everywhere) -> Devices:
  """All devices of all processes."""
  return Devices(Mesh(np.array(jax.devices()), ('data',)), placement)


def in_groups(n: int, least: int = LARGE, devices: Sequence[jax.Device] | None = None) -> Devices:
  """Devices in groups of n that share the large arrays of a training state.

  Those of a group are neighbours: of one process where they can be, and of one slice of a TPU pod,
  between whose chips are fast links. Between slices, and between groups, only gradients travel.

  Args:
    n: devices of a group.
    least: numbers of the smallest array that is split.
    devices: by default all of all processes.

  Raises:
    UserError: if the devices do not make such groups.
  """
  found = sorted(devices or jax.devices(), key=slice_of)  # which leaves their order in a slice
  if n == 1:
    return Devices(Mesh(np.array(found), ('data',)))
  if len(found) % n:
    raise UserError(f'config.training.fsdp = {n} must divide the number of devices, {len(found)}')
  slices = Counter(map(slice_of, found))
  for chips in slices.values():
    if chips % n:
      raise UserError(
        f'config.training.fsdp = {n} must divide the number of devices of each slice, {chips} of '
        f'{len(found)}: the arrays of a group are not split over slices'
      )
  mesh = Mesh(np.array(found).reshape(-1, n), ('data', 'fsdp'))
  return Devices(mesh, InParts(n, least))


def slice_of(device: jax.Device) -> int:
  """The TPU slice that a device is in, of those that work together; elsewhere there is one."""
  return int(getattr(device, 'slice_index', 0) or 0) if device.platform == 'tpu' else 0


@dataclasses.dataclass(frozen=True)
class Keys:
  """The random keys of a run: functions of its seed, a purpose and a step, on all devices."""

  seed: int
  devices: Devices

  def key(self, purpose: str, step: int = 0) -> Array:
    """The key for one of `PURPOSES` at a step."""
    make = jax.jit(_key, out_shardings=self.devices.replicated)  # a put can't reach other processes
    return make(self.seed, PURPOSES.index(purpose), step)


def _key(seed: int, purpose: int, step: int) -> Array:
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def out_of_memory(error: BaseException) -> bool:
  """Whether what was raised says that memory is short, of a device or of the host.

  That is a status of XLA's; but where no room is left, libraries of NVIDIA's fail in ways of their
  own.
  """
  signs = ('RESOURCE_EXHAUSTED', 'OUT_OF_MEMORY', 'ALLOC_FAILED')
  told = isinstance(error, jax.errors.JaxRuntimeError)
  return isinstance(error, MemoryError) or (told and any(sign in str(error) for sign in signs))
