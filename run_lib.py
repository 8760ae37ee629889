"""Training, evaluation and import of checkpoints, of a config in a workdir.

A workdir holds `config.json`, `checkpoints/` and `checkpoints-meta/`, `metrics.jsonl` and
`tensorboard/`, `samples/iter_<step>/sample.png`, and in `eval/` what evaluation made. Both can
be stopped at any moment and started again, with the same final result.
"""

from collections.abc import Iterator
from functools import partial
import logging

from etils import epath
import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict
import numpy as np

import artifacts
from build_lib import build, check_unchanged, FIXED_IN_EVAL, FIXED_IN_RUN, Setup
import checkpoints as checkpoints_lib
from checkpoints import Checkpoints
import datasets
from errors import UserError
import eval_lib
from eval_lib import Report
import losses
from losses import Batch, Metrics, TrainState
from progress import Bar, Stop, TrainLog
import released_checkpoints

logger = logging.getLogger('score_sde')


def train(config: ConfigDict, workdir: str) -> None:
  """Trains until `training.n_iters`, from the newest checkpoint in `workdir` if there is one.

  Raises:
    UserError: for a mistake in the config, the data or the workdir, or a loss that is not finite.
    SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is written; the code is 128 + signal.
  """
  setup, root = build(config), epath.Path(workdir)
  training = setup.config.training
  source, held_out = _load(setup, 'train'), _load(setup, 'test')
  _open(root, setup, FIXED_IN_RUN if checkpoints_lib.exist(root) else ())
  with Stop() as stop, Checkpoints(root) as checkpoints:
    start = state = _restore_or_init(setup, root, checkpoints)
    step = int(state.step)
    if step and (step % training.snapshot_freq == 0 or step >= training.n_iters):
      _draw_snapshot(setup, root, state, stop)  # the run may have been stopped while it drew
    loss_sum = eval_lib.compile_loss_sum(setup)
    eval_batches = _eval_batches(setup, held_out, step // training.eval_freq)
    log_choices = {'n_iters': training.n_iters, 'log_freq': training.log_freq}
    log_choices |= {'step': step, 'batch_size': training.batch_size}
    with artifacts.Metrics(root, step) as metrics, TrainLog(metrics, **log_choices) as log:
      for state, step, measured in _updates(setup, source, start):
        log.add(step, measured)
        if step % training.eval_freq == 0:
          total = loss_sum(state.ema_params, *next(eval_batches))
          log.add_eval(step, total / training.batch_size)
        snapshot = step % training.snapshot_freq == 0 or step == training.n_iters
        leave = step < training.n_iters and stop.agreed(step, training.log_freq)
        if snapshot or leave or step % training.snapshot_freq_for_preemption == 0:
          log.settle(step)
          checkpoints.save(state, keep=snapshot)
        if snapshot and not leave:
          _draw_snapshot(setup, root, state, stop)
        if leave:
          break
  if step < training.n_iters:
    logger.info('stopped at step %d, saved; the same command goes on from there', step)
    raise SystemExit(128 + stop.signal)
  logger.info('trained to step %d; checkpoints are in %s', step, root / 'checkpoints')


def evaluate(config: ConfigDict, workdir: str, eval_folder: str = 'eval') -> list[Report]:
  """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt`, or the newest before those.

  With `eval.enable_loss`, the loss over the held-out images, each counted once. With
  `eval.enable_bpd`, their bits per dimension, or those of the training images. With
  `eval.enable_sampling`, `eval.num_samples` samples in `<eval_folder>/step_<step>/`: a grid
  `samples.png`, and `samples_<round>.npz` with uint8 [N, H, W, C]. What is there already is not
  made again.

  Returns:
    For each checkpoint, what `<eval_folder>/report_<step>.json` holds.

  Raises:
    UserError: for a mistake in the config, the data or the workdir.
  """
  setup, root = build(config), epath.Path(workdir)
  wanted, out = setup.config.eval, root / eval_folder
  if not checkpoints_lib.exist(root):
    raise UserError(f'{root} holds no checkpoints to evaluate; train first (--mode train)')
  check_unchanged(root / 'config.json', setup.config, FIXED_IN_RUN)
  _open(out, setup, FIXED_IN_EVAL)
  held_out = _load(setup, 'test') if wanted.enable_loss else None
  loss_sum = eval_lib.compile_loss_sum(setup)
  reports = []
  with Checkpoints(root) as checkpoints:
    for step in _steps_to_evaluate(setup.config, checkpoints.steps()):
      params = checkpoints.restore(step, _like(setup)).ema_params
      path = out / f'report_{step}.json'
      report = artifacts.read_json(path) if path.exists() else {'step': step}
      if held_out is not None and 'loss' not in report:
        report |= eval_lib.evaluate_loss(setup, loss_sum, held_out, params)
        artifacts.write_json(path, report)
      if wanted.enable_bpd and not eval_lib.has_bpd(setup, report):
        folder = eval_lib.step_folder(out, step)
        report |= eval_lib.evaluate_bpd(setup, _load(setup, wanted.bpd_dataset), params, folder)
        artifacts.write_json(path, report)
      if wanted.enable_sampling and report.get('samples') != wanted.num_samples:
        report |= eval_lib.evaluate_samples(setup, params, step, eval_lib.step_folder(out, step))
        artifacts.write_json(path, report)
      values = ', '.join(f'{name} {value:.6g}' for name, value in report.items())
      logger.info('%s; report in %s', values, path)
      if wanted.enable_sampling:
        logger.info('samples are in %s', eval_lib.step_folder(out, step) / 'samples.png')
      reports.append(report)
  return reports


def import_released(config: ConfigDict, workdir: str, checkpoint: str) -> None:
  """Makes a workdir of a checkpoint of the released JAX or PyTorch code.

  The result is a checkpoint like any other: `evaluate` evaluates it, `train` goes on from it.

  Raises:
    UserError: for a mistake in the config, a file that does not fit it, or a workdir in use.
  """
  setup, root = build(config), epath.Path(workdir)
  if checkpoints_lib.exist(root):
    raise UserError(f'{root} holds checkpoints already; choose another --workdir')
  like = _like(setup)  # says so if the config does not make a network
  state = released_checkpoints.load(
    checkpoint, setup.model, (1, *setup.data_shape), setup.tx, setup.config.model.ema_rate
  )
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, like))
  _open(root, setup, ())
  with Checkpoints(root) as checkpoints:
    checkpoints.save(state, keep=True)
  logger.info('imported %s, of step %d, to %s', checkpoint, int(state.step), root / 'checkpoints')


def _load(setup: Setup, split: str) -> datasets.ImageSource:
  """The images of a split.

  Raises:
    UserError: if they cannot be read, or have other classes than a label-conditional model.
  """
  data, num_classes = setup.config.data, setup.model.num_classes
  source = datasets.load(
    data.dataset,
    split,
    image_size=data.image_size,
    num_channels=data.num_channels,
    path=data.path,
    data_dir=data.tfds_dir,
    category=data.category,
  )
  if num_classes and num_classes != source.num_classes:
    raise UserError(
      f'config.model.num_classes is {num_classes}, and dataset {data.dataset!r} has '
      f'{source.num_classes or "no"} classes; set it to that, or to 0 for a model without labels'
    )
  return source


def _open(folder: epath.Path, setup: Setup, fixed: tuple[str, ...]) -> None:
  """Makes a folder whose config agrees in the `fixed` fields, and writes the config to it."""
  check_unchanged(folder / 'config.json', setup.config, fixed)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(folder / 'config.json', setup.config.to_dict())
  except OSError as error:
    raise UserError(f'cannot write to {folder} ({error.strerror}); choose another') from None


# Training.


def _init(setup: Setup, rng: Array) -> TrainState:
  return losses.init_state(rng, setup.model, setup.tx, (1, *setup.data_shape))


def _like(setup: Setup) -> TrainState:
  """The shapes, dtypes and shardings of the training state."""
  try:
    state = jax.eval_shape(partial(_init, setup), setup.key('init'))
  except (TypeError, ValueError) as error:
    reason = str(error).strip().partition('\n')[0]
    raise UserError(f'config.model does not make a network: {reason}') from None
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=setup.replicated), state
  )


def _restore_or_init(setup: Setup, root: epath.Path, checkpoints: Checkpoints) -> TrainState:
  state = checkpoints.restore_latest(_like(setup))
  if state is not None:
    logger.info('resuming %s at step %d', root, int(state.step))
    return state
  logger.info('training in %s', root)
  # This program runs once: most of its time would go into optimising it.
  options = {'xla_backend_optimization_level': 0}
  init = jax.jit(partial(_init, setup), out_shardings=setup.replicated, compiler_options=options)
  return init(setup.key('init'))


def _updates(
  setup: Setup, source: datasets.ImageSource, state: TrainState
) -> Iterator[tuple[TrainState, int, Metrics]]:
  """Trains to the end; yields state, step and metrics after every call of the device."""
  training, step = setup.config.training, int(state.step)
  batches = datasets.train_batches(
    source, training.batch_size, seed=setup.config.seed, start=step, **eval_lib.processes()
  )
  update = partial(
    losses.train_step,
    model=setup.model,
    objective=setup.objective,
    tx=setup.tx,
    ema_rate=setup.config.model.ema_rate,
    ema_warmup=setup.config.model.ema_warmup,
  )

  def scan(state: TrainState, batches: Batch, rng: Array) -> tuple[TrainState, Metrics]:
    return jax.lax.scan(lambda s, batch: update(s, batch, rng), state, batches)

  choices = {'out_shardings': (setup.replicated, setup.replicated), 'donate_argnums': 0}
  one_step, many_steps = jax.jit(update, **choices), jax.jit(scan, **choices)
  stacked = NamedSharding(setup.batch.mesh, PartitionSpec(None, *setup.batch.spec))
  rng, n = setup.key('train'), setup.steps_per_call
  while step < training.n_iters:
    if n > 1 and _steps_to_event(step, training) >= n:
      many = jax.tree.map(lambda *rows: np.stack(rows), *(next(batches) for _ in range(n)))
      many = jax.tree.map(partial(jax.make_array_from_process_local_data, stacked), many)
      state, measured = many_steps(state, many, rng)
      step += n
    else:
      state, measured = one_step(state, setup.put(next(batches)), rng)
      step += 1
    yield state, step, measured


def _steps_to_event(step: int, training: FrozenConfigDict) -> int:
  """How many steps are left until something else is due."""
  frequencies = (
    training.log_freq,
    training.eval_freq,
    training.snapshot_freq,
    training.snapshot_freq_for_preemption,
  )
  return min(training.n_iters - step, *(every - step % every for every in frequencies))


def _eval_batches(
  setup: Setup, held_out: datasets.ImageSource, start: int
) -> Iterator[tuple[Batch, Array]]:
  """Batches of held-out images on the devices without end, each with a mask and a key."""
  size, seed = setup.config.training.batch_size, setup.config.seed
  batches = datasets.train_batches(held_out, size, seed=seed, start=start, **eval_lib.processes())
  for i, batch in enumerate(batches, start):
    everyone = np.ones(len(batch['image']), bool)
    yield setup.put(batch | {'mask': everyone}), setup.key('eval', i)


def _draw_snapshot(setup: Setup, root: epath.Path, state: TrainState, stop: Stop) -> None:
  """A grid of samples; left out, and drawn by the next run, if a signal comes."""
  step, training = int(state.step), setup.config.training
  path = root / 'samples' / f'iter_{step}' / 'sample.png'
  if not training.snapshot_sampling or path.exists():
    return

  with Bar('sample', 100, unit='%') as bar:

    def progress(fraction: float) -> None:
      bar.update(100 * fraction)
      if stop.signal and jax.process_count() == 1:
        raise InterruptedError

    try:
      rng = setup.key('snapshot', step)
      n = training.snapshot_samples
      labels = eval_lib.classes_in_turn(setup, 0, n)
      images, _ = eval_lib.draw(setup, state.ema_params, rng, n, progress, labels)
    except InterruptedError:
      return
  artifacts.write_grid(path, images)
  logger.info('step %d: samples are in %s', step, path)


def _steps_to_evaluate(config: FrozenConfigDict, steps: list[int]) -> list[int]:
  """The steps of the checkpoints begin_ckpt to end_ckpt, in units of snapshot_freq."""
  unit, begin, end = config.training.snapshot_freq, config.eval.begin_ckpt, config.eval.end_ckpt
  chosen = [step for step in steps if begin * unit <= step <= end * unit]
  if chosen:
    return chosen
  there = f'checkpoints {begin} to {end} (steps {begin * unit} to {end * unit})'
  if not steps or steps[-1] > end * unit:
    raise UserError(
      f'no {there}; there are those of steps {steps}: set config.eval.begin_ckpt and end_ckpt, '
      f'which count in units of config.training.snapshot_freq = {unit}'
    )
  logger.warning('no %s yet; evaluating the newest, of step %d', there, steps[-1])
  return steps[-1:]
