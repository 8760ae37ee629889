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
from ml_collections import FrozenConfigDict
import numpy as np

from builders.setup import Setup
from data import sources
from models.score import Params
from runtime import processes
from runtime.errors import UserError
from training.checkpoints import Checkpoints
from training.step import Batch, finite_step, Metrics, TrainState
from workdir.artifacts import Metrics as MetricsFile
from workdir.progress import Stop, TrainLog

logger = logging.getLogger('score_sde')

Update = Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]  # (state, batch, key)


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained, and for how long.

  Attributes:
    section: of the config, that describes the network.
    init: key -> the state before the first step.
    update: to the state one step later, and metrics [] of that step.
    evaluate: (moving average of the parameters, held-out batch, key) -> metrics [].
    purposes: of the keys that these three get.
    batch_size: of training and of evaluation.
    n_iters: steps.
  """

  section: str
  init: Callable[[Array], TrainState]
  update: Update
  evaluate: Callable[[Params, Batch, Array], Metrics]
  purposes: tuple[str, str, str]
  batch_size: int
  n_iters: int


def train(
  setup: Setup,
  task: Task,
  root: epath.Path,
  source: sources.Source,
  held_out: sources.Source,
  at_snapshot: Callable[[TrainState, Stop], None] = lambda state, stop: None,
) -> TrainState:
  """Trains to the end, from the newest checkpoint in `root` if there is one.

  How often there is a log, an evaluation, a snapshot stands in `config.training`. `at_snapshot` is
  called once a snapshot is saved, and again on resuming there: the run may have been stopped in
  the middle of it.

  Returns:
    The state after the last step.

  Raises:
    UserError: for a config that makes no network, an image that cannot be read, checkpoints that
      cannot, or a loss that is not finite.
    Failure: if a checkpoint cannot be written.
    SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is written; the code is 128 + signal.
  """
  training = setup.config.training
  with Stop() as stop, Checkpoints(root) as checkpoints:
    start = state = _restore_or_init(setup, task, root, checkpoints)
    step = int(state.step)
    if step and (step % training.snapshot_freq == 0 or step >= task.n_iters):
      at_snapshot(state, stop)
    evaluate = jax.jit(task.evaluate, out_shardings=setup.devices.replicated)
    held_out_batches = _held_out_batches(setup, task, held_out, step // training.eval_freq)
    log_choices = {'n_iters': task.n_iters, 'log_freq': training.log_freq}
    log_choices |= {'step': step, 'batch_size': task.batch_size}
    with (
      MetricsFile(root, step, training.wandb) as metrics,
      TrainLog(metrics, **log_choices) as log,
    ):
      for state, step, measured in updates(setup, task, source, start):
        log.add(step, measured)
        if step % training.eval_freq == 0:
          log.add_eval(step, evaluate(state.ema_params, *next(held_out_batches)))
        snapshot = step % training.snapshot_freq == 0 or step == task.n_iters
        leave = step < task.n_iters and stop.agreed(step, training.log_freq)
        if snapshot or leave or step % training.snapshot_freq_for_preemption == 0:
          log.settle(step)
          metrics.flush()
          checkpoints.save(state, keep=snapshot)
          log.saved = step
        if snapshot and not leave:
          at_snapshot(state, stop)
        if leave:
          break
  if step < task.n_iters:
    logger.info('stopped at step %d, saved; the same command goes on from there', step)
    raise SystemExit(128 + stop.signal)
  logger.info('trained to step %d; checkpoints are in %s', step, root / 'checkpoints')
  return state


def like(setup: Setup, task: Task) -> TrainState:
  """The shapes, dtypes and shardings of the training state.

  Raises:
    UserError: if the config does not make a network.
  """
  try:
    state = jax.eval_shape(task.init, setup.keys.key(task.purposes[0]))
  except (TypeError, ValueError) as error:
    reason = str(error).strip().partition('\n')[0]
    raise UserError(f'config.{task.section} does not make a network: {reason}') from error
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=setup.devices.replicated), state
  )


def _restore_or_init(
  setup: Setup, task: Task, root: epath.Path, checkpoints: Checkpoints
) -> TrainState:
  state = checkpoints.restore_latest(like(setup, task))
  if state is not None:
    logger.info('resuming %s at step %d', root, int(state.step))
    return state
  logger.info('training in %s', root)
  options = once_options()
  init = jax.jit(task.init, out_shardings=setup.devices.replicated, compiler_options=options)
  return init(setup.keys.key(task.purposes[0]))


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


def updates(
  setup: Setup, task: Task, source: sources.Source, state: TrainState
) -> Iterator[tuple[TrainState, int, Metrics]]:
  """Trains to the end; yields state, step and metrics after every call of the device."""
  step, rng = int(state.step), setup.keys.key(task.purposes[1])
  n = setup.config.training.n_jitted_steps
  choices: dict[str, Any] = {'out_shardings': (setup.devices.replicated,) * 2, 'donate_argnums': 0}
  choices['compiler_options'] = compiler_options()
  skip = setup.config.training.skip_nonfinite
  update = partial(finite_step, task.update) if skip else task.update
  one_step = jax.jit(update, **choices)
  many_steps = jax.jit(partial(several_steps, update), **choices)
  with contextlib.closing(
    sources.train_batches(
      source, task.batch_size, seed=setup.config.seed, start=step, **processes.share()
    )
  ) as batches:
    while step < task.n_iters:
      if n > 1 and steps_to_event(step, task.n_iters, setup.config.training) >= n:
        many = jax.tree.map(lambda *rows: np.stack(rows), *(next(batches) for _ in range(n)))
        state, measured = many_steps(state, setup.devices.put_several(many), rng)
        step += n
      else:
        state, measured = one_step(state, setup.devices.put(next(batches)), rng)
        step += 1
      yield state, step, measured


def several_steps(
  update: Update, state: TrainState, batches: Batch, rng: Array
) -> tuple[TrainState, Metrics]:
  """The steps on batches [n, B, ...] in one program, and metrics [n] of them."""
  return jax.lax.scan(lambda s, batch: update(s, batch, rng), state, batches)


def steps_to_event(step: int, n_iters: int, training: FrozenConfigDict) -> int:
  """How many steps are left until something else is due."""
  frequencies = (
    training.log_freq,
    training.eval_freq,
    training.snapshot_freq,
    training.snapshot_freq_for_preemption,
  )
  return min(n_iters - step, *(every - step % every for every in frequencies))


def _held_out_batches(
  setup: Setup, task: Task, held_out: sources.Source, start: int
) -> Iterator[tuple[Batch, Array]]:
  """Batches of held-out images on the devices, without end, each with a key."""
  seed = setup.config.seed
  choices = {'seed': seed, 'start': start, **processes.share()}
  with contextlib.closing(sources.train_batches(held_out, task.batch_size, **choices)) as batches:
    for i, batch in enumerate(batches, start):
      yield setup.devices.put(batch), setup.keys.key(task.purposes[2], i)
