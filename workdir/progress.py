"""What long work tells and is told: progress, logs of training, and signals to stop.

Progress is a bar on a terminal and plain lines in a log, on process 0 only.
"""

from collections import deque
import logging
import math
import signal
import sys
import time

import jax
from jax import Array
from jax.experimental import multihost_utils
import numpy as np
from tqdm import tqdm

from runtime.compilation import working_time
from runtime.errors import UserError
from workdir.artifacts import Metrics

logger = logging.getLogger('score_sde')

LINE_SECONDS = 20.0  # between two lines in a log
BAR_FORMAT = '{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}{postfix}]'
MOST_SKIPPED = 100  # steps in a row that may have no finite loss or gradient
NOTICE_SECONDS = 5.0  # about, between two questions of several processes whether to stop
AHEAD = 2  # calls of the training step that may wait for the device


class Bar:
  """How far a task is, and the time that is left; a context manager.

  That is by the pace since the first word of progress: what comes before it is getting ready. Time
  in which something is compiled does not count, then or later.

  Args:
    what: the task, in a word.
    total: how many units there are in all.
    done: how many are done already.
    unit: name of the units.
  """

  def __init__(self, what: str, total: float, done: float = 0, unit: str = 'steps'):
    self._what, self._total, self._unit, self._first = what, total, unit, done
    self._tty = sys.stderr.isatty()
    self._last_line = time.monotonic()
    self._from: tuple[float, float] | None = None  # units and time of the first word
    self._bar = tqdm(
      desc=what,
      total=total,
      initial=done,
      dynamic_ncols=True,
      leave=False,
      bar_format=BAR_FORMAT,
      disable=jax.process_index() > 0 or not self._tty,
    )

  def __enter__(self) -> 'Bar':
    return self

  def __exit__(self, *exception: object) -> None:
    self._bar.close()

  def update(self, done: float, note: str = '') -> None:
    """Says that `done` units are done in all, with a note beside the bar."""
    notes = ', '.join(filter(None, (self._left(done), note)))
    if not self._bar.disable:
      self._bar.set_postfix_str(notes, refresh=False)
      self._bar.update(done - self._bar.n)
    now = time.monotonic()
    line_due = now - self._last_line >= LINE_SECONDS and self._first < done < self._total
    if line_due and not self._tty and jax.process_index() == 0:
      self._last_line = now
      logger.info(
        '%s %.0f/%.0f %s%s', self._what, done, self._total, self._unit,
        f', {notes}' if notes else '',
      )  # fmt: skip

  def _left(self, done: float) -> str:
    """The time that is left, in words; nothing as long as that cannot be told."""
    now = working_time()
    if self._from is None:
      if done > self._first:
        self._from = done, now
      return ''
    first, began = self._from
    if done <= first:
      return ''
    left = (self._total - done) * (now - began) / (done - first)
    return f'{tqdm.format_interval(left)} left'


class Stop:
  """Notices SIGTERM and Ctrl-C, so that work ends in good order; a second Ctrl-C ends it at once.

  A context manager; outside it the signals have their former effect.
  """

  def __init__(self) -> None:
    self.signal = 0
    self._ask_at = 0  # the step of the next question to the other processes
    self._asked: tuple[int, float] | None = None  # step and time of the last one
    self._pace = (1, math.inf)  # steps and seconds between the last two; unknown at first

  def __enter__(self) -> 'Stop':
    self._former = {s: signal.signal(s, self._notice) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._former.items():
      signal.signal(number, handler)

  def _notice(self, number: int, frame: object) -> None:
    if self.signal and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = number
    logger.info('%s: saving a checkpoint, then leaving', signal.Signals(number).name)

  def agreed(self, step: int, every: int) -> bool:
    """Whether to stop at this step.

    Several processes ask each other about every `NOTICE_SECONDS`, and at least every `every` steps.
    A question waits for the device; so the time between two of them is that of their steps. How
    many steps the next is away is process 0's to say, with each answer.
    """
    if jax.process_count() == 1:
      return self.signal > 0
    if step < self._ask_at:
      return False
    mine = np.array([self.signal, steps_to_question(*self._pace, every)], np.int32)
    answers = multihost_utils.process_allgather(mine).reshape(-1, 2)
    now = time.monotonic()
    if self._asked:
      self._pace = (step - self._asked[0], now - self._asked[1])
    self._asked, self._ask_at = (step, now), step + int(answers[0, 1])
    self.signal = int(answers[:, 0].max())
    return self.signal > 0


def steps_to_question(steps: int, seconds: float, every: int) -> int:
  """How many steps until processes ask again, where the last `steps` took so many `seconds`.

  As many as take `NOTICE_SECONDS`; but at most `every`, and at most twice as many as the last time,
  as a few quick steps promise little.
  """
  in_time = int(min(NOTICE_SECONDS * steps / max(seconds, 1e-9), every))
  return max(1, min(in_time, 2 * steps))


class TrainLog:
  """Means of what training steps measure over `log_freq` steps, for the bar and for `metrics`.

  Values are fetched one call of the device after their own, so that it never waits for Python.
  Steps that were skipped are counted, and are not part of the means. A context manager.

  Attributes:
    saved: the step of the last checkpoint, 0 for none.
  """

  def __init__(self, metrics: Metrics, *, n_iters: int, step: int, batch_size: int, log_freq: int):
    self.saved, self._skipped = step, 0
    self._metrics, self._n_iters = metrics, n_iters
    self._batch_size, self._log_freq = batch_size, log_freq
    self._bar, self._note = Bar('train', n_iters, step), ''
    self._window: list[dict[str, Array]] = []
    self._running: deque[tuple[int, dict[str, Array]]] = deque()
    self._due: list[tuple[int, list[dict[str, Array]]]] = []
    self._since, self._since_step = working_time(), step

  def __enter__(self) -> 'TrainLog':
    return self

  def __exit__(self, *exception: object) -> None:
    self._bar.__exit__()

  def add(self, step: int, measured: dict[str, Array]) -> None:
    """Takes the metrics, [] or [n], of the one or n steps that end at `step`.

    The bar counts those that the device is done with, or the time that is left would be too short.
    """
    self.flush()
    self._running.append((step, measured))
    if len(self._running) > AHEAD:
      done, oldest = self._running.popleft()
      jax.block_until_ready(oldest)
      self._bar.update(done, self._note)
    self._window.append(measured)
    if step % self._log_freq == 0 or step == self._n_iters:
      self._due.append((step, self._window))
      self._window = []

  def add_eval(self, step: int, measured: dict[str, Array]) -> None:
    """Takes the metrics [] of an evaluation, to be written with `eval_` before their names."""
    self._due.append((step, [{f'eval_{name}': value for name, value in measured.items()}]))

  def flush(self) -> None:
    """Writes what is due.

    Raises:
      UserError: if a loss is not finite.
    """
    for step, window in self._due:
      means = self._finite_means(step, window)
      if 'loss' in means:
        now = working_time()
        rate = (step - self._since_step) / max(now - self._since, 1e-9)
        self._since, self._since_step = now, step
        means |= {'steps_per_s': rate, 'images_per_s': rate * self._batch_size}
        self._note = f'{rate:.3g} steps/s, {rate * self._batch_size:.0f} images/s'
        self._note += f', loss {means["loss"]:.4g}'
      self._metrics.write(step, **means)
    self._due = []

  def settle(self, step: int) -> None:
    """Writes what is due, and looks at all steps up to this one, before its state is saved.

    Raises:
      UserError: if a loss is not finite, and such steps are not skipped.
    """
    self.flush()
    if self._window and 'skipped' not in self._window[0]:
      self._finite_means(step, self._window)
    jax.block_until_ready([measured for _, measured in self._running])
    self._running.clear()
    self._bar.update(step, self._note)

  def _finite_means(self, step: int, window: list[dict[str, Array]]) -> dict[str, float]:
    """Means over the steps of a window that ends at `step`, and how many of them were skipped."""
    values = {name: np.concatenate([np.ravel(m[name]) for m in window]) for name in window[0]}
    if 'skipped' in values:
      return self._means_of_taken(step, values)
    for name, each in values.items():
      for i in np.flatnonzero(~np.isfinite(each)):
        raise UserError(
          f'{name} is {each[i]} at step {step - len(each) + 1 + i}: {self._advice()}, or leave out '
          'such steps (config.training.skip_nonfinite)'
        )
    return {name: float(each.mean()) for name, each in values.items()}

  def _means_of_taken(self, step: int, values: dict[str, np.ndarray]) -> dict[str, float]:
    """The same where steps may be skipped, which are not part of the means."""
    skipped = values.pop('skipped') > 0
    taken = np.flatnonzero(~skipped)
    self._skipped = len(skipped) - 1 - taken[-1] if len(taken) else self._skipped + len(skipped)
    if self._skipped >= MOST_SKIPPED:
      raise UserError(f'{self._skipped} steps in a row up to {step} were skipped: {self._advice()}')
    means = {name: float(each[taken].mean()) for name, each in values.items() if len(taken)}
    return means | {'skipped': float(skipped.sum())}

  def _advice(self) -> str:
    saved = f'the checkpoint of step {self.saved} is good' if self.saved else 'nothing was saved'
    return (
      f'{saved}. Try a lower learning rate (lr) or config.optim.grad_clip, look for damaged images'
    )
