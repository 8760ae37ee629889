"""Samples that are compared with data are of the classes as often as the data are."""

import dataclasses
from functools import partial
import logging
from pathlib import Path

from etils import epath
import jax.numpy as jnp
import numpy as np
import pytest

from builders.evaluation import make_sample_quality, reference_file
from builders.setup import build, Setup
from configs.vp.digits import get_config
from data import sources
from data.images import ImageSource
from evaluation import metrics
from evaluation.labels import count_classes, in_turn, LabelLaw
from evaluation.sample_quality import SampleQuality
from runtime.errors import UserError

# How many images of 0 to 9 the training set of SVHN has.
SVHN = (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659)
N = 5000  # images and samples


@pytest.fixture(autouse=True)
def few_subsets(monkeypatch) -> None:
  """Kernel distances take longest, and are not what is tested here."""
  few = partial(metrics.kernel_distance, subsets=2)
  monkeypatch.setattr(metrics, 'kernel_distance', few)


@pytest.fixture(scope='module')
def digits() -> dict[str, np.ndarray]:
  source = sources.load('digits', 'train', image_size=8, num_channels=1)
  return source.batch(np.arange(len(source)))


def resampled(digits: dict[str, np.ndarray], counts: tuple[int, ...], n: int = N) -> ImageSource:
  """Digits of the classes as often as `counts` says, each drawn from those of its class."""
  rng, labels = np.random.default_rng(0), LabelLaw('', counts).labels(n)
  rows = [rng.choice(np.flatnonzero(digits['label'] == label)) for label in labels]
  read = lambda i: (digits['data'][rows[i]], labels[i])  # noqa: E731
  return ImageSource((8, 8, 1), n, read, [str(k) for k in range(len(counts))])


def setup_of(digits: dict[str, np.ndarray], stats: Path, **fields) -> Setup:
  """A model that is perfect in p(x | y): what it draws of a class are images of that class."""
  rng = np.random.default_rng(1)

  def perfect(_, score_fn, shape, **__):
    labels = np.asarray(score_fn.told['labels'])
    chosen = [rng.choice(np.flatnonzero(digits['label'] == y)) for y in labels]
    return jnp.asarray(2 * (digits['data'][chosen] / 255.0) - 1 + 1e-3, jnp.float32), 1

  config = get_config()
  config.model.num_classes = 10
  config.eval.update({'stats_path': str(stats), 'num_samples': N, 'batch_size': 2500} | fields)
  return dataclasses.replace(build(config), sampler=perfect)


def measured(quality: SampleQuality, folder: Path) -> dict:
  return quality.measure({}, 0, epath.Path(folder))


@pytest.fixture(scope='module')
def like_svhn(digits, tmp_path_factory) -> Setup:
  """The model, and a reference of digits that are as frequent as in SVHN."""
  setup = setup_of(digits, tmp_path_factory.mktemp('svhn') / 'stats.npz')
  reference_file(setup).make(resampled(digits, SVHN), 1000, setup.devices.mesh)
  return setup


def test_a_perfect_model_is_as_far_from_data_as_data_are_from_themselves(like_svhn, tmp_path):
  """Where it is asked for the classes in turn, it is eight times as far away."""
  quality = make_sample_quality(like_svhn)
  report = measured(quality, tmp_path)
  shares = np.array(SVHN) / sum(SVHN)
  counts = np.array(report['labels']['class_counts'])
  assert report['labels']['law'] == 'as frequent as in the reference'
  assert counts.sum() == N and np.abs(counts - N * shares).max() <= 1
  drawn = np.concatenate([np.load(tmp_path / f'samples_{i}.npz')['labels'] for i in range(2)])
  assert np.abs(np.bincount(drawn) - N * shares).max() <= 1
  even = dataclasses.replace(quality, law=in_turn(10))
  assert quality.is_in(report) and not even.is_in(report)
  of_even = measured(even, tmp_path)  # in the same folder, where the samples are of another law
  assert of_even['labels'] == {'law': 'in turn', 'class_counts': [1] * 10}
  print(report['frechet_pixels'], of_even['frechet_pixels'])
  assert report['frechet_pixels'] < 0.012 and of_even['frechet_pixels'] > 0.06


def test_samples_of_a_law_are_kept_and_what_follows_it_is_not_redone(like_svhn, tmp_path):
  quality = dataclasses.replace(make_sample_quality(like_svhn), n=20, batch_size=16)
  measured(quality, tmp_path)
  before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('*.npz')}
  measured(quality, tmp_path)
  assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('*.npz')} == before
  measured(dataclasses.replace(quality, law=in_turn(10)), tmp_path)
  after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('*.npz')}
  assert len(after) == 4 and all(after[name] != stamp for name, stamp in before.items())
  # The fewer are those that come first, whichever their number is.
  more = np.load(tmp_path / 'samples_0.npz')['labels']
  assert more.tolist() == [i % 10 for i in range(16)]


@pytest.mark.parametrize('counts', [SVHN, (1, 0, 1000), (5, 5, 5), (7,), (1, 2**40)])
def test_no_class_comes_sooner_than_its_share(counts):
  labels, shares = LabelLaw('', counts).labels(2000), np.array(counts) / sum(counts)
  drawn = (labels[:, None] == np.arange(len(counts))).cumsum(0)
  away = drawn - np.arange(1, 2001)[:, None] * shares
  assert away.max() < 1 and away.min() > -2
  np.testing.assert_array_equal(labels, LabelLaw('', tuple(3 * n for n in counts)).labels(2000))


def test_where_all_classes_are_as_frequent_they_come_in_turn():
  law = LabelLaw('as frequent as in the reference', (5000,) * 10)
  np.testing.assert_array_equal(law.labels(34), np.arange(34) % 10)
  assert law.mark == in_turn(10).mark == ''  # earlier rounds of the same samples are good


def without_counts(stats: Path, to: Path) -> None:
  """The statistics as they were before they told of classes."""
  with np.load(stats) as arrays:
    np.savez(to, **{name: value for name, value in arrays.items() if name != 'class_counts'})


def test_earlier_statistics_leave_the_classes_to_the_data(like_svhn, digits, tmp_path, caplog):
  stats = epath.Path(like_svhn.config.eval.stats_path)
  without_counts(stats, tmp_path / 'earlier.npz')
  setup = setup_of(digits, tmp_path / 'earlier.npz')
  with caplog.at_level(logging.WARNING, logger='score_sde'):
    quality = make_sample_quality(setup)
  assert 'earlier.npz does not say how frequent the classes are' in caplog.text
  assert quality.law.counts == tuple(np.bincount(digits['label']).tolist())  # those of the split
  assert count_classes(resampled(digits, SVHN, 200)) == tuple(
    np.bincount(LabelLaw('', SVHN).labels(200)).tolist()
  )


def test_a_reference_of_other_classes_is_refused_before_samples_are_drawn(digits, tmp_path):
  setup = setup_of(digits, tmp_path / 'stats.npz')
  counts = (3, 5, 4)
  reference_file(setup).make(resampled(digits, counts, 120), 50, setup.devices.mesh)
  with pytest.raises(UserError, match=r'is of 3 classes, and config\.model\.num_classes = 10'):
    make_sample_quality(setup)


def test_a_reference_without_classes_leaves_them_in_turn(digits, tmp_path, caplog):
  setup = setup_of(digits, tmp_path / 'stats.npz')
  images = ImageSource((8, 8, 1), 60, lambda i: (digits['data'][i], 0))
  reference_file(setup).make(images, 50, setup.devices.mesh)
  with caplog.at_level(logging.WARNING, logger='score_sde'):
    assert make_sample_quality(setup).law == in_turn(10)
  assert 'is of data without labels: samples are of all classes in turn' in caplog.text
  unconditional = setup_of(digits, tmp_path / 'stats.npz')
  unconditional = dataclasses.replace(
    unconditional, model=dataclasses.replace(unconditional.model, num_classes=0)
  )
  assert make_sample_quality(unconditional).law is None
