"""Training, distillation, evaluation, sampling and import of checkpoints, of a config in a workdir.

A workdir holds `config.json`, `machine.json`, `index.html` which shows the run, `checkpoints/` and
`checkpoints-meta/`, `metrics.jsonl` and `tensorboard/`, `samples/iter_<step>/sample.png`, in
`eval/` what evaluation made, in `sample/` what was drawn, and in `classifier/` the same of a
classifier. All of it can be stopped at any moment and started again, with the same final result.
"""

from collections.abc import Callable
import dataclasses
from functools import partial
import logging
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from builders import averages
from builders.continuity import (
  begin_from,
  check_classes,
  check_goes_on,
  check_model,
  check_results,
  class_names,
  note_data,
  note_machine,
  write_config,
)
from builders.data import check_data as check_images
from builders.data import load_images, load_source
from builders.data import pack as pack_images
from builders.distillation import check_distillation, stages
from builders.evaluation import (
  checkpoint_range,
  make_bits_of_files,
  make_drawing,
  make_late_average,
  make_measurements,
  reference_file,
)
from builders.guide import load_guide
from builders.requests import make_sample_request
from builders.setup import build, saved_setup, Setup
from builders.snapshots import (
  draw_snapshot,
  hint_of_average,
  make_snapshot_quality,
  measure_snapshot,
)
from builders.teachers import load_teacher
from builders.training import (
  abstract_state,
  classifier_task,
  classifier_times,
  make_classifier,
  make_schedule,
  score_task,
  task_of,
)
from builders.values import check_shared
from builders.weights import imported, nothing_trained, read_weights, write_weights
from data.check import SplitReport
from data.classes import numbers_of
from data.folder import fingerprint, shown
from data.images import Source
from data.noise_scales import NoiseScales
from data.packed import Packed
from evaluation.evaluate import measured, step_folder
from evaluation.likelihoods import measure as measure_images
from evaluation.sample import draw_samples
from evaluation.sample_quality import SampleQuality
from evaluation.stats import examples, noise_scales
from models.score import Params
from runtime.errors import UserError
from training import checkpoints as checkpoints_lib
from training import classifier, exported, loop
from training.checkpoints import Checkpoints, Notes
from training.step import TrainState
from workdir import artifacts, best, page, reports, same_config
from workdir.origin import set_aside_former
from workdir.progress import Stop
from workdir.reports import Report
from workdir.same_config import (
  check_unchanged,
  FIXED_NOISE,
  LEARNED,
  LEARNED_BY_CLASSIFIER,
)

logger = logging.getLogger('score_sde')


def train(config: ConfigDict, workdir: str, init_from: str = '') -> None:
  """Trains until `training.n_iters`, from the newest checkpoint in `workdir` if there is one.

  A new run begins with the parameters of another if `init_from` names that: a workdir, or one of
  its checkpoints. It goes on like any other, with `init_from` or without.

  Raises:
    UserError: for a mistake in the config, the data or the workdir, or a loss that is not finite.
    SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is written; the code is 128 + signal.
  """
  setup, root = build(config), artifacts.root_of(workdir)
  if setup.config.distill.method:
    raise UserError(
      f'config.distill.method = {setup.config.distill.method} is for --mode distill, which --mode '
      'train is not: give --mode distill, or a config without it'
    )
  source, held_out = _training_data(setup)
  check_goes_on(root, setup, LEARNED)
  notes, begin = note_data(root, setup, source, setup.model.num_classes), None
  if init_from:
    notes, begin = begin_from(init_from, root, setup, notes)
  elif notes.begun_from:
    logger.info('it began with the parameters of %(workdir)s, step %(step)d', notes.begun_from)
  _train(setup, root, score_task(setup), source, held_out, notes, begin)


def distill(config: ConfigDict, workdir: str, teacher: str = '') -> None:
  """Trains a student that samples in a few steps, from the score model in another workdir.

  It goes on from the newest checkpoint, as `train` does. Progressive distillation is a run for each
  halving of the steps: the last one in `workdir`, those before it in `<workdir>/stages/<steps>`,
  each the teacher of the next.

  Raises:
    UserError: for a mistake in the config, the data, the workdir or the teacher, or a loss that is
      not finite.
    SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is written; the code is 128 + signal.
  """
  build(config)  # refuses what it must not be, before stages are made of it
  *before, last = stages(config)
  setup, root = build(last), artifacts.root_of(workdir)
  check_distillation(setup.config, teacher)
  check_goes_on(root, setup, LEARNED)
  source, held_out = _training_data(setup)
  for stage in before:
    steps = stage.distill.end_steps
    folder = root / 'stages' / str(steps)
    logger.info('from %d steps to %d, in %s', stage.distill.start_steps, steps, folder)
    _distill_stage(build(stage), folder, teacher, source, held_out)
    teacher = str(folder)
  _distill_stage(setup, root, teacher, source, held_out)


def _distill_stage(
  setup: Setup, root: epath.Path, teacher: str, source: Source, held_out: Source
) -> None:
  """Trains, or goes on with, the student of a stage."""
  check_goes_on(root, setup, LEARNED)
  notes = note_data(root, setup, source, setup.model.num_classes)
  frozen, begin = None, None
  if teacher:
    taught_by = load_teacher(teacher, setup, notes)
    notes = dataclasses.replace(notes, teacher=taught_by.source)
    begin, frozen = taught_by.beginning.begin, taught_by.params
  _train(setup, root, task_of(setup, frozen), source, held_out, notes, begin)


def _training_data(setup: Setup) -> tuple[Source, Source]:
  """The data to train with, and those held out; a config that cannot train with them is refused."""
  check_shared(setup.config, 'training.snapshot_samples')
  check_shared(setup.config, 'training.batch_size', 'training.grad_accum')
  source, held_out = (load_source(setup.config, split) for split in ('train', 'test'))
  numbers_of(
    [label for label in setup.config.sampling.labels if isinstance(label, str)],
    source.class_names, source.num_classes,
  )  # fmt: skip
  return source, held_out


def _train(
  setup: Setup,
  root: epath.Path,
  task: loop.Task,
  source: Source,
  held_out: Source,
  notes: Notes,
  begin: Callable[[TrainState], TrainState] | None,
) -> None:
  """Trains in a workdir to the end; see `loop.train`."""
  quality = make_snapshot_quality(setup, root)
  with artifacts.opened(root):
    loop.train(
      task, make_schedule(setup.config), setup.devices, setup.keys, root, source, held_out,
      partial(_at_start, setup, root),
      partial(_at_snapshot, setup, root, quality=quality, held_out=held_out), notes, begin,
    )  # fmt: skip
    page.write(root)  # now that the last checkpoint is there


def train_classifier(config: ConfigDict, workdir: str) -> Report:
  """Trains the classifier of noisy images in `<workdir>/classifier`, as `train` does, and tests it.

  Returns:
    Loss and accuracy on the held-out images by level of noise; it stands in `report.json` there.

  Raises:
    UserError: for a mistake in the config, the data or the workdir, or a loss that is not finite.
    SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is written; the code is 128 + signal.
  """
  setup, root = build(config), artifacts.root_of(workdir)
  if setup.config.data.dim:
    raise UserError(f'a classifier is for images, and config.data.dim = {setup.config.data.dim}')
  check_shared(setup.config, 'classifier.batch_size')
  source, held_out = (load_source(setup.config, split, 'classifier') for split in ('train', 'test'))
  check_unchanged(root / 'config.json', setup.config.to_dict(), FIXED_NOISE)
  folder = classifier.folder(root)
  check_goes_on(folder, setup, LEARNED_BY_CLASSIFIER)
  notes = note_data(folder, setup, source, source.num_classes)
  with artifacts.opened(folder):
    state = loop.train(
      classifier_task(setup), make_schedule(setup.config, 'classifier'), setup.devices, setup.keys,
      folder, source, held_out, partial(_at_start, setup, folder), notes=notes,
    )  # fmt: skip
    report = {'step': int(state.step), 'checkpoint': checkpoints_lib.identity(state.ema_params)}
    report |= classifier.evaluate(
      make_classifier(setup), setup.codec, state.ema_params, held_out, classifier_times(setup),
      setup.config.eval.batch_size, setup.devices, setup.keys,
    )  # fmt: skip
    artifacts.write_json(folder / 'report.json', report)
    page.write(root)
  logger.info('accuracy %.4f; report in %s', report['accuracy'], folder / 'report.json')
  return report


def evaluate(config: ConfigDict, workdir: str, eval_folder: str = 'eval') -> list[Report]:
  """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt`, or the newest before those.

  With `eval.enable_loss`, the loss over the held-out images, each counted once. With
  `eval.enable_bpd`, their bits per dimension, or those of the training images. With
  `eval.enable_sampling`, `eval.num_samples` samples in `<eval_folder>/step_<step>/`: a grid
  `samples.png`, and `samples_<round>.npz` with uint8 [N, H, W, C]; and, with `eval.features`, how
  far they are from the data, as `evaluation` measures it. What is there already, of the same
  checkpoint, is not made again. `<eval_folder>/table.md` compares the checkpoints.

  Returns:
    For each checkpoint, what `<eval_folder>/report_<step>.json` holds.

  Raises:
    UserError: for a mistake in the config, the data or the workdir.
  """
  setup, root = build(config), artifacts.root_of(workdir)
  out = root / eval_folder
  if not checkpoints_lib.exist(root) and not setup.config.eval.wait:
    raise nothing_trained(root, setup)
  check_model(root, setup)
  if setup.model.num_classes:
    class_names(setup, root)  # which says so if they are others
  guide = load_guide(setup, root) if setup.config.eval.enable_sampling else None
  measurements, all_reports = make_measurements(setup, guide), []
  late_average = make_late_average(setup, measurements)
  check_results(out, setup)
  with artifacts.opened(out), Checkpoints(root) as checkpoints:
    wanted = checkpoint_range(setup.config)
    for step in [best.step_of(root)] if setup.config.eval.best else wanted.steps(checkpoints):
      used = [setup.config.ema.use]
      (params,) = checkpoints.restore_averages(step, abstract_state(setup), used)
      check_classes(setup, root, step, measurements)
      origin = checkpoints_lib.origin(root, step, params)
      folder, report = step_folder(out, step), origin.claim_report(out)
      origin.claim(folder)
      write_config(out, setup, step)
      report = measured(report, measurements, params, out)
      if late_average and late_average.is_wanted(report):
        not_averaged = checkpoints.restore_params(step, abstract_state(setup))
        report |= late_average.measure(not_averaged, step, folder)
        reports.write(out, report)
      all_reports.append(report)
      reports.publish(out, all_reports)
      page.write(root)
      logger.info(
        'step %d: %s; report in %s', step, reports.summary(report), reports.path_of(out, step)
      )
      if late_average:
        late_average.tell(report)
      if setup.config.eval.enable_sampling:
        logger.info('samples are in %s', folder / 'samples.png')
  if len(all_reports) > 1:
    logger.info('%s', reports.table(all_reports).splitlines()[-1])
    logger.info('the table of all is in %s', out / 'table.md')
  return all_reports


def sample(config: ConfigDict, workdir: str, sample_folder: str = 'sample') -> Report:
  """Draws samples from the newest checkpoint, in `<sample_folder>/step_<step>/`.

  See `evaluation.sample`; a model that knows no classes takes them from the workdir's classifier.

  Returns:
    How many samples there are, and the number of score evaluations that each took.

  Raises:
    UserError: for a mistake in the config, the workdir or the user's images.
  """
  setup, root = build(config), artifacts.root_of(workdir)
  step, params = _newest(setup, root)
  names = class_names(setup, root if setup.model.num_classes else classifier.folder(root))
  request, log_prob, used = make_sample_request(setup, names), None, [params]
  if setup.config.sampling.labels and not setup.model.num_classes:
    task = classifier_task(setup)
    of_classes = classifier.load(root, setup.config.to_dict(), task, setup.devices, setup.keys)
    log_prob = make_classifier(setup).bind(of_classes)
    used.append(of_classes)
  if guide := load_guide(setup, root):
    used.append(guide.params)
  out = root / sample_folder
  folder = step_folder(out, step)
  check_results(out, setup)
  with artifacts.opened(out):
    checkpoints_lib.origin(root, step, *used).claim(folder)
    write_config(out, setup, step)
    report = draw_samples(make_drawing(setup, guide), setup.keys, request, params, log_prob, folder)
    page.write(root)
  logger.info('%(samples)d samples, %(nfe)d evaluations each', report)
  logger.info('samples are in %s', folder / 'samples.png')
  hint_of_average(setup, step)
  return report


def likelihood(config: ConfigDict, workdir: str, images: str) -> Report:
  """Measures the bits/dim of a user's images by the newest checkpoint, one by one.

  In `likelihood/<folder>-<fingerprint of the files>/step_<step>/`; see `evaluation.likelihoods`.

  Returns:
    Their mean, and that of as many held-out images of the config's own data.

  Raises:
    UserError: for a mistake in the config, the workdir or the images.
  """
  setup, root = build(config), artifacts.root_of(workdir)
  bits, files = make_bits_of_files(setup, images)
  step, params = _newest(setup, root)
  name = Path(images).expanduser().resolve().name
  out = root / 'likelihood' / f'{name}-{fingerprint(images, files)[:8]}'
  check_results(out, setup)
  with artifacts.opened(out):
    folder = step_folder(out, step)
    checkpoints_lib.origin(root, step, params).claim(folder)
    write_config(out, setup, step)
    within = Path(images).expanduser()
    names = [shown(file.relative_to(within) if within.is_dir() else file.name) for file in files]
    held_out = load_source(setup.config, setup.config.eval.bpd_dataset)
    report = measure_images(bits, names, held_out, params, folder)
    artifacts.write_json(folder / 'report.json', report)
  logger.info('%s', ', '.join(f'{name} {value:.5g}' for name, value in report.items()))
  logger.info('table, pictures of the least likely and histogram are in %s', folder)
  return report


def stats(config: ConfigDict) -> NoiseScales | None:
  """Writes the statistics of features, and prints the noise levels that the training data ask for.

  The former are what samples are compared with, of the images of `eval.stats_split` by the network
  `eval.features`, if any. The latter are NCSNv2's, see `evaluation.stats`; they are for the VE SDE,
  whose models have such levels, and for whoever asks for nothing else, with no `eval.features`.

  Returns:
    The noise levels, or None if they are not wanted, or the data are too few, or too much alike, to
    ask for any.

  Raises:
    UserError: for a mistake in the config or the data.
  """
  setup = build(config)
  fields, batch_size = setup.config, setup.config.eval.batch_size
  train, file = load_images(fields, 'train'), reference_file(setup)
  compared = load_images(fields, fields.eval.stats_split) if file else None
  if file and compared:
    file.check(compared)
  chosen = None
  if file is None or fields.training.sde == 'vesde':
    x = examples(train, setup.codec, batch_size=batch_size, seed=fields.seed)
    try:
      chosen = noise_scales(x, fields.model.sigma_min, fields.sampling.n_steps_each)
    except UserError as error:
      if file is None:  # nothing else was wanted
        raise
      logger.warning('no noise levels are recommended: %s', error)
  if file and compared:
    file.make(compared, batch_size, setup.devices.mesh)
    logger.info('statistics of the features are in %s', file.path)
  return chosen


def check_data(config: ConfigDict) -> list[SplitReport]:
  """Reads all images, and prints what they are: how many, sizes, modes, classes, what is cropped.

  Raises:
    UserError: for a mistake in the config, or images that cannot be read: all of them are named.
  """
  return check_images(build(config).config)


def pack(config: ConfigDict, folder: str) -> Packed:
  """Decodes all images once, at the config's size, and writes them to the shards of a folder.

  `config.data.dataset = 'packed'` with `config.data.path` = that folder reads them; see
  `data.packed`. What is there already, of the same images, is not made again.

  Raises:
    UserError: for a mistake in the config, or an image that cannot be read.
    Failure: if the disk is full.
  """
  packed = pack_images(build(config).config, folder)
  logger.info('train with --config.data.dataset=packed --config.data.path=%s', folder)
  return packed


def load(workdir: str) -> tuple[Setup, Params]:
  """A run's parts, from its `config.json`, and the parameters of its newest checkpoint.

  The same of a folder that `export` wrote.

  Raises:
    UserError: if it is neither, or the workdir holds no checkpoint.
  """
  root = artifacts.root_of(workdir)
  if exported.is_here(root):
    setup, _, _, params = read_weights(root)
    return setup, params
  if not (root / 'config.json').exists() and not checkpoints_lib.exist(root):
    raise UserError(
      f'{root} is neither the workdir of a run nor a folder of exported weights; name one, for '
      "example 'assets/edm/digits', which comes with the code"
    )
  setup = saved_setup(root, 'the workdir of a run')
  return setup, _newest(setup, root)[1]


def _newest(setup: Setup, root: epath.Path) -> tuple[int, Params]:
  """Step and parameters of the newest checkpoint or, with `eval.best`, of the best one."""
  if not checkpoints_lib.exist(root):
    raise nothing_trained(root, setup)
  check_model(root, setup)
  like, used = abstract_state(setup), [setup.config.ema.use]
  with Checkpoints(root) as checkpoints:
    if setup.config.eval.best:
      step = best.step_of(root)
      return step, checkpoints.restore_averages(step, like, used)[0]
    newest = checkpoints.restore_latest_averages(like, used)
  if newest is None:  # an object store shows those that broke off
    raise UserError(f'{root} holds no whole checkpoint; train first (--mode train)')
  step, (params,) = newest
  return step, params


def export(
  config: ConfigDict, workdir: str, folder: str = 'export', licence: str = ''
) -> epath.Path:
  """Writes the newest average of a workdir as safetensors, with a card, to `<workdir>/<folder>`.

  The card says by which command it was trained, and what `<workdir>/eval` found of it. See
  `training.exported`. `load` reads such a folder, and `import_released` makes a workdir of it.

  Returns:
    That folder.

  Raises:
    UserError: for a mistake in the config or the workdir, or if other weights are there.
  """
  setup, root = build(config), artifacts.root_of(workdir)
  step, params = _newest(setup, root)
  out = root / folder
  machine, identity = root / 'machine.json', checkpoints_lib.identity(params)
  trained_with = artifacts.read_json(machine) if machine.exists() else {}
  measured = reports.read(root / 'eval', step)
  if measured.get('checkpoint') != identity:  # of no evaluation, or of a former run
    measured = {}
  with artifacts.opened(out):
    write_weights(
      out, setup, params, step, checkpoints_lib.notes(root), trained_with, measured, licence
    )
  logger.info('weights of step %d are in %s', step, out)
  return out


def import_released(config: ConfigDict, workdir: str, checkpoint: str) -> None:
  """Makes a workdir of a checkpoint of the released JAX or PyTorch code, or of exported weights.

  The result is a checkpoint like any other: `evaluate` evaluates it, `train` goes on from it.

  Raises:
    UserError: for a mistake in the config, a file that does not fit it, or a workdir in use.
  """
  setup, root = build(config), artifacts.root_of(workdir)
  if checkpoints_lib.exist(root):
    raise UserError(f'{root} holds checkpoints already; choose another --workdir')
  if setup.config.ema.sigma_rels:
    raise UserError(
      'config.ema.sigma_rels must be empty for --mode import: what is imported has one average'
    )
  if setup.config.training.learned_weight:
    raise UserError(
      'config.training.learned_weight must be False for --mode import: what is imported has none'
    )
  state, notes = imported(setup, checkpoint)
  with artifacts.opened(root), Checkpoints(root, notes) as checkpoints:
    set_aside_former(root)
    write_config(root, setup, int(state.step))
    checkpoints.save(state, keep=True)
  logger.info('imported %s, of step %d, to %s', checkpoint, int(state.step), root / 'checkpoints')


def post_hoc_average(config: ConfigDict, workdir: str) -> epath.Path:
  """Makes the average of width `ema.sigma_rel`, which was never kept, of those in the snapshots.

  It is the first average of the only checkpoint of `<workdir>/ema/<sigma_rel>`, a workdir like any
  other: of the step of the newest snapshot. See `training.averages.combination`.

  Returns:
    That workdir.

  Raises:
    UserError: for a mistake in the config, or if the snapshots do not hold what it takes.
  """
  return averages.make(build(config), artifacts.root_of(workdir))


def sweep_averages(config: ConfigDict, workdir: str, eval_folder: str = 'eval') -> list[Report]:
  """Measures averages of all widths `ema.sweep`, of those in the snapshots, and names the best.

  What is measured is what `evaluate` measures of a checkpoint; which is the best, `reports.RANKING`
  says. Samples and reports of each lie in `<workdir>/ema/<eval_folder>/<sigma_rel>/`, the
  comparison beside these, in `sweep.json` and `table.md`. What is there already, of the same
  snapshots, is not made again. No checkpoint is written: `post_hoc_average` makes that of the best.

  Returns:
    For each width its report, with `sigma_rel` and, from 0 to 1, `unknown_share`: how much of the
    average the snapshots cannot tell.

  Raises:
    UserError: for a mistake in the config, the data or the workdir, or if the snapshots do not hold
      what it takes.
  """
  return averages.sweep(build(config), artifacts.root_of(workdir), eval_folder)


def _at_start(setup: Setup, root: epath.Path, state: TrainState) -> None:
  """Writes down with what a run goes on, now that its state is there; says what changed."""
  step = int(state.step)
  if not checkpoints_lib.exist(root):
    set_aside_former(root)
  if step and (changed := same_config.changes(root / 'config.json', setup.config.to_dict())):
    logger.info('it goes on with another config: %s', same_config.told(changed))
  write_config(root, setup, step)
  note_machine(root)


def _at_snapshot(
  setup: Setup,
  root: epath.Path,
  state: TrainState,
  stop: Stop,
  quality: SampleQuality | None = None,
  held_out: Source | None = None,
) -> None:
  draw_snapshot(setup, root, state, stop, held_out)
  if quality:
    measure_snapshot(setup, root, quality, state, stop)
  page.write(root)
