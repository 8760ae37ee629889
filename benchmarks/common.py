"""What the benchmarks of speed share: networks, the machine and its peaks, times taken in turns."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
import importlib
import math
import os
from pathlib import Path
import platform
import statistics
import time
from typing import Any

import jax
from jax import Array
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
import numpy as np

from builders.setup import build, Setup
from data import sources
from data.images import ImageSource
from runtime import start
from training import loop
from workdir import versions
from workdir.artifacts import json_text

_REDUCED = {'model.nf': 32, 'model.num_res_blocks': 2}
_NCSNPP, _DDPMPP = ('ve.cifar10', 'ncsnpp_continuous'), ('vp.cifar10', 'ddpmpp_continuous')
# By name: a config, a variant of it, and what is changed.
NETWORKS = {
  'reduced ncsnpp': (*_NCSNPP, _REDUCED),
  'reduced ddpmpp': (*_DDPMPP, _REDUCED),
  'cifar10 ncsnpp': (*_NCSNPP, {}),
  'cifar10 ddpmpp': (*_DDPMPP, {}),
  'cifar10 ncsnpp deep': ('ve.cifar10', 'ncsnpp_deep_continuous', {}),
  'ffhq_256 ncsnpp': ('ve.ffhq_256', 'ncsnpp_continuous', {}),
  'ffhq ncsnpp': ('ve.ffhq', 'ncsnpp_continuous', {}),
  'photos 32': ('vp.photos', '32', {}),
  'photos 64': ('vp.photos', '64', {}),
  'photos 128': ('vp.photos', '128', {}),
  'photos 256': ('vp.photos', '256', {}),
}
_DIMENSION = 2048  # of the matrices whose product gives the peak
_IMAGES = (16, 32, 32, 128)  # shape of what is convolved for it


def network(name: str, changes: dict[str, Any]) -> Setup:
  """What one of `NETWORKS` is built of, with changes {'section.field': value} to its config."""
  config = config_of(name)
  config.update_from_flattened_dict(changes)
  return build(config)


def config_of(name: str) -> ConfigDict:
  """The config of one of `NETWORKS`."""
  path, variant, own = NETWORKS[name]
  config: ConfigDict = importlib.import_module(f'configs.{path}').get_config(variant)
  config.update_from_flattened_dict(own)
  return config


def images(setup: Setup, batch: int) -> np.ndarray:
  """Random ones, uint8 [batch, ...]: speed does not depend on what they show."""
  return np.random.default_rng(0).integers(0, 256, (batch, *setup.data_shape), np.uint8)


def init(setup: Setup) -> Any:
  """Parameters of its network, whose program need not be fast."""
  make = jax.jit(setup.model.init, static_argnums=1, compiler_options=loop.once_options())
  return make(setup.keys.key('init'), (1, *setup.data_shape))


@contextmanager
def no_cache() -> Iterator[None]:
  """Compiles anew what is kept from earlier runs."""
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # else what was decided at the first compilation stays
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', True)
    compilation_cache.reset_cache()


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, Any]]:
  """The median time of each run and its value; in turns, after one round that compiles."""
  times, values = {name: [] for name in runs}, {}
  for _ in range(repeats + 1):
    for name, run in runs.items():
      began = time.perf_counter()
      values[name] = jax.block_until_ready(run())
      times[name].append(time.perf_counter() - began)
  return {name: (statistics.median(times[name][1:]), values[name]) for name in runs}


@jax.jit
def _matmul(a: Array) -> Array:
  return a @ a


@jax.jit
def _convolve(x: Array, kernel: Array) -> Array:
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def matmul_peak(dtype: str, dimension: int, precision: str | None = None) -> float:
  """FLOP/s that a product of two square matrices reaches, at its best.

  `precision` is one of JAX's, such as 'highest'; by default what JAX's default is.
  """
  a = jax.random.uniform(jax.random.key(0), (dimension, dimension), dtype)
  with jax.default_matmul_precision(precision):
    return 2 * dimension**3 / _shortest(lambda: _matmul(a))


def convolution_peak(
  dtype: str, images: tuple[int, int, int, int], precision: str | None = None
) -> float:
  """FLOP/s that a 3x3 convolution of images [B, H, W, C] reaches, with as many channels out."""
  rng, channels = jax.random.key(0), images[-1]
  x = jax.random.uniform(rng, images, dtype)
  kernel = jax.random.uniform(rng, (3, 3, channels, channels), dtype)
  with jax.default_matmul_precision(precision):
    return 2 * x.size * 9 * channels / _shortest(lambda: _convolve(x, kernel))


def _shortest(call: Callable[[], Any]) -> float:
  """Seconds of the shortest of eight calls."""
  times = []
  for _ in range(8):
    began = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - began)
  return min(times)


def peaks(dtype: str) -> dict[str, float]:
  """FLOP/s of a matrix product and of a 3x3 convolution of 128 channels, at their best."""
  return {
    'matmul': matmul_peak(dtype, _DIMENSION),
    'convolution': convolution_peak(dtype, _IMAGES),
  }


def flop(lowered: jax.stages.Lowered) -> float:
  """That XLA counts in a program before it is optimised; of a loop one turn. 0 if it doesn't."""
  return (lowered.cost_analysis() or {}).get('flops', 0.0)


def queued(call: Callable[[], Any], seconds: float) -> float:
  """Seconds of a call of the device, of which many wait in its queue, as in training.

  So what Python does between calls counts only where the device waits for it. The first call
  compiles; then three rounds take about so many seconds in all, and the median counts.
  """

  def each(n: int) -> float:
    began = time.perf_counter()
    for _ in range(n):
      value = call()
    jax.block_until_ready(value)
    return (time.perf_counter() - began) / n

  each(1)
  n = min(max(2, math.ceil(seconds / 3 / each(1))), 50)  # results of all may be in memory
  return statistics.median(each(n) for _ in range(3))


def machine() -> dict[str, Any]:
  """Versions, devices, processor, and the settings that speed depends on."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    processor = next(line for line in lines if line.startswith('model name')).partition(': ')[2]
  except (OSError, StopIteration):  # not Linux, or a processor without a name
    processor = platform.processor()
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  names = ('XLA_FLAGS', 'GLIBC_TUNABLES')
  settings = {name: os.environ[name] for name in names if os.environ.get(name)}
  return versions.here() | {'processor': processor, 'cores': cores} | settings


def parser(doc: str) -> argparse.ArgumentParser:
  """With the flag that every benchmark has; its command gets the pages that a run gets."""
  start.use_large_pages()
  made = argparse.ArgumentParser(description=doc.partition('\n')[0])
  made.add_argument('--json', metavar='PATH', help='write the numbers')
  return made


def network_parser(doc: str) -> argparse.ArgumentParser:
  """The same, and which network sees how many images."""
  made = parser(doc)
  made.add_argument('--network', choices=NETWORKS, default='reduced ncsnpp')
  made.add_argument('--batch', type=int, default=16, help='images (16)')
  return made


def add_data_flags(parser: argparse.ArgumentParser) -> None:
  """Which images; see `load`."""
  parser.add_argument('--dataset', default='digits', help='config.data.dataset (digits)')
  parser.add_argument('--path', default='', help='config.data.path')
  parser.add_argument('--data-dir', default='', help='config.data.tfds_dir')


def load(args: argparse.Namespace, setup: Setup, split: str) -> ImageSource:
  """The images that the flags name, of the size that the network takes."""
  data = setup.config.data
  sizes = {'image_size': data.image_size, 'num_channels': data.num_channels}
  return sources.load(args.dataset, split, path=args.path, data_dir=args.data_dir, **sizes)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Rows of text and numbers, the latter with three figures, under their heads."""
  cells = [list(head)]
  cells += [[three_figures(value) for value in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = []
  for first, *others in cells:
    aligned = (f'{cell:>{width}}' for cell, width in zip(others, widths[1:], strict=True))
    lines.append('  '.join([f'{first:{widths[0]}}', *aligned]))
  return '\n'.join(lines)


def three_figures(value: float | str) -> str:
  """A number, as an int is or with three figures; text as it is."""
  if isinstance(value, str | int):
    return str(value)
  if value and abs(value) < 1e-4:
    return f'{value:.1e}'
  decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
  return f'{value:.{max(0, decimals)}f}'


def report(text: str, results: Any, path: str | None) -> None:
  """Prints the table under the machine; writes both as JSON where there is a path."""
  here = machine()
  print('; '.join(f'{name} {value}' for name, value in here.items()))
  print(f'\n{text}')
  if path:
    Path(path).write_text(json_text({'machine': here, 'results': results}, indent=2) + '\n')
