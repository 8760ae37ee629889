"""What `--mode sample` draws: samples, of a class if wanted, or what an image leaves open.

A task says what is known of an image: all but what is to be painted (`inpaint`), its grey values
(`colorize`), or a smaller (`superres`) or blurred (`deblur`) version of it.
"""

from collections.abc import Callable
import logging
import math
from pathlib import Path
from typing import Any

from etils import epath
import jax
from jax import Array
import numpy as np
from PIL import Image, ImageOps

from builders.setup import Setup
from controllable_generation import (
  BlockMean,
  BoundedMean,
  GaussianBlur,
  Gray,
  Known,
  Mask,
  Operator,
  PosteriorGuidance,
)
from data import geometry
from data.folder import image_files
from evaluation.draw import class_score, to_stored
from models.classifier import ClassLogProb
from models.score import Params
from runtime import processes
from runtime.errors import UserError
from samplers.base import Constraint
from sde_lib import ScoreFn
from workdir import artifacts
from workdir.progress import Bar

logger = logging.getLogger('score_sde')

SHOWN = 16  # samples in the picture of a trajectory


def wanted_labels(setup: Setup, n: int) -> np.ndarray | None:
  """`sampling.labels` over and over, int32 [n]; without them, all classes that the model knows.

  Raises:
    UserError: if there is no such class.
  """
  labels, classes = setup.config.sampling.labels, setup.model.num_classes
  known = classes or setup.config.classifier.num_classes
  if wrong := [label for label in labels if not 0 <= label < known]:
    allowed = f'0 to {known - 1}' if known else 'none, as neither model nor classifier has classes'
    raise UserError(f'config.sampling.labels has {wrong[0]}; allowed: {allowed}')
  if not labels and not classes:
    return None
  return np.resize(np.array(labels or range(classes), np.int32), n)


def draw_samples(
  setup: Setup, params: Params, log_prob: ClassLogProb | None, folder: epath.Path
) -> dict[str, Any]:
  """Draws `sampling.num_samples` samples, for a task so many of each input.

  `folder` then holds them as a grid `samples.png`, as uint8 in `samples.npz`, and one PNG each; in
  the grid of a task, every row begins with its input as it was measured. With
  `sampling.trajectory`, also `trajectory.gif` and `trajectory.png`, how the first became images.
  Of points there is the density in `samples.png`, floats in `samples.npz`, and the GIF.

  Raises:
    UserError: for a mistake in the config, or in the files that it names.
  """
  choice, devices = setup.config.sampling, jax.device_count()
  names, y, operator = _measure(setup) if choice.task else ([], None, None)
  each, n_inputs = choice.num_samples, max(1, len(names))
  total = each * n_inputs
  size = min(setup.config.eval.batch_size, math.ceil(total / devices) * devices)
  labels, parts, stages = wanted_labels(setup, each), [], []
  with Bar('sample', total, unit='samples') as bar:
    for i, start in enumerate(range(0, total, size)):
      rows = np.arange(start, start + size) % total  # the last batch is as large as the others
      of_rows = (
        None if labels is None else processes.shard(labels[rows % each], setup.devices.batch)
      )
      score_fn = class_score(setup, params, of_rows, log_prob)
      constraint = None
      if y is not None and operator is not None:
        y_of_rows = processes.shard(y[rows // each], setup.devices.batch)
        score_fn, constraint = _condition(setup, score_fn, operator, y_of_rows)

      def progress(fraction: float, x: Array, start: int = start) -> None:
        bar.update(min(total, start + fraction * size))
        if choice.trajectory and start == 0:
          stages.append(processes.gather(x if setup.config.data.dim else x[:SHOWN]))

      rng = jax.random.fold_in(setup.keys.key('draw'), i)
      shape = (size, *setup.data_shape)
      x, nfe = setup.sampler(
        rng, score_fn, shape, sharding=setup.devices.batch, constraint=constraint, observe=progress
      )
      parts.append(to_stored(setup, processes.gather(x)))
      bar.update(min(total, start + size))
  images = np.concatenate(parts)[:total]
  arrays = {} if labels is None else {'labels': np.tile(labels, n_inputs)}
  artifacts.write_npz(folder / 'samples.npz', samples=images, nfe=np.int64(nfe), **arrays)
  if not setup.config.data.dim:
    for i, image in enumerate(images):
      name = f'{names[i // each]}_{i % each}' if names else f'sample_{i}'
      artifacts.write_png(folder / f'{name}.png', image)
  _write_overview(setup, folder, images, y, each)
  if stages:
    _write_trajectory(setup, folder, stages)
  return {'samples': total, 'nfe': nfe}


def _write_trajectory(setup: Setup, folder: epath.Path, stages: list[np.ndarray]) -> None:
  """Pictures of x [n, H, W, C] at some times, each with the contrast of the samples at the end.

  The noise of the VE SDE is far larger than the data, and would be all that one sees.
  """
  centre = 0.0 if setup.config.data.centered else 0.5
  spread = (stages[-1] - centre).std()
  shrink = [max(1.0, (x - centre).std() / spread) for x in stages]
  frames = [
    to_stored(setup, centre + (x - centre) / by) for x, by in zip(stages, shrink, strict=True)
  ]
  artifacts.write_gif(folder / 'trajectory.gif', frames)
  if setup.config.data.dim:
    return
  shown = np.linspace(0, len(frames) - 1, min(10, len(frames))).round().astype(int)
  strip = np.stack([frames[i] for i in shown], axis=1)  # a row for each sample
  path = folder / 'trajectory.png'
  artifacts.write_grid(path, strip.reshape(-1, *setup.data_shape), columns=len(shown))


def _write_overview(
  setup: Setup, folder: epath.Path, images: np.ndarray, y: np.ndarray | None, each: int
) -> None:
  path = folder / 'samples.png'
  if y is None:
    artifacts.write_samples(path, images, most=100)
    return
  measured, columns = to_stored(setup, y), min(each, 9)
  rows = images.reshape(len(y), each, *setup.data_shape)[:20, :columns]
  rows = np.concatenate([measured[:20, None], rows], axis=1)
  artifacts.write_grid(path, rows.reshape(-1, *setup.data_shape), columns=columns + 1)


# Tasks.


def _condition(
  setup: Setup, score_fn: ScoreFn, operator: Operator, y: Array
) -> tuple[ScoreFn, Constraint | None]:
  """The score and the constraint that make samples agree with a measurement y [B, ...]."""
  choice, sde = setup.config.sampling, setup.model.sde
  if choice.conditioning == 'constraint':
    return score_fn, Known(y, operator, sde)
  low, high = (-1.0, 1.0) if setup.config.data.centered else (0.0, 1.0)
  guided = PosteriorGuidance(score_fn, operator, y, sde, choice.noise_std * (high - low))
  return BoundedMean(guided, sde, low, high), None


def _measure(setup: Setup) -> tuple[list[str], np.ndarray, Operator]:
  """Names of the inputs, what is measured of them [K, ...] scaled as data are, and the operator."""
  choice = setup.config.sampling
  files, make = _input_files(choice.input), TASKS[choice.task]
  y, operator = make(setup, files)
  stems = [file.stem for file in files]
  names = stems if len(set(stems)) == len(stems) else [f'{i}_{s}' for i, s in enumerate(stems)]
  return names, y, operator


def _inpaint(setup: Setup, files: list[Path]) -> tuple[np.ndarray, Operator]:
  choice, (size, _, _) = setup.config.sampling, setup.data_shape
  if not Path(choice.mask).expanduser().is_file():
    raise UserError(
      f'config.sampling.mask={choice.mask!r} is not a file; name an image that is white where '
      'pixels are known, and black where they are to be painted'
    )
  mask = _read(Path(choice.mask).expanduser(), size, 1) >= 128
  if mask.all() or not mask.any():
    colour = 'white, so that nothing is to be painted' if mask.all() else 'black: nothing is known'
    raise UserError(f'the mask {choice.mask} is all {colour}')
  known = mask.astype(np.float32)
  return known * _read_all(setup, files), Mask(known)


def _colorize(setup: Setup, files: list[Path]) -> tuple[np.ndarray, Operator]:
  if setup.data_shape[-1] != 3:
    raise UserError('config.sampling.task = colorize needs a model of colour images')
  return _read_all(setup, files).mean(-1, keepdims=True).repeat(3, axis=-1), Gray()


def _superres(setup: Setup, files: list[Path]) -> tuple[np.ndarray, Operator]:
  factor, (size, _, _) = setup.config.sampling.factor, setup.data_shape
  if factor < 2 or size % factor:
    raise UserError(
      f'config.sampling.factor = {factor} must be at least 2 and divide config.data.image_size = '
      f'{size}'
    )
  small = _read_all(setup, files, size // factor)
  return small.repeat(factor, axis=1).repeat(factor, axis=2), BlockMean(factor)


def _deblur(setup: Setup, files: list[Path]) -> tuple[np.ndarray, Operator]:
  choice = setup.config.sampling
  if choice.conditioning != 'posterior' or not choice.noise_std > 0:
    raise UserError(
      'config.sampling.task = deblur needs config.sampling.conditioning = posterior and '
      f'noise_std > 0, a level of the noise in the image; got {choice.conditioning!r} and '
      f'{choice.noise_std}'
    )
  return _read_all(setup, files), GaussianBlur(choice.blur_std)


TASKS: dict[str, Callable[[Setup, list[Path]], tuple[np.ndarray, Operator]]] = {
  'inpaint': _inpaint,
  'colorize': _colorize,
  'superres': _superres,
  'deblur': _deblur,
}


def _input_files(path: str) -> list[Path]:
  where = Path(path).expanduser()
  if path and where.is_file():
    return [where]
  files = image_files(where) if path and where.is_dir() else []
  if not files:
    raise UserError(f'config.sampling.input={path!r} is neither an image nor a folder of images')
  return files


def _read_all(setup: Setup, files: list[Path], size: int | None = None) -> np.ndarray:
  """Files as float32 [K, size, size, C], scaled as data are."""
  own_size, _, channels = setup.data_shape
  pixels = np.stack([_read(file, size or own_size, channels) for file in files])
  x = pixels.astype(np.float32) / 255
  return 2 * x - 1 if setup.config.data.centered else x


def _read(file: Path, size: int, channels: int) -> np.ndarray:
  """A file as the network would see it: uint8 [size, size, channels]."""
  try:
    with Image.open(file) as image:
      pixels = geometry.convert(ImageOps.exif_transpose(image), channels)
    fitted = geometry.short_side_then_crop(pixels, size)
    return np.asarray(fitted).reshape(size, size, channels)
  except Exception as error:  # Pillow has a dozen
    raise UserError(f'{file} cannot be read as an image ({error})') from None
