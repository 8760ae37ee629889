"""Trainings and measurements that benchmarks compare: what was done is not done again.

The commands that write docs/results.md share their flags, and where their runs lie.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import json
import logging
from pathlib import Path
import shutil
import sys
from typing import Any, Generic, Protocol, TypeVar
import zlib

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from benchmarks import results_page
from builders.distillation import stages
from configs.base import Changes
from data.images import Batch, Source
from evaluation.evaluate import Measurement
from models.score import Params
import run_lib
from runtime import start
from runtime.errors import UserError
from training.checkpoints import identity, steps_in
from workdir import artifacts
from workdir.reports import Report


class Compared(Protocol):
  """What a command compares on one set of data.

  Attributes:
    name: of the data.
    needs_path: the images do not come with the code.
  """

  @property
  def name(self) -> str: ...

  @property
  def needs_path(self) -> bool: ...


AnyTrial = TypeVar('AnyTrial', bound=Compared)


@dataclasses.dataclass(frozen=True)
class Job(Generic[AnyTrial]):
  """A trial, and where it is to lie.

  Attributes:
    trial: what is compared.
    folder: of its runs, and of what was measured.
    data: fields of the config that say where the images are.
    docs: the folder of the page that its tables go into.
  """

  trial: AnyTrial
  folder: epath.Path
  data: Changes
  docs: Path


def parser(doc: str | None, runs: str, trials: Sequence[Compared]) -> argparse.ArgumentParser:
  """The flags of a command whose runs lie in the folder `runs`."""
  made = argparse.ArgumentParser(description=(doc or '').partition('\n')[0])
  names = [trial.name.lower() for trial in trials]
  made.add_argument('--dataset', choices=names, help='only this one')
  made.add_argument('--path', default='', help='folder or archive of the files of Fashion-MNIST')
  made.add_argument('--data-dir', default='', help='config.data.tfds_dir of Fashion-MNIST')
  made.add_argument('--runs', default=runs, help=f'where runs lie ({runs})')
  made.add_argument(
    '--quick', action='store_true', help='a few steps, in a folder quick/ of its own there'
  )
  return made


def jobs(
  args: argparse.Namespace, trials: Sequence[AnyTrial], quick: AnyTrial
) -> list[Job[AnyTrial]]:
  """What the flags ask for. A quick one writes into a copy of the page."""
  logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', level=logging.WARNING)
  logging.getLogger('score_sde').setLevel(logging.INFO)
  root, docs = epath.Path(args.runs).resolve(), results_page.DOCS
  chosen = [trial for trial in trials if args.dataset in (None, trial.name.lower())]
  if args.quick:
    chosen, root = [quick], root / 'quick'
    docs = Path(root)
    docs.mkdir(parents=True, exist_ok=True)
    shutil.copy(results_page.DOCS / results_page.PAGE, docs)
  where = {'data.path': args.path, 'data.tfds_dir': args.data_dir}
  return [
    Job(trial, root / trial.name.lower(), where if trial.needs_path else {}, docs)
    for trial in chosen
  ]


def run(main: Callable[[], None]) -> None:
  """Runs a command, whose mistakes of its user are told in one line."""
  start.use_large_pages()
  try:
    main()
  except UserError as error:
    sys.exit(f'error: {error}')


def train(config: ConfigDict, workdir: epath.Path, teacher: str = '') -> None:
  """Trains a score model, or a student as `distill` says, as far as that was not done."""
  if stages(config)[-1].training.n_iters in steps_in(workdir):
    return
  if config.distill.method:
    run_lib.distill(config, str(workdir), teacher)
  else:
    run_lib.train(config, str(workdir))


def spent(workdir: epath.Path) -> tuple[int, float]:
  """Images that a run saw, and the seconds of its steps; with the stages before it, if any."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  seconds, before = 0.0, 0
  for line in sorted((line for line in lines if 'steps_per_s' in line), key=lambda v: v['step']):
    seconds += (line['step'] - before) / line['steps_per_s']
    before = line['step']
  config: dict[str, Any] = artifacts.read_json(workdir / 'config.json')
  images = config['training']['n_iters'] * config['training']['batch_size']
  if config.get('distill', {}).get('method') != 'progressive':  # older runs do not have the section
    return images, seconds
  stages = workdir / 'stages' if (workdir / 'stages').exists() else workdir.parent
  earlier = stages / str(2 * config['distill']['end_steps'])
  if not earlier.exists():
    return images, seconds
  images_before, seconds_before = spent(earlier)
  return images + images_before, seconds + seconds_before


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
    artifacts.write_json(path, report)
  return artifacts.read_json(path) | {'folder': str(own)}  # where it is now: runs may be moved


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
