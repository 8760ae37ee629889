"""What is evaluated: which checkpoints of a run, and what a measurement of one is."""

import abc
from collections.abc import Iterator, Sequence
import dataclasses
import logging
import time

from etils import epath

from models.score import Params
from runtime import processes
from runtime.errors import UserError
from training.checkpoints import Checkpoints
from workdir import reports
from workdir.reports import Report

logger = logging.getLogger('score_sde')

WAIT_SECONDS = 30.0  # between two looks for a new checkpoint


class Measurement(abc.ABC):
  """Something that is measured of a checkpoint, and its part of the report."""

  @property
  def class_names(self) -> Sequence[str]:
    """The classes of the data that it is measured on, whose labels a model may be told."""
    return ()

  @abc.abstractmethod
  def is_in(self, report: Report) -> bool:
    """Whether a report holds it already, as it is wanted."""

  @abc.abstractmethod
  def measure(self, params: Params, step: int, folder: epath.Path) -> Report:
    """Measures the parameters of a step.

    What takes long is done in `rounds`, whose files lie in `folder`: a measurement that is stopped
    and started again repeats at most one.
    """


def measured(
  report: Report, measurements: Sequence[Measurement], params: Params, out: epath.Path
) -> Report:
  """A report with all that is measured of parameters; written with each that it did not have."""
  step = report['step']
  for measurement in measurements:
    if not measurement.is_in(report):
      report |= measurement.measure(params, step, step_folder(out, step))
      reports.write(out, report)
  return report


def step_folder(out: epath.Path, step: int) -> epath.Path:
  """Where the arrays and pictures of the checkpoint of a step lie."""
  return out / f'step_{step}'


@dataclasses.dataclass(frozen=True)
class CheckpointRange:
  """The checkpoints of a run with the numbers `begin` to `end`.

  Attributes:
    begin, end: the first and the last number.
    unit: steps between two numbers.
    n_iters: steps of training, whose last has a checkpoint as well.
    wait: for those that training has still to write.
  """

  begin: int
  end: int
  unit: int
  n_iters: int
  wait: bool = False

  def steps(self, checkpoints: Checkpoints) -> Iterator[int]:
    """The steps of those that are there, ascending, as they come.

    Without `wait`, and if there is none, the newest before them stands for them.

    Raises:
      UserError: if there is none and will be none.
    """
    unit, begin, end = self.unit, self.begin, self.end
    last, done = min(end * unit, self.n_iters), begin * unit - 1
    while True:
      found = [step for step in checkpoints.steps() if done < step <= end * unit]
      step = processes.from_first(min(found, default=-1))
      if step >= 0:
        yield step
        done = step
      elif not self.wait or done >= last:
        break
      else:
        logger.info('waiting for the next checkpoint, up to step %d', last)
        time.sleep(WAIT_SECONDS)
    if done >= begin * unit:
      return
    there = f'checkpoints {begin} to {end} (steps {begin * unit} to {end * unit})'
    others = checkpoints.steps()
    newest = processes.from_first(others[-1] if others else -1)
    if not 0 <= newest < (end + 1) * unit:  # the last step may be one after a multiple
      raise UserError(
        f'no {there}; there are those of steps {others}: set config.eval.begin_ckpt and end_ckpt, '
        f'which count in units of config.training.snapshot_freq = {unit}'
      )
    logger.warning('no %s yet; evaluating the newest, of step %d', there, newest)
    yield newest
