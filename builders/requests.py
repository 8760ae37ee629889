"""From the section `sampling` of a config to what `--mode sample` is asked for."""

from collections.abc import Callable, Sequence
import logging

from ml_collections import FrozenConfigDict
import numpy as np

from builders.data import load_source, make_conditions, make_decoder
from builders.setup import Setup
from data.classes import numbers_of
from data.images import spread
from evaluation.sample import Conditioned, SampleRequest
from evaluation.tasks import (
  ByConstraint,
  ByPosterior,
  Colorize,
  Conditioning,
  Deblur,
  Inpaint,
  input_files,
  InverseProblem,
  names_of,
  read_image,
  SuperResolve,
  Task,
)
from runtime.errors import UserError

logger = logging.getLogger('score_sde')


def make_sample_request(setup: Setup, class_names: Sequence[str] = ()) -> SampleRequest:
  """What a config wants drawn by `--mode sample`; it may name classes by `class_names`.

  Raises:
    UserError: if there is no such class, or the fields do not go together.
  """
  choice = setup.config.sampling
  labels, conditions = _wanted_labels(setup, class_names), None
  if setup.config.data.condition:
    conditions, of_conditions = _wanted_conditions(setup)
    if of_conditions is not None and not choice.labels:
      labels = np.repeat(of_conditions, choice.num_samples)
  return SampleRequest(
    n=choice.num_samples,
    batch_size=setup.config.eval.batch_size,
    labels=labels,
    problem=_inverse_problem(setup.config) if choice.task else None,
    trajectory=choice.trajectory,
    conditions=conditions,
  )


def _wanted_conditions(setup: Setup) -> tuple[Conditioned, np.ndarray | None]:
  """Those in `sampling.condition`, or those of held-out images, with the classes of these, if any.

  Raises:
    UserError: if there are none, or they cannot be read.
  """
  config, choice = setup.config, setup.config.sampling
  if not choice.condition:
    held_out = load_source(config, 'test')
    numbers = spread(len(held_out), choice.num_conditions)
    batch = held_out.batch(numbers)
    conditioned = Conditioned([f'held_out_{i}' for i in numbers], batch['condition'])
    return conditioned, batch['label'] if setup.model.num_classes else None
  of_images = make_conditions(config)
  assert of_images is not None  # as the model has some
  files = input_files(choice.condition, 'config.sampling.condition')
  return Conditioned(
    names_of(files), np.stack([read_image(file, of_images.of_file) for file in files])
  ), None


def _wanted_labels(setup: Setup, names: Sequence[str]) -> np.ndarray | None:
  """`sampling.labels` over and over, int32 [n]; without them, all classes that the model knows."""
  classes = setup.model.num_classes
  known = classes or setup.config.classifier.num_classes
  labels = numbers_of(setup.config.sampling.labels, names, known)
  if not labels and not classes:
    return None
  if labels and names:
    shown = dict.fromkeys(f'{label} {names[label]}' for label in labels)
    logger.info('drawing the classes %s', ', '.join(shown))
  in_turn = np.array(labels or range(classes), np.int32)
  return np.resize(in_turn, setup.config.sampling.num_samples)


def _inverse_problem(config: FrozenConfigDict) -> InverseProblem:
  choice = config.sampling
  make_task, make_conditioning = _TASKS[choice.task], _CONDITIONINGS[choice.conditioning]
  return InverseProblem(
    make_task(choice), choice.input, make_conditioning(choice), make_decoder(config)
  )


def _deblur(choice: FrozenConfigDict) -> Deblur:
  if choice.conditioning != 'posterior' or not choice.noise_std > 0:
    raise UserError(
      'config.sampling.task = deblur needs config.sampling.conditioning = posterior and '
      f'noise_std > 0, a level of the noise in the image; got {choice.conditioning!r} and '
      f'{choice.noise_std}'
    )
  return Deblur(choice.blur_std)


_TASKS: dict[str, Callable[[FrozenConfigDict], Task]] = {
  'inpaint': lambda choice: Inpaint(choice.mask),
  'colorize': lambda choice: Colorize(),
  'superres': lambda choice: SuperResolve(choice.factor),
  'deblur': _deblur,
}

_CONDITIONINGS: dict[str, Callable[[FrozenConfigDict], Conditioning]] = {
  'constraint': lambda choice: ByConstraint(),
  'posterior': lambda choice: ByPosterior(choice.noise_std),
}
