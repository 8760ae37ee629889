"""How soon several processes notice that they are to stop."""

import math
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from runtime import compilation
from workdir import progress
from workdir.progress import steps_to_question, Stop

ROOT = Path(__file__).parent.parent.parent
# Steps of 50 ms, a thousand of which are 50 s; the first takes much longer, as if it compiled.
_SLOW_STEPS = """
import sys, time
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from workdir import progress
progress.NOTICE_SECONDS = 1.0
with progress.Stop() as stop:
  for step in range(1, 1000):
    time.sleep(1.0 if step == 1 else 0.05)
    print(step, flush=True)
    if stop.agreed(step, 1000):
      break
print('stopped by', stop.signal, 'at', step)
"""


def test_two_processes_notice_a_signal_to_one_within_seconds_and_at_the_same_step():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  runs = [
    subprocess.Popen(
      [sys.executable, '-c', _SLOW_STEPS, address, str(i)],
      cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)},
      stdout=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    while runs[1].stdout.readline().strip() != '45':  # by then it asks about once a second
      assert runs[1].poll() is None
    runs[1].send_signal(signal.SIGTERM)
    sent = time.monotonic()
    said = [run.communicate(timeout=60)[0].splitlines()[-1] for run in runs]
    assert time.monotonic() - sent < 10  # of the 48 s that were left; a busy machine is slow to end
  finally:
    for run in runs:
      run.kill()
  assert said[0] == said[1]
  words = said[0].split()
  assert int(words[2]) == signal.SIGTERM
  assert 45 <= int(words[-1]) <= 45 + 25


def _longest_wait(seconds_of, n: int, every: int) -> tuple[float, int]:
  """The longest time between two questions over n steps, after the first few, and their number."""
  step, asked, pace, longest, questions = 1, None, (1, math.inf), 0.0, 0
  while step < n:
    ahead = steps_to_question(*pace, every)
    if asked is not None:
      pace = (step - asked, sum(map(seconds_of, range(asked + 1, step + 1))))
      longest = max(longest, pace[1] if asked > 2 else 0.0)
    asked, step, questions = step, step + ahead, questions + 1
  return longest, questions


@pytest.mark.parametrize('seconds', [0.003, 0.3, 1.7, 4.0])
def test_steps_of_any_length_are_asked_after_within_seconds(seconds):
  """Also after a first step that compiles for minutes."""
  longest, questions = _longest_wait(lambda i: 200.0 if i <= 2 else seconds, 2000, every=500)
  assert longest <= progress.NOTICE_SECONDS + 1e-6
  assert questions <= 2000 * seconds / 2 + 20  # seldom: short steps are not slowed


def test_steps_longer_than_the_bound_are_all_asked_after():
  assert _longest_wait(lambda i: 60.0, 50, every=500)[0] == 60.0


def test_steps_that_get_ten_times_slower_are_asked_after_within_seconds_again():
  seconds = {True: 0.1, False: 1.0}
  longest, _ = _longest_wait(lambda i: seconds[i < 300], 1000, every=500)
  assert longest <= 10 * progress.NOTICE_SECONDS + 1e-6  # once, before it can be known
  tail, _ = _longest_wait(lambda i: 1.0 if i > 3 else 0.1, 1000, every=500)
  assert tail <= 2 * progress.NOTICE_SECONDS


def test_never_less_often_than_asked_for_and_never_not_at_all():
  assert steps_to_question(64, 1e-6, every=50) == 50
  assert steps_to_question(64, 0.0, every=500) == 128
  assert steps_to_question(5, 1e9, every=50) == 1


def test_one_process_notices_at_once(monkeypatch):
  monkeypatch.setattr(progress, 'steps_to_question', None)  # is not asked
  with Stop() as stop:
    assert not stop.agreed(7, 1000)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.agreed(8, 1000) and stop.signal == signal.SIGTERM


# The time that is left.


class Clock:
  """A time that passes as it is told."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    monkeypatch.setattr(progress.time, 'monotonic', lambda: self.now)


def line(caplog, bar: progress.Bar, done: float, note: str = '') -> str:
  """What a log is told next, if anything."""
  caplog.clear()
  caplog.set_level('INFO', logger='score_sde')
  bar.update(done, note)
  return caplog.text.partition('score_sde:')[2].partition(' ')[2].strip()


def test_the_time_that_is_left_does_not_count_what_comes_before_the_first_step(monkeypatch, caplog):
  clock = Clock(monkeypatch)
  with progress.Bar('train', 1010, done=10) as bar:
    clock.now += 600  # which compile
    assert line(caplog, bar, 15, 'loss 2') == 'train 15/1010 steps, loss 2'
    clock.now += 30
    assert line(caplog, bar, 30) == 'train 30/1010 steps, 32:40 left'  # 2 s each
    clock.now += 10
    assert line(caplog, bar, 35) == ''  # too soon for another
    clock.now += 10
    assert line(caplog, bar, 40, 'loss 1') == 'train 40/1010 steps, 32:20 left, loss 1'


def test_the_time_that_is_left_does_not_count_what_is_compiled_later(monkeypatch, caplog):
  """An evaluation in mid-training, and other programs; functions within functions count once."""
  clock = Clock(monkeypatch)
  monkeypatch.setattr(compilation, 'here', compiling := compilation.Compilation())
  with progress.Bar('train', 100) as bar:
    bar.update(1)
    clock.now += 20
    assert line(caplog, bar, 11) == 'train 11/100 steps, 02:58 left'
    clock.now += 50
    compiling.note('/jax/core/compile/jaxpr_trace_duration', 30.0)
    compiling.note('/jax/core/compile/jaxpr_trace_duration', 40.0)  # around it
    clock.now += 60
    compiling.note('/jax/core/compile/backend_compile_duration', 60.0)
    compiling.note('/jax/compilation_cache/compile_time_saved_sec', 500.0)
    clock.now += 10
    assert line(caplog, bar, 21) == 'train 21/100 steps, 02:38 left'  # 20 of 120 s for ten steps


def test_the_first_time_that_is_left_is_right(monkeypatch, caplog):
  """Calls of the device that wait their turn are not done, though Python is past them."""
  clock, measured = Clock(monkeypatch), [{'loss': jnp.float32(i)} for i in range(101)]
  ends = {id(of_call['loss']): 10.0 * i for i, of_call in enumerate(measured)}  # 10 s each

  def block_until_ready(tree) -> None:
    clock.now = max([clock.now, *(began + ends[id(x)] for x in jax.tree.leaves(tree))])

  monkeypatch.setattr(progress.jax, 'block_until_ready', block_until_ready)
  caplog.set_level('INFO', logger='score_sde')
  began = clock.now
  choices = {'n_iters': 100, 'step': 0, 'batch_size': 1, 'log_freq': 1000}
  with progress.TrainLog(None, **choices) as log:  # there is nothing to write
    for step in range(1, 10):
      log.add(step, measured[step])
    log.settle(9)
  told = [text.partition(', ')[0::2] for text in caplog.messages]
  assert told[:2] == [('train 2/100 steps', '16:20 left'), ('train 4/100 steps', '16:00 left')]
  assert clock.now == began + 90


def test_what_jax_compiles_stops_the_clock():
  wall, work = time.monotonic(), compilation.working_time()
  jax.jit(lambda x: jnp.linalg.svd(x) + jnp.linalg.svd(2 * x))(jnp.ones((7, 5)))
  wall, work = time.monotonic() - wall, compilation.working_time() - work
  assert 0 <= work < 0.8 * wall  # never back: what lies within something else counts once
