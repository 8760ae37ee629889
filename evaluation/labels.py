"""Which class each sample of a class-conditional model is drawn of.

A model knows p(x | y), and who draws chooses p(y). Where samples are compared with data, p(y) is
that of the data: otherwise a distance tells how evenly the classes were asked for, and a perfect
p(x | y) is far from data whose classes are not as frequent.
"""

import dataclasses
import logging
from typing import Any

import numpy as np

from data.batches import eval_batches
from data.images import Source
from workdir.progress import Bar

logger = logging.getLogger('score_sde')

_COUNTED = 1024  # images whose labels are read at a time


@dataclasses.dataclass(frozen=True)
class LabelLaw:
  """How often samples are of each class.

  Attributes:
    name: what the law follows.
    counts: samples are of class k as often as counts[k] in sum(counts).
  """

  name: str
  counts: tuple[int, ...]

  @property
  def mark(self) -> str:
    """What tells it from other laws; empty if it gives the classes 0, 1, 2, ... in turn."""
    return '' if len(set(self.counts)) == 1 else f'classes {self.counts}'

  def labels(self, n: int) -> np.ndarray:
    """The classes of the samples 0 to n - 1, int32 [n]; nothing about them is random.

    Each sample is of the class that lags furthest behind its share. So whichever samples are
    taken, from the first on, no class has a whole sample more than its share; and where all
    classes are as frequent, they come in turn.
    """
    counts, labels = np.array(self.counts, np.int64), np.empty(n, np.int32)
    total, lag = counts.sum(), np.zeros(len(counts), np.int64)  # in samples, times the total
    for i in range(n):
      lag += counts
      labels[i] = lag.argmax()
      lag[labels[i]] -= total
    return labels

  def report(self) -> dict[str, Any]:
    """What a report says of it."""
    return {'law': self.name, 'class_counts': list(self.counts)}


def in_turn(num_classes: int) -> LabelLaw:
  """All classes alike: 0, 1, 2, ... over and over."""
  return LabelLaw('in turn', (1,) * num_classes)


def count_classes(source: Source) -> tuple[int, ...]:
  """How many examples of each class a source has; empty if it has no labels. It reads them all."""
  counts = np.zeros(source.num_classes, np.int64)
  if source.num_classes:
    with Bar('labels', len(source), unit='images') as bar:
      for i, batch in enumerate(eval_batches(source, _COUNTED)):
        labels = batch['label'][batch['mask']]
        counts += np.bincount(labels, minlength=len(counts))
        bar.update(min((i + 1) * _COUNTED, len(source)))
  return tuple(counts.tolist())
