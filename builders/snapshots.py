"""The picture of samples that training leaves at a snapshot; training can do without it."""

import logging

from etils import epath
import jax

from builders.evaluation import make_drawing
from builders.setup import Setup
from builders.training import average_in_use
from evaluation.average import is_late, what_is_late
from runtime import processes
from runtime.devices import out_of_memory
from training import checkpoints as checkpoints_lib
from training.step import TrainState
from workdir import artifacts
from workdir.progress import Bar, Stop

logger = logging.getLogger('score_sde')


def draw_snapshot(setup: Setup, root: epath.Path, state: TrainState, stop: Stop) -> None:
  """A grid of samples; left out, and drawn by the next run, if a signal comes."""
  step, training = int(state.step), setup.config.training
  path = root / 'samples' / f'iter_{step}' / 'sample.png'
  if not training.snapshot_sampling:
    return
  origin = checkpoints_lib.origin(root, step, state.ema_params)
  if processes.from_first(path.exists()):
    origin.claim(path.parent)
    if processes.from_first(path.exists()):
      return

  with Bar('sample', 100, unit='%') as bar:

    def progress(fraction: float) -> None:
      bar.update(100 * fraction)
      if stop.signal and jax.process_count() == 1:
        raise InterruptedError

    try:
      rng = setup.keys.key('snapshot', step)
      n, drawing = training.snapshot_samples, make_drawing(setup)
      # What a step has room for; points take next to none.
      most = n if setup.config.data.dim else training.batch_size // training.grad_accum
      samples = drawing.in_rounds(state.ema_params, rng, n, most, progress)
    except InterruptedError:
      return
    except FloatingPointError as error:  # training can do without
      logger.warning('step %d: no picture: %s', step, error)
      return
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      if not out_of_memory(error):
        raise
      logger.warning(
        'step %d: no picture: out of memory for %d samples at a time. Training goes on; set '
        'config.training.snapshot_samples below that, or config.training.snapshot_sampling = False',
        step, min(n, most),
      )  # fmt: skip
      return
  origin.claim(path.parent)
  artifacts.write_png(path, setup.codec.pictures.overview(samples))
  logger.info('step %d: samples are in %s', step, path)
  hint_of_average(setup, step)


def hint_of_average(setup: Setup, step: int) -> None:
  """Says so, where samples are of a moving average that has not arrived."""
  average = average_in_use(setup.config)
  if is_late(average, step):
    logger.warning(
      'samples are of parameters that have not arrived: %s', what_is_late(average, step)
    )
