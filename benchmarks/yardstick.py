"""How far samples of small models are from their training images, by a classifier and by pixels.

What the benchmarks of results share: the images, the small classifier that is trained on them, and
the features of all of them.
"""

import dataclasses
from functools import cached_property
import math

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from benchmarks import small_classifier
from builders.data import load_source
from builders.setup import build
from data.images import ImageSource
from evaluation import features
from evaluation.features import FeatureNetwork
from evaluation.metrics import Moments
from evaluation.reference import Reference
from evaluation.sample_quality import Comparison
from runtime.devices import all_devices


@dataclasses.dataclass(frozen=True)
class Yardstick:
  """A comparison with all training images, by the features of two networks.

  Attributes:
    config: says which images.
    folder: where the classifier is kept.
    training: how the classifier is trained.
  """

  config: ConfigDict
  folder: epath.Path
  training: small_classifier.Training

  def source(self, split: str) -> ImageSource:
    """The images, with their classes."""
    source = load_source(build(self.config).config, split)
    assert isinstance(source, ImageSource)  # no points: these have pixels
    return source

  @cached_property
  def train_source(self) -> ImageSource:
    """Those that samples are compared with."""
    return self.source('train')

  @cached_property
  def classifier(self) -> tuple[FeatureNetwork, float]:
    """The classifier's features, and its accuracy on the held-out images."""
    path = self.folder / f'classifier_{self.training.images}.npz'
    sources = self.train_source, self.source('test')
    return small_classifier.features_of(path, *sources, self.training)

  @cached_property
  def networks(self) -> tuple[FeatureNetwork, ...]:
    """By whose features samples are compared with data."""
    pixels = features.load('pixels')
    assert pixels is not None
    return self.classifier[0], pixels

  @cached_property
  def comparisons(self) -> tuple[Comparison, ...]:
    """With all training images, by each network."""
    return tuple(Comparison(network, self._reference(network)) for network in self.networks)

  def _reference(self, network: FeatureNetwork) -> Reference:
    extract, n = network.compile(all_devices().mesh), len(self.train_source)
    parts = np.array_split(np.arange(n), math.ceil(n / 1000))
    taken = np.concatenate([extract(self.train_source.gather(rows)) for rows in parts])
    moments = Moments.of(taken)
    return Reference(n, moments.mean, moments.cov, taken)
