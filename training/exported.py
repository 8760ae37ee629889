"""Weights that leave a run, in a folder that any tool reads, and come back.

card.json            the config, what the weights are, where they come from, their licence
weights.safetensors  one average of the parameters, by name, ResnetBlockBigGANpp_0/Conv_0/kernel
pytorch.safetensors  the same as the PyTorch release names and lays them out, where it has the
                     network (https://github.com/yang-song/score_sde_pytorch)
"""

from collections.abc import Mapping
import hashlib
from typing import Any

from etils import epath
import jax
import numpy as np
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from models.score import Params
from runtime.errors import UserError
from training import checkpoints
from training.flat_tables import fit, flat, Shapes
from training.released_torch import to_torch
from workdir import artifacts

CARD = 'card.json'
_FORMAT = 1
_WEIGHTS = 'weights.safetensors'
PYTORCH = 'pytorch.safetensors'


def write(
  folder: epath.Path,
  params: Params,
  card: Mapping[str, Any],
  torch_names: Shapes | None = None,
  sigmas: np.ndarray | None = None,
) -> None:
  """Writes a folder of weights.

  Args:
    folder: where to; weights that are there already must be the same.
    params: one average of the parameters.
    card: what to say of them, with 'config'.
    torch_names: the parameters in the order of their creation, where PyTorch's release has the
      network; otherwise there is no file for it.
    sigmas: the noise levels, largest first, that its networks keep beside their parameters.

  Raises:
    UserError: if other weights are there.
  """
  identity = checkpoints.identity(params)
  if (folder / CARD).exists() and read_card(folder)['checkpoint'] != identity:
    raise UserError(
      f'{folder} holds the weights of another checkpoint; choose another --export_folder'
    )
  arrays = {name: np.ascontiguousarray(jax.device_get(x)) for name, x in flat(params).items()}
  files = {_WEIGHTS: to_bytes(arrays)}
  if torch_names is not None:
    theirs = to_torch(arrays, torch_names)
    files[PYTORCH] = to_bytes(theirs if sigmas is None else theirs | {'sigmas': sigmas})
  sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
  for name, data in files.items():
    artifacts.write(folder / name, data)
  # Last: where there is a card, all is there.
  artifacts.write_json(
    folder / CARD, {'format': _FORMAT, 'checkpoint': identity, **card, 'sha256': sums}
  )


def is_here(folder: epath.Path) -> bool:
  """Whether a folder is one of weights."""
  return (folder / CARD).exists()


def read_card(folder: epath.Path) -> dict[str, Any]:
  """What is said of the weights in a folder.

  Raises:
    UserError: if it cannot be read, or a later version of this code wrote it.
  """
  card = artifacts.read_json(folder / CARD)
  if not isinstance(card, dict) or not {'format', 'config', 'checkpoint', 'sha256'} <= card.keys():
    raise UserError(f'{folder / CARD} is not the card of exported weights (--mode export)')
  if card['format'] != _FORMAT:
    raise UserError(
      f'{folder / CARD} has format {card["format"]}, and this code reads {_FORMAT}: update the code'
    )
  return card


def read(folder: epath.Path, card: Mapping[str, Any], shapes: Shapes) -> Params:
  """The weights in a folder, for a network of these parameters.

  Raises:
    UserError: if the file is damaged, or does not fit the network.
  """
  path = folder / _WEIGHTS
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    raise UserError(f'{path} does not exist; it belongs to {CARD}') from None
  if hashlib.sha256(data).hexdigest() != card['sha256'].get(_WEIGHTS):
    raise UserError(f'{path} is damaged: it is not the file that {CARD} tells of; copy it again')
  try:
    return fit(from_bytes(data), shapes, 'weights')
  except UserError as error:
    raise UserError(f'{path} does not fit the config in {CARD}: {error}') from None
