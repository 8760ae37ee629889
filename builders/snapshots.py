"""What training leaves at a snapshot: a picture of samples, and how far samples are from the data.

Training can do without either.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import logging
import math

from etils import epath
import jax
import numpy as np

from builders.continuity import write_config
from builders.data import load_images
from builders.evaluation import make_drawing, make_sample_quality, reference_file
from builders.guide import load_guide
from builders.setup import Setup
from builders.training import average_in_use
from data.images import Source, spread
from evaluation.average import is_late, what_is_late
from evaluation.evaluate import step_folder
from evaluation.sample_quality import SampleQuality
from runtime import processes
from runtime.devices import out_of_memory
from runtime.errors import UserError
from training import checkpoints as checkpoints_lib
from training.packing import unpacked
from training.step import TrainState
from workdir import artifacts, best, reports, same_config
from workdir.pictures import in_pairs
from workdir.progress import Bar, Stop
from workdir.reports import Report

logger = logging.getLogger('score_sde')


@contextlib.contextmanager
def _training_goes_on(without: str, out_of_room: str) -> Iterator[None]:
  """Ends what is done at a snapshot, with a warning, where it fails; a signal ends it silently."""
  try:
    yield
  except InterruptedError:
    pass
  except FloatingPointError as error:
    logger.warning('%s: %s', without, error)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if not out_of_memory(error):
      raise
    logger.warning('%s: %s', without, out_of_room)


def draw_snapshot(
  setup: Setup,
  root: epath.Path,
  state: TrainState,
  stop: Stop,
  held_out: Source | None = None,
) -> None:
  """A grid of samples; left out, and drawn by the next run, if a signal comes.

  Those of a model that is told conditions are of the conditions of held-out images, and stand
  beside them.
  """
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

    n = training.snapshot_samples
    # What a step has room for; points take next to none.
    most = n if setup.config.data.dim else training.batch_size // training.grad_accum
    remedy = (
      f'out of memory for {min(n, most)} samples at a time. Training goes on; set '
      'config.training.snapshot_samples below that, or config.training.snapshot_sampling = False'
    )
    samples: np.ndarray | None = None
    beside = None
    with _training_goes_on(f'step {step}: no picture', remedy):
      rng = setup.keys.key('snapshot', step)
      if setup.config.data.condition and held_out is not None:
        beside = held_out.batch(np.resize(spread(len(held_out), n), n))
      samples = make_drawing(setup).in_rounds(state.ema_params, rng, n, most, progress, beside)
  if samples is None:
    return
  origin.claim(path.parent)
  artifacts.write_png(
    path,
    in_pairs(beside['condition'], samples, columns=2 * math.ceil(math.sqrt(n / 2)))
    if beside
    else setup.codec.pictures.overview(samples),
  )
  logger.info('step %d: samples are in %s', step, path)
  hint_of_average(setup, step)


def make_snapshot_quality(setup: Setup, root: epath.Path) -> SampleQuality | None:
  """What compares samples of snapshots with data, if `training.fid_freq` wants that.

  The statistics of the data are made if they are not there, and kept.

  Raises:
    UserError: if the data cannot be compared with, or snapshots were compared in another way.
  """
  config = setup.config
  if not config.training.fid_freq:
    return None
  file = reference_file(setup) if config.eval.features and not config.data.dim else None
  if file is None:
    raise UserError(
      'config.training.fid_freq compares samples with images by config.eval.features, which is '
      'empty: set that to inception or pixels, or the former to 0'
    )
  way_out = (
    'Distances of one run must be comparable: give back these values, move that folder away, or '
    'set config.training.fid_freq = 0'
  )
  same_config.check_unchanged(
    root / best.FOLDER / 'config.json', config.to_dict(), same_config.FIXED_IN_QUALITY, way_out
  )
  if not processes.from_first(file.path.exists()):
    logger.info('%s is not there yet: looking at the data, once', file.path)
    compared = load_images(config, config.eval.stats_split)
    file.make(compared, config.eval.batch_size, setup.devices.mesh)
  quality = make_sample_quality(setup, load_guide(setup, root))
  return dataclasses.replace(quality, n=config.training.fid_samples)


def measure_snapshot(
  setup: Setup, root: epath.Path, quality: SampleQuality, state: TrainState, stop: Stop
) -> None:
  """Compares samples of a snapshot with data, in `<workdir>/quality/`; names the best snapshot.

  It is what `--mode eval` says of the checkpoint, to the bit, with `eval.num_samples` =
  `training.fid_samples`: the same average, keys, rounds and statistics. If a signal comes, whole
  rounds are kept, and the next run goes on with them. A snapshot that has its report is not
  measured again.
  """
  step, training = int(state.step), setup.config.training
  number = step // training.snapshot_freq
  if step < training.n_iters and number % training.fid_freq:
    return
  params, out = unpacked(state.averages[setup.config.ema.use]), root / best.FOLDER
  folder, origin = step_folder(out, step), checkpoints_lib.origin(root, step, params)
  report = origin.claim_report(out)
  origin.claim(folder)
  write_config(out, setup, step)

  def watch() -> None:
    if stop.signal and jax.process_count() == 1:
      raise InterruptedError

  if not quality.is_in(report):
    remedy = (
      f'out of memory for {quality.batch_size} at a time. Training goes on; set '
      'config.eval.batch_size below that'
    )
    found: Report = {}
    with _training_goes_on(f'step {step}: its samples are not compared', remedy):
      found = dataclasses.replace(quality, watch=watch).measure(params, step, folder)
    if not found:
      return
    report |= found
    reports.write(out, report)
  measured = _measured_until(out, step)
  reports.publish(out, measured)
  logger.info('step %d: %s', step, reports.summary(report))
  if chosen := best.of(measured):
    best.write(root, chosen)
    logger.info('best so far: %s (%s)', chosen.told, best.FILE)


def _measured_until(out: epath.Path, step: int) -> list[Report]:
  """The reports of snapshots up to this one, in their order."""
  steps = (int(path.stem.rpartition('_')[2]) for path in out.glob('report_*.json'))
  return [reports.read(out, s) for s in sorted(steps) if s <= step]


def hint_of_average(setup: Setup, step: int) -> None:
  """Says so, where samples are of a moving average that has not arrived."""
  average = average_in_use(setup.config)
  if is_late(average, step):
    logger.warning(
      'samples are of parameters that have not arrived: %s', what_is_late(average, step)
    )
