"""From a score to images, as a dataset has them; and the classes that are asked for."""

from collections.abc import Callable

from jax import Array
import numpy as np

from builders.setup import Setup
from controllable_generation import ClassifierFreeGuidance, ClassifierGuidance
from models.classifier import ClassLogProb
from models.score import Params
from runtime import processes
from sde_lib import ScoreFn


def class_score(
  setup: Setup, params: Params, labels: Array | None, log_prob: ClassLogProb | None = None
) -> ScoreFn:
  """The score of the classes `labels` [B], or of all images, with the guidance of the config.

  A model that knows no classes needs `log_prob`, a classifier of noisy images.
  """
  model, scale = setup.model, setup.config.sampling.guidance_scale
  if labels is None:
    return model.bind(params)
  if not model.num_classes:
    assert log_prob is not None  # as the model knows no classes
    return ClassifierGuidance(model.bind(params), log_prob, labels, scale)
  conditional = model.bind(params, labels=labels)
  if scale == 1:  # which needs no second evaluation
    return conditional
  return ClassifierFreeGuidance(conditional, model.bind(params), scale)


def draw(
  setup: Setup,
  params: Params,
  rng: Array,
  n: int,
  progress: Callable[[float], None] | None = None,
  labels: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
  """Draws n images, uint8 [n, H, W, C], or points, the same on every process; n suits the devices.

  Of a label-conditional model they belong to the classes `labels`, int32 [n].

  Returns:
    The samples, and the number of score evaluations that each took.
  """
  score_fn = class_score(
    setup, params, None if labels is None else processes.shard(labels, setup.devices.batch)
  )
  observe = None if progress is None else (lambda fraction, x: progress(fraction))
  shape = (n, *setup.data_shape)
  x, nfe = setup.sampler(rng, score_fn, shape, sharding=setup.devices.batch, observe=observe)
  return to_stored(setup, processes.gather(x)), nfe


def to_stored(setup: Setup, x: np.ndarray) -> np.ndarray:
  """Data as a dataset has them: images as uint8 of the same shape, points as they are.

  Raises:
    FloatingPointError: if some are not finite.
  """
  if not np.isfinite(x).all():
    broken = (~np.isfinite(x.reshape(len(x), -1)).all(1)).sum()
    raise FloatingPointError(
      f'{broken} of {len(x)} samples are not finite; try another sampler, more steps '
      '(config.sampling.num_steps), or a checkpoint of earlier'
    )
  if setup.config.data.dim:
    return x
  x = (x + 1) / 2 if setup.config.data.centered else x
  half = 0.5 if setup.config.sampling.uint8 == 'round' else 0.0
  return np.clip(255 * x + half, 0, 255).astype(np.uint8)


def classes_in_turn(setup: Setup, start: int, n: int) -> np.ndarray | None:
  """Labels 0, 1, 2, ... int32 [n] for samples `start` to `start` + n, or None without classes."""
  classes = setup.model.num_classes
  return np.arange(start, start + n, dtype=np.int32) % classes if classes else None
