"""What samples are compared with: features of a dataset's images, in a file that is made once.

The file, `assets/stats/<dataset>_<resolution>_<features>.npz` unless the config names another,
holds the features' mean [d] and cov [d, d] in float64 over all images, the features [M, d] of at
most `KEPT` of them, in `class_counts` [K] how many images each class has, and in `provenance` how
they came about, as JSON. Earlier files have no `class_counts`. The released `cifar10_stats.npz`,
pool_3 [50000, 2048] alone, is read as well.
"""

import dataclasses
import hashlib
import json
import logging
import os
from typing import Any
import zlib

from etils import epath
import jax
from jax.sharding import Mesh
import numpy as np

from data.batches import eval_batches
from data.decoding import Decoder
from data.images import Source, spread
from data.sources import kind_of
from evaluation.features import FeatureNetwork
from evaluation.metrics import Moments, NEIGHBOURS
from runtime import processes
from runtime.errors import cannot_write, UserError
from workdir import artifacts, versions
from workdir.progress import Bar

logger = logging.getLogger('score_sde')

KEPT = 50_000  # images, evenly over the dataset, whose features are kept
_FOLDER = epath.Path(__file__).parent.parent / 'assets' / 'stats'


@dataclasses.dataclass(frozen=True)
class Reference:
  """Features of a dataset.

  Attributes:
    n: the number of images.
    mean: float64 [d].
    cov: float64 [d, d].
    features: of some of the images, float32 [M, d].
    class_counts: how many images each class has, empty without labels; None if not known.
  """

  n: int
  mean: np.ndarray
  cov: np.ndarray
  features: np.ndarray
  class_counts: tuple[int, ...] | None = None

  @property
  def identity(self) -> str:
    """A hash, by which a report tells what it compared with."""
    return hashlib.sha256(self.mean.tobytes() + self.cov.tobytes()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Images:
  """Which images features are of.

  Attributes:
    dataset: its name.
    category: of it, if it has some.
    path: where it lies, if the user says so.
    split: 'train' or 'test'.
    shape: of an image.
    decoder: how files become images.
  """

  dataset: str
  category: str
  path: str
  split: str
  shape: tuple[int, int, int]
  decoder: Decoder = dataclasses.field(default_factory=Decoder)

  def usual_path(self, features: str) -> epath.Path:
    """Where the file of their features by the network of that name lies."""
    folder = ''
    if kind_of(self.dataset).of_users:  # others may have the same name
      place = epath.Path(self.path).expanduser()
      folder = f'{place.name}-{zlib.crc32(os.fsencode(os.path.abspath(place))):08x}'
    parts = [self.dataset.replace('/', '-').lower(), self.category, folder]
    name = '-'.join(part for part in parts if part)
    split = '' if self.split == 'train' else f'_{self.split}'
    return _FOLDER / f'{name}_{self.shape[0]}{split}_{features}.npz'


@dataclasses.dataclass(frozen=True)
class ReferenceFile:
  """The file of the features that a network gives of images.

  Attributes:
    path: of the file.
    images: which images.
    network: the network.
  """

  path: epath.Path
  images: Images
  network: FeatureNetwork

  def check(self, source: Source) -> None:
    """Sees to it, before the work, that the file can be made of the images of `source`.

    Raises:
      UserError: if they are too few, or there is a folder in its place.
    """
    n, images = len(source), self.images
    if n < 2:
      raise UserError(
        f'statistics take at least 2 images; dataset {images.dataset!r} has {n} in split '
        f'{images.split}. --config.eval.features= leaves them out'
      )
    if self.path.is_dir():
      raise UserError(f'{self.path} is a folder; set config.eval.stats_path to a file in it')

  def make(self, source: Source, batch_size: int, mesh: Mesh) -> None:
    """Writes it, of the images of `source`.

    It goes on from where it was stopped. An existing file is replaced.

    Raises:
      UserError: if an image cannot be read, or the file may not be written; see `check`.
      Failure: if there is no room for it.
    """
    self.check(source)
    try:
      self._make(source, batch_size, mesh)
    except OSError as error:
      raise cannot_write(self.path, error, 'set config.eval.stats_path to another') from error

  def _make(self, source: Source, size: int, mesh: Mesh) -> None:
    n, path = len(source), self.path
    if n <= NEIGHBOURS:
      logger.warning('%d images: samples can be compared with more than %d only', n, NEIGHBOURS)
    provenance = self._provenance() | {'count': n}
    mark = zlib.crc32(json.dumps([provenance, size, source.num_classes]).encode())
    folder = path.parent / f'.{path.stem}-{mark:08x}'  # not of other data, network or rounds
    extract, sums = self.network.compile(mesh), _Sums.read(folder, source.num_classes)
    chosen = spread(n, KEPT)
    with Bar('features', n, min(sums.rounds * size, n), unit='images') as bar:
      batches = eval_batches(source, size, start=sums.rounds, **processes.share())
      for i, batch in enumerate(batches, sums.rounds):
        begin, end = i * size, min((i + 1) * size, n)
        features = extract(batch['data'])[: end - begin]
        kept = features[chosen[(chosen >= begin) & (chosen < end)] - begin]
        artifacts.write_npz(_rows(folder, i), features=kept)
        labels = processes.gather(batch['label'])[: end - begin] if source.num_classes else None
        sums = sums.with_round(features, labels)
        sums.write(folder)
        bar.update(end)
    assert sums.moments is not None  # there are images
    if jax.process_index() == 0:
      rows = [artifacts.read_npz(_rows(folder, i))['features'] for i in range(sums.rounds)]
      artifacts.write_npz(
        path,
        mean=sums.moments.mean,
        cov=sums.moments.cov,
        features=np.concatenate(rows),
        class_counts=sums.class_counts,
        provenance=artifacts.json_text(provenance | {'versions': versions.here()}, indent=2),
      )
      folder.rmtree()
    processes.wait_for_all('features')

  def _provenance(self) -> dict[str, Any]:
    images, decoder = self.images, self.images.decoder
    span = [decoder.span.black, decoder.span.white] if decoder.span else None
    return {
      'dataset': images.dataset.lower(),
      'category': images.category,
      'path': images.path,
      'split': images.split,
      'image_size': images.shape[0],
      'num_channels': images.shape[2],
      'fit': decoder.fit,
      'background': decoder.background,
      'span': span,
      'preprocessing': 'as in training, uint8, not flipped',
      'features': self.network.name,
      'features_version': self.network.version,
    }

  def load(self) -> Reference:
    """Reads it.

    Raises:
      UserError: if it is missing or damaged, of too few or other images, or another network.
    """
    path, network = self.path, self.network
    if not path.exists():
      raise UserError(
        f'{path} does not exist, with which samples are compared; the same command with '
        '--mode stats makes it. --config.eval.features= draws samples without comparing them'
      )
    try:
      with path.open('rb') as file, np.load(file, allow_pickle=False) as stored:
        arrays = dict(stored)
      reference, provenance = _parse(arrays)
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds
      raise UserError(
        f'{path} cannot be read ({error}); it should be of --mode stats, or hold pool_3 [N, 2048]'
      ) from None
    changed = [
      f'{name}: {provenance[name]!r} there, {value!r} now'
      for name, value in self._provenance().items()
      if name in provenance and name != 'path' and provenance[name] != value
    ]
    image = jax.ShapeDtypeStruct((1, *self.images.shape), np.uint8)
    d = jax.eval_shape(network.apply, network.params, image).shape[1]
    if d != len(reference.mean):
      changed.append(f'{len(reference.mean)} features there, {d} now')
    if changed:
      raise UserError(
        f'{path} is of something else: {"; ".join(changed)}. Name another in '
        'config.eval.stats_path, or make it again with --mode stats'
      )
    if len(reference.features) <= NEIGHBOURS or not np.isfinite(reference.cov).all():
      raise UserError(
        f'{path} is of {len(reference.features)} images: samples can be compared with more than '
        f'{NEIGHBOURS} only. --config.eval.features= draws samples without comparing them'
      )
    return reference


@dataclasses.dataclass(frozen=True)
class _Sums:
  """What is known of the features of the images of the first rounds.

  Attributes:
    rounds: how many.
    moments: of the features; None before the first round.
    class_counts: how many of the images are of each class, int64 [K].
  """

  rounds: int
  moments: Moments | None
  class_counts: np.ndarray

  def with_round(self, features: np.ndarray, labels: np.ndarray | None) -> '_Sums':
    """The sums with one round more, of features [n, d] and labels [n] if there are any."""
    moments, counts = Moments.of(features), self.class_counts
    if labels is not None:
      counts = counts + np.bincount(labels, minlength=len(counts))
    return _Sums(self.rounds + 1, self.moments + moments if self.moments else moments, counts)

  def write(self, folder: epath.Path) -> None:
    """Replaces the sums in a folder, of a round less."""
    assert self.moments is not None
    artifacts.write_large_npz(
      folder / 'sums.npz',
      rounds=self.rounds,
      n=self.moments.n,
      mean=self.moments.mean,
      scatter=self.moments.scatter,
      class_counts=self.class_counts,
    )

  @classmethod
  def read(cls, folder: epath.Path, num_classes: int) -> '_Sums':
    """Those in a folder, as far as the rows of their rounds are there as well."""
    path, none = folder / 'sums.npz', cls(0, None, np.zeros(num_classes, np.int64))
    if not processes.from_first(path.exists()):
      return none
    there = artifacts.read_npz(path)
    rounds = int(there['rounds'])
    if not processes.from_first(all(_rows(folder, i).exists() for i in range(rounds))):
      return none
    moments = Moments(int(there['n']), there['mean'], there['scatter'])
    return cls(rounds, moments, there['class_counts'])


def _rows(folder: epath.Path, i: int) -> epath.Path:
  """The file of the features of round i that are kept."""
  return folder / f'{i}.npz'


def _parse(arrays: dict[str, np.ndarray]) -> tuple[Reference, dict[str, Any]]:
  if 'pool_3' in arrays:
    features = arrays['pool_3'].reshape(len(arrays['pool_3']), -1)
    moments = Moments.of(features)
    provenance = {'features': 'inception'}
    return Reference(moments.n, moments.mean, moments.cov, features), provenance
  provenance, counts = json.loads(str(arrays['provenance'])), arrays.get('class_counts')
  return (
    Reference(
      provenance['count'],
      arrays['mean'],
      arrays['cov'],
      arrays['features'],
      None if counts is None else tuple(counts.tolist()),
    ),
    provenance,
  )
