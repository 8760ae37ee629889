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
from flax import serialization, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from models.score import Params, ScoreModel
from runtime.errors import UserError
from training.step import TrainState

logger = logging.getLogger('score_sde')

# By name, with slashes: ResnetBlockBigGANpp_0/Conv_0/kernel.
Arrays = dict[str, np.ndarray]
Shapes = dict[str, jax.ShapeDtypeStruct]

# The released code has a class of its own for each block that is a variant of another here.
_RENAMED = (
  (re.compile(r'\b(ResnetBlockDDPM|AttnBlock)(?=_\d)'), r'\1pp'),
  (re.compile(r'\bCond(?=(Refine|RCU|MSF|CRP)Block_\d)'), ''),
  (re.compile(r'\bConditional(?=ResidualBlock_\d)'), ''),
)

# What the released networks without `conditional` hold and do not read: the frequencies of Fourier
# features; in the PyTorch release also a map of the embedding in every block.
_UNREAD = re.compile(r'GaussianFourierProjection_0/W|ResnetBlock\w+_\d+/Dense_0/\w+')


@dataclasses.dataclass(frozen=True)
class Released:
  """What a released checkpoint holds, under the names of this code.

  Attributes:
    step: training steps taken.
    adam_step: steps that Adam counted.
    ema_rate: of the moving average.
    params, ema_params: the parameters and their moving average.
    mu, nu: Adam's first and second moments.
    consistency: whether it is a consistency model, not a score model.
    target: its target parameters, if it has any.
  """

  step: int
  adam_step: int
  ema_rate: float
  params: Arrays
  ema_params: Arrays
  mu: Arrays
  nu: Arrays
  consistency: bool = False
  target: Arrays | None = None


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


def network_parameters(model: ScoreModel, shape: tuple[int, ...]) -> Shapes:
  """The parameters of a network by name, in the order of their creation."""
  names: list[str] = []  # JAX returns trees sorted by name

  def init() -> Params:
    params = model.init(jax.random.key(0), shape)
    names.extend(flat(params))
    return params

  shapes = flat(jax.eval_shape(init))
  return {name: shapes[name] for name in names}


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


# The PyTorch release.


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
  if not _is_conditional(names):  # there the frequencies are a module that ours does not have
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


# Both.


def _is_conditional(names: Iterable[str]) -> bool:
  """Whether a network embeds the time."""
  return 'Dense_0/kernel' in names


def _without_unread(found: Released, names: Iterable[str]) -> Released:
  """Without the arrays that an unconditional network holds and does not read."""
  if _is_conditional(names):
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


def flat(tree: Any) -> dict[str, Any]:
  """Name, with slashes -> array, of a tree."""
  return traverse_util.flatten_dict(tree, sep='/')


def fit(found: Arrays, names: Shapes, what: str) -> Params:
  """The tree of the arrays, once their names and shapes are those of the network.

  Normalisations of the JAX release hold [1, 1, 1, C] where ours hold [C].

  Raises:
    UserError: naming what differs first.
  """
  fitted = {}
  for name, wanted in names.items():
    if name not in found:
      extra = [f'{k} {v.shape}' for k, v in found.items() if k not in names][:1]
      instead = f'; it has {extra[0]} instead' if extra else ''
      raise UserError(f'its {what} lack {name} {wanted.shape}{instead}')
    x = np.asarray(found[name])
    if wanted.ndim == 1 and x.shape == (1, 1, 1, *wanted.shape):
      x = x.reshape(wanted.shape)
    if x.shape != wanted.shape:
      raise UserError(
        f'{name} of its {what} has shape {x.shape}, the network of the config {wanted.shape}'
      )
    fitted[name] = jnp.asarray(x, wanted.dtype)
  for name in found:
    if name not in names:
      raise UserError(f'its {what} have {name} {found[name].shape}, the network of the config not')
  return traverse_util.unflatten_dict(fitted, sep='/')


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
