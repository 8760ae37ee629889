"""What evaluation costs, and whether its distances make sense.

Costs: images a second through Inception, with random weights; then the seconds and the peak of the
process's memory for each distance between two sets of features of the size of pool_3.

Sanity: with `--config` and prepared data, the distances, by the config's feature network, of one
half of the training images from the other, of the held-out images from the training images, of the
latter blurred, and of noise of uniform pixels.

  python -m benchmarks.evaluation [--rows N] [--images N]
  python -m benchmarks.evaluation --config configs/vp/digits.py [--limit N] [--set FIELD=VALUE ...]
"""

import argparse
from collections.abc import Callable
import resource
import runpy
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from PIL import Image, ImageFilter

from builders.setup import build
from data import sources
from evaluation import features, inception, metrics
from evaluation.features import FeatureNetwork
from evaluation.metrics import Moments
from evaluation.reference import Reference
from evaluation.sample_quality import Comparison


def gigabytes() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def random_inception() -> FeatureNetwork:
  """Inception with random weights, which take as long as any."""
  net, rng = inception.InceptionV3(), np.random.default_rng(0)
  shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8))
  params = jax.tree.map(
    lambda x: rng.normal(0, 1 / np.sqrt(x.size), x.shape).astype(np.float32), shapes['params']
  )
  return FeatureNetwork(
    name='inception',
    version='random weights',
    params=params,
    apply=lambda params, images: net.apply({'params': params}, images),
    logits=None,
    frechet='fid',
    kernel='kid',
    suffix='',
  )


def images_per_second(n_images: int) -> float:
  """Of random images through Inception, from the host to features there."""
  images = np.random.default_rng(0).integers(0, 256, (n_images, 32, 32, 3), np.uint8)
  extract = random_inception().compile(jax.sharding.Mesh(np.array(jax.devices()), ('data',)))
  extract(images)  # compiles
  began = time.monotonic()
  extract(images)
  return n_images / (time.monotonic() - began)


def costs(rows: int, n_images: int) -> None:
  rng, mesh = np.random.default_rng(0), jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  rate = images_per_second(n_images)
  print(f'features: {rate:.2f} images/s, {50_000 / rate / 60:.0f} minutes for 50,000', flush=True)
  print(f'peak so far {gigabytes():.1f} GiB')
  x, y = (rng.random((rows, inception.FEATURES), np.float32) for _ in range(2))
  print(f'two sets of {rows} features of dimension {inception.FEATURES}: {gigabytes():.1f} GiB')
  a = timed('mean and covariance', lambda: Moments.of(x))
  b = Moments.of(y)
  timed('Frechet distance', lambda: metrics.frechet_distance(a.mean, a.cov, b.mean, b.cov))
  timed('kernel distance', lambda: metrics.kernel_distance(x, y))
  timed('Inception score', lambda: metrics.inception_score(x[:, : inception.CLASSES]))
  timed('precision and recall', lambda: metrics.precision_recall(x, y, mesh))


def timed(what: str, function: Callable[[], Any]) -> Any:
  began = time.monotonic()
  result = function()
  print(f'{what}: {time.monotonic() - began:.1f} s, peak {gigabytes():.1f} GiB', flush=True)
  return result


def sanity(config: ConfigDict, limit: int) -> None:
  setup, data = build(config), config.data
  network = features.load(config.eval.features, config.eval.inception_path)
  mesh = setup.devices.mesh
  extract = network.compile(mesh)

  def load(split: str) -> np.ndarray:
    source = sources.load(
      data.dataset, split, image_size=data.image_size, num_channels=data.num_channels,
      path=data.path, data_dir=data.tfds_dir, category=data.category,
    )  # fmt: skip
    rows = np.random.default_rng(0).permutation(len(source))[:limit]
    return source.gather(rows)

  train, test = load('train'), load('test')
  half = len(train) // 2
  noise = np.random.default_rng(0).integers(0, 256, train[:half].shape, np.uint8)
  of_half = extract(train[:half])
  total = Moments.of(of_half)
  against = Comparison(network, Reference(half, total.mean, total.cov, of_half))
  sets = {
    'the same images': train[:half],
    'the other half': train[half : 2 * half],
    'held-out images': test,
    'the other half, blurred': np.stack([blurred(x) for x in train[half : 2 * half]]),
    'noise': noise,
  }
  print(f'| from {half} training images | images | ' + ' | '.join(names(network)) + ' |')
  print('|---' * (2 + len(names(network))) + '|', flush=True)
  for what, images in sets.items():
    found = against.report(extract(images), mesh)
    cells = ' | '.join(f'{found[name]:.5g}' for name in names(network))
    print(f'| {what} | {len(images)} | {cells} |', flush=True)


def names(network: FeatureNetwork) -> list[str]:
  shares = [f'{name}{network.suffix}' for name in ('precision', 'recall')]
  return [network.frechet, network.kernel, *shares]


def blurred(image: np.ndarray) -> np.ndarray:
  picture = Image.fromarray(image.squeeze()).filter(ImageFilter.GaussianBlur(1))
  return np.asarray(picture).reshape(image.shape)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rows', type=int, default=50_000, help='of features')
  parser.add_argument('--images', type=int, default=128, help='that Inception is timed with')
  parser.add_argument('--config', help='config file[:variant] whose data are compared')
  parser.add_argument('--limit', type=int, default=10_000, help='images of each split, at most')
  parser.add_argument('--set', nargs='+', default=[], metavar='FIELD=VALUE', help='of the config')
  choices = parser.parse_args()
  if not choices.config:
    costs(choices.rows, choices.images)
    return
  path, _, variant = choices.config.partition(':')
  config = runpy.run_path(path)['get_config'](*([variant] if variant else []))
  config.update_from_flattened_dict(dict(entry.split('=', 1) for entry in choices.set))
  sanity(config, choices.limit)


if __name__ == '__main__':
  main()
