"""Which snapshot of a run is the best, by what training measured of samples of each: `best.json`.

The reports lie in `quality/`, as those of an evaluation lie in its folder.
"""

import dataclasses
from typing import Any

from etils import epath

from runtime.errors import UserError
from workdir import artifacts, reports
from workdir.reports import Report

FOLDER, FILE = 'quality', 'best.json'  # of a workdir


@dataclasses.dataclass(frozen=True)
class Best:
  """A snapshot, and what it is the best in.

  Attributes:
    step: of training.
    by: the name of the distance from the data, of which less is better.
    value: that distance.
    floor: that of two halves of the data, if it is known.
    samples: how many were compared.
    compared: how many snapshots there were to choose from.
    checkpoint: the checksum of the average that was sampled.
  """

  step: int
  by: str
  value: float
  floor: float | None
  samples: int
  compared: int
  checkpoint: str

  @property
  def told(self) -> str:
    """What it is, in words."""
    floor = '' if self.floor is None else f' (floor {self.floor:.6g})'
    return (
      f'step {self.step}, {self.by} {self.value:.6g}{floor} of {self.samples} samples, the best of '
      f'{self.compared} snapshots'
    )


def of(found: list[Report]) -> Best | None:
  """The best of some reports, if they have a measure in common."""
  if not (chosen := reports.best(found)):
    return None
  step, name = chosen
  report = next(report for report in found if report['step'] == step)
  return Best(
    step,
    name,
    report[name],
    reports.scalars(report).get(f'{name}_floor'),
    report['samples'],
    len(found),
    report['checkpoint'],
  )


def write(root: epath.Path, best: Best) -> None:
  """Writes `best.json` in a workdir."""
  artifacts.write_json(root / FILE, dataclasses.asdict(best))


def read(root: epath.Path) -> Best | None:
  """What it says, if it is there.

  Raises:
    UserError: if it is damaged.
  """
  path = root / FILE
  if not path.exists():
    return None
  value: Any = artifacts.read_json(path)
  try:
    return Best(**value)
  except TypeError:
    raise UserError(f'{path} is damaged; move it away, and training makes it again') from None


def step_of(root: epath.Path) -> int:
  """The step of the best snapshot.

  Raises:
    UserError: if none is named.
  """
  best = read(root)
  if best is None:
    raise UserError(
      f'config.eval.best: {root} has no {FILE}, which training writes with '
      'config.training.fid_freq = 1'
    )
  return best.step
