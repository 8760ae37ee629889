"""From a config to --mode distill: which stages there are, and what each of them trains."""

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Any

from jax import Array
from ml_collections import ConfigDict, FrozenConfigDict

from builders.samplers import make_halving
from builders.setup import Setup
from models.score import Params
from runtime.errors import UserError
from sde_lib import SDE
from training import consistency, progressive
from training.averages import Average
from training.consistency import (
  Consistency,
  consistency_distillation,
  consistency_training,
  DISTANCES,
  easy_tuning,
  improved_training,
  WEIGHTS,
)
from training.curricula import NormalLaw
from training.loop import Task
from training.step import Batch, init_state, Metrics, TrainState


def distillation_task(
  setup: Setup, averages: tuple[Average, ...], teacher: Params | None = None
) -> Task:
  """The training of a student, by the parameters of a teacher if it reads them all along.

  Without them the task has the state of the student alone: what checkpoints hold.
  """
  return _TASKS[setup.config.distill.method](setup, averages, teacher)


def make_consistency(config: FrozenConfigDict, sde: SDE) -> Consistency:
  """What a consistency model is asked for.

  Raises:
    UserError: if the numbers of its steps, or its times, do not go together.
  """
  choice, training = config.distill, config.training
  steps, law = training.n_iters, NormalLaw(training.time_mean, training.time_std)
  usual_distance = 'l2' if choice.method in ('cd', 'ct') else 'pseudo_huber'
  distance = DISTANCES[choice.distance or usual_distance](choice.huber_c)
  common = {'sde': sde, 'eps': training.eps, 'distance': distance}
  growing = {'steps': steps, 'start': choice.start_steps, 'end': choice.end_steps}
  try:
    objective = {
      'cd': lambda: consistency_distillation(
        **common, n=choice.num_steps, solver=choice.solver, mu=choice.target_rate, rho=choice.rho
      ),
      'ct': lambda: consistency_training(
        **common, **growing, mu=choice.target_rate, rho=choice.rho
      ),
      'ict': lambda: improved_training(**common, **growing, law=law, rho=choice.rho),
      'ect': lambda: easy_tuning(
        **common, steps=steps, q=choice.gap_base, k=choice.gap_k, b=choice.gap_b,
        stages=choice.doublings, law=law,
      ),
    }[choice.method]()  # fmt: skip
  except ValueError as error:
    raise UserError(f'config.distill.method = {choice.method}: {error}') from None
  weight = WEIGHTS[choice.weight] if choice.weight else objective.weight
  return dataclasses.replace(objective, weight=weight)


def _progressive(setup: Setup, averages: tuple[Average, ...], teacher: Params | None) -> Task:
  config = setup.config
  choices: dict[str, Any] = {
    'model': setup.model,
    'codec': setup.codec,
    'objective': make_halving(config, setup.model.sde),
  }

  def evaluate(params: Params, teacher: Params, batch: Batch, rng: Array) -> Metrics:
    return {'loss': progressive.eval_step(params, teacher, batch, rng, **choices).mean()}

  return _task(setup, averages, partial(progressive.train_step, **choices), evaluate, teacher)


def _consistency(setup: Setup, averages: tuple[Average, ...], teacher: Params | None) -> Task:
  config = setup.config
  objective = make_consistency(config, setup.model.sde)
  choices: dict[str, Any] = {'model': setup.model, 'codec': setup.codec, 'objective': objective}

  def evaluate(params: Params, teacher: Params | None, batch: Batch, rng: Array) -> Metrics:
    del teacher
    return {'loss': consistency.eval_step(params, batch, rng, **choices).mean()}

  read_all_along = teacher if config.distill.method == 'cd' else None
  averages = (*averages, *objective.target_averages)
  step = partial(consistency.train_step, **choices)
  return _task(setup, averages, step, evaluate, read_all_along)


def _task(
  setup: Setup,
  averages: tuple[Average, ...],
  step: Callable[..., tuple[TrainState, Metrics]],
  evaluate: Callable[[Params, Any, Batch, Array], Metrics],
  frozen: Params | None,
) -> Task:
  training = setup.config.training
  choices = {'model': setup.model, 'tx': setup.tx, 'shape': (1, *setup.data_shape)}
  return Task(
    section='model',
    init=partial(init_state, n_averages=len(averages), **choices),
    update=partial(step, tx=setup.tx, averages=averages, grad_accum=training.grad_accum),
    evaluate=evaluate,
    purposes=('init', 'train', 'eval'),
    batch_size=training.batch_size,
    frozen=frozen,
  )


_LATE = 4  # steps, at most, of a stage that `distill.late_iters` is for
_WITHOUT_TEACHER = ('ct', 'ict')
# By method: (setup, averages, the teacher's parameters if they are there) -> what is trained.
_TASKS: dict[str, Callable[[Setup, tuple[Average, ...], Params | None], Task]] = {
  'progressive': _progressive,
  'cd': _consistency,
  'ct': _consistency,
  'ict': _consistency,
  'ect': _consistency,
}


def check_distillation(config: FrozenConfigDict, teacher: str) -> None:
  """Raises UserError unless a config is for --mode distill, with a teacher if it has one."""
  method = config.distill.method
  if not method:
    raise UserError(
      'config.distill.method is empty, and --mode distill needs one: give a config of '
      'configs/distill, or choose --mode train'
    )
  if method in _WITHOUT_TEACHER and teacher:
    raise UserError(
      f'config.distill.method = {method} learns from data alone; leave --teacher {teacher} out'
    )
  if method not in _WITHOUT_TEACHER and not teacher:
    raise UserError(
      f'config.distill.method = {method} needs --teacher WORKDIR, also to go on: the workdir of a '
      'score model'
    )


def stages(config: ConfigDict) -> list[ConfigDict]:
  """The configs of the runs that make a student, one after another; the last one ends as `config`.

  In progressive distillation each halves the steps, from `distill.start_steps`, and is the teacher
  of the next; all else is one run. Stages of few steps, in which most is lost, may be longer: those
  of 2 and 1 take twice as many updates in the paper (Salimans & Ho 2022).
  """
  choice = config.distill
  if choice.method != 'progressive':
    return [config]
  made, steps = list[ConfigDict](), choice.start_steps // 2
  while steps >= choice.end_steps:
    stage = ConfigDict(config.to_dict())
    stage.distill.start_steps, stage.distill.end_steps = 2 * steps, steps
    if steps <= _LATE and choice.late_iters:
      stage.training.n_iters = choice.late_iters
    made.append(stage)
    steps //= 2
  return made
