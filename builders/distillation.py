"""From a config to --mode distill: which stages there are, and what each of them trains."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jax import Array
from ml_collections import ConfigDict, FrozenConfigDict

from builders.samplers import make_halving
from builders.setup import Setup
from models.score import Params
from runtime.errors import UserError
from training import progressive
from training.averages import Average
from training.loop import Task
from training.step import Batch, init_state, Metrics


def distillation_task(
  setup: Setup, averages: tuple[Average, ...], teacher: Params | None = None
) -> Task:
  """The training of a student, by the parameters of a teacher if it reads them all along.

  Without them the task has the state of the student alone: what checkpoints hold.
  """
  return _TASKS[setup.config.distill.method](setup, averages, teacher)


def _progressive(setup: Setup, averages: tuple[Average, ...], teacher: Params | None) -> Task:
  config = setup.config
  choices: dict[str, Any] = {
    'model': setup.model,
    'codec': setup.codec,
    'objective': make_halving(config, setup.model.sde),
  }

  def evaluate(params: Params, teacher: Params, batch: Batch, rng: Array) -> Metrics:
    return {'loss': progressive.eval_step(params, teacher, batch, rng, **choices).mean()}

  return Task(
    section='model',
    init=partial(
      init_state, model=setup.model, tx=setup.tx, shape=(1, *setup.data_shape),
      n_averages=len(averages),
    ),
    update=partial(
      progressive.train_step, tx=setup.tx, averages=averages,
      grad_accum=config.training.grad_accum, **choices,
    ),
    evaluate=evaluate,
    purposes=('init', 'train', 'eval'),
    batch_size=config.training.batch_size,
    frozen=teacher,
  )  # fmt: skip


_WITHOUT_TEACHER = ('ct', 'ict')
# By method: (setup, averages, the teacher's parameters if they are there) -> what is trained.
_TASKS: dict[str, Callable[[Setup, tuple[Average, ...], Params | None], Task]] = {
  'progressive': _progressive,
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
  """The configs of the runs that make a student, one after another; the last one is `config`.

  In progressive distillation each halves the steps, from `distill.start_steps`, and is the teacher
  of the next; all else is one run.
  """
  choice = config.distill
  if choice.method != 'progressive':
    return [config]
  before, steps = list[ConfigDict](), choice.start_steps // 2
  while steps > choice.end_steps:
    stage = ConfigDict(config.to_dict())
    stage.distill.start_steps, stage.distill.end_steps = 2 * steps, steps
    before.append(stage)
    steps //= 2
  return [*before, config]
