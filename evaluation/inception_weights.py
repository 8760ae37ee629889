"""The weights of the Inception network of FID: downloaded, checked and converted once, then kept.

They come as a PyTorch file from https://github.com/mseitzer/pytorch-fid, converted there from
TensorFlow's graph of December 2015. Reading it takes PyTorch, once on a machine; the converted
weights are kept in `$XDG_CACHE_HOME/score_sde/`, by default below `~/.cache`.
"""

from collections.abc import Mapping
import hashlib
import http.client
import logging
import os
from pathlib import Path
from typing import Any
import urllib.request

from flax import traverse_util
import jax
import numpy as np

from evaluation.inception import CLASSES, FEATURES, InceptionV3
from runtime.errors import UserError
from training.released_torch import read_torch

logger = logging.getLogger('score_sde')

NAME = 'pt_inception-2015-12-05-6726825d.pth'
URL = f'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAME}'
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
_BN_EPS = 1e-3
_HELP = f'download {URL} yourself, and name the file in config.eval.inception_path'

Params = dict[str, Any]


def load(path: str = '') -> Params:
  """The parameters of `InceptionV3`, and 'fc', its last layer.

  Args:
    path: the file of weights, `NAME`, or an `.npz` that this function kept; empty to download the
      weights where they were never converted before.

  Raises:
    UserError: if the file cannot be had, is another one, or PyTorch is missing to read it.
  """
  if path.endswith('.npz'):
    return _load_converted(Path(path).expanduser())
  if path:
    data = _read(path)
  cache = _cache()
  if cache.exists():
    return _load_converted(cache)
  params = convert(read_torch(data if path else _download()))
  try:
    _keep(params, cache)
  except OSError as error:
    logger.warning('cannot keep the converted weights in %s (%s)', cache, error.strerror)
  return params


def _keep(params: Params, cache: Path) -> None:
  cache.parent.mkdir(parents=True, exist_ok=True)
  temporary = cache.with_name(f'.{cache.name}.{os.getpid()}.tmp')  # others may do the same now
  try:
    with temporary.open('wb') as file:
      np.savez(file, sha256=SHA256, **traverse_util.flatten_dict(params, sep='/'))
    temporary.replace(cache)
  finally:
    temporary.unlink(missing_ok=True)


def _cache() -> Path:
  root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(root, 'score_sde', 'inception-2015-12-05.npz')


def _load_converted(file: Path) -> Params:
  try:
    with np.load(file, allow_pickle=False) as arrays:
      flat = dict(arrays)
  except FileNotFoundError:
    raise UserError(f'config.eval.inception_path={str(file)!r} does not exist; {_HELP}') from None
  except Exception as error:  # zipfile, zlib and NumPy raise many kinds
    raise UserError(f'{file} is damaged ({error}); remove it, and it is made again') from None
  source = str(flat.pop('sha256', 'none'))
  if source != SHA256 or {name: x.shape for name, x in flat.items()} != shapes():
    raise UserError(
      f'{file} was not converted from the weights with sha256 {SHA256}, it names {source}; '
      'remove it, and it is made again'
    )
  return traverse_util.unflatten_dict(flat, sep='/')


def _read(path: str) -> bytes:
  try:
    data = Path(path).expanduser().read_bytes()
  except OSError as error:
    raise UserError(f'config.eval.inception_path={path!r}: {error.strerror}; {_HELP}') from None
  return _checked(data, path)


def _download() -> bytes:
  logger.info('downloading the weights of Inception from %s', URL)
  try:
    with urllib.request.urlopen(URL, timeout=60) as response:
      return _checked(response.read(), URL)
  except (OSError, http.client.HTTPException) as error:  # the latter if it breaks off
    reason = ' '.join(str(error).split())
    raise UserError(f'cannot download {URL} ({reason}); {_HELP}') from None


def _checked(data: bytes, source: str) -> bytes:
  found = hashlib.sha256(data).hexdigest()
  if found != SHA256:
    raise UserError(
      f'{source} has sha256 {found}, and the weights that FID is defined by have {SHA256}; {_HELP}'
    )
  return data


def convert(content: Mapping[str, np.ndarray]) -> Params:
  """From the PyTorch names to the Flax tree, with batch normalisation in kernels and biases.

  Raises:
    UserError: naming the first array that is missing, unknown or of another shape.
  """
  found = {k: v for k, v in content.items() if not k.endswith('.num_batches_tracked')}
  wanted, flat = _torch_shapes(), dict[str, np.ndarray]()
  for name, shape in wanted.items():
    if name not in found:
      raise UserError(f'these are not the weights of Inception: {name} {shape} is missing')
    if np.shape(found[name]) != shape:
      raise UserError(
        f'these are not the weights of Inception: {name} is {np.shape(found[name])}, not {shape}'
      )
  for name in found:
    if name not in wanted:
      raise UserError(f'these are not the weights of Inception: they have {name}, it does not')
  for name in [k.removesuffix('/kernel') for k in shapes() if k.endswith('/kernel')]:
    convert_layer = _linear if name == 'fc' else _convolution
    kernel, bias = convert_layer(found, name.replace('/', '.'))
    flat |= {f'{name}/kernel': kernel, f'{name}/bias': bias}
  return traverse_util.unflatten_dict(flat, sep='/')


def _torch_shapes() -> dict[str, tuple[int, ...]]:
  """The shapes in the PyTorch file, by name."""
  wanted = {}
  for name, shape in shapes().items():
    layer, kind = name.replace('/', '.').rsplit('.', 1)
    if layer == 'fc':
      wanted[f'fc.{"weight" if kind == "kernel" else "bias"}'] = shape[::-1]
    elif kind == 'kernel':
      height, width, n_in, n_out = shape
      wanted[f'{layer}.conv.weight'] = (n_out, n_in, height, width)
      parts = ('weight', 'bias', 'running_mean', 'running_var')
      wanted |= {f'{layer}.bn.{part}': (n_out,) for part in parts}
  return wanted


def _convolution(content: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
  gamma, beta, mean, variance = (
    np.asarray(content[f'{name}.bn.{part}'], np.float64)
    for part in ('weight', 'bias', 'running_mean', 'running_var')
  )
  scale = gamma / np.sqrt(variance + _BN_EPS)
  kernel = np.asarray(content[f'{name}.conv.weight'], np.float64).transpose(2, 3, 1, 0) * scale
  return kernel.astype(np.float32), (beta - mean * scale).astype(np.float32)


def _linear(content: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
  kernel, bias = (np.asarray(content[f'{name}.{part}'], np.float32) for part in ('weight', 'bias'))
  return kernel.T, bias


def shapes() -> dict[str, tuple[int, ...]]:
  """The shapes of all parameters, by name."""
  image = jax.ShapeDtypeStruct((1, 8, 8, 3), np.uint8)
  params = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)['params']
  flat = {name: x.shape for name, x in traverse_util.flatten_dict(params, sep='/').items()}
  return flat | {'fc/kernel': (FEATURES, CLASSES), 'fc/bias': (CLASSES,)}
