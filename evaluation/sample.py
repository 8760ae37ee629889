"""What `--mode sample` draws: samples, of a class if wanted, or what an image leaves open."""

from collections.abc import Callable
import dataclasses
from functools import cached_property, partial
import logging
import math
import os
import zlib

from etils import epath
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
from PIL import Image

from data.codec import Codec
from data.images import Batch
from evaluation.draw import Drawing
from evaluation.tasks import Inputs, InverseProblem
from models.classifier import ClassLogProb
from models.score import Params
from runtime import processes
from runtime.devices import Keys
from workdir import artifacts, pictures, rounds
from workdir.progress import Bar
from workdir.reports import Report
from workdir.rounds import Arrays

logger = logging.getLogger('score_sde')

ROWS, COLUMNS = 20, 9  # at most: of inputs, and of samples beside each, in a picture
MOST_NAMED = 10  # classes, in a line


@dataclasses.dataclass(frozen=True)
class SampleRequest:
  """What is to be drawn.

  Attributes:
    n: samples, of each input of a problem, or of each condition.
    batch_size: of all devices together, at most.
    labels: the classes of the samples, over and over if they are fewer, or None for samples of all
      classes.
    problem: what is known of images whose samples are wanted, if so.
    trajectory: show how the first samples came to be.
    conditions: what a model is told beside noisy images, if it is told such.
  """

  n: int
  batch_size: int
  labels: np.ndarray | None = None
  problem: InverseProblem | None = None
  trajectory: bool = False
  conditions: 'Conditioned | None' = None


@dataclasses.dataclass(frozen=True)
class Conditioned:
  """The conditions that samples are wanted for.

  Attributes:
    names: of the conditions, each another one.
    images: uint8 [K, H, W, C].
  """

  names: list[str]
  images: np.ndarray


def draw_samples(
  drawing: Drawing,
  keys: Keys,
  request: SampleRequest,
  params: Params,
  log_prob: ClassLogProb | None,
  folder: epath.Path,
) -> Report:
  """Draws what is requested, of the parameters of a model and, if need be, of a classifier.

  `folder` then holds the samples in one picture, `samples.png`, as a dataset has them in
  `samples.npz`, and images as one PNG each; in the picture of a problem every row begins with its
  input as it was measured, in that of conditions with its condition. With a trajectory, there is
  also `trajectory.gif` and, of images, `trajectory.png`. Samples are drawn in `rounds` of a batch:
  what is stopped and started again repeats at most one, and what is done already is not drawn
  again.

  Returns:
    How many samples there are, and the number of score evaluations that each took.

  Raises:
    UserError: for a mistake in the inputs, or a folder or names that cannot be written.
    FloatingPointError: if samples are not finite.
  """
  codec = drawing.codec
  inputs = request.problem.read(codec) if request.problem else None
  work = _Work(drawing, keys, request, inputs, params, log_prob, folder)
  names = work.names
  longest = max((f'{name}.png' for name in names), key=lambda name: len(os.fsencode(name)))
  artifacts.check_can_write(folder, longest)
  if request.labels is not None:
    logger.info('samples are of %s', _classes(request.labels))
  arrays = rounds.kept_or_made(
    folder / 'samples.npz', 'samples', work.total, work.draw_all, work.mark
  )
  samples = arrays['samples']
  for name, picture in zip(names, codec.pictures.separate(samples), strict=False):  # not of points
    artifacts.write_png(folder / f'{name}.png', picture)
  if inputs:
    overview = _beside_inputs(codec.to_stored(inputs.y), samples)
  elif request.conditions:
    shown = pictures.with_channels(request.conditions.images, samples.shape[-1])
    overview = _beside_inputs(shown, samples)
  else:
    overview = codec.pictures.overview(samples, most=100)
  artifacts.write_png(folder / 'samples.png', overview)
  processes.wait_for_all('samples')
  if jax.process_index() == 0 and work.rounds_folder.exists():
    work.rounds_folder.rmtree()
  return {'samples': work.total, 'nfe': int(arrays['nfe'])}


@dataclasses.dataclass(frozen=True)
class _Work:
  """All that samples depend on, and where they go; see `draw_samples`."""

  drawing: Drawing
  keys: Keys
  request: SampleRequest
  inputs: Inputs | None
  params: Params
  log_prob: ClassLogProb | None
  folder: epath.Path

  @property
  def total(self) -> int:
    """How many samples there are in all."""
    return self.request.n * len(self.groups or ('all',))

  @property
  def groups(self) -> list[str]:
    """The names of what n samples each are wanted for: inputs, or conditions; of neither none."""
    named = self.inputs or self.request.conditions
    return named.names if named else []

  @property
  def size(self) -> int:
    """How many are drawn in a round."""
    devices = jax.device_count()
    return min(self.request.batch_size, math.ceil(self.total / devices) * devices)

  @property
  def names(self) -> list[str]:
    """Of the samples."""
    n, groups = self.request.n, self.groups
    return [f'{groups[i // n]}_{i % n}' if groups else f'sample_{i}' for i in range(self.total)]

  @cached_property
  def mark(self) -> str:
    """What tells these samples from those of other classes, inputs or rounds in the folder."""
    request, inputs = self.request, self.inputs
    crc = zlib.crc32(repr((request.n, self.size, request.trajectory)).encode())
    if request.labels is not None:
      crc = zlib.crc32(request.labels.tobytes(), crc)
    if request.conditions:
      crc = zlib.crc32(repr(request.conditions.names).encode(), crc)
      crc = zlib.crc32(np.ascontiguousarray(request.conditions.images).tobytes(), crc)
    if inputs:
      crc = zlib.crc32(repr(inputs.names).encode(), crc)
      crc = zlib.crc32(np.ascontiguousarray(inputs.y).tobytes(), crc)
      # A mask may be another where the pixels that it leaves are the same.
      shape = inputs.y[:1].shape
      pattern = jnp.linspace(0.0, 1.0, math.prod(shape)).reshape(shape)
      crc = zlib.crc32(np.asarray(inputs.operator(pattern)).tobytes(), crc)
    return f'{crc:08x}'

  @property
  def rounds_folder(self) -> epath.Path:
    """Where the rounds lie until all are done."""
    return self.folder / f'.rounds-{self.mark}'

  def draw_all(self) -> Arrays:
    """All samples, of as many rounds as are there, and of those that are not."""
    total, size, parts = self.total, self.size, list[Arrays]()
    with Bar('sample', total, unit='samples') as bar:
      for i, first in enumerate(range(0, total, size)):
        path, there = self.rounds_folder / f'{i}.npz', min(size, total - first)
        make = partial(self._draw_round, bar, i, first)
        parts.append(rounds.kept_or_made(path, 'samples', there, make))
        bar.update(first + there)
    samples = np.concatenate([part['samples'] for part in parts])
    labels = self.request.labels
    of_each = {} if labels is None else {'labels': np.resize(labels, total)}
    return {'samples': samples, 'nfe': parts[-1]['nfe'], **of_each}

  def _draw_round(self, bar: Bar, i: int, first: int) -> Arrays:
    """Round i, of the samples from number `first` on."""
    drawing, codec, request, n = self.drawing, self.drawing.codec, self.request, self.request.n
    rows = np.arange(first, first + self.size) % self.total  # the last is as large as the others
    wanted, constraint, stages = Batch(), None, list[np.ndarray]()
    if request.labels is not None:
      wanted['label'] = request.labels[rows % len(request.labels)]
    if request.conditions:
      wanted['condition'] = request.conditions.images[rows // n]
    score_fn = drawing.score_fn(self.params, wanted, self.log_prob)
    to_stored: Callable[[np.ndarray], np.ndarray] = codec.to_stored
    if request.problem and self.inputs:
      y, operator = self.inputs.y[rows // n], self.inputs.operator
      score_fn, constraint = request.problem.conditioning.condition(
        score_fn, operator, processes.shard(y, drawing.devices.batch), drawing.model.sde, codec
      )
      to_stored = partial(request.problem.to_stored, y=y, operator=operator, codec=codec)

    def progress(fraction: float, x: Array) -> None:
      bar.update(min(self.total, first + fraction * self.size))
      if request.trajectory and i == 0:
        stages.append(processes.gather(x[: codec.pictures.filmed]))

    rng = jax.random.fold_in(self.keys.key('draw'), i)
    samples, nfe = drawing.samples(rng, score_fn, self.size, constraint, progress, to_stored)
    if stages:  # now, as they are kept nowhere
      _write_trajectory(self.folder, codec, stages)
    return {'samples': samples[: self.total - first], 'nfe': np.array(nfe, np.int64)}


def _classes(labels: np.ndarray) -> str:
  """The classes among labels, in the order in which they come."""
  classes = [str(label) for label in dict.fromkeys(labels.tolist())]
  if len(classes) == 1:
    return f'class {classes[0]}'
  if len(classes) > MOST_NAMED:
    return f'{len(classes)} classes in turn, {classes[0]}, {classes[1]} ... {classes[-1]}'
  return f'the classes {", ".join(classes)} in turn'


def _beside_inputs(inputs: np.ndarray, samples: np.ndarray) -> Image.Image:
  """A picture with a row for each of the first images [K, H, W, C], and samples of each."""
  of_each = samples.reshape(len(inputs), -1, *inputs.shape[1:])
  rows = np.concatenate([inputs[:ROWS, None], of_each[:ROWS, :COLUMNS]], axis=1)
  return pictures.grid(rows.reshape(-1, *inputs.shape[1:]), columns=rows.shape[1])


def _write_trajectory(folder: epath.Path, codec: Codec, stages: list[np.ndarray]) -> None:
  """Pictures of x [n, ...] at some times, each with the contrast of the samples at the end.

  The noise of the VE SDE is far larger than the data, and would be all that one sees.
  """
  spread = (stages[-1] - codec.centre).std()
  shrink = [max(1.0, (x - codec.centre).std() / spread) for x in stages]
  frames = [
    codec.to_stored(codec.centre + (x - codec.centre) / by)
    for x, by in zip(stages, shrink, strict=True)
  ]
  artifacts.write_gif(folder / 'trajectory.gif', codec.pictures.film(frames))
  if strip := codec.pictures.strip(frames):
    artifacts.write_png(folder / 'trajectory.png', strip)
