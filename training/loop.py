"""The training loop, of score models and of classifiers: resume, step, evaluate, save, stop."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
from functools import partial
import logging
from typing import Any

from etils import epath
import jax
from jax import Array
import numpy as np

from data.batches import train_batches
from data.images import Source
from models.score import Params
from runtime import processes
from runtime.devices import Devices, Keys
from runtime.errors import UserError
from training.checkpoints import Checkpoints, Notes
from training.packing import packed, SMALL, STACKED, unpacked
from training.step import Batch, finite_step, Metrics, TrainState
from workdir.artifacts import Metrics as MetricsFile
from workdir.progress import Stop, TrainLog

logger = logging.getLogger('score_sde')

# (state, frozen, batch, key) -> the state one step later, and metrics [] of that step
Update = Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained.

  Attributes:
    section: of the config, that describes the network.
    init: key -> the state before the first step.
    update: (state, frozen, batch, key) -> the state one step later, and metrics [] of that step.
      The state may be packed: `training.packing.unpacked` makes trees of it.
    evaluate: (moving average of the parameters, frozen, held-out batch, key) -> metrics [].
    purposes: of the keys that these three get.
    batch_size: of training and of evaluation.
    frozen: parameters that `update` and `evaluate` read and never change, a teacher's, on the
      devices. They are an argument of the compiled step, neither donated nor part of a checkpoint.
  """

  section: str
  init: Callable[[Array], TrainState]
  update: Update
  evaluate: Callable[[Params, Any, Batch, Array], Metrics]
  purposes: tuple[str, str, str]
  batch_size: int
  frozen: Any = None


@dataclasses.dataclass(frozen=True)
class Schedule:
  """For how long training goes on, and how often it does what is not a step; all in steps.

  Attributes:
    n_iters: of the whole training.
    n_jitted_steps: in one program, where nothing else is due in between.
    log_freq, eval_freq: between two lines of metrics, and two evaluations.
    snapshot_freq: between two checkpoints that are kept.
    snapshot_freq_for_preemption: between two of which the last two are.
    skip_nonfinite: leave out steps whose loss or gradient is not finite; otherwise training ends.
    keep_snapshots: of the checkpoints that are kept, the newest alone; 0 for all.
    wandb: the project of Weights & Biases that metrics are sent to, if any.
  """

  n_iters: int
  n_jitted_steps: int
  log_freq: int
  eval_freq: int
  snapshot_freq: int
  snapshot_freq_for_preemption: int
  skip_nonfinite: bool = False
  keep_snapshots: int = 0
  wandb: str = ''

  def steps_to_event(self, step: int) -> int:
    """How many steps are left until something else is due."""
    frequencies = (
      self.log_freq,
      self.eval_freq,
      self.snapshot_freq,
      self.snapshot_freq_for_preemption,
    )
    return min(self.n_iters - step, *(every - step % every for every in frequencies))


def train(
  task: Task,
  schedule: Schedule,
  devices: Devices,
  keys: Keys,
  root: epath.Path,
  source: Source,
  held_out: Source,
  at_start: Callable[[TrainState], None] = lambda state: None,
  at_snapshot: Callable[[TrainState, Stop], None] = lambda state, stop: None,
  notes: Notes | None = None,
  begin: Callable[[TrainState], TrainState] | None = None,
) -> TrainState:
  """Trains to the end, from the newest checkpoint in `root` if there is one.

  `at_start` is called once the state is there, before anything is written: what cannot be restored
  leaves the folder as it is. `at_snapshot` is called once a snapshot is saved, and again on
  resuming there: the run may have been stopped in the middle of it. `notes` are written down with
  every checkpoint. `begin`, if any, makes the state before the first step of the one that was
  initialised.

  Returns:
    The state after the last step.

  Raises:
    UserError: for a config that makes no network, an image that cannot be read, checkpoints that
      cannot, or a loss that is not finite.
    Failure: if a checkpoint cannot be written.
    SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is written; the code is 128 + signal.
  """
  n_iters = schedule.n_iters
  with Stop() as stop, Checkpoints(root, notes, schedule.keep_snapshots) as checkpoints:
    state = restore_or_init(task, devices, keys, root, checkpoints, begin)
    step = int(state.step)
    at_start(state)
    if step and (step % schedule.snapshot_freq == 0 or step >= n_iters):
      at_snapshot(state, stop)
    state = as_trained(state, devices)  # by the same name: what it was is freed
    steps = updates(task, schedule, devices, keys, source, state)
    evaluate = jax.jit(task.evaluate, out_shardings=devices.replicated)
    held_out_batches = _held_out_batches(
      task, devices, keys, held_out, start=step // schedule.eval_freq
    )
    log_choices = {'n_iters': n_iters, 'log_freq': schedule.log_freq}
    log_choices |= {'step': step, 'batch_size': task.batch_size}
    with (
      MetricsFile(root, step, schedule.wandb) as metrics,
      TrainLog(metrics, **log_choices) as log,
    ):
      for state, step, measured in steps:
        log.add(step, measured)
        if step % schedule.eval_freq == 0:
          log.add_eval(step, evaluate(state.ema_params, task.frozen, *next(held_out_batches)))
        snapshot = step % schedule.snapshot_freq == 0 or step == n_iters
        leave = step < n_iters and stop.agreed(step, schedule.log_freq)
        if snapshot or leave or step % schedule.snapshot_freq_for_preemption == 0:
          log.settle(step)
          metrics.flush()
          checkpoints.save(unpacked(state), keep=snapshot)
          log.saved = step
        if snapshot and not leave:
          at_snapshot(unpacked(state), stop)
          # From here the same command goes on with what a signal broke off there.
          leave = step < n_iters and jax.process_count() == 1 and stop.signal > 0
        if leave:
          break
  if step < n_iters:
    logger.info('stopped at step %d, saved; the same command goes on from there', step)
    raise SystemExit(128 + stop.signal)
  logger.info('trained to step %d; checkpoints are in %s', step, root / 'checkpoints')
  return unpacked(state)


def abstract_state(task: Task, devices: Devices, keys: Keys) -> TrainState:
  """The shapes, dtypes and shardings of the training state.

  Raises:
    UserError: if the config does not make a network.
  """
  try:
    state = jax.eval_shape(task.init, keys.key(task.purposes[0]))
  except (TypeError, ValueError) as error:
    reason = str(error).strip().partition('\n')[0]
    raise UserError(f'config.{task.section} does not make a network: {reason}') from error
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    state,
    devices.state_shardings(state),
  )


def restore_or_init(
  task: Task,
  devices: Devices,
  keys: Keys,
  root: epath.Path,
  checkpoints: Checkpoints,
  begin: Callable[[TrainState], TrainState] | None = None,
) -> TrainState:
  """The state of the newest checkpoint, or the one before the first step if there is none."""
  abstract = abstract_state(task, devices, keys)
  state = checkpoints.restore_latest(abstract)
  if state is not None:
    logger.info('resuming %s at step %d', root, int(state.step))
    return state
  logger.info('training in %s', root)
  shardings = devices.state_shardings(abstract)
  init = jax.jit(task.init, out_shardings=shardings, compiler_options=once_options())
  state = init(keys.key(task.purposes[0]))
  return begin(state) if begin else state


def once_options() -> dict[str, int]:
  """XLA's for a program that runs once: on CPUs most of its time would go into optimising it."""
  return {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else {}


def compiler_options() -> dict[str, str]:
  """XLA's for a training step.

  XLA:CPU takes optimisation barriers away before it fuses operations, unless it is told not to:
  with them `model.remat` saves memory, and `models.barriers.stored` time.
  """
  cpu = jax.default_backend() == 'cpu'
  return {'xla_disable_hlo_passes': 'cse_barrier_expander'} if cpu else {}


def as_trained(state: TrainState, devices: Devices) -> TrainState:
  """A state as the programs of these devices take it: with its parameters packed, but on CPUs.

  There a kernel costs little to start, and the norm of a gradient adds up as it always did.
  """
  if devices.platform == 'cpu':
    return state
  in_parts = devices.rows is not None  # large arrays are spread over the devices
  return packed(state, STACKED if devices.platform == 'gpu' and not in_parts else SMALL)


def compile_steps(
  task: Task, schedule: Schedule, devices: Devices, state: TrainState
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """The programs of one step and of several: (state, frozen, batch or batches, key) -> the next.

  The state, which is `as_trained`, is donated; what is frozen is not.
  """
  shardings = devices.state_shardings(state)
  choices: dict[str, Any] = {'out_shardings': (shardings, devices.replicated), 'donate_argnums': 0}
  choices['compiler_options'] = compiler_options()
  update = partial(finite_step, task.update) if schedule.skip_nonfinite else task.update
  return jax.jit(update, **choices), jax.jit(partial(several_steps, update), **choices)


def updates(
  task: Task,
  schedule: Schedule,
  devices: Devices,
  keys: Keys,
  source: Source,
  state: TrainState,
) -> Iterator[tuple[TrainState, int, Metrics]]:
  """Trains to the end; yields state, step and metrics after every call of the device.

  The states, the first one too, are `as_trained`; `training.packing.unpacked` makes trees of them.
  """
  step, rng, n = int(state.step), keys.key(task.purposes[1]), schedule.n_jitted_steps
  one_step, many_steps = compile_steps(task, schedule, devices, state)
  with contextlib.closing(
    train_batches(source, task.batch_size, seed=keys.seed, start=step, **processes.share())
  ) as batches:
    while step < schedule.n_iters:
      if n > 1 and schedule.steps_to_event(step) >= n:
        many = jax.tree.map(lambda *rows: np.stack(rows), *(next(batches) for _ in range(n)))
        state, measured = many_steps(state, task.frozen, devices.put_several(many), rng)
        step += n
      else:
        state, measured = one_step(state, task.frozen, devices.put(next(batches)), rng)
        step += 1
      yield state, step, measured


def several_steps(
  update: Update, state: TrainState, frozen: Any, batches: Batch, rng: Array
) -> tuple[TrainState, Metrics]:
  """The steps on batches [n, B, ...] in one program, and metrics [n] of them."""
  return jax.lax.scan(lambda s, batch: update(s, frozen, batch, rng), state, batches)


def _held_out_batches(
  task: Task, devices: Devices, keys: Keys, held_out: Source, *, start: int
) -> Iterator[tuple[Batch, Array]]:
  """Batches of held-out images on the devices, without end, each with a key."""
  choices = {'seed': keys.seed, 'start': start, **processes.share()}
  with contextlib.closing(train_batches(held_out, task.batch_size, **choices)) as batches:
    for i, batch in enumerate(batches, start):
      yield devices.put(batch), keys.key(task.purposes[2], i)
