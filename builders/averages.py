"""Averages of widths that training did not keep, made of the snapshots of a run, and compared."""

import dataclasses
import logging

from etils import epath

from builders.continuity import (
  check_classes,
  check_goes_on,
  check_results,
  class_names,
  write_config,
)
from builders.evaluation import make_measurements
from builders.guide import load_guide
from builders.setup import Setup
from builders.training import abstract_state
from evaluation.evaluate import measured, step_folder
from runtime.errors import UserError
from training import checkpoints as checkpoints_lib
from training.averages import Power
from training.checkpoints import Checkpoints
from training.post_hoc import averages_of_snapshots
from workdir import artifacts, page, reports
from workdir.reports import Report
from workdir.same_config import LEARNED

logger = logging.getLogger('score_sde')


def make(setup: Setup, root: epath.Path) -> epath.Path:
  """`run_lib.post_hoc_average`, of a run in `root`."""
  ema, abstract = setup.config.ema, abstract_state(setup)
  _check_widths(setup, root, 'sigma_rel')
  with Checkpoints(root, create=False) as checkpoints:
    step = _newest_snapshot(root, checkpoints)
    state = checkpoints.restore(step, abstract)
    ((average, left),) = averages_of_snapshots(
      checkpoints, abstract, ema.sigma_rels, [ema.sigma_rel]
    )
  folder = root / 'ema' / f'{ema.sigma_rel:g}'
  if checkpoints_lib.exist(folder):
    raise UserError(f'{folder} holds an average already; move it away to make it anew')
  state = dataclasses.replace(state, averages=(average, *state.averages[1:]))
  with artifacts.opened(folder), Checkpoints(folder, checkpoints_lib.notes(root)) as checkpoints:
    write_config(folder, setup, step)
    checkpoints.save(state, keep=True)
  logger.info(
    'the average of sigma_rel = %g is the checkpoint of --workdir %s; what the snapshots cannot '
    'tell of it is %.1f %%', ema.sigma_rel, folder, 100 * left,
  )  # fmt: skip
  return folder


def sweep(setup: Setup, root: epath.Path, eval_folder: str) -> list[Report]:
  """`run_lib.sweep_averages`, of a run in `root`."""
  out, widths = root / 'ema' / eval_folder, list(dict.fromkeys(setup.config.ema.sweep))
  _check_widths(setup, root, 'sweep')
  wanted = setup.config.eval
  compared = wanted.enable_sampling and wanted.features
  if not (wanted.enable_loss or wanted.enable_bpd or wanted.enable_bound or compared):
    raise UserError(
      'config.ema.sweep compares averages by what is measured of them, and nothing is: set '
      'config.eval.enable_loss, enable_bpd or enable_bound, or enable_sampling with features'
    )
  if setup.model.num_classes:
    class_names(setup, root)  # which says so if they are others
  for width in widths:
    check_results(out / str(width), setup)
  guide = load_guide(setup, root) if wanted.enable_sampling else None
  measurements, all_reports = make_measurements(setup, guide), list[Report]()
  with artifacts.opened(out), Checkpoints(root, create=False) as checkpoints:
    step = _newest_snapshot(root, checkpoints)
    check_classes(setup, root, step, measurements)
    made = averages_of_snapshots(
      checkpoints, abstract_state(setup), setup.config.ema.sigma_rels, widths
    )
    for width, (params, left) in zip(widths, made, strict=True):
      folder, origin = out / str(width), checkpoints_lib.origin(root, step, params)
      report = origin.claim_report(folder) | {'sigma_rel': width, 'unknown_share': left}
      origin.claim(step_folder(folder, step))
      write_config(folder, setup, step)
      all_reports.append(measured(report, measurements, params, folder))
      reports.publish_sweep(out, all_reports)
      page.write(root)
      logger.info('sigma_rel = %s: %s', width, reports.summary(report))
  logger.info('%s', reports.table(all_reports, 'sigma_rel'))
  logger.info(
    'the table is in %s; --mode ema without config.ema.sweep makes a checkpoint of the width '
    'config.ema.sigma_rel', out / 'table.md',
  )  # fmt: skip
  return all_reports


def _check_widths(setup: Setup, root: epath.Path, field: str) -> None:
  """Raises UserError unless averages of the widths of a field can be made in a workdir."""
  ema = setup.config.ema
  if not ema.sigma_rels:
    raise UserError(
      '--mode ema makes an average of those that training keeps with config.ema.sigma_rels, for '
      'example (0.05, 0.1), and it is empty'
    )
  value = ema[field]
  try:
    for width in value if isinstance(value, tuple) else [value]:
      Power(width)
  except ValueError as wrong:
    raise UserError(f'config.ema.{field}: {wrong}') from None
  check_goes_on(root, setup, LEARNED)


def _newest_snapshot(root: epath.Path, checkpoints: Checkpoints) -> int:
  """The step of it."""
  steps = checkpoints.steps()
  if not steps:
    raise UserError(f'{root} holds no snapshots in checkpoints/: train first, or fix --workdir')
  return steps[-1]
