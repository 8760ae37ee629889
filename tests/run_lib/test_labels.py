"""Labels stay with their images; a network is told them, or now and then the null label."""

from collections.abc import Callable
import dataclasses
import itertools

from etils import epath
import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from builders.evaluation import make_sample_quality
from builders.setup import build
from configs import base, own
from data import sources
from data.batches import eval_batches, train_batches
from data.codec import ImageCodec
from data.images import ImageSource
from data.records import Records
from data.sources import load
from losses import Objective, UniformTimes
from models.ddpm import DDPM
from models.mlp import MLP
from models.ncsnpp import NCSNpp
from models.preconditioning import PRECONDITIONINGS
from models.score import ScoreModel
import run_lib
from runtime.errors import UserError
from sde_lib import expand, SDE, VPSDE
from training.averages import ConstantRate
from training.optim import adam, LearningRate
from training.step import eval_step, train_step, TrainState

KEY = jax.random.key(0)


# Data


def labelled(n: int) -> ImageSource:
  """Image i of 2x2 pixels is filled with i, and is of class 7 i modulo 5."""
  fill = lambda i: (np.full((2, 2, 1), i, np.uint8), 7 * i % 5)  # noqa: E731
  return ImageSource((2, 2, 1), n, fill, 'abcde')


@pytest.mark.parametrize('in_memory', [True, False])
@pytest.mark.parametrize('processes', [1, 4])
def test_labels_stay_with_their_images(monkeypatch, in_memory, processes):
  if not in_memory:
    monkeypatch.setattr('data.images._MEMORY_LIMIT', 0)
  seen = set()
  for p in range(processes):
    own = {'process_index': p, 'process_count': processes}
    shuffled = itertools.islice(train_batches(labelled(37), 8, seed=1, **own), 10)
    for batch in itertools.chain(shuffled, eval_batches(labelled(37), 8, **own)):
      assert batch['label'].dtype == np.int32 and batch['label'].shape == (8 // processes,)
      numbers = batch['data'][:, 0, 0, 0].astype(int)
      np.testing.assert_array_equal(batch['label'], 7 * numbers % 5)
      seen |= set(batch['label'].tolist())
  assert seen == set(range(5)) and labelled(3).num_classes == 5


def test_digits_have_the_labels_of_their_file():
  stored = np.load(sources._DIGITS)['labels']
  train, test = (load('digits', split, image_size=8, num_channels=1) for split in ('train', 'test'))
  found = [source.batch(np.arange(len(source)))['label'] for source in (train, test)]
  np.testing.assert_array_equal(np.concatenate(found), stored)
  assert train.class_names == tuple('0123456789')


def test_subfolders_of_a_folder_are_classes(tmp_path):
  def source(split: str) -> ImageSource:
    return load('folder', split, image_size=4, num_channels=1, path=str(tmp_path))

  def save(value: int, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(file)

  def found(split: str) -> dict[int, int]:
    batch = next(iter(eval_batches(source(split), 8)))
    there = batch['mask']
    return dict(zip(batch['data'][there, 0, 0, 0], batch['label'][there], strict=True))

  for value, name in enumerate(['b/x', 'a/y', 'c/deep/z', 'c/w']):
    save(10 * value, f'train/{name}.png')
  save(90, 'test/c/x.png')  # only one class is there, with its own number
  assert source('test').class_names == source('train').class_names == ('a', 'b', 'c')
  assert found('train') == {0: 1, 10: 0, 20: 2, 30: 2} and found('test') == {90: 2}
  save(50, 'test/x.png')  # an image of no class
  for split in ('train', 'test'):
    assert source(split).num_classes == 0
    assert 'label' not in next(iter(eval_batches(source(split), 8)))


def test_secret_labels_are_no_labels(monkeypatch):
  """TFDS has -1 for the label of every image in a split whose labels are not published."""
  records = Records(3, lambda i: (Image.new('L', (4, 4)), -1), str, lambda image, size: image, 'ab')
  monkeypatch.setitem(sources.KINDS, 'secret', sources.Kind(lambda *_: records))
  assert load('secret', 'test', image_size=4, num_channels=1).num_classes == 0


# Networks


def tiny_net(make: Callable[..., nn.Module], num_classes: int, **fields) -> nn.Module:
  shape = {'nf': 8, 'ch_mult': (1,), 'num_res_blocks': 1, 'attn_resolutions': ()}
  return make(**shape, num_classes=num_classes, **fields)


def test_a_perceptron_is_told_labels_too():
  x, nets = X.reshape(4, -1), [MLP(nf=8, num_classes=n) for n in (0, 3)]
  plain, told = (net.init(KEY, x, COND, False)['params'] for net in nets)
  assert (told.keys() - plain.keys()) == {'Embed_0'}
  assert told['Embed_0']['embedding'].shape == (4, 8)
  seen = lambda labels: nets[1].apply({'params': told}, x, COND, False, labels)  # noqa: E731
  np.testing.assert_array_equal(seen(None), seen(jnp.full(4, 3)))
  assert (np.abs(seen(jnp.zeros(4, int)) - seen(None)).max(1) > 1e-3).all()


X, COND = jax.random.normal(KEY, (4, 4, 4, 1)), jnp.full(4, 0.7)


@pytest.mark.parametrize('make', [NCSNpp, DDPM])
def test_labels_add_one_array_to_the_parameters(make):
  plain, told = (
    jax.eval_shape(lambda n=n: tiny_net(make, n).init(KEY, X, COND, False))['params']
    for n in (0, 3)
  )
  assert told.pop('Embed_0')['embedding'].shape == (4, 32)
  assert jax.tree.map(lambda p: p.shape, plain) == jax.tree.map(lambda p: p.shape, told)


def test_each_image_of_a_batch_is_seen_with_its_own_label():
  net = tiny_net(NCSNpp, 3, resblock_type='ddpm')  # which compile sooner
  shapes = jax.eval_shape(lambda: net.init(KEY, X, COND, False))
  leaves, treedef = jax.tree.flatten(shapes)
  keys = jax.random.split(KEY, len(leaves))
  draws = [0.3 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
  variables = jax.tree.unflatten(treedef, draws)
  told = jax.jit(lambda labels: net.apply(variables, X, COND, False, labels))
  each, zeros = told(jnp.array([0, 1, 2, 3])), told(jnp.zeros(4, jnp.int32))
  np.testing.assert_allclose(each[0], zeros[0], rtol=1e-5, atol=1e-5)
  assert (np.abs(each - zeros).max((1, 2, 3))[1:] > 1e-2).all()
  np.testing.assert_allclose(told(None), told(jnp.full(4, 3)), rtol=1e-4, atol=1e-5)


def test_a_model_without_labels_refuses_them():
  setup = build(own.digits(base.vp('ddpmpp')))
  with pytest.raises(ValueError, match='takes no labels'):
    setup.model.bind({}, labels=jnp.zeros(2, jnp.int32))
  assert setup.model.bind({}, labels=None).told == {}


class PointNet(nn.Module):
  """The noise in x_t, if all images of a label are one of constant brightness, which is learnt."""

  sde: SDE

  @nn.compact
  def __call__(self, x: Array, t: Array, train: bool, labels: Array) -> Array:
    points = self.param('points', nn.initializers.zeros, (3,))
    mean = self.sde.alpha(t) * points[labels]
    return (x - expand(mean, x)) / expand(self.sde.sigma(t), x)


def test_training_learns_each_class_and_all_together():
  """Two images: the network finds each by its label, and their mean for the null label."""
  sde, codec = VPSDE(), ImageCodec((2, 2, 1), centered=True, label_dropout=0.3)
  net = PointNet(sde)
  model = ScoreModel(
    net, sde.chain(1000), lambda chain, t: t, PRECONDITIONINGS['noise'], True, True, num_classes=2
  )
  choices = {'model': model, 'codec': codec, 'objective': Objective(sde, UniformTimes(0.2))}
  tx = adam(LearningRate(0.01), beta1=0.9, eps=1e-8, weight_decay=0, grad_clip=-1)
  params = {'points': jnp.zeros(3)}
  state = TrainState(jnp.int32(0), params, (params,), tx.init(params))
  labels = jnp.arange(64) % 2
  images = (
    jnp.full((64, 2, 2, 1), 51, jnp.uint8) + (102 * labels).astype(jnp.uint8)[:, None, None, None]
  )
  batch = {'data': images, 'label': labels}

  def step(state: TrainState, _: None) -> tuple[TrainState, None]:
    state, _ = train_step(state, batch, KEY, **choices, tx=tx, averages=(ConstantRate(0.99),))
    return state, None

  state, _ = jax.jit(lambda state: jax.lax.scan(step, state, None, length=500))(state)
  # Levels 51 and 153 of 255 are -0.6 and 0.2. Which images lose their label varies: over the
  # hundred steps of the moving average, 20 each, their mean does by 0.4 / sqrt(2000) = 0.01.
  np.testing.assert_allclose(state.ema_params['points'], [-0.6, 0.2, -0.2], atol=0.04)
  # Evaluation hides none: the loss of a hidden one would be above 0.4^2 alpha^2 / std^2.
  each = eval_step(state.ema_params, batch, KEY, **choices)
  assert each.shape == (64,) and each.max() < 0.02


# Configs and runs


@pytest.mark.parametrize(
  ('network', 'fields', 'said'),
  [
    ('ncsn', {'model.num_classes': 10}, 'needs a network with an embedding of the time'),
    ('ddpm', {'model.num_classes': 10, 'model.conditional': False}, 'config.model.conditional'),
    ('ddpm', {'model.num_classes': -1}, 'must be at least 0'),
    ('ddpm', {'training.label_dropout': 1.5}, 'from 0 to 1'),
  ],
)
def test_labels_that_a_network_cannot_take_are_told(network, fields, said):
  config = base.ve(network)
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=said):
    build(config)


@pytest.mark.parametrize('section', ['model', 'classifier'])
def test_other_classes_than_those_of_the_data_are_told(section, tmp_path):
  config = own.digits(base.vp('ddpmpp'))
  config[section].num_classes = 7
  run = {'model': run_lib.train, 'classifier': run_lib.train_classifier}[section]
  with pytest.raises(UserError, match=f"{section}.num_classes is 7, .*'digits'.* has 10 classes"):
    run(config, str(tmp_path))


def test_samples_are_of_all_classes_in_turn(tmp_path):
  def show_labels(rng, score_fn, shape, **_):
    pixels = jnp.broadcast_to(expand(score_fn.told['labels'], jnp.zeros(shape)), shape)
    return 2 * pixels / 255 - 1 + 1e-3, 1

  config = own.digits(base.vp('ddpmpp'))
  config.model.num_classes = 10
  config.eval.update(num_samples=24, batch_size=16, features='')
  setup = dataclasses.replace(build(config), sampler=show_labels)
  make_sample_quality(setup).measure({}, 0, epath.Path(tmp_path))
  rounds = [np.load(tmp_path / f'samples_{i}.npz') for i in range(2)]
  labels = np.concatenate([arrays['labels'] for arrays in rounds])
  assert labels.tolist() == [i % 10 for i in range(24)]
  shown = np.concatenate([arrays['samples'] for arrays in rounds])
  assert (shown == labels[:, None, None, None]).all()
