"""Trainings and measurements that benchmarks compare: what was done is not done again."""

from collections.abc import Iterable, Sequence
import dataclasses
import time
import zlib

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from data.images import Batch, Source
from evaluation.evaluate import Measurement
from models.score import Params
import run_lib
from training.checkpoints import identity
from workdir import artifacts
from workdir.reports import Report


def train(config: ConfigDict, workdir: epath.Path) -> float:
  """Trains to `training.n_iters`; seconds, of all the times that it was begun."""
  path, seconds, n_iters = workdir / 'trained.json', 0.0, config.training.n_iters
  if path.exists():
    done = artifacts.read_json(path)
    if done['step'] == n_iters:
      return done['seconds']
    seconds = done['seconds']
  began, step = time.monotonic(), 0
  try:
    run_lib.train(config, str(workdir))
    step = n_iters
  finally:  # also when it is stopped
    seconds += time.monotonic() - began
    artifacts.write_json(path, {'step': step, 'seconds': seconds})
  return seconds


def measured(
  folder: epath.Path,
  name: str,
  settings: Report,
  measurements: Iterable[Measurement],
  params: Params,
  step: int,
) -> Report:
  """What was measured of a checkpoint with these settings, or is now.

  The report has the settings as well, and the `folder` of its files, in `folder`.
  """
  settings = settings | {'checkpoint': identity(params)}
  mark = zlib.crc32(artifacts.json_text(settings).encode())
  own = folder / f'{name}-{mark:08x}'
  path, report = own / 'report.json', settings
  if not path.exists():
    for measurement in measurements:
      report |= measurement.measure(params, step, own)
    artifacts.write_json(path, report | {'folder': str(own)})
  return artifacts.read_json(path)


@dataclasses.dataclass(frozen=True)
class FirstImages(Source):
  """The first n images of a source."""

  source: Source
  n: int

  @property
  def class_names(self) -> Sequence[str]:  # type: ignore[override]  # a property is read as well
    return self.source.class_names

  def __len__(self) -> int:
    return min(self.n, len(self.source))

  def batch(self, indices: np.ndarray) -> Batch:
    return self.source.batch(indices)
