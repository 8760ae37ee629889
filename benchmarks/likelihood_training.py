"""Held-out bits/dim of ways to train for it, with an equal budget: weights and laws of times.

Networks of the VP SDE, the same but for the loss, are trained on uniformly dequantised images. Then
held-out images get their bits/dim by the probability flow, and the bound of the reverse SDE; of the
last way also with other noise between levels. What is trained and measured stays under
runs/likelihood, and is not done again: the command can be stopped at any moment. It writes the
tables of docs/results.md, which grow as it goes on.

  python -m benchmarks.likelihood_training [--dataset NAME] [--path FOLDER] [--quick]

Fashion-MNIST: `--path /usr/share/datasets/fashion-mnist`, as in `benchmarks.recipes`.
"""

from collections.abc import Callable, Iterator, Sequence
import csv
import dataclasses
from functools import cache
import importlib
import math
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from benchmarks import dequantization, results_page, runs
from builders.evaluation import make_bits_per_dim, make_bound
from builders.setup import Setup
from configs.base import Changes
from evaluation.bits_per_dim import BitsPerDim
from models.score import Params
import run_lib
from workdir.reports import Report

SEED = 1
_IMPORTANCE: Changes = {'training.time_law': 'likelihood'}


@dataclasses.dataclass(frozen=True)
class Variant:
  """A way to train: what it is called in the table and on disk, and its fields."""

  name: str
  folder: str
  changes: Changes


VARIANTS = (
  Variant('sigma^2, uniform', 'sample', {}),
  Variant('likelihood, uniform', 'likelihood', {'training.likelihood_weighting': True}),
  Variant('likelihood, importance-sampled', 'importance', _IMPORTANCE),
  Variant(
    'likelihood, importance-sampled, stratified',
    'stratified',
    _IMPORTANCE | {'training.stratified': True},
  ),
)


@dataclasses.dataclass(frozen=True)
class Trial:
  """What the ways are compared on.

  Attributes:
    name: of the data.
    dataset: of the config configs/vp/<dataset>.py.
    changes: of it.
    n_iters: steps of training.
    exact_images: held-out ones, the first ones, whose exact bits/dim are measured.
    bound_images: whose bound is.
    samples: K of the noise between levels, for the tighter bound; 1 for none.
    noise_steps: of training the noise of `benchmarks.dequantization`.
    variants: that are trained.
    needs_path: the images do not come with the code.
  """

  name: str
  dataset: str
  n_iters: int
  exact_images: int
  bound_images: int
  samples: int = 1
  noise_steps: int = 400
  changes: Changes = dataclasses.field(default_factory=dict)
  variants: tuple[Variant, ...] = VARIANTS
  needs_path: bool = False

  @property
  def mark(self) -> str:
    """Of the table in the page."""
    return f'likelihood, {self.name}'


TRIALS = (
  Trial('digits', 'digits', n_iters=2000, exact_images=64, bound_images=297),
  Trial(
    'Fashion-MNIST',
    'fashion_mnist',
    n_iters=300,
    exact_images=16,
    bound_images=128,
    variants=(VARIANTS[0], VARIANTS[-1]),
    needs_path=True,
  ),
)
QUICK = Trial(
  'digits',
  'digits',
  n_iters=10,
  exact_images=8,
  bound_images=8,
  samples=2,
  noise_steps=2,
  changes={
    'model.nf': 8,
    'model.ch_mult': (1,),
    'model.attn_resolutions': (),
    'training.n_jitted_steps': 1,
  },
  variants=(VARIANTS[0], VARIANTS[-1]),
)


def config_of(trial: Trial, variant: Variant, data: Changes) -> ConfigDict:
  """What is trained."""
  config = importlib.import_module(f'configs.vp.{trial.dataset}').get_config()
  changes = {'data.uniform_dequantization': True, **trial.changes, **variant.changes, **data}
  config.update_from_flattened_dict(changes)
  config.seed = SEED
  config.training.n_iters = config.training.snapshot_freq = trial.n_iters
  config.training.snapshot_sampling = False
  return config


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, and what is measured of it, each image dequantised once.

  Attributes:
    trial: that it is of.
    variant: how it was trained.
    setup: its parts.
    params: the average that is evaluated.
    folder: of what was measured.
  """

  trial: Trial
  variant: Variant
  setup: Setup
  params: Params
  folder: epath.Path

  @property
  def images_seen(self) -> int:
    """In training."""
    return self.trial.n_iters * self.setup.config.training.batch_size

  def with_other_noises(self) -> Report:
    """What is measured with other noise between levels, by what it is called."""
    found = {'learned': self.learned()}
    if self.trial.samples > 1:
      found[f'uniform, K = {self.trial.samples}'] = self.uniform(self.trial.samples)
    return found

  def uniform(self, samples: int = 1) -> Report:
    name = 'bits' if samples == 1 else 'samples'
    return self._kept(name, {'samples': samples}, lambda: {'samples': samples})

  def learned(self) -> Report:
    steps = self.trial.noise_steps

    @cache
    def noise() -> dequantization.Learned:
      return dequantization.train(self.setup, self.params, steps)

    return self._kept('learned', {'steps': steps}, lambda: {'dequantization': noise()})

  def _kept(self, name: str, settings: Report, changes: Callable[[], dict[str, Any]]) -> Report:
    """The exact value and the bound, with changes to what measures them, unless they are there."""

    def measurements() -> Iterator[BitsPerDim]:
      for bits, n in (
        (make_bound(self.setup), self.trial.bound_images),
        (make_bits_per_dim(self.setup), self.trial.exact_images),
      ):
        source = runs.FirstImages(bits.source, n)
        own = {'source': source, 'repeats': 1, 'batch_size': len(source)}
        yield dataclasses.replace(bits, **own, **changes())

    settings = settings | {'images': [self.trial.exact_images, self.trial.bound_images]}
    step = self.trial.n_iters
    return runs.measured(self.folder, name, settings, measurements(), self.params, step)


def trained(trial: Trial, variant: Variant, folder: epath.Path, data: Changes) -> Run:
  """A way, trained as far as that was not done."""
  workdir = folder / f'{variant.folder}_{SEED}'
  runs.train(config_of(trial, variant, data), workdir)
  setup, params = run_lib.load(str(workdir))
  return Run(trial, variant, setup, params, workdir / 'measured')


def _each(report: Report, name: str) -> np.ndarray:
  """Bits/dim of each image, in the order of their numbers."""
  with (epath.Path(report['folder']) / f'{name}.csv').open() as file:
    return np.array([float(line['bits_per_dim']) for line in csv.DictReader(file)])


def _cells(report: Report, first: Report) -> list[str]:
  """The exact value and the bound, with their errors, and how much less the first has of each.

  The difference is of the same images with the same chance, and so is its error.
  """
  cells = []
  for name in ('bpd_test', 'bound_test'):
    cells.append(f'{report[name]:.3f} ± {report[f"{name}_std_error"]:.3f}')
    change = _each(report, name) - _each(first, name)
    error = change.std(ddof=1) / math.sqrt(len(change))
    cells.append('' if report is first else f'{change.mean():+.4f} ± {error:.4f}')
  return cells


def tables(
  trial: Trial, images_seen: int, ways: dict[str, Report], noises: dict[str, Report]
) -> list[str]:
  """What docs/results.md shows of a trial: ways to train, and the last with other noises."""
  heads = ['bits/dim', 'difference', 'bound', 'difference']
  (first, *_), (*_, last) = ways.values(), ways.values()
  lines = [
    f'{trial.name}, VP, {images_seen:,} images seen. Bits/dim of {first["bpd_test_images"]} '
    f'held-out images, bound of {first["bound_test_images"]}. Differences are from the first row.',
    '',
    *results_page.table(
      ['weight, times', *heads], [[name, *_cells(of, first)] for name, of in ways.items()]
    ),
  ]
  if noises:
    lines += ['', 'The last of these, by the noise between the levels of the held-out images:', '']
    rows = [[name, *_cells(of, last)] for name, of in {'uniform': last, **noises}.items()]
    lines += results_page.table(['noise', *heads], rows)
  return lines


def show(run: Run, ways: dict[str, Report], noises: dict[str, Report], page: Path) -> None:
  """Puts the tables into the page, with what was measured until now."""
  lines = tables(run.trial, run.images_seen, ways, noises)
  page.write_text(results_page.put(page.read_text(), run.trial.mark, lines))
  print('\n'.join(['', *lines]), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
  args = runs.parser(__doc__, 'runs/likelihood', TRIALS).parse_args(argv)
  for job in runs.jobs(args, TRIALS, QUICK):
    ways, page = dict[str, Report](), job.docs / results_page.PAGE
    for variant in job.trial.variants:
      run = trained(job.trial, variant, job.folder, job.data)
      ways[variant.name] = run.uniform()
      show(run, ways, {}, page)
    show(run, ways, run.with_other_noises(), page)


if __name__ == '__main__':
  runs.run(main)
