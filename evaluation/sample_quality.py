"""How far samples of a model are from data, by the features of a network."""

from collections.abc import Callable
import dataclasses
from functools import cached_property, partial
import math
import time

from etils import epath
import jax
from jax.sharding import Mesh
import numpy as np

from data.images import Batch, Source
from evaluation import metrics
from evaluation.draw import Drawing
from evaluation.evaluate import Measurement
from evaluation.features import FeatureNetwork
from evaluation.labels import LabelLaw
from evaluation.metrics import Floor, Moments
from evaluation.reference import Reference
from models.score import Params
from runtime import processes
from runtime.devices import Keys
from workdir import artifacts, pictures, reports, rounds
from workdir.progress import Bar
from workdir.reports import Report
from workdir.rounds import Arrays

SHOWN = 100  # samples, at most, in a grid of images


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Of samples with data, by the features that a network gives of both.

  Attributes:
    network: gives them.
    reference: those of the data.
  """

  network: FeatureNetwork
  reference: Reference

  def is_in(self, report: Report) -> bool:
    """Whether a report tells of it."""
    return report.get(f'reference_{self.network.name}') == self.reference.identity

  def floor(self, n: int) -> Floor:
    """How far data are from data, n of each or as many as there are; computed once."""
    if n not in self._floors:
      self._floors[n] = Floor.of(self.reference.features, n)
    return self._floors[n]

  @cached_property
  def _floors(self) -> dict[int, Floor]:
    return {}

  def report(self, features: np.ndarray, mesh: Mesh) -> Report:
    """All that `metrics` knows of features [N, d] of samples, in the order of the samples."""
    network, reference, moments = self.network, self.reference, Moments.of(features)
    kernel, kernel_std = metrics.kernel_distance(features, reference.features)
    precision, recall = metrics.precision_recall(features, reference.features, mesh)
    report = {
      network.frechet: metrics.frechet_distance(
        moments.mean, moments.cov, reference.mean, reference.cov
      ),
      network.kernel: kernel,
      f'{network.kernel}_std': kernel_std,
      f'precision{network.suffix}': precision,
      f'recall{network.suffix}': recall,
    }
    if network.logits:
      score, score_std = metrics.inception_score(network.logits(features))
      report |= {'inception_score': score, 'inception_score_std': score_std}
    floor = self.floor(len(features))
    report |= {
      f'{network.frechet}_floor': floor.frechet,
      f'{network.kernel}_floor': floor.kernel,
      f'{network.frechet}_floor_images': floor.n,
      'few_samples': len(features) < reports.FEW,
    }
    return report | {f'reference_{network.name}': reference.identity}


@dataclasses.dataclass(frozen=True)
class OfImages:
  """The images whose conditions samples are of, in their order, and over again.

  Attributes:
    source: of the images.
    split: of the data that they are.
  """

  source: Source
  split: str

  def report(self) -> Report:
    """What a report says of them."""
    return {'split': self.split, 'files': self.source.fingerprint()}

  @property
  def mark(self) -> str:
    """What tells them from others."""
    return f'conditions {self.report()}'

  def batch(self, first: int, n: int) -> Batch:
    """The images from number `first` on."""
    return self.source.batch(np.arange(first, first + n) % len(self.source))


@dataclasses.dataclass(frozen=True)
class SampleQuality(Measurement):
  """Draws samples and, with a comparison, takes their features, in rounds of a batch.

  Attributes:
    drawing: how samples are drawn.
    n: how many.
    batch_size: of all devices together.
    keys: of the run.
    law: of the classes of the samples, where the model is told them, and no conditions.
    comparison: with data, if any.
    watch: is called while samples are drawn; what it raises breaks off, and leaves whole rounds.
    of_images: whose conditions the samples are of, and whose classes, where the model is told such.
  """

  drawing: Drawing
  n: int
  batch_size: int
  keys: Keys
  law: LabelLaw | None = None
  comparison: Comparison | None = None
  watch: Callable[[], None] = lambda: None
  of_images: OfImages | None = None

  def is_in(self, report: Report) -> bool:
    compared = self.comparison is None or self.comparison.is_in(report)
    return (
      compared
      and report.get('samples') == self.n
      and report.get('guide') == (self.drawing.guide.report() if self.drawing.guide else None)
      and report.get('labels') == (self.law.report() if self.law else None)
      and report.get('conditions') == (self.of_images.report() if self.of_images else None)
    )

  def measure(self, params: Params, step: int, folder: epath.Path) -> Report:
    """Leaves `samples.png` and `samples_<round>.npz` in the folder, and features beside them.

    Raises:
      FloatingPointError: if samples are not finite, or a solver does not come to its end.
    """
    network = self.comparison.network if self.comparison else None
    mesh, features = self.drawing.devices.mesh, []
    extract = network.compile(mesh) if network else None
    nfes, seconds, feature_seconds = [], 0.0, 0.0
    # The last round is as large as the others, so that samples do not depend on their number.
    size = min(self.batch_size, self.n)
    mark, of_law = (self.law.mark if self.law else '') + self.drawing.mark, self._of_law(size)
    mark += self.of_images.mark if self.of_images else ''
    with Bar('sample', self.n, unit='samples') as bar:
      for i, first in enumerate(range(0, self.n, size)):
        n = min(size, self.n - first)
        wanted = {name: rows[first : first + size] for name, rows in of_law.items()}
        make = partial(
          self._draw_round, params, step, i, size, n, wanted, partial(self._show, bar, first, n)
        )
        arrays = rounds.kept_or_made(folder / f'samples_{i}.npz', 'samples', n, make, mark)
        samples = arrays['samples']
        nfes.append(int(arrays['nfe']))
        seconds += float(arrays['seconds'])
        if i == 0 and self.of_images:
          beside = self.of_images.batch(0, min(n, SHOWN))['condition']
          picture = pictures.in_pairs(beside, samples)
        elif i == 0:
          picture = self.drawing.codec.pictures.overview(samples, most=SHOWN)
        if network and extract:
          path = folder / f'features_{network.name}_{i}.npz'
          make = partial(_features_round, extract, samples)
          arrays = rounds.kept_or_made(path, 'features', n, make, network.version + mark)
          features.append(arrays['features'])
          feature_seconds += float(arrays['seconds'])
        bar.update(first + n)
    artifacts.write_png(folder / 'samples.png', picture)
    report: Report = {'samples': self.n, 'nfe': float(np.mean(nfes)), 'sample_seconds': seconds}
    if self.law:
      report['labels'] = self.law.report()
    if self.of_images:
      report['conditions'] = self.of_images.report()
    if self.drawing.guide:
      report['guide'] = self.drawing.guide.report()
    if self.comparison:
      began = time.monotonic()
      report |= self.comparison.report(np.concatenate(features), mesh)
      report |= {'feature_seconds': feature_seconds, 'distance_seconds': time.monotonic() - began}
    return report

  def _show(self, bar: Bar, done: int, n: int, fraction: float) -> None:
    """Moves a bar to `done` and a fraction of the next n."""
    bar.update(done + fraction * n)
    self.watch()

  def _of_law(self, size: int) -> Batch:
    """The classes of all samples, those of the last round that are not kept among them."""
    return {'label': self.law.labels(math.ceil(self.n / size) * size)} if self.law else {}

  def _draw_round(
    self,
    params: Params,
    step: int,
    i: int,
    size: int,
    n: int,
    wanted: Batch,
    progress: Callable[[float], None],
  ) -> Arrays:
    """The first n of round i, in which `size` samples are drawn, with what is `wanted` of a law."""
    rng = jax.random.fold_in(self.keys.key('sample', step), i)
    if self.of_images:
      wanted = self.drawing.told_of(self.of_images.batch(i * size, size))
    samples, nfe = self.drawing.samples_of(params, rng, size, wanted, progress)
    extra = {'labels': wanted['label'][:n]} if 'label' in wanted else {}
    return {'samples': samples[:n], 'nfe': np.array(nfe, np.int64), **extra}


def _features_round(extract: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> Arrays:
  n, devices = len(images), jax.device_count()
  rows = np.arange(math.ceil(n / devices) * devices).clip(max=n - 1)
  return {'features': extract(processes.own_rows(images[rows]))[:n]}
