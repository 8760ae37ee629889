"""Checkpoints of released codes, JAX or PyTorch, turned into training states of this code.

The JAX release (https://github.com/yang-song/score_sde) wrote flax.serialization bytes of
State(step, optimizer, lr, model_state, ema_rate, params_ema, rng); the PyTorch release
(https://github.com/yang-song/score_sde_pytorch) wrote `.pth` files; the consistency models of
CIFAR-10 (https://github.com/openai/consistency_models_cifar10), and the EDM that they begin with,
are bytes of State(step, lr, ema_rate, params, params_ema, model_state, opt_state, rng_state), some
with target_params. All become flat tables, name -> array; what differs in names, order and layout
is undone; and the names and shapes are compared with those of the config's network before anything
is taken over.
"""

from collections.abc import Iterable
import dataclasses
import io
import logging
import re
from typing import Any
import zipfile

from etils import epath
from flax import serialization
import jax.numpy as jnp
import numpy as np
import optax

from models.score import Params, ScoreModel
from runtime.errors import UserError
from training.flat_tables import (
  Arrays,
  fit,
  flat,
  is_conditional,
  network_parameters,
  Released,
  Shapes,
)
from training.released_torch import from_torch, read_torch
from training.step import TrainState

logger = logging.getLogger('score_sde')

# The released code has a class of its own for each block that is a variant of another here.
_RENAMED = (
  (re.compile(r'\b(ResnetBlockDDPM|AttnBlock)(?=_\d)'), r'\1pp'),
  (re.compile(r'\bCond(?=(Refine|RCU|MSF|CRP)Block_\d)'), ''),
  (re.compile(r'\bConditional(?=ResidualBlock_\d)'), ''),
)

# What the released networks without `conditional` hold and do not read: the frequencies of Fourier
# features; in the PyTorch release also a map of the embedding in every block.
_UNREAD = re.compile(r'GaussianFourierProjection_0/W|ResnetBlock\w+_\d+/Dense_0/\w+')


def load(
  path: epath.PathLike,
  model: ScoreModel,
  shape: tuple[int, ...],
  tx: optax.GradientTransformation,
  ema_rate: float,
  *,
  consistency: bool = False,
  has_target: bool = False,
) -> TrainState:
  """The training state in a released checkpoint.

  Args:
    path: the file.
    model: the score model of the config.
    shape: of its data, [B, ...].
    tx: the optimiser whose state is made.
    ema_rate: the config's, once warmed up; if the checkpoint has another one, that is said.
    consistency: whether the config is of a consistency model, not of a score model.
    has_target: whether the last average of the state is the target of one: that of the checkpoint,
      or the parameters themselves.

  Raises:
    UserError: if the file is not such a checkpoint, or does not fit.
  """
  path = epath.Path(path)
  if not path.is_file():
    raise UserError(f'--checkpoint {str(path)!r} is not a file')
  data, names = path.read_bytes(), network_parameters(model, shape)
  try:
    if path.suffix in ('.pth', '.pt') or zipfile.is_zipfile(io.BytesIO(data)):
      found = from_torch(read_torch(data), names)
    else:
      state = serialization.msgpack_restore(data)
      found = from_jcm(state) if 'opt_state' in state else from_jax(state)
  except UserError as error:
    raise UserError(f'{path}: {error}') from None
  except Exception as error:  # of msgpack and pickle, and the lookup of what is not there
    reason = ' '.join(str(error).split())[:120]
    raise UserError(
      f'{path} is not a checkpoint of the released JAX or PyTorch code '
      f'({type(error).__name__}: {reason})'
    ) from None
  _check_kind(path, found, consistency)
  if not np.isclose(found.ema_rate, ema_rate):
    logger.warning(
      '%s averaged its parameters at rate %g; from here on it is %g, set by config.model.ema_rate '
      'or config.ema.half_life',
      path, found.ema_rate, ema_rate,
    )  # fmt: skip
  try:
    return _state(_without_unread(found, names), names, tx, has_target)
  except UserError as error:
    raise UserError(f'{path} does not fit the config: {error}') from None


def _check_kind(path: epath.Path, found: Released, consistency: bool) -> None:
  """Raises UserError unless the config is of what the file holds."""
  if found.consistency and not consistency:
    raise UserError(
      f'{path}: it is a consistency model, and the config is of a score model; give one of '
      'configs/distill, with config.distill.method = cd or ct as it was trained'
    )
  if consistency and not found.consistency:
    raise UserError(
      f'{path}: it is a score model, and config.distill.method makes a consistency model of one; '
      'import it with the config of a score model, and name that workdir with --teacher'
    )


# The JAX release.


def from_jax(state: dict[str, Any]) -> Released:
  """What a released `State` holds, as flax.serialization restores it."""
  optimizer = state['optimizer']['state']
  moments = flat(optimizer['param_states'])

  def moment(name: str) -> Arrays:
    ends = f'/{name}'
    return {ours(k.removesuffix(ends)): v for k, v in moments.items() if k.endswith(ends)}

  return Released(
    step=int(state['step']),
    adam_step=int(optimizer['step']),
    ema_rate=float(state['ema_rate']),
    params={ours(k): v for k, v in flat(state['optimizer']['target']).items()},
    ema_params={ours(k): v for k, v in flat(state['params_ema']).items()},
    mu=moment('grad_ema'),
    nu=moment('grad_sq_ema'),
  )


def from_jcm(state: dict[str, Any]) -> Released:
  """What a `State` of the consistency models' code holds, as flax.serialization restores it.

  An EDM was trained by Adam with a warm-up, whose count stands behind the moments; a consistency
  model by RAdam, without. The loss of the EDM is the sum over pixels, ours half of it, so that its
  moments become those of half the gradient; the losses of the others are the same. With clipping,
  all that stands one place deeper.

  Raises:
    UserError: if its optimiser has no moments.
  """
  places = state['opt_state']
  chain = places if 'mu' in places['0'] else places['1']
  adam = chain.get('0', {})
  if 'mu' not in adam:
    raise UserError('its optimiser has no moments: it was not Adam')
  consistency = 'target_params' in state or not chain['2']
  scale = 1.0 if consistency else 0.5
  return Released(
    step=int(state['step']),
    adam_step=int(adam['count']),
    ema_rate=float(state['ema_rate']),
    params=flat(state['params']),
    ema_params=flat(state['params_ema']),
    mu={name: scale * v for name, v in flat(adam['mu']).items()},
    nu={name: scale**2 * v for name, v in flat(adam['nu']).items()},
    consistency=consistency,
    target=flat(state['target_params']) if 'target_params' in state else None,
  )


def ours(name: str) -> str:
  """Our name of a parameter of the JAX release."""
  for pattern, replacement in _RENAMED:
    name = pattern.sub(replacement, name)
  return name


def _without_unread(found: Released, names: Iterable[str]) -> Released:
  """Without the arrays that an unconditional network holds and does not read."""
  if is_conditional(names):
    return found

  def read(arrays: Arrays) -> Arrays:
    return {k: v for k, v in arrays.items() if not _UNREAD.fullmatch(k)}

  # Consistency models are conditional: no target is left to read.
  return dataclasses.replace(
    found,
    params=read(found.params),
    ema_params=read(found.ema_params),
    mu=read(found.mu),
    nu=read(found.nu),
  )


def _state(
  found: Released, names: Shapes, tx: optax.GradientTransformation, has_target: bool
) -> TrainState:
  params = fit(found.params, names, 'parameters')
  mu, nu = (fit(x, names, "Adam's moments") for x in (found.mu, found.nu))
  opt_state = optax.tree_utils.tree_set(tx.init(params), mu=mu, nu=nu, count=jnp.int32(found.step))
  # What counts for the warm-up is the step, what corrects Adam's bias is its own count.
  opt_state = optax.tree_utils.tree_set(opt_state, _is_adams, count=jnp.int32(found.adam_step))
  averages: tuple[Params, ...] = (fit(found.ema_params, names, 'moving averages'),)
  if has_target:
    averages += (fit(found.target or found.params, names, 'target parameters'),)
  return TrainState(jnp.int32(found.step), params, averages, opt_state)


def _is_adams(path: tuple[Any, ...], value: Any) -> bool:
  del value
  return getattr(path[-1], 'tuple_name', '') == 'ScaleByAdamState'
