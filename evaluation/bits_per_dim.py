"""The likelihood of images, or a bound on it, in bits per dimension."""

from collections.abc import Callable, Sequence
import dataclasses
from functools import cached_property, partial
import math
from typing import Protocol

from etils import epath
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from data.batches import eval_batches
from data.codec import Codec
from data.images import Batch, Source
from evaluation.evaluate import Measurement
from likelihood import bits_per_dim, importance_weighted, LogDensity
from models.score import Params, ScoreModel
from runtime import processes
from runtime.devices import Devices, Keys
from training.step import told_in_evaluation
from workdir import artifacts, rounds
from workdir.progress import Bar
from workdir.reports import Report
from workdir.rounds import Arrays


@dataclasses.dataclass(frozen=True)
class Estimator:
  """What bits per dimension are computed by.

  Attributes:
    name: in a report, and in the names of files: bpd or bound.
    density: estimates log p(x_0), several times over.
    of: what it averages over beside images and dequantisation: probes, or draws of all times.
    n: how many estimates it makes of an image.
    choices: what else a report should say of it, such as tolerances.
    usual: a report that does not say how many estimates there were is of so many.
  """

  name: str
  density: LogDensity
  of: str
  n: int
  choices: Report
  usual: int = 1

  @property
  def version(self) -> str:
    """What the files of rounds depend on, beside what a folder of results is fixed to."""
    told = ', '.join(f'{name} {value}' for name, value in self.choices.items())
    return '' if self.n == self.usual and self.name == 'bpd' else f'{self.n} {self.of}, {told}'


UNIFORM = 'uniform'


class Dequantization(Protocol):
  """How x_0 is drawn of stored images: the noise between their levels."""

  @property
  def name(self) -> str:
    """In a report."""

  def __call__(self, rngs: Array, images: Array) -> tuple[Array, Array]:
    """(keys [B], images [B, ...]) -> x_0, like them, and log q [B] of that noise, per level."""


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Noise of density 1 over a level (Sec. 4.3)."""

  codec: Codec
  name = UNIFORM

  def __call__(self, rngs: Array, images: Array) -> tuple[Array, Array]:
    return jax.vmap(self.codec.dequantized)(rngs, images), jnp.zeros(len(images))


@dataclasses.dataclass(frozen=True)
class BitsPerDim(Measurement):
  """Bits per dimension of dequantised images (Sec. 4.3), each counted once per repeat.

  The noise and the probes of an image are a function of the seed, the repeat and the image's
  number, so that the size of the batches matters only within the tolerance of the solver. The
  standard error is that of the mean over images of what the repeats give on average;
  `parts_of_error` tells its parts apart. A table, <name>.csv, has each image by its number.

  With several samples of an image's noise in each repeat, their densities are averaged, not
  the logarithms of these (`importance_weighted`): what is measured comes nearer to the likelihood
  of the levels themselves, from above.

  Attributes:
    model: the score model.
    estimator: measures log p(x_0).
    codec: says how wide the levels of images are.
    dequantization: makes x_0 of the images.
    source: the images.
    split: 'train' or 'test', of which they are.
    repeats: how often each image is dequantised.
    samples: of its noise each time.
    batch_size: of all devices together.
    devices: which share a batch.
    keys: of the run.
  """

  model: ScoreModel
  estimator: Estimator
  codec: Codec
  dequantization: Dequantization
  source: Source
  split: str
  repeats: int
  samples: int
  batch_size: int
  devices: Devices
  keys: Keys

  @property
  def name(self) -> str:
    """In a report, and in the names of files."""
    return f'{self.estimator.name}_{self.split}'

  @property
  def class_names(self) -> Sequence[str]:
    return self.source.class_names

  def is_in(self, report: Report) -> bool:
    by, name = self.estimator, self.name
    if name not in report:
      return False
    there = {what: report.get(f'{name}_{what}', value) for what, value in by.choices.items()}
    n = report.get(f'{name}_{by.of}', by.usual)
    samples = report.get(f'{name}_importance_samples', 1)
    noise = report.get(f'{name}_dequantization', UNIFORM)
    measured = report[f'{name}_repeats'], samples, noise, n, there
    wanted = self.repeats, self.samples, self.dequantization.name, by.n, by.choices
    return measured == wanted

  def measure(self, params: Params, step: int, folder: epath.Path) -> Report:
    values, nfe, seconds = self.of_images(params, folder)
    of_images, by, n_images = values.mean((0, 1)), self.estimator, len(self.source)
    each = _table(np.arange(n_images), values)
    artifacts.write(folder / f'{self.name}.csv', each.encode())
    std_error = None  # which one image alone does not tell
    if n_images > 1:
      std_error = float(of_images.std(ddof=1) / math.sqrt(n_images))
    report = {
      '': float(of_images.mean()),
      '_std_error': std_error,
      **{f'_error_of_{part}': error for part, error in parts_of_error(values, by.of).items()},
      '_images': n_images,
      '_repeats': self.repeats,
      '_importance_samples': self.samples,
      '_dequantization': self.dequantization.name,
      f'_{by.of}': by.n,
      **{f'_{name}': value for name, value in by.choices.items()},
      '_nfe': nfe,
      '_seconds': seconds,
    }
    return {self.name + name: value for name, value in report.items()}

  def of_images(self, params: Params, folder: epath.Path) -> tuple[np.ndarray, float, float]:
    """Bits per dimension [repeats, estimates, images], evaluations on average, and seconds."""
    size, repeats, n_images = self.batch_size, self.repeats, len(self.source)
    by, per_repeat = self.estimator, math.ceil(n_images / size)
    version = by.version if self.samples == 1 else f'{by.version}; {self.samples} samples'
    if self.dequantization.name != UNIFORM:
      version += f'; {self.dequantization.name}'
    values, nfes, seconds = np.zeros((repeats, by.n, n_images)), [], 0.0
    with Bar('bits/dim', repeats * n_images, unit='images') as bar:
      for repeat in range(repeats):
        for i, batch in enumerate(eval_batches(self.source, size, **processes.share())):
          begin, end = i * size, min((i + 1) * size, n_images)
          path = folder / f'{self.name}_{repeat * per_repeat + i}.npz'
          make = partial(self._round, params, batch, repeat, begin)
          arrays = rounds.kept_or_made(path, 'bpd', end - begin, make, version)
          values[repeat, :, begin:end] = arrays['bpd'].reshape(end - begin, by.n).T
          nfes.append(int(arrays['nfe']))
          seconds += float(arrays['seconds'])
          bar.update(repeat * n_images + end)
    return values, float(np.mean(nfes)), seconds

  def _round(self, params: Params, batch: Batch, repeat: int, first: int) -> Arrays:
    """Of a batch whose first image has the number `first`: 'bpd' [n] or [n, estimates]."""
    stored = self.devices.put(batch)
    images = stored['data']
    score_fn = self.model.bind(params, **told_in_evaluation(stored, self.model, self.codec))
    rngs = self._keys_of(self.keys.key('bpd', repeat), first, images)
    logp, log_q, nfe = [], [], 0
    for sample in range(self.samples):
      rngs_noise = rngs[:, 0]
      if sample:
        rng = self.keys.key('bpd_samples', repeat * self.samples + sample)
        rngs_noise = self._keys_of(rng, first, images)[:, 0]
      x0, density = self._dequantized(rngs_noise, images)
      estimates, evaluations = self.estimator.density.estimates(rngs[:, 1], score_fn, x0)
      logp.append(estimates)
      log_q.append(density)
      nfe += evaluations
    logp = importance_weighted(jnp.stack(logp), jnp.stack(log_q))
    bits = bits_per_dim(logp, self.codec.dim, self.codec.level_width)
    there = len(self.source) - first
    each = processes.gather(bits).T[:there]  # of all processes, which cannot be iterated over
    return {'bpd': each[:, 0] if self.estimator.n == 1 else each, 'nfe': np.array(nfe, np.int64)}

  @cached_property
  def _keys_of(self) -> Callable[[Array, int, Array], Array]:
    """(key, first, images [B, H, W, C]) -> two keys for each, by its number."""

    def keys(rng: Array, first: Array, images: Array) -> Array:
      numbers = first + jnp.arange(len(images))
      return jax.vmap(lambda number: jax.random.split(jax.random.fold_in(rng, number)))(numbers)

    return jax.jit(keys, out_shardings=self.devices.batch)

  @cached_property
  def _dequantized(self) -> Callable[[Array, Array], tuple[Array, Array]]:
    """`dequantization`, compiled."""
    return jax.jit(self.dequantization, out_shardings=self.devices.batch)


def parts_of_error(values: np.ndarray, of: str) -> dict[str, float | None]:
  """The parts of the standard error of the mean of values [repeats, estimates, images].

  The image's own value, its dequantisation, and what a single estimate of that is worth, a probe or
  a group of times, are independent: their variances, by the analysis of variance of nested means,
  add up to that of the mean. What cannot be told apart is None, and is in the part before it: with
  one estimate `of` is in the dequantisation, and with one repeat that is in the images.
  """
  repeats, estimates, images = values.shape
  of_repeats = values.mean(1)
  within = values.var(1, ddof=1).mean() if estimates > 1 else 0.0
  between = of_repeats.var(0, ddof=1).mean() if repeats > 1 else within / estimates
  total = of_repeats.mean(0).var(ddof=1) if images > 1 else math.nan
  parts = {
    'images': (total - between / repeats) / images,
    'dequantization': (between - within / estimates) / (repeats * images),
    of: within / (repeats * estimates * images),
  }
  known = {'images': images > 1, 'dequantization': repeats > 1, of: estimates > 1}
  return {
    name: math.sqrt(max(float(variance), 0.0)) if known[name] else None
    for name, variance in parts.items()
  }


def _table(numbers: np.ndarray, values: np.ndarray) -> str:
  """Comma-separated: the number of each image, its bits/dim, and what their error is known to be.

  Args:
    numbers: of the images [n].
    values: [repeats, estimates, n]. The error is by the repeats or, if there is one, the estimates.
  """
  apart = values.mean(1) if len(values) > 1 else values[0]
  n, lines = len(apart), ['image,bits_per_dim,std_error']
  for number, of_image in zip(numbers, apart.T, strict=True):
    error = f'{of_image.std(ddof=1) / math.sqrt(n):.6f}' if n > 1 else ''
    lines.append(f'{number},{of_image.mean():.6f},{error}')
  return '\n'.join(lines) + '\n'
