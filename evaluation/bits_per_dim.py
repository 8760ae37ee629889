"""The likelihood of images, in bits per dimension."""

from collections.abc import Callable, Sequence
import dataclasses
from functools import cached_property, partial
import math

from etils import epath
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from data import sources
from data.codec import Codec
from evaluation.evaluate import Measurement
from likelihood import bits_per_dim, Likelihood
from models.score import Params, ScoreModel
from runtime import processes
from runtime.devices import Devices, Keys
from workdir import rounds
from workdir.progress import Bar
from workdir.reports import Report
from workdir.rounds import Arrays


@dataclasses.dataclass(frozen=True)
class BitsPerDim(Measurement):
  """Bits per dimension of uniformly dequantised images (Sec. 4.3), each counted once per repeat.

  The noise and the probe of an image are a function of the seed, the repeat and the image's number,
  so that the size of the batches matters only within the tolerance of the solver. The standard
  error is that of the mean over images of what the repeats give on average.

  Attributes:
    model: the score model.
    likelihood: measures log p(x_0).
    codec: makes x_0 of the images, and says how wide their levels are.
    source: the images.
    split: 'train' or 'test', of which they are.
    repeats: how often each image is dequantised.
    batch_size: of all devices together.
    devices: which share a batch.
    keys: of the run.
  """

  model: ScoreModel
  likelihood: Likelihood
  codec: Codec
  source: sources.Source
  split: str
  repeats: int
  batch_size: int
  devices: Devices
  keys: Keys

  @property
  def name(self) -> str:
    """In a report, and in the names of files."""
    return f'bpd_{self.split}'

  @property
  def class_names(self) -> Sequence[str]:
    return self.source.class_names

  def is_in(self, report: Report) -> bool:
    return report.get(f'{self.name}_repeats') == self.repeats

  def measure(self, params: Params, step: int, folder: epath.Path) -> Report:
    size, repeats, n_images = self.batch_size, self.repeats, len(self.source)
    per_repeat = math.ceil(n_images / size)
    values, nfes, seconds = np.zeros((repeats, n_images)), [], 0.0
    with Bar('bits/dim', repeats * n_images, unit='images') as bar:
      for repeat in range(repeats):
        for i, batch in enumerate(sources.eval_batches(self.source, size, **processes.share())):
          begin, end = i * size, min((i + 1) * size, n_images)
          path = folder / f'{self.name}_{repeat * per_repeat + i}.npz'
          make = partial(self._round, params, batch, repeat, begin)
          arrays = rounds.kept_or_made(path, 'bpd', end - begin, make)
          values[repeat, begin:end] = arrays['bpd']
          nfes.append(int(arrays['nfe']))
          seconds += float(arrays['seconds'])
          bar.update(repeat * n_images + end)
    of_images, std_error = values.mean(0), None  # which one image alone does not tell
    if n_images > 1:
      std_error = float(of_images.std(ddof=1) / math.sqrt(n_images))
    return {
      self.name: float(of_images.mean()),
      f'{self.name}_std_error': std_error,
      f'{self.name}_images': n_images,
      f'{self.name}_repeats': repeats,
      f'{self.name}_nfe': float(np.mean(nfes)),
      f'{self.name}_seconds': seconds,
    }

  def _round(self, params: Params, batch: sources.Batch, repeat: int, first: int) -> Arrays:
    """Of a batch whose first image has the number `first`."""
    images = self.devices.put(batch['data'])
    x0, rngs = self._dequantized(self.keys.key('bpd', repeat), first, images)
    labels = self.devices.put(batch['label']) if self.model.num_classes else None
    score_fn = self.model.bind(params, labels=labels)
    logp, _, nfe = self.likelihood(rngs, score_fn, x0)
    bits = bits_per_dim(logp, self.codec.dim, self.codec.level_width)
    there = len(self.source) - first
    return {'bpd': processes.gather(bits)[:there], 'nfe': np.array(nfe, np.int64)}

  @cached_property
  def _dequantized(self) -> Callable[[Array, int, Array], tuple[Array, Array]]:
    """(key, first, images [B, H, W, C]) -> x_0, like them, and keys [B], by each one's number."""

    def dequantized(rng: Array, first: Array, images: Array) -> tuple[Array, Array]:
      numbers = first + jnp.arange(len(images))
      rngs = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(rng, number)))(numbers)
      return jax.vmap(self.codec.dequantized)(rngs[:, 0], images), rngs[:, 1]

    return jax.jit(dequantized, out_shardings=self.devices.batch)
