"""The rows of `benchmarks.accelerator`: each is a function that returns figures by name.

A figure is a number, or a word. 'check' is 'ok' or 'WRONG', for numbers that have to be right.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import dataclasses
from functools import cache, partial
import os
from pathlib import Path
import signal
import tempfile
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from benchmarks import common, evaluation, forms, golden, input_pipeline, sampling, training
from benchmarks.likelihood import both
from builders.setup import Setup
from configs.vp import digits
from data import sources
from data.images import ImageSource
from likelihood import draw_probes, Likelihood, VolumeChange
import run_lib
from sampling import ProbabilityFlow
from training import loop

Figures = dict[str, float | str]
Found = dict[str, Figures]  # of the rows so far, by name
OK, WRONG = 'ok', 'WRONG'
TOLERANCE = 1e-4  # of golden numbers at full precision


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table: its name, and what measures its figures, given those before it."""

  name: str
  measure: Callable[[Found], Figures]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How large everything is that is measured.

  Attributes:
    network: changes to the configs of the networks.
    batch: images of a training step.
    evaluations: images of an evaluation of the network, a small and a large number.
    sampled: images that samplers draw, and likelihoods are of.
    times: of a sampler's grid.
    matrix: rows of the matrices whose product gives the peak.
    images: shape of what is convolved for it.
    layer: shape of what single layers take.
    inception: images that features are of.
    files: images of the folder that the input pipeline reads.
    steps: of the run that is stopped and goes on.
    calls: of the training step, beside the same within training.
    seconds: that each timing takes, about.
  """

  network: dict[str, Any]
  batch: int
  evaluations: tuple[int, int]
  sampled: int
  times: int
  matrix: int
  images: tuple[int, int, int, int]
  layer: tuple[int, int, int, int]
  inception: int
  files: int
  steps: int
  calls: int
  seconds: float


FULL = Sizes(
  network={},
  batch=128,
  evaluations=(256, 1024),
  sampled=256,
  times=20,
  matrix=8192,
  images=(128, 64, 64, 256),
  layer=(512, 32, 32, 128),
  inception=2048,
  files=4096,
  steps=400,
  calls=50,
  seconds=1.0,
)
QUICK = Sizes(
  network={
    'model.nf': 8,
    'model.ch_mult': (1,),
    'model.num_res_blocks': 1,
    'model.attn_resolutions': (),  # but for the one in the middle
    'data.image_size': 16,
  },
  batch=8,
  evaluations=(8, 16),
  sampled=4,
  times=4,
  matrix=512,
  images=(4, 32, 32, 64),
  layer=(4, 16, 16, 16),
  inception=4,
  files=64,
  steps=16,
  calls=10,
  seconds=0.05,
)

NETWORKS = ('ncsnpp', 'ddpmpp')
DTYPES = ('bfloat16', 'float32')
SAMPLERS = {
  'PC': 'PC, reverse diffusion + Langevin',
  'ODE': 'probability flow, RK45',
  'DPM-Solver++': 'DPM-Solver++ 2M',
}
PRODUCTS = (('float32', 'highest'), ('float32', 'default'), ('bfloat16', 'default'))


def rows(sizes: Sizes) -> list[Row]:
  """All of them. What says most comes first, then the same of the other networks and types."""
  net, dtype = NETWORKS[0], DTYPES[0]
  first = [
    *(Row(f'golden {case}', partial(golden_network, case)) for case in golden.NETWORKS[:4]),
    *(Row(f'golden steps {name}', partial(golden_steps, name)) for name in golden.SDES),
    *(
      Row(f'peak {what} {dtype} {precision}', partial(peak, sizes, what, dtype, precision))
      for what in ('matmul', 'convolution')
      for dtype, precision in PRODUCTS
    ),
    Row(f'step {net} {dtype} x5', partial(step, sizes, net, dtype, 5)),
    Row(f'evaluate {net} {dtype} {sizes.evaluations[1]}',
        partial(evaluate, sizes, net, dtype, sizes.evaluations[1])),
    *(Row(f'sampler {name}', partial(sampler, sizes, name)) for name in SAMPLERS),
    Row('sampler likelihood', partial(likelihood, sizes)),
    Row('inception', partial(inception, sizes)),
    Row('input', partial(input_rate, sizes)),
    Row('resume', partial(stop_and_resume, short_run(sizes))),
  ]  # fmt: skip
  others = [
    *(
      Row(f'step {net} {dtype} x{n}', partial(step, sizes, net, dtype, n))
      for dtype in DTYPES
      for net in NETWORKS
      for n in (5, 1)
    ),
    *(
      Row(f'evaluate {net} {dtype} {n}', partial(evaluate, sizes, net, dtype, n))
      for dtype in DTYPES
      for net in NETWORKS
      for n in sizes.evaluations
    ),
    *(
      Row(f'layer {layer}, {form}', partial(one_form, sizes, layer, form))
      for layer, (choices, _) in forms.LAYERS.items()
      for form in choices
    ),
    Row('loop', partial(training_loop, sizes)),
    *(Row(f'golden {case}', partial(golden_network, case)) for case in golden.NETWORKS[4:]),
  ]
  named = {row.name for row in first}
  return first + [row for row in others if row.name not in named]


# Right?


def at_both_precisions(measure: Callable[[], dict[str, float]]) -> Figures:
  """Errors with products at full precision, which are checked, and at the device's default.

  A CPU has one precision: there they are measured once.
  """
  with jax.default_matmul_precision('highest'):
    default = full = measure()
  if jax.default_backend() != 'cpu':
    with jax.default_matmul_precision('default'):
      default = measure()
  right = all(value < TOLERANCE for value in full.values())
  named = {f'{name}, default': value for name, value in default.items()}
  return full | named | {'check': OK if right else WRONG}


def golden_network(case: str, found: Found) -> Figures:
  """Errors of the score and of the losses of a network."""
  return at_both_precisions(partial(golden.network_errors, case))


def golden_steps(name: str, found: Found) -> Figures:
  """Errors of the steps of samplers, and of solutions of the ODE where there are golden ones."""

  def measure() -> dict[str, float]:
    ode = {'ODE': golden.ode_error(name)} if name in golden.SOLVED else {}
    return {'steps': max(golden.step_errors(name).values())} | ode

  return at_both_precisions(measure)


def short_run(sizes: Sizes) -> ConfigDict:
  """A tiny network of digits."""
  config = digits.get_config()
  config.update_from_flattened_dict(
    {'model.nf': 8, 'model.ch_mult': (1,), 'model.attn_resolutions': ()}
  )
  config.training.n_iters = sizes.steps
  return config


def stop_and_resume(config: ConfigDict, found: Found) -> Figures:
  """A run that SIGTERM stops, and that goes on, beside one that runs through."""
  config, steps = config.copy_and_resolve_references(), config.training.n_iters
  every = steps // 4  # the second save waits for the first, which so is seen in time
  config.training.update(
    snapshot_freq=steps, snapshot_freq_for_preemption=every, snapshot_sampling=False
  )
  with tempfile.TemporaryDirectory() as folder:
    whole, parts = Path(folder, 'whole'), Path(folder, 'parts')
    run_lib.train(config, str(whole))
    stopped_at, seconds = _train_until_stopped(config, parts)
    run_lib.train(config, str(parts))
    through, resumed = (jax.device_get(run_lib.load(str(run))[1]) for run in (whole, parts))
  pairs = zip(jax.tree.leaves(through), jax.tree.leaves(resumed), strict=True)
  difference = max(float(np.abs(a - b).max()) for a, b in pairs)
  exact = difference == 0 or jax.default_backend() != 'cpu'  # others may sum in another order
  return {
    'steps': steps,
    'stopped at': stopped_at,
    's to stop': seconds,
    'difference': difference,
    'check': OK if exact else WRONG,
  }


def _train_until_stopped(config: ConfigDict, folder: Path) -> tuple[int, float]:
  """Trains, and sends SIGTERM once there is a checkpoint; the step it stops at, and seconds."""
  sent: list[float] = []

  def send() -> None:
    while not over.wait(0.005):
      if _saved(folder):
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGTERM)
        return

  over, thread = threading.Event(), threading.Thread(target=send)
  ours = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # where it comes as the run ends
  thread.start()
  try:
    run_lib.train(config, str(folder))
  except SystemExit:  # what a run that is stopped ends with
    return max(_saved(folder)), time.perf_counter() - sent[0]
  finally:
    over.set()
    thread.join()
    signal.signal(signal.SIGTERM, ours)
  raise RuntimeError(f'the run of {config.training.n_iters} steps ended before it was stopped')


def _saved(folder: Path) -> list[int]:
  """The steps of the checkpoints of a run."""
  found = folder.glob('checkpoints*/*')
  return [int(path.name) for path in found if path.name.isdigit()]


# Fast?


@cache
def _peak(what: str, shape: Any, dtype: str, precision: str) -> float:
  """FLOP/s of one device."""
  measure = {'matmul': common.matmul_peak, 'convolution': common.convolution_peak}[what]
  return measure(dtype, shape, precision)


def peak(sizes: Sizes, what: str, dtype: str, precision: str, found: Found) -> Figures:
  """The most that a product or a convolution reaches on one device."""
  shape = {'matmul': sizes.matrix, 'convolution': sizes.images}[what]
  return {'TFLOP/s': _peak(what, shape, dtype, precision) / 1e12}


def _speed(sizes: Sizes, dtype: str, images: int, flop: float, seconds: float) -> Figures:
  """How fast so many images are, and which share of the devices' peak that is."""
  most = _peak('matmul', sizes.matrix, dtype, 'default') * jax.device_count()
  return {
    'ms': 1e3 * seconds,
    'images/s': images / seconds,
    '% of peak': 100 * flop / seconds / most if flop else '-',
    'GFLOP': flop / 1e9 if flop else '-',
  }


def _setup(sizes: Sizes, network: str, changes: dict[str, Any]) -> Setup:
  return common.network(f'cifar10 {network}', sizes.network | changes)


def step(sizes: Sizes, network: str, dtype: str, n: int, found: Found) -> Figures:
  """A training step, of n in one program, as training has it."""
  changes = {'training.batch_size': sizes.batch, 'training.n_jitted_steps': n}
  setup = _setup(sizes, network, changes | {'model.dtype': dtype})
  run, batch, measured = training.compile_step(setup, True, loop.compiler_options())
  state, rng = training.initial(setup), setup.keys.key('train')

  def call() -> Any:
    nonlocal state
    state, metrics = run(state, None, batch, rng)
    return metrics

  seconds = common.queued(call, sizes.seconds) / n
  return _speed(sizes, dtype, sizes.batch, measured['flop'], seconds) | {
    'MB': measured['memory'] / 1e6,
    'trace s': measured['trace'],
    'compile s': measured['compile'],
  }


def evaluate(sizes: Sizes, network: str, dtype: str, batch: int, found: Found) -> Figures:
  """One evaluation of the score."""
  setup = _setup(sizes, network, {'model.dtype': dtype})
  params = jax.device_put(common.init(setup), setup.devices.replicated)
  score_fn = setup.model.bind(params)
  x = setup.devices.put(
    np.random.default_rng(0).normal(size=(batch, *setup.data_shape)).astype('float32')
  )
  t = setup.devices.put(np.full(batch, 0.5, np.float32))
  began = time.perf_counter()
  lowered = jax.jit(lambda score_fn, x, t: score_fn(x, t)).lower(score_fn, x, t)
  traced = time.perf_counter()
  with common.no_cache():
    run = lowered.compile()
  compiled, memory = time.perf_counter(), run.memory_analysis()
  seconds = common.queued(lambda: run(score_fn, x, t), sizes.seconds)
  needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  return _speed(sizes, dtype, batch, common.flop(lowered), seconds) | {
    'MB': needed / 1e6,
    'trace s': traced - began,
    'compile s': compiled - traced,
  }


# Does the device wait?


def sampler(sizes: Sizes, name: str, found: Found) -> Figures:
  """What a sampler adds to the evaluations of the network, which are queued one after another."""
  which = SAMPLERS[name]
  measured = sampling.measure(
    f'cifar10 {NETWORKS[0]}',
    sizes.sampled,
    sizes.times,
    sizes.network | {'model.dtype': DTYPES[0]},
    [which],
    repeats=3,
  )
  row, bare = measured[which], measured[sampling.NETWORK]['evaluation']
  return _added(row['nfe'], row['evaluation'], bare) | {'without network ms': 1e3 * row['added']}


def _added(nfe: float, seconds: float, bare: float) -> Figures:
  return {
    'evaluations': nfe,
    'ms each': 1e3 * seconds,
    'network ms': 1e3 * bare,
    'added %': 100 * (seconds / bare - 1),
  }


def likelihood(sizes: Sizes, found: Found) -> Figures:
  """The same of a likelihood, whose evaluations are of the network and its pullback."""
  setup = _setup(sizes, NETWORKS[0], {'model.dtype': DTYPES[0]})
  sde, score_fn, rng = setup.model.sde, setup.model.bind(common.init(setup)), jax.random.key(0)
  x0 = jax.random.uniform(rng, (sizes.sampled, *setup.data_shape))
  probes = draw_probes(rng, x0, 'rademacher', 1)
  change, solve = (
    VolumeChange(ProbabilityFlow(score_fn, sde), probes),
    Likelihood(sde, 1e-5, 1e-2, 1e-2),
  )
  bare = common.queued(lambda: both(change, x0, jnp.float32(0.5)), sizes.seconds)
  runs = {'solution': lambda: solve(rng, score_fn, x0)}
  seconds, (_, _, nfe) = common.timed(runs, 3)['solution']
  return _added(int(nfe), seconds / int(nfe), bare)


def inception(sizes: Sizes, found: Found) -> Figures:
  """Features of images, from the host and back."""
  rate = evaluation.images_per_second(sizes.inception)
  return {'images/s': rate, 'minutes for 50,000': 50_000 / rate / 60}


def input_rate(sizes: Sizes, found: Found) -> Figures:
  """What the host delivers, beside what the fastest training step above takes."""
  setup = _setup(sizes, NETWORKS[0], {'training.batch_size': sizes.batch})
  with _photos(setup, sizes.files) as source:
    rates = input_pipeline.batches(setup, source)
  batch = common.images(setup, sizes.batch)
  moved = common.queued(lambda: setup.devices.put(batch), sizes.seconds)
  steps = [row for name, row in found.items() if name.startswith('step ') and 'images/s' in row]
  return {
    'decoded/s': sizes.batch / rates['decoded'],
    'from memory/s': sizes.batch / rates['from memory'],
    'to device/s': sizes.batch / moved,
    'a step takes/s': max((row['images/s'] for row in steps), default='-'),
  }


@contextmanager
def _photos(setup: Setup, n: int) -> Iterator[ImageSource]:
  """A folder of n images as PNG files, of noise, which takes longest to decode."""
  size = setup.config.data.image_size
  images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
  with tempfile.TemporaryDirectory() as folder:
    for i, image in enumerate(images):
      Image.fromarray(image).save(Path(folder, f'{i:05}.png'))
    yield sources.load('folder', 'train', image_size=size, num_channels=3, path=folder)


def training_loop(sizes: Sizes, found: Found) -> Figures:
  """A step of training, input and log included, beside the step alone on images already there."""
  changes = {'training.batch_size': sizes.batch, 'training.n_jitted_steps': 1}
  setup = _setup(sizes, NETWORKS[0], changes | {'model.dtype': DTYPES[0]})
  with _photos(setup, sizes.files) as source:
    seconds = input_pipeline.steps(setup, source, sizes.calls)
  alone, trained = seconds['step'], seconds['step of training']
  return {
    'ms in training': 1e3 * trained,
    'ms alone': 1e3 * alone,
    'not hidden %': 100 * (trained / alone - 1),
  }


# Which form of a layer pays?


def one_form(sizes: Sizes, layer: str, form: str, found: Found) -> Figures:
  """One form of a layer, in bfloat16."""
  measured = forms.measure(layer, form, sizes.layer, DTYPES[0], sizes.seconds / 4)
  return {
    'ms': 1e3 * measured['layer'],
    'gradient ms': 1e3 * measured['gradient'],
    'beside first': measured['error'],
  }
