"""How long this process has been compiling: time that the rest of a task does not take again."""

import threading
import time

import jax

_EVENTS = '/jax/core/compile/'  # tracing, lowering, compiling; also where a cache has the result


class Compilation:
  """The time for which JAX has been compiling since this was made."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._spans: list[tuple[float, float]] = []  # disjoint, ascending
    self._total = 0.0

  @property
  def seconds(self) -> float:
    with self._lock:
      return self._total

  def note(self, event: str, duration_secs: float, **_: str | int) -> None:
    """Counts the time of an event that ends now; that of events within it only once."""
    if not event.startswith(_EVENTS):
      return
    with self._lock:
      end = time.monotonic()
      begin = end - duration_secs
      while self._spans and self._spans[-1][0] >= begin:
        inner = self._spans.pop()
        self._total -= inner[1] - inner[0]
      begin = max(begin, self._spans[-1][1]) if self._spans else begin
      self._spans.append((begin, end))
      self._total += end - begin


here = Compilation()
jax.monitoring.register_event_duration_secs_listener(here.note)


def working_time() -> float:
  """A clock in seconds, with an arbitrary zero, that stands while something is compiled."""
  return time.monotonic() - here.seconds
