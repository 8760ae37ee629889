"""Training, evaluation, sampling and import of checkpoints, of a config in a workdir.

A workdir holds `config.json`, `checkpoints/` and `checkpoints-meta/`, `metrics.jsonl` and
`tensorboard/`, `samples/iter_<step>/sample.png`, in `eval/` what evaluation made, in `sample/` what
was drawn, and in `classifier/` the same of a classifier. All of it can be stopped at any moment
and started again, with the same final result.
"""

import dataclasses
from functools import partial
import logging
import math

from etils import epath
import jax
from jax import Array
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict
import numpy as np

import artifacts
from build_lib import build, check_shared, Setup
import checkpoints as checkpoints_lib
from checkpoints import Checkpoints
import classifier_lib
from configs.base import saved
import datasets
from draw_lib import classes_in_turn, draw
import ebm
from errors import UserError
import eval_lib
from eval_lib import Report
import losses
from losses import Batch, Metrics, TrainState
from models.score import Params
from noise_scales import NoiseScales, recommend
from progress import Bar, Stop
import released_checkpoints
from same_config import (
  check_unchanged,
  FIXED_IN_CLASSIFIER,
  FIXED_IN_EVAL,
  FIXED_IN_RUN,
  FIXED_NOISE,
)
import sample_lib
import toy_data
import train_lib
from train_lib import Task

logger = logging.getLogger('score_sde')

STATS_EXAMPLES = 5000  # whose distances `stats` compares, fewer if they are large:
STATS_NUMBERS = 2**28  # pixels and channels of all of them, a gigabyte


def train(config: ConfigDict, workdir: str) -> None:
  """Trains until `training.n_iters`, from the newest checkpoint in `workdir` if there is one.

  Raises:
    UserError: for a mistake in the config, the data or the workdir, or a loss that is not finite.
    SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is written; the code is 128 + signal.
  """
  setup, root = build(config), epath.Path(workdir)
  source, held_out = (_load(setup, split) for split in ('train', 'test'))
  _open(root, setup, FIXED_IN_RUN if checkpoints_lib.exist(root) else ())
  draw = partial(_draw_snapshot, setup, root)
  train_lib.train(setup, score_task(setup), root, source, held_out, draw)


def train_classifier(config: ConfigDict, workdir: str) -> Report:
  """Trains the classifier of noisy images in `<workdir>/classifier`, as `train` does, and tests it.

  Returns:
    Loss and accuracy on the held-out images by level of noise; it stands in `report.json` there.

  Raises:
    UserError: for a mistake in the config, the data or the workdir, or a loss that is not finite.
    SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is written; the code is 128 + signal.
  """
  setup, root = build(config), epath.Path(workdir)
  if setup.config.data.dim:
    raise UserError(f'a classifier is for images, and config.data.dim = {setup.config.data.dim}')
  check_shared(setup.config, 'classifier.batch_size')
  source, held_out = (_load(setup, split, 'classifier') for split in ('train', 'test'))
  check_unchanged(root / 'config.json', setup.config, FIXED_NOISE)
  folder = classifier_lib.folder(root)
  _open(folder, setup, FIXED_IN_CLASSIFIER if checkpoints_lib.exist(folder) else ())
  state = train_lib.train(setup, classifier_lib.task(setup), folder, source, held_out)
  report = {'step': int(state.step)}
  report |= classifier_lib.evaluate(setup, state.ema_params, held_out)
  artifacts.write_json(folder / 'report.json', report)
  logger.info('accuracy %.4f; report in %s', report['accuracy'], folder / 'report.json')
  return report


def evaluate(config: ConfigDict, workdir: str, eval_folder: str = 'eval') -> list[Report]:
  """Evaluates the checkpoints `eval.begin_ckpt` to `eval.end_ckpt`, or the newest before those.

  With `eval.enable_loss`, the loss over the held-out images, each counted once. With
  `eval.enable_bpd`, their bits per dimension, or those of the training images. With
  `eval.enable_sampling`, `eval.num_samples` samples in `<eval_folder>/step_<step>/`: a grid
  `samples.png`, and `samples_<round>.npz` with uint8 [N, H, W, C]. What is there already is not
  made again.

  Returns:
    For each checkpoint, what `<eval_folder>/report_<step>.json` holds.

  Raises:
    UserError: for a mistake in the config, the data or the workdir.
  """
  setup, root = build(config), epath.Path(workdir)
  wanted, out = setup.config.eval, root / eval_folder
  if not checkpoints_lib.exist(root):
    raise UserError(f'{root} holds no checkpoints to evaluate; train first (--mode train)')
  check_unchanged(root / 'config.json', setup.config, FIXED_IN_RUN)
  _open(out, setup, FIXED_IN_EVAL)
  held_out = _load(setup, 'test') if wanted.enable_loss else None
  loss_sums = eval_lib.compile_loss_sums(setup)
  reports = []
  with Checkpoints(root) as checkpoints:
    for step in _steps_to_evaluate(setup.config, checkpoints.steps()):
      params = checkpoints.restore(step, _like(setup)).ema_params
      path = out / f'report_{step}.json'
      report = artifacts.read_json(path) if path.exists() else {'step': step}
      if held_out is not None and 'loss' not in report:
        report |= eval_lib.evaluate_loss(setup, loss_sums, held_out, params)
        artifacts.write_json(path, report)
      if wanted.enable_bpd and not eval_lib.has_bpd(setup, report):
        folder = eval_lib.step_folder(out, step)
        report |= eval_lib.evaluate_bpd(setup, _load(setup, wanted.bpd_dataset), params, folder)
        artifacts.write_json(path, report)
      if wanted.enable_sampling and report.get('samples') != wanted.num_samples:
        report |= eval_lib.evaluate_samples(setup, params, step, eval_lib.step_folder(out, step))
        artifacts.write_json(path, report)
      values = ', '.join(f'{name} {value:.6g}' for name, value in report.items())
      logger.info('%s; report in %s', values, path)
      if wanted.enable_sampling:
        logger.info('samples are in %s', eval_lib.step_folder(out, step) / 'samples.png')
      reports.append(report)
  return reports


def sample(config: ConfigDict, workdir: str, sample_folder: str = 'sample') -> Report:
  """Draws samples from the newest checkpoint, in `<sample_folder>/step_<step>/`.

  See `sample_lib.sample`; a model that knows no classes takes them from the workdir's classifier.

  Returns:
    How many samples there are, and the number of score evaluations that each took.

  Raises:
    UserError: for a mistake in the config, the workdir or the user's images.
  """
  setup, root = build(config), epath.Path(workdir)
  step, params = _newest(setup, root)
  log_prob = None
  if setup.config.sampling.labels and not setup.model.num_classes:
    log_prob = setup.classifier.bind(classifier_lib.load(setup, root))
  out = root / sample_folder
  _open(out, setup, FIXED_IN_EVAL)
  folder = eval_lib.step_folder(out, step)
  report = sample_lib.sample(setup, params, log_prob, folder)
  logger.info('%(samples)d samples, %(nfe)d evaluations each', report)
  logger.info('samples are in %s', folder / 'samples.png')
  return report


def stats(config: ConfigDict) -> NoiseScales:
  """Prints the noise levels that NCSNv2 recommends for the training data; see `noise_scales`.

  They are those of at most `STATS_EXAMPLES` examples, drawn by the seed; sigma_min and the number
  of Langevin steps at a level are the config's.

  Raises:
    UserError: for a mistake in the config or the data.
  """
  setup = build(config)
  source, size = _load(setup, 'train'), setup.config.eval.batch_size
  n = min(len(source), STATS_EXAMPLES, STATS_NUMBERS // math.prod(setup.data_shape))
  batches = datasets.train_batches(source, min(size, n), seed=setup.config.seed)
  parts = [next(batches)['data'] for _ in range(math.ceil(n / min(size, n)))]
  data, rng = np.concatenate(parts)[:n], jax.random.key(0)  # of nothing: there are no flips
  x = losses.preprocess(rng, jnp.asarray(data), setup.model.centered, False, False)
  n_steps = setup.config.sampling.n_steps_each
  chosen = recommend(np.asarray(x), setup.config.model.sigma_min, n_steps)
  logger.info('%d examples of dimension %d', n, math.prod(setup.data_shape))
  logger.info('largest distance between two of them: %.4g', chosen.sigma_max)
  logger.info(
    'NCSNv2 recommends --config.model.sigma_max=%.4g --config.model.num_scales=%d (a ratio of %.4f '
    'down to sigma_min = %g)',
    chosen.sigma_max, chosen.num_scales, chosen.ratio, chosen.sigma_min,
  )  # fmt: skip
  logger.info(
    'and, for annealed Langevin dynamics with sampling.n_steps_each = %d, '
    '--config.sampling.snr=%.4g (epsilon %.3g)',
    n_steps, chosen.snr, chosen.epsilon,
  )  # fmt: skip
  return chosen


def load(workdir: str) -> tuple[Setup, Params]:
  """A run's parts, from its `config.json`, and the parameters of its newest checkpoint.

  Raises:
    UserError: if the workdir holds no checkpoint.
  """
  root = epath.Path(workdir)
  path = root / 'config.json'
  if not path.exists():
    raise UserError(f'{path} does not exist; name the workdir of a run')
  setup = build(saved(artifacts.read_json(path)))
  return setup, _newest(setup, root)[1]


def _newest(setup: Setup, root: epath.Path) -> tuple[int, Params]:
  """Step and parameters of the newest checkpoint."""
  if not checkpoints_lib.exist(root):
    raise UserError(f'{root} holds no checkpoints; train first (--mode train)')
  check_unchanged(root / 'config.json', setup.config, FIXED_IN_RUN)
  with Checkpoints(root) as checkpoints:
    state = checkpoints.restore_latest(_like(setup))
  return int(state.step), state.ema_params


def import_released(config: ConfigDict, workdir: str, checkpoint: str) -> None:
  """Makes a workdir of a checkpoint of the released JAX or PyTorch code.

  The result is a checkpoint like any other: `evaluate` evaluates it, `train` goes on from it.

  Raises:
    UserError: for a mistake in the config, a file that does not fit it, or a workdir in use.
  """
  setup, root = build(config), epath.Path(workdir)
  if checkpoints_lib.exist(root):
    raise UserError(f'{root} holds checkpoints already; choose another --workdir')
  like = _like(setup)  # says so if the config does not make a network
  state = released_checkpoints.load(
    checkpoint, setup.model, (1, *setup.data_shape), setup.tx, setup.config.model.ema_rate
  )
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, like))
  _open(root, setup, ())
  with Checkpoints(root) as checkpoints:
    checkpoints.save(state, keep=True)
  logger.info('imported %s, of step %d, to %s', checkpoint, int(state.step), root / 'checkpoints')


def _load(setup: Setup, split: str, section: str = 'model') -> datasets.Source:
  """The data of a split, for the network that a section of the config describes.

  Raises:
    UserError: if they cannot be read, or have other classes than the network.
  """
  data, num_classes = setup.config.data, setup.config[section].num_classes
  if data.dim:
    return toy_data.load(data.dataset, split, data.dim)
  source = datasets.load(
    data.dataset,
    split,
    image_size=data.image_size,
    num_channels=data.num_channels,
    path=data.path,
    data_dir=data.tfds_dir,
    category=data.category,
  )
  takes_labels = num_classes > 0 or section == 'classifier'
  if takes_labels and not num_classes == source.num_classes > 0:
    n = source.num_classes
    there = f'{n} classes; set it to that' if n else 'no labels; choose another dataset'
    raise UserError(
      f'config.{section}.num_classes is {num_classes}, and dataset {data.dataset!r}, split {split},'
      f' has {there}'
    )
  return source


def _open(folder: epath.Path, setup: Setup, fixed: tuple[str, ...]) -> None:
  """Makes a folder whose config agrees in the `fixed` fields, and writes the config to it."""
  check_unchanged(folder / 'config.json', setup.config, fixed)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(folder / 'config.json', setup.config.to_dict())
  except OSError as error:
    raise UserError(f'cannot write to {folder} ({error.strerror}); choose another') from None


def score_task(setup: Setup) -> Task:
  """The training of the score model of a config."""
  model, training = setup.model, setup.config.training

  def evaluate(params: Params, batch: Batch, rng: Array) -> Metrics:
    each = losses.eval_step(params, batch, rng, model=model, objective=setup.objective)
    return {'loss': each.mean()}

  choices = {
    'model': model,
    'objective': setup.objective,
    'tx': setup.tx,
    'ema_rate': setup.config.model.ema_rate,
    'ema_warmup': setup.config.model.ema_warmup,
  }
  shape = (1, *setup.data_shape)
  task = Task(
    section='model',
    init=lambda rng: losses.init_state(rng, model, setup.tx, shape),
    update=partial(losses.train_step, **choices),
    evaluate=evaluate,
    purposes=('init', 'train', 'eval'),
    batch_size=training.batch_size,
    n_iters=training.n_iters,
  )
  if training.objective != 'cd':
    return task
  divergence = setup.divergence
  return dataclasses.replace(
    task,
    init=lambda rng: ebm.init_state(rng, model, setup.tx, shape, divergence),
    update=partial(ebm.train_step, divergence=divergence, **choices),
  )


def _like(setup: Setup) -> TrainState:
  return train_lib.like(setup, score_task(setup))


def _draw_snapshot(setup: Setup, root: epath.Path, state: TrainState, stop: Stop) -> None:
  """A grid of samples; left out, and drawn by the next run, if a signal comes."""
  step, training = int(state.step), setup.config.training
  path = root / 'samples' / f'iter_{step}' / 'sample.png'
  if not training.snapshot_sampling or path.exists():
    return

  with Bar('sample', 100, unit='%') as bar:

    def progress(fraction: float) -> None:
      bar.update(100 * fraction)
      if stop.signal and jax.process_count() == 1:
        raise InterruptedError

    try:
      rng = setup.key('snapshot', step)
      n = training.snapshot_samples
      labels = classes_in_turn(setup, 0, n)
      images, _ = draw(setup, state.ema_params, rng, n, progress, labels)
    except InterruptedError:
      return
  artifacts.write_samples(path, images)
  logger.info('step %d: samples are in %s', step, path)


def _steps_to_evaluate(config: FrozenConfigDict, steps: list[int]) -> list[int]:
  """The steps of the checkpoints begin_ckpt to end_ckpt, in units of snapshot_freq."""
  unit, begin, end = config.training.snapshot_freq, config.eval.begin_ckpt, config.eval.end_ckpt
  chosen = [step for step in steps if begin * unit <= step <= end * unit]
  if chosen:
    return chosen
  there = f'checkpoints {begin} to {end} (steps {begin * unit} to {end * unit})'
  if not steps or steps[-1] > end * unit:
    raise UserError(
      f'no {there}; there are those of steps {steps}: set config.eval.begin_ckpt and end_ckpt, '
      f'which count in units of config.training.snapshot_freq = {unit}'
    )
  logger.warning('no %s yet; evaluating the newest, of step %d', there, steps[-1])
  return steps[-1:]
