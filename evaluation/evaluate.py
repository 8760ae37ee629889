"""What an evaluation measures of a checkpoint: loss, bits per dimension, samples.

Each function returns its part of the report. What takes long is done in `rounds`, so that an
evaluation that is stopped and started again repeats at most one.
"""

from collections.abc import Callable, Iterator
import dataclasses
from functools import partial
import logging
import math
import time
from typing import Any

from etils import epath
import jax
from jax import Array
import jax.numpy as jnp
from ml_collections import FrozenConfigDict
import numpy as np

from builders.setup import explicit_matching, Setup
from data import sources
from data.codec import preprocess
from evaluation import metrics
from evaluation.draw import classes_in_turn, draw
from evaluation.features import FeatureNetwork
from evaluation.metrics import Moments
from evaluation.reference import Reference
from likelihood import bits_per_dim, Likelihood
import losses
from runtime import processes
from runtime.errors import UserError
from training.checkpoints import Checkpoints
from training.step import Batch, eval_step
from workdir import artifacts, rounds
from workdir.progress import Bar
from workdir.reports import Report
from workdir.rounds import Arrays

logger = logging.getLogger('score_sde')

WAIT_SECONDS = 30.0  # between two looks for a new checkpoint
LossSums = Callable[[Any, Batch, Array], dict[str, Array]]


def steps(config: FrozenConfigDict, checkpoints: Checkpoints) -> Iterator[int]:
  """The steps of the checkpoints begin_ckpt to end_ckpt, in units of snapshot_freq, ascending.

  With `eval.wait` it waits for those that training has still to write; without, the newest stands
  for them if there is none.

  Raises:
    UserError: if there is none and will be none.
  """
  unit, begin, end = config.training.snapshot_freq, config.eval.begin_ckpt, config.eval.end_ckpt
  last, done = min(end * unit, config.training.n_iters), begin * unit - 1
  while True:
    found = [step for step in checkpoints.steps() if done < step <= end * unit]
    step = processes.from_first(min(found, default=-1))
    if step >= 0:
      yield step
      done = step
    elif not config.eval.wait or done >= last:
      break
    else:
      logger.info('waiting for the next checkpoint, up to step %d', last)
      time.sleep(WAIT_SECONDS)
  if done >= begin * unit:
    return
  there = f'checkpoints {begin} to {end} (steps {begin * unit} to {end * unit})'
  others = checkpoints.steps()
  newest = processes.from_first(others[-1] if others else -1)
  if not 0 <= newest < (end + 1) * unit:  # the last step may be one after a multiple
    raise UserError(
      f'no {there}; there are those of steps {others}: set config.eval.begin_ckpt and end_ckpt, '
      f'which count in units of config.training.snapshot_freq = {unit}'
    )
  logger.warning('no %s yet; evaluating the newest, of step %d', there, newest)
  yield newest


def compile_loss_sums(setup: Setup) -> LossSums:
  """(params, batch, key) -> the sums [] of the losses of the examples that its 'mask' marks.

  Where the true score is known, 'score_error' is the explicit score matching loss beside the
  'loss' of training.
  """
  objectives = {'loss': setup.objective}
  if setup.true_score_fn is not None:
    matching = explicit_matching(setup.true_score_fn)
    objectives['score_error'] = dataclasses.replace(setup.objective, matching=matching)

  def loss_sums(params: Any, batch: Batch, rng: Array) -> dict[str, Array]:
    def total(objective: losses.Objective) -> Array:
      each = eval_step(params, batch, rng, model=setup.model, objective=objective)
      return (each * batch['mask']).sum()

    return {name: total(objective) for name, objective in objectives.items()}

  return jax.jit(loss_sums, out_shardings=setup.devices.replicated)


def evaluate_loss(
  setup: Setup, loss_sums: LossSums, held_out: sources.Source, params: Any
) -> Report:
  """The means of `loss_sums` over the held-out data, of which each counts once."""
  sums, began = [], time.monotonic()
  size, n = setup.config.eval.batch_size, len(held_out)
  with Bar('loss', n, unit='examples') as bar:
    for i, batch in enumerate(sources.eval_batches(held_out, size, **processes.share())):
      sums.append(
        jax.device_get(loss_sums(params, setup.devices.put(batch), setup.keys.key('eval', i)))
      )
      bar.update(min((i + 1) * size, n))
  means = {name: sum(float(part[name]) for part in sums) / n for name in sums[0]}
  return means | {'loss_images': n, 'loss_seconds': time.monotonic() - began}


def has_bpd(setup: Setup, report: Report) -> bool:
  """Whether a report holds the bits per dimension that the config asks for."""
  wanted = setup.config.eval
  return report.get(f'bpd_{wanted.bpd_dataset}_repeats') == wanted.bpd_repeats


def evaluate_bpd(setup: Setup, source: sources.Source, params: Any, folder: epath.Path) -> Report:
  """Bits per dimension of uniformly dequantised images (Sec. 4.3), each counted once per repeat.

  The noise and the probe of an image are a function of the seed, the repeat and the image's number,
  so that the size of the batches matters only within the tolerance of the solver. The standard
  error is that of the mean over images of what the repeats give on average.
  """
  wanted, n_images = setup.config.eval, len(source)
  size, repeats = wanted.batch_size, wanted.bpd_repeats
  per_repeat = math.ceil(n_images / size)
  values, nfes, seconds = np.zeros((repeats, n_images)), [], 0.0
  likelihood = Likelihood(setup.model.sde)
  dequantize = jax.jit(_dequantize, static_argnums=3, out_shardings=setup.devices.batch)

  def bits_of(batch: sources.Batch, repeat: int, first: int) -> Arrays:
    images, rng = setup.devices.put(batch['data']), setup.keys.key('bpd', repeat)
    x0, rngs = dequantize(rng, first, images, setup.model.centered)
    labels = setup.devices.put(batch['label']) if setup.model.num_classes else None
    logp, _, nfe = likelihood(rngs, setup.model.bind(params, labels=labels), x0)
    bits = bits_per_dim(logp, math.prod(setup.data_shape), setup.model.centered)
    return {'bpd': processes.gather(bits)[: n_images - first], 'nfe': np.array(nfe, np.int64)}

  with Bar('bits/dim', repeats * n_images, unit='images') as bar:
    for repeat in range(repeats):
      for i, batch in enumerate(sources.eval_batches(source, size, **processes.share())):
        begin, end = i * size, min((i + 1) * size, n_images)
        path = folder / f'bpd_{wanted.bpd_dataset}_{repeat * per_repeat + i}.npz'
        make = partial(bits_of, batch, repeat, begin)
        arrays = rounds.kept_or_made(path, 'bpd', end - begin, make)
        values[repeat, begin:end] = arrays['bpd']
        nfes.append(int(arrays['nfe']))
        seconds += float(arrays['seconds'])
        bar.update(repeat * n_images + end)
  of_images, name = values.mean(0), f'bpd_{wanted.bpd_dataset}'
  return {
    name: float(of_images.mean()),
    f'{name}_std_error': float(of_images.std(ddof=1) / math.sqrt(n_images)),
    f'{name}_images': n_images,
    f'{name}_repeats': repeats,
    f'{name}_nfe': float(np.mean(nfes)),
    f'{name}_seconds': seconds,
  }


def _dequantize(rng: Array, first: Array, images: Array, centered: bool) -> tuple[Array, Array]:
  """Images as the network sees them [B, H, W, C], and keys [B], by the number of each image."""
  numbers = first + jnp.arange(len(images))
  rngs = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(rng, number)))(numbers)

  def one(rng: Array, image: Array) -> Array:
    return preprocess(rng, image, centered, False, True)

  return jax.vmap(one)(rngs[:, 0], images), rngs[:, 1]


def step_folder(out: epath.Path, step: int) -> epath.Path:
  return out / f'step_{step}'


def has_samples(
  setup: Setup, report: Report, network: FeatureNetwork | None, reference: Reference | None
) -> bool:
  """Whether a report tells of as many samples as the config asks for, and of this comparison."""
  if report.get('samples') != setup.config.eval.num_samples:
    return False
  if network is None:
    return True
  assert reference is not None  # as there is a network
  return report.get(f'reference_{network.name}') == reference.identity


def evaluate_samples(
  setup: Setup,
  params: Any,
  step: int,
  folder: epath.Path,
  network: FeatureNetwork | None = None,
  reference: Reference | None = None,
) -> Report:
  """Draws samples and compares their features with those of the reference, in rounds of a batch.

  Raises:
    FloatingPointError: if samples are not finite, or a solver does not come to its end.
  """
  wanted, first, features = setup.config.eval, None, []
  # The last round is as large as the others, so that samples do not depend on their number.
  size = min(wanted.batch_size, wanted.num_samples)
  mesh = setup.devices.mesh
  assert isinstance(mesh, jax.sharding.Mesh)  # not one without devices
  extract = network.compile(mesh) if network else None
  nfes, seconds, feature_seconds = [], 0.0, 0.0
  with Bar('sample', wanted.num_samples, unit='samples') as bar:
    for i, begin in enumerate(range(0, wanted.num_samples, size)):
      n = min(size, wanted.num_samples - begin)
      progress = partial(_show, bar, begin, n)
      make = partial(_draw_round, setup, params, step, i, size, n, progress)
      arrays = rounds.kept_or_made(folder / f'samples_{i}.npz', 'samples', n, make)
      samples = arrays['samples']
      nfes.append(int(arrays['nfe']))
      seconds += float(arrays['seconds'])
      first = samples if first is None else first
      if network and extract:
        path = folder / f'features_{network.name}_{i}.npz'
        make = partial(_features_round, extract, samples)
        arrays = rounds.kept_or_made(path, 'features', n, make, network.version)
        features.append(arrays['features'])
        feature_seconds += float(arrays['seconds'])
      bar.update(begin + n)
  assert first is not None  # there is a round
  artifacts.write_samples(folder / 'samples.png', first, most=100)
  report = {'samples': wanted.num_samples, 'nfe': float(np.mean(nfes)), 'sample_seconds': seconds}
  if network:
    assert reference is not None  # as there is a network
    began = time.monotonic()
    report |= distances(np.concatenate(features), network, reference, mesh)
    report |= {f'reference_{network.name}': reference.identity}
    report |= {'feature_seconds': feature_seconds, 'distance_seconds': time.monotonic() - began}
  return report


def _draw_round(
  setup: Setup,
  params: Any,
  step: int,
  i: int,
  size: int,
  n: int,
  progress: Callable[[float], None],
) -> Arrays:
  rng = jax.random.fold_in(setup.keys.key('sample', step), i)
  labels = classes_in_turn(setup, i * size, size)
  samples, nfe = draw(setup, params, rng, size, progress, labels)
  extra = {} if labels is None else {'labels': labels[:n]}
  return {'samples': samples[:n], 'nfe': np.array(nfe, np.int64), **extra}


def _features_round(extract: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> Arrays:
  n, devices = len(images), jax.device_count()
  rows = np.arange(math.ceil(n / devices) * devices).clip(max=n - 1)
  return {'features': extract(processes.own_rows(images[rows]))[:n]}


def _show(bar: Bar, done: int, n: int, fraction: float) -> None:
  """Moves a bar to `done` and a fraction of the next n."""
  bar.update(done + fraction * n)


def distances(
  x: np.ndarray,
  network: FeatureNetwork,
  reference: Reference,
  mesh: jax.sharding.Mesh,
) -> Report:
  """All that `evaluation` knows of features [N, d] of samples, in the order of the samples."""
  moments = Moments.of(x)
  kernel, kernel_std = metrics.kernel_distance(x, reference.features)
  precision, recall = metrics.precision_recall(x, reference.features, mesh)
  report = {
    network.frechet: metrics.frechet_distance(
      moments.mean, moments.cov, reference.mean, reference.cov
    ),
    network.kernel: kernel,
    f'{network.kernel}_std': kernel_std,
    f'precision{network.suffix}': precision,
    f'recall{network.suffix}': recall,
  }
  if network.logits:
    score, score_std = metrics.inception_score(network.logits(x))
    report |= {'inception_score': score, 'inception_score_std': score_std}
  return report
