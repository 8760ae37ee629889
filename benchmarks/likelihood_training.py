"""Held-out bits/dim of ways to train for it, with an equal budget: weights and laws of times.

Networks of the VP SDE, the same but for the loss, are trained on uniformly dequantised images. Then
held-out images get their bits/dim by the probability flow, the same with several samples of the
noise between levels, and the bound of the reverse SDE. What is trained and measured stays under
runs/likelihood, and is not done again: the command can be stopped at any moment. It writes the
tables of docs/results.md, which grow as it goes on.

  python -m benchmarks.likelihood_training [--dataset NAME] [--path FOLDER] [--quick]

Fashion-MNIST: `--path /usr/share/datasets/fashion-mnist`, as in `benchmarks.recipes`.
"""

import argparse
from collections.abc import Sequence
import csv
import dataclasses
import importlib
import logging
import math
from pathlib import Path
import shutil
import sys

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from benchmarks import results_page, runs
from benchmarks.recipes import DOCS
from builders.evaluation import make_bits_per_dim, make_bound
from configs.base import Changes
from evaluation.bits_per_dim import BitsPerDim
from models.score import Params
import run_lib
from runtime import start
from runtime.errors import UserError
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
    name: of the data; in lower case, that of its folder.
    dataset: of the config configs/vp/<dataset>.py.
    changes: of it.
    n_iters: steps of training.
    images: held-out ones that are measured, the first ones.
    samples: of the noise between levels, for the tighter bound.
    variants: that are trained.
    needs_path: the images do not come with the code.
  """

  name: str
  dataset: str
  n_iters: int
  images: int
  samples: int = 4
  changes: Changes = dataclasses.field(default_factory=dict)
  variants: tuple[Variant, ...] = VARIANTS
  needs_path: bool = False

  @property
  def mark(self) -> str:
    """Of the table in the page."""
    return f'likelihood, {self.name}'


TRIALS = (
  Trial('digits', 'digits', n_iters=2000, images=297),
  Trial('Fashion-MNIST', 'fashion_mnist', n_iters=500, images=96, needs_path=True),
)
QUICK = Trial(
  'digits',
  'digits',
  n_iters=10,
  images=8,
  samples=2,
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


def row(trial: Trial, variant: Variant, folder: epath.Path, data: Changes) -> Report:
  """Trains a way and measures it, as far as that was not done."""
  workdir = folder / f'{variant.folder}_{SEED}'
  seconds = runs.train(config_of(trial, variant, data), workdir)
  setup, params = run_lib.load(str(workdir))

  def measured(name: str, measurement: BitsPerDim) -> Report:
    return _measured(trial, workdir, name, measurement, params)

  bits, bound = make_bits_per_dim(setup), make_bound(setup)
  return {
    'variant': variant.name,
    'seconds': seconds,
    'images_seen': trial.n_iters * setup.config.training.batch_size,
    'bits': measured('bits', bits),
    'samples': measured('samples', dataclasses.replace(bits, samples=trial.samples)),
    'bound': measured('bound', bound),
  }


def _measured(
  trial: Trial, workdir: epath.Path, name: str, measurement: BitsPerDim, params: Params
) -> Report:
  """Of the first held-out images, each dequantised once; the table of each of them is kept."""
  source = runs.FirstImages(measurement.source, trial.images)
  measurement = dataclasses.replace(measurement, source=source, repeats=1, batch_size=len(source))
  settings = {'images': len(source), 'samples': measurement.samples}
  return runs.measured(workdir / 'measured', name, settings, [measurement], params, trial.n_iters)


def _of_each(report: Report, name: str) -> np.ndarray:
  """Bits/dim of each image, in the order of their numbers."""
  with (epath.Path(report['folder']) / f'{name}.csv').open() as file:
    return np.array([float(line['bits_per_dim']) for line in csv.DictReader(file)])


def _difference(each: np.ndarray, other: np.ndarray) -> str:
  """Mean of differences of the same images with the same noise, and its standard error."""
  gain = each - other
  return f'{gain.mean():+.4f} ± {gain.std(ddof=1) / math.sqrt(len(gain)):.4f}'


def table(trial: Trial, rows: Sequence[Report]) -> list[str]:
  """What docs/results.md shows of a trial, with its caption."""
  first = _of_each(rows[0]['bits'], 'bpd_test')
  lines = []
  for of in rows:
    bits, bound = of['bits'], of['bound']
    each = _of_each(bits, 'bpd_test')
    lines.append([
      of['variant'],
      f'{bits["bpd_test"]:.3f} ± {bits["bpd_test_std_error"]:.3f}',
      '' if of is rows[0] else _difference(each, first),
      _difference(_of_each(of['samples'], 'bpd_test'), each),
      f'{bound["bound_test"]:.3f} ± {bound["bound_test_std_error"]:.3f}',
      f'{of["seconds"]:.0f}',
    ])  # fmt: skip
  heads = [
    'weight, times', 'bits/dim', 'less the first row',
    f'{trial.samples} samples of the noise change it by', 'bound', 'seconds of training',
  ]  # fmt: skip
  caption = (
    f'{trial.name}, VP, {rows[0]["images_seen"]:,} images seen. Held-out images: '
    f'{rows[0]["bits"]["images"]}.'
  )
  return [caption, '', *results_page.table(heads, lines)]


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  names = [trial.name.lower() for trial in TRIALS]
  parser.add_argument('--dataset', choices=names, help='only this one')
  parser.add_argument('--path', default='', help='folder or archive of the files of Fashion-MNIST')
  parser.add_argument('--data-dir', default='', help='config.data.tfds_dir of Fashion-MNIST')
  parser.add_argument('--runs', default='runs/likelihood', help='where runs lie (runs/likelihood)')
  parser.add_argument(
    '--quick', action='store_true', help='a few steps, in a folder quick/ of its own there'
  )
  args = parser.parse_args(argv)
  logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', level=logging.WARNING)
  logging.getLogger('score_sde').setLevel(logging.INFO)
  root, docs = epath.Path(args.runs).resolve(), DOCS
  trials = [t for t in TRIALS if args.dataset in (None, t.name.lower())]
  if args.quick:
    trials, root = [QUICK], root / 'quick'
    docs = Path(root)
    docs.mkdir(parents=True, exist_ok=True)
    shutil.copy(DOCS / results_page.PAGE, docs)
  where = {'data.path': args.path, 'data.tfds_dir': args.data_dir}
  page = docs / results_page.PAGE
  for trial in trials:
    folder, data, rows = root / trial.dataset, where if trial.needs_path else {}, list[Report]()
    for variant in trial.variants:
      rows.append(row(trial, variant, folder, data))
      lines = table(trial, rows)
      page.write_text(results_page.put(page.read_text(), trial.mark, lines))
      print('\n'.join(['', *lines]), flush=True)


if __name__ == '__main__':
  start.use_large_pages()
  try:
    main()
  except UserError as error:
    sys.exit(f'error: {error}')
