"""From a score to samples, as a dataset has them; and the classes that are asked for."""

from collections.abc import Callable
import dataclasses
from functools import partial
import math

import jax
from jax import Array
import numpy as np

from controllable_generation import (
  Autoguidance,
  ClassifierFreeGuidance,
  ClassifierGuidance,
  NoiseInterval,
)
from data.codec import Codec
from data.images import Batch
from models.classifier import ClassLogProb
from models.score import Params, ScoreModel
from runtime import processes
from runtime.devices import Devices
from runtime.shapes import Told
from samplers.base import Constraint, Sampler
from sde_lib import ScoreFn
from training.step import told_in_evaluation
from workdir.reports import Report


@dataclasses.dataclass(frozen=True)
class Guide:
  """A weaker model of the same data, which samples are led away from: see `Autoguidance`.

  Attributes:
    model: the score model.
    params: its parameters.
    scale: of the difference between the model and it.
    step: of its checkpoint.
    identity: of its checkpoint, which samples depend on.
  """

  model: ScoreModel
  params: Params
  scale: float
  step: int
  identity: str

  def report(self) -> Report:
    """What is said of it beside samples."""
    return {'checkpoint': self.identity, 'step': self.step, 'scale': self.scale}


@dataclasses.dataclass(frozen=True)
class Drawing:
  """How samples of a model are drawn.

  Attributes:
    model: the score model.
    sampler: that makes x_0 of noise, with its score.
    codec: makes samples of x_0.
    devices: which share the samples.
    guidance_scale: of grad log p(y | x), where classes are asked for.
    guided: the noise levels where guidance counts, if not all of them.
    guide: a weaker model, if samples are led away from one.
  """

  model: ScoreModel
  sampler: Sampler
  codec: Codec
  devices: Devices
  guidance_scale: float = 1.0
  guided: NoiseInterval | None = None
  guide: Guide | None = None

  @property
  def mark(self) -> str:
    """What tells these samples from those of other parameters than the model's."""
    return f'guide {self.guide.identity}' if self.guide else ''

  def score_fn(
    self,
    params: Params,
    wanted: Batch,
    log_prob: ClassLogProb | None = None,
  ) -> ScoreFn:
    """The score of the samples that are `wanted`: of their classes, guided, or of all together.

    A model that knows no classes needs `log_prob`, a classifier of noisy images. Where there is a
    guide, model and guide together take the place of the model, and classes guide what they give.

    Args:
      params: of the model.
      wanted: what goes with each sample, as in a batch of data: 'label' [B] if classes are asked
        for, 'condition' uint8 [B, H, W, C] if the model is told such.
      log_prob: a classifier.
    """
    batch = {name: processes.shard(rows, self.devices.batch) for name, rows in wanted.items()}
    told = told_in_evaluation(batch, self.model, self.codec)
    score_fn = self._autoguided(params, told)
    if 'label' not in batch:
      return score_fn
    if not self.model.num_classes:
      assert log_prob is not None  # as the model knows no classes
      return ClassifierGuidance(
        score_fn, log_prob, batch['label'], self.guidance_scale, self.guided
      )
    if self.guidance_scale == 1:  # which needs no second evaluation
      return score_fn
    told_of_all = told.copy()
    del told_of_all['labels']
    of_all = self._autoguided(params, told_of_all)
    return ClassifierFreeGuidance(score_fn, of_all, self.guidance_scale, self.guided)

  def _autoguided(self, params: Params, told: Told) -> ScoreFn:
    """The score of the model, led away from that of the guide if there is one."""
    score_fn, guide = self.model.bind(params, **told), self.guide
    if guide is None:
      return score_fn
    weaker = guide.model.bind(guide.params, **told)
    return Autoguidance(score_fn, weaker, guide.scale, self.guided)

  def samples(
    self,
    rng: Array,
    score_fn: ScoreFn,
    n: int,
    constraint: Constraint | None = None,
    observe: Callable[[float, Array], None] | None = None,
    to_stored: Callable[[np.ndarray], np.ndarray] | None = None,
  ) -> tuple[np.ndarray, int]:
    """Draws n samples [n, ...] of a score, the same on every process; n suits the devices.

    `to_stored` makes of x_0 what a dataset has; by default it is the codec's.

    Returns:
      The samples as a dataset has them, and the number of score evaluations that each took.

    Raises:
      FloatingPointError: if some are not finite, or a solver does not come to its end.
    """
    shape, rows = (n, *self.codec.model_shape), self.devices.batch
    x, nfe = self.sampler(
      rng, score_fn, shape, sharding=rows, constraint=constraint, observe=observe
    )
    return (to_stored or self.codec.to_stored)(processes.gather(x)), nfe

  def samples_of(
    self,
    params: Params,
    rng: Array,
    n: int,
    wanted: Batch,
    progress: Callable[[float], None],
  ) -> tuple[np.ndarray, int]:
    """Draws n samples by parameters alone; `wanted` goes with them, see `score_fn`."""
    score_fn = self.score_fn(params, wanted)
    return self.samples(rng, score_fn, n, observe=lambda fraction, _: progress(fraction))

  def in_rounds(
    self,
    params: Params,
    rng: Array,
    n: int,
    most: int,
    progress: Callable[[float], None],
    beside: Batch | None = None,
  ) -> np.ndarray:
    """Draws n samples, of all classes in turn, `most` at a time where they are more than that.

    Those of a model that is told conditions are of the conditions, and the classes, of n images,
    `beside`.
    """
    rounds, size = max(1, math.ceil(n / most)), min(n, most)
    # The last is as large as the others, so that one program draws all.
    rows = np.arange(rounds * size)
    wanted = _rows(self.told_of(beside), rows % n) if beside else self.classes_in_turn(len(rows))
    if rounds == 1:
      return self.samples_of(params, rng, n, wanted, progress)[0]
    parts = list[np.ndarray]()
    for i, of_round in enumerate(rows.reshape(rounds, size)):
      of_all = partial(_fraction_of_all, progress, i, rounds)
      key = jax.random.fold_in(rng, i)
      parts.append(self.samples_of(params, key, size, _rows(wanted, of_round), of_all)[0])
    return np.concatenate(parts)[:n]

  def told_of(self, images: Batch) -> Batch:
    """What goes with images, as far as the model is told of it."""
    takes = {'label': self.model.num_classes, 'condition': self.model.condition_channels}
    return {name: images[name] for name, known in takes.items() if known}

  def classes_in_turn(self, n: int) -> Batch:
    """'label' [n], the classes 0, 1, 2, ... over and over; nothing of a model that knows none."""
    classes = self.model.num_classes
    return {'label': np.arange(n, dtype=np.int32) % classes} if classes else {}


def _rows(batch: Batch, rows: np.ndarray) -> Batch:
  return {name: of_all[rows] for name, of_all in batch.items()}


def _fraction_of_all(
  progress: Callable[[float], None], i: int, rounds: int, fraction: float
) -> None:
  """Tells of a fraction of round i."""
  progress((i + fraction) / rounds)
