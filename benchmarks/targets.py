"""Devices that XLA compiles for without having them: cards, and slices of TPUs, described."""

import dataclasses
import importlib.util
import os
from pathlib import Path
import re
from typing import Any

import jax
from jax.experimental import topologies

from runtime.errors import unknown, UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip as its vendor describes it: bytes/s of its memory, dense FLOP/s of a matrix product."""

  bandwidth: float
  bfloat16: float
  float32: float  # at JAX's default precision: TF32 on GPUs, one pass of bfloat16 on TPUs


CHIPS = {
  # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet, H100 SXM; its
  # figures are with sparsity, twice these.
  'h100': Chip(3.35e12, 989e12, 495e12),
  # https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e
  'v4': Chip(1.228e12, 275e12, 275e12),
  'v5e': Chip(0.819e12, 197e12, 197e12),
  'v5p': Chip(2.765e12, 459e12, 459e12),
  'v6e': Chip(1.64e12, 918e12, 918e12),
}
TARGETS = ('h100', 'tpu', 'cpu')
_COMPILERS = {  # of a target: modules, one of which must be there, and what brings it
  'h100': (('jax_plugins.xla_cuda13', 'jax_plugins.xla_cuda12'), 'jax[cuda13]'),
  'tpu': (('libtpu',), 'jax[tpu]'),
  'cpu': (('jax',), 'jax'),
}


def devices_of(target: str, slice_name: str) -> list[jax.Device]:
  """The devices that a target and its slice describe.

  Raises:
    UserError: if the compiler is not installed, or there is no such slice.
  """
  modules, package = _COMPILERS[target]
  if not any(_installed(module) for module in modules):
    raise UserError(
      f'the compiler for {target} is not installed; pip install "{package}=={jax.__version__}"'
    )
  if target != 'tpu' and not re.fullmatch('[1-9][0-9]*', slice_name):
    raise UserError(f'the slice of {target} is a number of devices, such as 1; got {slice_name!r}')
  if target == 'cpu':
    if int(slice_name) > len(jax.devices('cpu')):
      raise UserError(f'this machine has {len(jax.devices("cpu"))} device; got {slice_name}')
    return jax.devices('cpu')[: int(slice_name)]
  if target == 'tpu':
    slices, topology = _slices(slice_name)
    chip = topology.partition(':')[0]
    if chip not in CHIPS:
      raise unknown('the TPU', chip, [name for name in CHIPS if name != 'h100'])
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else it looks for its cloud
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # no chip is taken
    choices: dict[str, Any] = {'topology_name': topology, 'platform': 'tpu'}
    choices |= {'num_slices': slices} if slices > 1 else {}
  else:
    choices = {'topology_name': '', 'platform': 'cuda', 'topology': f'1x1x{slice_name}'}
    choices['target_config'] = Path(__file__).with_name('h100.txtpb').read_text()
  try:
    return list(topologies.get_topology_desc(**choices).devices)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    reason = str(error).partition('\n')[0][:200]
    raise UserError(f'{target} {slice_name!r} is no topology that it knows: {reason}') from error


def _slices(name: str) -> tuple[int, str]:
  """How many slices, and the topology of each: 2 and v5e:16x16 of 2xv5e:16x16."""
  found = re.fullmatch(r'([1-9][0-9]*)x(v.*)', name)
  return (int(found[1]), found[2]) if found else (1, name)


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # of the package that it is in
    return False


def chip_of(target: str, slice_name: str) -> Chip | None:
  """The chip of a target; None of this machine, which is not described."""
  return CHIPS.get('h100' if target == 'h100' else _slices(slice_name)[1].partition(':')[0])
