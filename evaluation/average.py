"""Whether the moving average of the parameters, which is evaluated, has come to where they are.

After n steps at rate r, r^n of the average is still the parameters that training began with: at
0.9999, 99 % after 100 steps, and 5 % after 30,000. Samples of such an average are no better than
those of a network that has learned nothing, whatever the loss of training says.
"""

import dataclasses
import logging

from etils import epath

from evaluation.held_out_loss import HeldOutLoss
from models.score import Params
from training.averages import Average
from workdir.reports import Report

logger = logging.getLogger('score_sde')

LATE = 0.05  # share of the first parameters, above which an average has not arrived


def is_late(average: Average, steps: int) -> bool:
  """Whether it has not arrived after so many steps."""
  return average.share_of_first(steps) > LATE


def what_is_late(average: Average, steps: int) -> str:
  """What is wrong, and what to do."""
  return (
    f'after {steps} steps, {average.share_of_first(steps):.0%} of the moving average of the '
    f'parameters are the first ones ({average}): train longer, or set config.model.ema_rate lower, '
    'config.model.ema_warmup or config.ema.half_life and train anew'
  )


@dataclasses.dataclass(frozen=True)
class LateAverage:
  """The held-out loss of the parameters themselves, beside that of an average that is late.

  Attributes:
    average: how the parameters are averaged.
    held_out_loss: measures both.
  """

  average: Average
  held_out_loss: HeldOutLoss

  def is_wanted(self, report: Report) -> bool:
    """Whether a report of a late average lacks it."""
    late = is_late(self.average, report['step'])
    return late and not all(self._name(name) in report for name in self.held_out_loss.losses)

  def measure(self, params: Params, step: int, folder: epath.Path) -> Report:
    """Of the parameters of a step, not of their average."""
    of_params = self.held_out_loss.measure(params, step, folder)
    return {self._name(name): of_params[name] for name in self.held_out_loss.losses}

  def tell(self, report: Report) -> None:
    """Gives both losses, where the average is late and the worse."""
    of_params = report.get(self._name('loss'))
    if (
      of_params is None
      or not of_params < report['loss']
      or not is_late(self.average, report['step'])
    ):
      return
    logger.warning(
      'the loss is %.4g, that of the parameters themselves %.4g: %s',
      report['loss'], of_params, what_is_late(self.average, report['step']),
    )  # fmt: skip

  def _name(self, objective: str) -> str:
    return f'{objective}_without_average'
