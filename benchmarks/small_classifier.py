"""A small convolutional classifier, whose features tell samples from data where Inception's do not.

Inception's weights are a download, and it was trained on photographs. This one is trained on the
images themselves, in a minute on two CPU cores, and from a seed: on one machine it is the same each
time. Its features are those before the last layer. Distances by them are comparable with each other
alone, never with FID.
"""

import dataclasses
from functools import partial
import hashlib

from etils import epath
import flax
import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from data.batches import eval_batches, train_batches
from data.images import ImageSource
from evaluation.features import FeatureNetwork
from models.score import Params
from workdir import artifacts

FEATURES = 64


class Net(nn.Module):
  """Two convolutions, each followed by a pool, and a layer of features: about 90 % on clothing."""

  num_classes: int

  def setup(self) -> None:
    self.convolutions = [nn.Conv(width, (3, 3)) for width in (32, 64)]
    self.hidden = nn.Dense(FEATURES)
    self.last = nn.Dense(self.num_classes)

  def features(self, images: Array) -> Array:
    """uint8 [B, H, W, C] -> float32 [B, FEATURES]."""
    x = images.astype(jnp.float32) / 127.5 - 1
    for convolution in self.convolutions:
      x = nn.max_pool(nn.relu(convolution(x)), (2, 2), (2, 2))
    return nn.relu(self.hidden(x.reshape(len(x), -1)))

  def __call__(self, images: Array) -> Array:
    """The logits of p(y | x) [B, K]."""
    return self.last(self.features(images))


@dataclasses.dataclass(frozen=True)
class Training:
  """How it is trained: Adam, on so many images over and over."""

  images: int
  batch_size: int = 128
  lr: float = 1e-3
  seed: int = 0


def features_of(
  path: epath.Path, train: ImageSource, test: ImageSource, training: Training
) -> tuple[FeatureNetwork, float]:
  """Its features, of the parameters in a file that is made once, and its accuracy on `test`."""
  net = Net(train.num_classes)
  shapes = jax.eval_shape(lambda: _init(net, train.shape, training.seed))
  if path.exists():
    kept = artifacts.read_npz(path)
    leaves = [kept[f'leaf_{i}'] for i in range(len(jax.tree.leaves(shapes)))]
    params, accuracy = jax.tree.unflatten(jax.tree.structure(shapes), leaves), kept['accuracy']
  else:
    params = _train(net, train, training)
    accuracy = np.array(_accuracy(net, params, test))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    of_leaves = {f'leaf_{i}': leaf for i, leaf in enumerate(leaves)}
    artifacts.write_npz(path, accuracy=accuracy, **of_leaves)
  version = hashlib.sha256(b''.join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
  apply = partial(net.apply, method=Net.features)
  network = FeatureNetwork(
    name='classifier',
    version=version[:16],
    params={'params': params},
    apply=lambda params, images: jnp.asarray(apply(params, images)),
    logits=None,
    frechet='frechet_classifier',
    kernel='kernel_classifier',
    suffix='_classifier',
  )
  return network, float(accuracy)


def _init(net: Net, shape: tuple[int, ...], seed: int) -> Params:
  return net.init(jax.random.key(seed), jnp.zeros((1, *shape), jnp.uint8))['params']


def _train(net: Net, source: ImageSource, training: Training) -> Params:
  params, tx = _init(net, source.shape, training.seed), optax.adam(training.lr)

  @jax.jit
  def step(params: Params, state: optax.OptState, images: Array, labels: Array) -> tuple:
    def loss(params: Params) -> Array:
      logits = net.apply({'params': params}, images)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, state = tx.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  batches = train_batches(source, training.batch_size, seed=training.seed)
  for _ in range(training.images // training.batch_size):
    batch = next(batches)
    params, state = step(params, state, batch['data'], batch['label'])
  batches.close()
  return flax.core.unfreeze(params)


def _accuracy(net: Net, params: Params, source: ImageSource) -> float:
  """The share of the images whose class it tells."""
  predict, right = jax.jit(lambda images: net.apply({'params': params}, images)), 0
  for batch in eval_batches(source, 500):
    said = np.asarray(predict(batch['data'])).argmax(1)
    right += int(((said == batch['label']) & batch['mask']).sum())
  return right / len(source)
