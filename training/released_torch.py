"""Checkpoints of the PyTorch release: its names, its order, its axes, and ours from them.

https://github.com/yang-song/score_sde_pytorch wrote `.pth` files of {optimizer, model, ema, step}.
Its modules are a list, `all_modules.<i>`, in the order in which ours are created.
"""

from collections.abc import Iterable
import io
import re
from typing import Any

import numpy as np

from runtime.errors import UserError
from training.flat_tables import Arrays, is_conditional, Released


def read_torch(data: bytes) -> dict[str, Any]:
  """A `.pth` file, with NumPy arrays for tensors; nothing but arrays and containers is unpickled.

  Raises:
    UserError: if PyTorch is not installed.
  """
  try:
    import torch
  except ImportError:
    raise UserError(
      'this is a PyTorch checkpoint, and PyTorch is not installed: pip install torch'
    ) from None

  def to_numpy(x: Any) -> Any:  # not jax.tree.map, which would sort the parameters
    if isinstance(x, dict):
      return {k: to_numpy(v) for k, v in x.items()}
    if isinstance(x, list):
      return [to_numpy(v) for v in x]
    return x.numpy() if isinstance(x, torch.Tensor) else x

  return to_numpy(torch.load(io.BytesIO(data), map_location='cpu', weights_only=True))


def from_torch(content: dict[str, Any], names: Iterable[str]) -> Released:
  """What a `.pth` file holds, given the parameters of the network in the order of their creation.

  The moving averages and Adam's moments are lists in the order of the parameters; both leave out
  the frequencies of Fourier features, which are not trained.

  Raises:
    UserError: if the network is not NCSN++ or DDPM.
  """
  model = {k.removeprefix('module.'): v for k, v in content['model'].items()}
  model = {k: v for k, v in model.items() if k != 'sigmas'}  # a buffer: what the config says
  if not all(name.startswith('all_modules.') for name in model):
    raise UserError(
      'of the PyTorch release only NCSN++, DDPM++ and DDPM can be imported: its NCSN and NCSNv2 '
      'are other networks than those of the JAX release, which are here'
    )
  names = list(names)
  frequencies = [name for name in model if re.fullmatch(r'all_modules\.\d+\.W', name)]
  trained = [name for name in model if name not in frequencies]
  shadow, optimizer = content['ema']['shadow_params'], content['optimizer']
  if len(shadow) != len(trained):
    raise UserError(f'it holds {len(shadow)} moving averages for {len(trained)} parameters')
  moments = optimizer['state']
  positions = {name: i for i, name in enumerate(model)}
  if len(optimizer['param_groups'][0]['params']) == len(trained):
    positions = {name: i for i, name in enumerate(trained)}
  if not is_conditional(names):  # there the frequencies are a module that ours does not have
    model = {k: v for k, v in model.items() if k not in frequencies}
  renamed = _names_from_torch(list(model), names)

  def arrays(values: dict[str, np.ndarray]) -> Arrays:
    return {renamed[k]: _layout(renamed[k], v) for k, v in values.items()}

  def moment(name: str) -> Arrays:
    zeros = {k: np.zeros_like(v) for k, v in model.items()}
    # Adam has none of what never had a gradient.
    with_gradient = [k for k in trained if positions[k] in moments]
    return arrays(zeros | {k: moments[positions[k]][name] for k in with_gradient})

  return Released(
    step=int(content['step']),
    adam_step=int(next(iter(moments.values()))['step']),
    ema_rate=float(content['ema']['decay']),
    params=arrays(model),
    ema_params=arrays(model | dict(zip(trained, shadow, strict=True))),
    mu=moment('exp_avg'),
    nu=moment('exp_avg_sq'),
  )


def _names_from_torch(theirs: list[str], ours: Iterable[str]) -> dict[str, str]:
  """Our name of each parameter `all_modules.<i>.<rest>`.

  The modules that hold parameters stand there in the order in which ours are created; inside a
  module the names are the same, but for those of weights.
  """
  modules: dict[str, set[str]] = {}  # of the network, with the names inside them
  for name in ours:
    module, _, inside = name.partition('/')
    modules.setdefault(module, set()).add(inside)
  numbers = list(dict.fromkeys(name.split('.')[1] for name in theirs))
  if len(numbers) != len(modules):
    raise UserError(
      f'it has {len(numbers)} modules with parameters, the config makes {len(modules)}: '
      'config.model is that of another network'
    )
  module_of = dict(zip(numbers, modules, strict=True))
  names = {}
  for name in theirs:
    _, number, *path, leaf = name.split('.')
    module = module_of[number]
    weights = ('kernel', 'scale', 'weight') if leaf == 'weight' else (leaf,)
    candidates = ['/'.join([*path, weight]) for weight in weights]
    inside = next((n for n in candidates if n in modules[module]), candidates[0])
    names[name] = f'{module}/{inside}'
  return names


def _layout(name: str, x: np.ndarray) -> np.ndarray:
  """PyTorch's convolutions [O, I, H, W] and linear maps [O, I], with the axes of Flax."""
  if not name.endswith(('/kernel', '/weight')):
    return x
  return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def to_torch(params: Arrays, names: Iterable[str]) -> Arrays:
  """The parameters as the PyTorch release has them in `all_modules`: its names, its axes.

  Args:
    params: by our names.
    names: all of them, in the order of their creation; of a network that embeds the time, and has
      no module without parameters, nor one that the release lacks.
  """
  numbers: dict[str, int] = {}
  theirs = {}
  for name in names:
    module, *path, leaf = name.split('/')
    number = numbers.setdefault(module, len(numbers))
    leaf = 'weight' if leaf in ('kernel', 'scale', 'weight') else leaf
    x = params[name]
    if name.endswith(('/kernel', '/weight')):
      x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    theirs['.'.join(['all_modules', str(number), *path, leaf])] = np.ascontiguousarray(x)
  return theirs
