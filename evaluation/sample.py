"""What `--mode sample` draws: samples, of a class if wanted, or what an image leaves open."""

from collections.abc import Callable
import dataclasses
from functools import partial
import math

from etils import epath
import jax
from jax import Array
import numpy as np
from PIL import Image

from data.codec import Codec
from evaluation.draw import Drawing
from evaluation.tasks import InverseProblem
from models.classifier import ClassLogProb
from models.score import Params
from runtime import processes
from runtime.devices import Keys
from workdir import artifacts, pictures
from workdir.progress import Bar
from workdir.reports import Report

ROWS, COLUMNS = 20, 9  # at most: of inputs, and of samples beside each, in a picture


@dataclasses.dataclass(frozen=True)
class SampleRequest:
  """What is to be drawn.

  Attributes:
    n: samples, of each input of a problem.
    batch_size: of all devices together, at most.
    labels: the class of each of the n, int32 [n], or None for samples of all classes.
    problem: what is known of images whose samples are wanted, if so.
    trajectory: show how the first samples came to be.
  """

  n: int
  batch_size: int
  labels: np.ndarray | None = None
  problem: InverseProblem | None = None
  trajectory: bool = False


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
  `samples.npz`, and images as one PNG each; in the picture of a problem, every row begins with its
  input as it was measured. With a trajectory, there is also `trajectory.gif` and, of images,
  `trajectory.png`.

  Returns:
    How many samples there are, and the number of score evaluations that each took.

  Raises:
    UserError: for a mistake in the inputs.
    FloatingPointError: if samples are not finite.
  """
  codec, rows_sharding = drawing.codec, drawing.devices.batch
  problem = request.problem
  inputs = problem.read(codec) if problem else None
  n, total = request.n, request.n * (len(inputs.names) if inputs else 1)
  devices = jax.device_count()
  size = min(request.batch_size, math.ceil(total / devices) * devices)
  parts, stages = [], []
  with Bar('sample', total, unit='samples') as bar:
    for i, first in enumerate(range(0, total, size)):
      rows = np.arange(first, first + size) % total  # the last batch is as large as the others
      labels = request.labels
      of_rows = None if labels is None else processes.shard(labels[rows % n], rows_sharding)
      score_fn, constraint = drawing.score_fn(params, of_rows, log_prob), None
      to_stored: Callable[[np.ndarray], np.ndarray] = codec.to_stored
      if problem and inputs:
        y = inputs.y[rows // n]
        score_fn, constraint = problem.conditioning.condition(
          score_fn, inputs.operator, processes.shard(y, rows_sharding), drawing.model.sde, codec
        )
        to_stored = partial(problem.to_stored, y=y, operator=inputs.operator, codec=codec)

      def progress(fraction: float, x: Array, first: int = first) -> None:
        bar.update(min(total, first + fraction * size))
        if request.trajectory and first == 0:
          stages.append(processes.gather(x[: codec.pictures.filmed]))

      rng = jax.random.fold_in(keys.key('draw'), i)
      samples, nfe = drawing.samples(rng, score_fn, size, constraint, progress, to_stored)
      parts.append(samples)
      bar.update(min(total, first + size))
  samples = np.concatenate(parts)[:total]
  arrays = {} if request.labels is None else {'labels': np.tile(request.labels, total // n)}
  artifacts.write_npz(folder / 'samples.npz', samples=samples, nfe=np.int64(nfe), **arrays)
  for i, picture in enumerate(codec.pictures.separate(samples)):
    name = f'{inputs.names[i // n]}_{i % n}' if inputs else f'sample_{i}'
    artifacts.write_png(folder / f'{name}.png', picture)
  if inputs:
    overview = _beside_inputs(codec.to_stored(inputs.y), samples)
  else:
    overview = codec.pictures.overview(samples, most=100)
  artifacts.write_png(folder / 'samples.png', overview)
  if stages:
    _write_trajectory(folder, codec, stages)
  return {'samples': total, 'nfe': nfe}


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
