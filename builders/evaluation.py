"""From a config to what is evaluated, and to what is drawn."""

import dataclasses
from functools import partial
import logging
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import FrozenConfigDict
import numpy as np

from builders.data import load_images, load_source, make_conditions, make_decoder
from builders.distillation import make_consistency
from builders.objectives import explicit_matching
from builders.rules_of_students import CONSISTENCY
from builders.setup import Setup
from builders.training import average_in_use
from controllable_generation import NoiseInterval
from data.images import ImageSource
from evaluation import features
from evaluation.average import LateAverage
from evaluation.bits_per_dim import BitsPerDim, Estimator, Uniform
from evaluation.dequantization import WithLearnedNoise
from evaluation.draw import Drawing, Guide
from evaluation.evaluate import CheckpointRange, Measurement
from evaluation.held_out_loss import HeldOutLoss, Loss
from evaluation.labels import count_classes, in_turn, LabelLaw
from evaluation.reference import Images, Reference, ReferenceFile
from evaluation.sample_quality import Comparison, OfImages, SampleQuality
from evaluation.tasks import input_files, read_image
from likelihood import Likelihood, LikelihoodBound
from runtime.errors import UserError
from training import consistency
from training.step import eval_step

logger = logging.getLogger('score_sde')

EVERY_NOISE = 1e9  # above all that there are, as a limit of guidance


def checkpoint_range(config: FrozenConfigDict) -> CheckpointRange:
  """The checkpoints that a config wants evaluated."""
  wanted, training = config.eval, config.training
  return CheckpointRange(
    begin=wanted.begin_ckpt,
    end=wanted.end_ckpt,
    unit=training.snapshot_freq,
    n_iters=training.n_iters,
    wait=wanted.wait,
  )


def make_measurements(setup: Setup, guide: Guide | None = None) -> list[Measurement]:
  """What a config wants measured of each checkpoint, in the order of a report.

  Samples are guided by a `guide`, if any; losses and likelihoods are those of the model alone.

  Raises:
    UserError: if data, a feature network or a file of features cannot be had, or do not fit.
  """
  wanted, made = setup.config.eval, list[Measurement]()
  if wanted.enable_loss:
    made.append(make_held_out_loss(setup))
  if wanted.enable_bpd:
    made.append(_with_its_noise(setup, make_bits_per_dim(setup)))
  if wanted.enable_bound:
    made.append(_with_its_noise(setup, make_bound(setup)))
  if wanted.enable_sampling:
    made.append(make_sample_quality(setup, guide))
  return made


def make_late_average(setup: Setup, measurements: list[Measurement]) -> LateAverage | None:
  """What is measured beside the loss of an average that has not arrived, if there is a loss."""
  average = average_in_use(setup.config)
  found = (LateAverage(average, m) for m in measurements if isinstance(m, HeldOutLoss))
  return next(found, None)


def make_held_out_loss(setup: Setup) -> HeldOutLoss:
  """The loss of training; where the true score is known, explicit score matching beside it.

  Of a consistency model it is how far its jumps are from each other.
  """
  of_model: dict[str, Any] = {'model': setup.model, 'codec': setup.codec}
  losses: dict[str, Loss]
  if setup.config.distill.method in CONSISTENCY:
    objective = make_consistency(setup.config, setup.model.sde)
    losses = {'loss': partial(consistency.eval_step, objective=objective, **of_model)}
  else:
    objectives = {'loss': setup.objective}
    if setup.true_score_fn is not None:
      matching = explicit_matching(setup.true_score_fn)
      objectives['score_error'] = dataclasses.replace(setup.objective, matching=matching)
    losses = {name: partial(eval_step, objective=v, **of_model) for name, v in objectives.items()}
  return HeldOutLoss(
    losses=losses,
    held_out=load_source(setup.config, 'test'),
    batch_size=setup.config.eval.batch_size,
    devices=setup.devices,
    keys=setup.keys,
  )


def make_bits_per_dim(setup: Setup) -> BitsPerDim:
  """Bits per dimension, of the images of `eval.bpd_dataset`."""
  likelihood = Likelihood(
    setup.model.sde, setup.config.training.eps, n_probes=setup.config.eval.num_probes
  )
  choices = {'eps': likelihood.eps, 'rtol': likelihood.rtol, 'atol': likelihood.atol}
  return _of_images(setup, Estimator('bpd', likelihood, 'probes', likelihood.n_probes, choices))


def make_bound(setup: Setup) -> BitsPerDim:
  """The bound on them, without an ODE.

  Raises:
    UserError: if the SDE has no noise at the smallest time.
  """
  wanted = setup.config.eval
  try:
    bound = LikelihoodBound(
      setup.model.sde, setup.config.training.eps, wanted.bound_form, wanted.bound_times
    )
  except ValueError as error:
    raise UserError(f'config.eval.enable_bound: {error}') from None
  choices = {'eps': bound.eps, 'form': bound.form, 'times': bound.n_times}
  return _of_images(setup, Estimator('bound', bound, 'draws', bound.n_groups, choices))


def make_bits_of_files(setup: Setup, path: str) -> tuple[BitsPerDim, list[Path]]:
  """Bits per dimension of a user's images, or their bound where `eval` wants that one alone.

  Returns:
    What measures them, and their files, in the order of their numbers.

  Raises:
    UserError: if there are no images, or one cannot be read, or the config has none.
  """
  config, wanted = setup.config, setup.config.eval
  if config.data.dim:
    raise UserError(f'--mode likelihood is for images, and config.data.dim = {config.data.dim}')
  if config.training.single_scale:
    raise UserError('--mode likelihood asks for all levels of noise, single_scale trains one')
  if config.model.num_classes and not config.training.label_dropout:
    raise UserError(
      '--mode likelihood has images without classes, and config.training.label_dropout = 0 trained '
      'no score of all classes together'
    )
  of_images = make_conditions(config)
  if of_images and not of_images.computed:
    raise UserError(
      '--mode likelihood has images alone, and this model is told an image beside each: '
      f'config.data.condition = {config.data.condition}. --mode eval with '
      'config.eval.enable_bpd measures pairs, in config.data.path and config.data.condition'
    )
  if wanted.bpd_dequantization != 'uniform':
    raise UserError('--mode likelihood has uniform noise: set config.eval.bpd_dequantization to it')
  files = input_files(path, '--images')
  decoder, size = make_decoder(config), config.data.image_size

  def read(i: int) -> tuple[np.ndarray, int]:
    return read_image(files[i], lambda image: decoder.pixels(image, size)), 0

  bits = (
    make_bound(setup) if wanted.enable_bound and not wanted.enable_bpd else make_bits_per_dim(setup)
  )
  source = ImageSource((size, size, config.data.num_channels), len(files), read)
  told = of_images.beside(source) if of_images else source
  return dataclasses.replace(bits, source=told, split='images'), files


def _with_its_noise(setup: Setup, bits: BitsPerDim) -> Measurement:
  config = setup.config
  if config.eval.bpd_dequantization == 'uniform':
    return bits
  if config.data.dim:
    raise UserError(
      'config.eval.bpd_dequantization = variational learns noise between the levels of images, and '
      f'config.data.dim = {config.data.dim} has points: set it to uniform'
    )
  source = load_source(config, 'train')
  return WithLearnedNoise(bits, source, config.training.eps, config.eval.bpd_dequantization_steps)


def _of_images(setup: Setup, estimator: Estimator) -> BitsPerDim:
  wanted = setup.config.eval
  return BitsPerDim(
    model=setup.model,
    estimator=estimator,
    codec=setup.codec,
    dequantization=Uniform(setup.codec),
    source=load_source(setup.config, wanted.bpd_dataset),
    split=wanted.bpd_dataset,
    repeats=wanted.bpd_repeats,
    samples=wanted.bpd_importance_samples,
    batch_size=wanted.batch_size,
    devices=setup.devices,
    keys=setup.keys,
  )


def make_drawing(setup: Setup, guide: Guide | None = None) -> Drawing:
  """How a config's samples are drawn, led away from a guide if there is one.

  Raises:
    UserError: if no noise level lies in the interval that is guided.
  """
  choice = setup.config.sampling
  guided = None
  if choice.guidance_low > 0 or choice.guidance_high < EVERY_NOISE:
    try:
      guided = NoiseInterval(setup.model.sde, choice.guidance_low, choice.guidance_high)
    except ValueError as error:
      raise UserError(f'config.sampling.guidance_low and guidance_high: {error}') from None
  return Drawing(
    model=setup.model,
    sampler=setup.sampler,
    codec=setup.codec,
    devices=setup.devices,
    guidance_scale=choice.guidance_scale,
    guided=guided,
    guide=guide,
  )


def make_sample_quality(setup: Setup, guide: Guide | None = None) -> SampleQuality:
  """Samples, compared with data if `eval.features` says by what."""
  wanted, file = setup.config.eval, reference_file(setup)
  reference = file.load() if file else None
  return SampleQuality(
    drawing=make_drawing(setup, guide),
    n=wanted.num_samples,
    batch_size=wanted.batch_size,
    keys=setup.keys,
    law=None if setup.config.data.condition else _label_law(setup, file, reference),
    comparison=Comparison(file.network, reference) if file and reference else None,
    of_images=_images_told_of(setup),
  )


def _images_told_of(setup: Setup) -> OfImages | None:
  """Those whose conditions the samples of an evaluation are of: what samples are compared with."""
  split = setup.config.eval.stats_split
  if not setup.config.data.condition:
    return None
  return OfImages(load_source(setup.config, split), split)


def _label_law(
  setup: Setup, file: ReferenceFile | None, reference: Reference | None
) -> LabelLaw | None:
  """The classes of the samples of an evaluation, of a model that is told them.

  They are as frequent as in what the samples are compared with; in turn if that is nothing, or has
  no classes.
  """
  classes = setup.model.num_classes
  if not classes:
    return None
  if file is None or reference is None:
    return in_turn(classes)
  counts = reference.class_counts
  if counts is None:
    split = setup.config.eval.stats_split
    logger.warning(
      '%s does not say how frequent the classes are, as earlier files do not: counting them in the '
      'data, split %s. --mode stats makes it anew, with them', file.path, split,
    )  # fmt: skip
    counts = count_classes(load_images(setup.config, split))
  if not counts:
    logger.warning('%s is of data without labels: samples are of all classes in turn', file.path)
    return in_turn(classes)
  if len(counts) != classes:
    raise UserError(
      f'{file.path} is of {len(counts)} classes, and config.model.num_classes = {classes}; make it '
      'again with --mode stats, or name another in config.eval.stats_path'
    )
  return LabelLaw('as frequent as in the reference', counts)


def reference_file(setup: Setup) -> ReferenceFile | None:
  """The file that samples are compared with, if they are.

  Raises:
    UserError: if the weights of the network cannot be had, or it does not see such images.
  """
  wanted, channels = setup.config.eval, setup.config.data.num_channels
  if wanted.features == 'inception' and channels not in (1, 3):
    raise UserError(
      f'config.eval.features = inception sees grey or RGB images, and config.data.num_channels = '
      f'{channels}; take --config.eval.features=pixels, or none, --config.eval.features='
    )
  network = features.load(wanted.features, wanted.inception_path)
  if network is None:
    return None
  images = reference_images(setup.config)
  named = epath.Path(wanted.stats_path).expanduser() if wanted.stats_path else None
  return ReferenceFile(named or images.usual_path(network.name), images, network)


def reference_images(config: FrozenConfigDict) -> Images:
  """The images that samples are compared with."""
  data = config.data
  return Images(
    dataset=data.dataset,
    category=data.category,
    path=data.path,
    split=config.eval.stats_split,
    shape=(data.image_size, data.image_size, data.num_channels),
    decoder=make_decoder(config),
  )
