"""Models that are told an image: the score of p_t(x | c) is learned, drawn from and measured."""

import dataclasses
import math
from pathlib import Path

from etils import epath
from flax import linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest
from whole_runs import values_of

from builders.evaluation import (
  make_bits_per_dim,
  make_drawing,
  make_sample_quality,
)
from builders.requests import make_sample_request
from builders.setup import build, Setup
from builders.training import task_of
from configs import base, own
from configs.flow import digits
from data.augmentation import Augmentation
from data.codec import ImageCodec
from data.conditions import WithConditions
from data.images import ImageSource
from evaluation.bits_per_dim import BitsPerDim
from evaluation.sample import draw_samples
from losses import Objective, UniformTimes
from models import ncsn
from models.dit import DiT
from models.ncsnpp import NCSNpp
from models.preconditioning import PRECONDITIONINGS
from models.score import ScoreModel
import run_lib
from runtime.errors import UserError
from sde_lib import expand, SDE
from training.averages import ConstantRate
from training.optim import adam, LearningRate
from training.step import eval_step, train_step, TrainState

KEY = jax.random.key(0)
GAIN, STD = 0.5, 0.2  # of images: x = GAIN c + STD z, as networks see them
ROWS = np.random.default_rng(0)
CONDITIONS = ROWS.integers(0, 256, (256, 8, 8, 1), np.uint8)
IMAGES = np.rint(
  127.5 * (1 + GAIN * (CONDITIONS / 127.5 - 1) + STD * ROWS.standard_normal(CONDITIONS.shape))
).clip(0, 255).astype(np.uint8)  # fmt: skip
BATCH = {'data': jnp.asarray(IMAGES), 'condition': jnp.asarray(CONDITIONS)}
SHUFFLED = BATCH | {'condition': jnp.roll(BATCH['condition'], 1, axis=0)}


class Exact(nn.Module):
  """The noise in x_t = alpha x + sigma z where x is N(gain c, STD^2), whose gain is learned."""

  sde: SDE

  @nn.compact
  def __call__(self, x: Array, t: Array, train: bool, condition: Array) -> Array:
    gain = self.param('gain', nn.initializers.zeros, ())
    alpha, sigma = (expand(v, x) for v in self.sde.kernel(t))
    return sigma * (x - alpha * gain * condition) / ((alpha * STD) ** 2 + sigma**2)


def model_of(sde: SDE, net: nn.Module | None = None, output: str = 'noise') -> ScoreModel:
  return ScoreModel(
    net or Exact(sde), sde.chain(100), lambda chain, t: t, PRECONDITIONINGS[output], True, True,
    condition_channels=1,
  )  # fmt: skip


def setup_of(sde: str, **fields) -> Setup:
  """A config of images of 8x8 and their low resolution, with the exact network."""
  config = own.digits(base.SDES[sde]('ddpmpp'))
  config.data.update(condition='lowres:4', centered=True)
  config.sampling.update(num_steps=60, corrector='none')
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
  setup = build(config)
  return dataclasses.replace(setup, model=model_of(setup.model.sde))


def in_network_scale(images: np.ndarray) -> np.ndarray:
  return np.asarray(images, np.float64) / 127.5 - 1


@pytest.mark.parametrize('sde', base.SDES)
def test_the_loss_is_least_at_the_score_given_the_condition(sde):
  """And there it is what noise leaves open: E (sigma s + z)^2 = 1 - sigma^2 / v."""
  setup = setup_of(sde)
  objective = Objective(setup.model.sde, UniformTimes(1e-2, setup.model.sde.T), reduce_mean=True)
  choices = {'model': setup.model, 'codec': setup.codec, 'objective': objective}

  @jax.jit
  def loss(gain: float, condition: Array) -> Array:
    batch = BATCH | {'condition': condition}
    return eval_step({'gain': jnp.float32(gain)}, batch, KEY, **choices).mean()

  right = loss(GAIN, BATCH['condition'])
  t = objective.times(jax.random.split(KEY, 3)[1], len(IMAGES))
  alpha, sigma = setup.model.sde.kernel(t)
  left_open = (1 - sigma**2 / ((alpha * STD) ** 2 + sigma**2)).mean()
  np.testing.assert_allclose(right, left_open, rtol=0.05)
  assert right < loss(0.9 * GAIN, BATCH['condition']) < loss(0.0, BATCH['condition'])
  assert right < loss(1.1 * GAIN, BATCH['condition']) < loss(GAIN, SHUFFLED['condition'])


def test_training_learns_what_goes_with_what():
  """Half of the pairs are flipped, each as a whole; a condition of another image is of no use."""
  sde = setup_of('vp').model.sde
  codec = ImageCodec((8, 8, 1), centered=True, random_flip=True)
  objective = Objective(sde, UniformTimes(0.1))
  choices = {'model': model_of(sde), 'codec': codec, 'objective': objective}
  tx = adam(LearningRate(0.02), beta1=0.9, eps=1e-8, weight_decay=0, grad_clip=-1)

  @jax.jit
  def trained(batch: dict) -> TrainState:
    def step(state: TrainState, _: None) -> tuple[TrainState, None]:
      return train_step(
        state, batch, KEY, **choices, tx=tx, averages=(ConstantRate(0.9),), grad_accum=2
      )[0], None

    params = {'gain': jnp.zeros(())}
    state = TrainState(jnp.int32(0), params, (params,), tx.init(params))
    return jax.lax.scan(step, state, None, length=150)[0]

  right, wrong = trained(BATCH).ema_params, trained(SHUFFLED).ema_params
  np.testing.assert_allclose(right['gain'], GAIN, atol=0.03)
  np.testing.assert_allclose(wrong['gain'], 0, atol=0.05)
  of_right, of_wrong = (
    eval_step(right, batch, KEY, **choices).mean() for batch in (BATCH, SHUFFLED)
  )
  assert of_wrong > 1.5 * of_right


class Copy(nn.Module):
  """Its output is the condition."""

  @nn.compact
  def __call__(self, x: Array, t: Array, train: bool, augment_labels=None, *, condition) -> Array:
    return self.param('one', nn.initializers.ones, ()) * condition


@dataclasses.dataclass(frozen=True)
class Upended(Augmentation):
  """In place of what takes long to compile: some images upside down."""

  def __call__(self, rng: Array, images: Array) -> tuple[Array, Array]:
    some = jax.random.bernoulli(rng, self.probability, (len(images), 1, 1, 1))
    return jnp.where(some, images[:, ::-1], images), jnp.zeros((len(images), 9))


def test_flips_and_augmentation_do_the_same_to_both():
  """Where images are their own conditions, the condition is the denoised image, and no loss."""
  sde = setup_of('vp').model.sde
  model = dataclasses.replace(model_of(sde, Copy(), 'denoised'), augmented=True)
  codec = ImageCodec((8, 8, 1), centered=True, random_flip=True)
  params = {'one': jnp.ones(())}
  tx = adam(LearningRate(0.0), beta1=0.9, eps=1e-8, weight_decay=0, grad_clip=-1)
  state = TrainState(jnp.int32(0), params, (params,), tx.init(params))

  @jax.jit
  def loss(condition: Array) -> Array:
    batch = BATCH | {'condition': condition}
    return train_step(
      state, batch, KEY, model=model, codec=codec, tx=tx, averages=(ConstantRate(0.9),),
      objective=Objective(sde, UniformTimes(0.5)), augmentation=Upended(0.5),
    )[1]['loss']  # fmt: skip

  assert loss(BATCH['data']) < 1e-8
  assert loss(BATCH['data'][:, :, ::-1]) > 1e-3
  flipped = codec.training_condition(KEY, BATCH['condition']) != codec.condition(BATCH['condition'])
  assert 0.3 < flipped.any((1, 2, 3)).mean() < 0.7


@pytest.mark.parametrize(
  ('sde', 'method', 'n'), [('ve', 'pc', 300), ('edm', 'heun', 40), ('flow', 'flow_heun', 40)]
)
def test_samples_are_of_their_conditions(sde, method, n):
  setup = setup_of(sde, sampling__method=method, sampling__num_steps=n, model__sigma_max=20.0)
  drawn, _ = make_drawing(setup).samples_of(
    {'gain': jnp.float32(GAIN)}, KEY, len(CONDITIONS), {'condition': CONDITIONS}, lambda _: None
  )
  x, c = in_network_scale(drawn + 0.5), in_network_scale(CONDITIONS)
  np.testing.assert_allclose((x * c).mean() / (c * c).mean(), GAIN, atol=0.02)
  np.testing.assert_allclose((x - GAIN * c).std(), STD, rtol=0.03)
  np.testing.assert_allclose((x - GAIN * c).mean(), 0, atol=0.01)


def of_pairs(setup: Setup, conditions: np.ndarray) -> BitsPerDim:
  images = ImageSource((8, 8, 1), 32, lambda i: (IMAGES[i], 0))
  source = WithConditions(images, lambda _, numbers: conditions[numbers], '')
  return dataclasses.replace(make_bits_per_dim(setup), source=source, repeats=1, batch_size=32)


def test_likelihoods_are_given_the_condition(tmp_path):
  """log p(x | c) of a normal law: the entropy is log2(STD sqrt(2 pi e) / level)."""
  setup, params = setup_of('vp', training__eps=1e-3), {'gain': jnp.float32(GAIN)}
  right, wrong = (
    of_pairs(setup, conditions).of_images(params, epath.Path(tmp_path / str(i)))[0]
    for i, conditions in enumerate((CONDITIONS, np.roll(CONDITIONS, 1, 0)))
  )
  entropy = math.log2(STD * math.sqrt(2 * math.pi * math.e) * 128)
  np.testing.assert_allclose(right.mean(), entropy, atol=0.06)
  assert wrong.mean() > right.mean() + 1


class Spy(nn.Module):
  """Its output is the mean of the condition, everywhere."""

  @nn.compact
  def __call__(self, x: Array, t: Array, train: bool, condition: Array) -> Array:
    return jnp.broadcast_to(condition.mean((1, 2, 3), keepdims=True), x.shape)


@pytest.mark.parametrize('centered', [True, False])
@pytest.mark.parametrize('sde', base.SDES)
def test_no_noise_level_changes_what_is_seen_of_a_condition(sde, centered):
  """In [-1, 1] whatever the data are, and c_in scales x alone."""
  config = own.digits(base.SDES[sde]('ddpmpp'))
  config.data.update(condition='lowres:4', centered=centered or sde == 'edm')
  setup = build(config)
  model = dataclasses.replace(setup.model, net=Spy())
  condition = setup.codec.condition(jnp.full((3, 8, 8, 1), 255, jnp.uint8))
  score_fn = model.bind({}, condition=condition.at[0].set(-1.0))
  seen, _ = score_fn._network(jnp.array([0.1, 0.5, 0.9]))(1e3 * jnp.ones((3, 8, 8, 1)))
  np.testing.assert_array_equal(seen[:, 0, 0, 0], [-1, 1, 1])


UNET = {'nf': 8, 'ch_mult': (1, 1), 'num_res_blocks': 1, 'attn_resolutions': ()}
NETWORKS = {
  'ncsnpp': NCSNpp(**UNET, resblock_type='ddpm', progressive_input='input_skip'),
  'dit': DiT(2, 8, 1, 2),
  'ncsnv2': ncsn.RefineNet(4, ncsn.STAGES['ncsnv2_64'][:2]),
}


@pytest.mark.parametrize('net', NETWORKS.values(), ids=NETWORKS)
def test_networks_take_channels_more_and_give_those_of_the_image(net):
  """Three channels of the image and two of the condition come in, three go out."""
  model = dataclasses.replace(setup_of('vp').model, net=net, condition_channels=2)
  params = jax.eval_shape(lambda: model.init(KEY, (2, 8, 8, 3)))
  x, condition, t = jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 8, 8, 2)), jnp.full(2, 0.5)
  out = jax.eval_shape(lambda p: model.bind(p, condition=condition)(x, t), params)
  assert out.shape == (2, 8, 8, 3)
  shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
  assert any(5 in shape or 5 * 2 * 2 in shape for shape in shapes)


def test_a_model_without_its_condition_is_refused():
  model = setup_of('vp').model
  for condition in (None, jnp.zeros((2, 8, 8, 3))):
    with pytest.raises(ValueError, match='takes a condition of 1 channels'):
      model.bind({}, condition=condition)
  with pytest.raises(ValueError, match='of 0 channels; got 1'):
    dataclasses.replace(model, condition_channels=0).bind({}, condition=jnp.zeros((2, 8, 8, 1)))


@pytest.mark.parametrize('method', ['progressive', 'cd', 'ect'])
def test_students_are_told_what_their_teachers_are(method):
  jumps = {'sampling__method': 'pc' if method == 'progressive' else 'consistency'}
  fields = {'model__output': 'v', 'training__eps': 1e-3, 'eval__enable_loss': False, **jumps}
  setup = setup_of('vp', distill__method=method, **fields)
  params = {'gain': jnp.zeros(())}
  task = task_of(setup, params)
  state = jax.eval_shape(task.init, KEY)
  for act in (task.update, lambda s, *rest: task.evaluate(s.ema_params, *rest)):
    jax.eval_shape(act, state, params, BATCH, KEY)
    with pytest.raises(KeyError, match='condition'):
      jax.eval_shape(act, state, params, {'data': BATCH['data']}, KEY)


def shows_conditions(rng, score_fn, shape, **_) -> tuple[Array, int]:
  return score_fn.told['condition'] + 1e-3, 1


def test_samples_of_an_evaluation_are_of_each_image_in_order(tmp_path):
  setup = setup_of('vp', eval__features='', eval__num_samples=300, eval__stats_split='test')
  setup = dataclasses.replace(setup, sampler=shows_conditions)
  quality = make_sample_quality(setup)
  report = quality.measure({'gain': 0.0}, 0, epath.Path(tmp_path))
  drawn = np.concatenate([np.load(tmp_path / f'samples_{i}.npz')['samples'] for i in range(3)])
  source = quality.of_images.source
  np.testing.assert_array_equal(
    drawn, source.batch(np.arange(300) % len(source))['condition']
  )  # of 297
  assert len(source) == 297 and report['conditions']['split'] == 'test' and quality.is_in(report)
  of_others = make_sample_quality(setup_of('vp', eval__features='', eval__num_samples=300))
  assert not of_others.is_in(report)


def test_samples_of_each_condition_stand_beside_it(tmp_path):
  """Of held-out images, or of a folder of files, whatever their size."""
  shown = dataclasses.replace
  setup = shown(setup_of('vp', sampling__num_conditions=5, sampling__num_samples=3), sampler=None)
  drawing = make_drawing(shown(setup, sampler=shows_conditions))
  request = make_sample_request(setup)
  folder = epath.Path(tmp_path / 'held_out')
  report = draw_samples(drawing, setup.keys, request, {'gain': 0.0}, None, folder)
  assert report['samples'] == 15 and request.conditions.names[-1] == 'held_out_296'
  drawn = np.load(folder / 'samples.npz')['samples'].reshape(5, 3, 8, 8, 1)
  np.testing.assert_array_equal(drawn, request.conditions.images[:, None].repeat(3, 1))
  with Image.open(folder / 'held_out_296_2.png') as picture:
    np.testing.assert_array_equal(picture, drawn[4, 2, :, :, 0])
  with Image.open(folder / 'samples.png') as picture:
    assert picture.size == (4 * 66 + 2, 5 * 66 + 2)  # a condition and three samples in each row
  (tmp_path / 'mine').mkdir()
  Image.fromarray(np.uint8([[0, 255], [0, 255]])).save(tmp_path / 'mine/two.png')
  mine = make_sample_request(setup_of('vp', sampling__condition=str(tmp_path / 'mine')))
  assert mine.conditions.names == ['two']
  np.testing.assert_array_equal(mine.conditions.images[0, :, ::7, 0], [[0, 255]] * 8)


TINY = {'model.nf': 8, 'model.num_layers': 1, 'model.num_heads': 2, 'sampling.num_steps': 3}
TINY |= {'data.condition': 'lowres:4', 'training.n_iters': 4, 'training.snapshot_freq': 4}


def tiny(**fields) -> ConfigDict:
  config = digits.get_config('dit')
  values = {k: v for k, v in values_of({}).items() if not k.startswith('model.')}
  config.update_from_flattened_dict(
    values | TINY | {k.replace('__', '.'): v for k, v in fields.items()}
  )
  return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory) -> Path:
  root = tmp_path_factory.mktemp('conditional')
  run_lib.train(tiny(), str(root))
  return root


def test_what_leaves_a_run_takes_its_condition_along(workdir):
  assert (workdir / 'samples/iter_4/sample.png').exists()
  setup, params = run_lib.load(str(run_lib.export(tiny(), str(workdir))))
  assert setup.model.condition_channels == 1
  score_fn = setup.model.bind(params, condition=setup.codec.condition(BATCH['condition'][:2]))
  assert score_fn(jnp.zeros((2, 8, 8, 1)), jnp.full(2, 0.5)).shape == (2, 8, 8, 1)
  for act in (run_lib.evaluate, run_lib.sample, run_lib.train):
    with pytest.raises(UserError, match=r"data\.condition: 'lowres:4' there, 'lowres:2' now"):
      act(tiny(data__condition='lowres:2'), str(workdir))


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'data__condition': 'lowres:3'}, 'divide config.data.image_size = 8'),
    ({'data__condition': 'lowres:1'}, 'at least 2'),
    ({'data__condition': 'gray'}, 'is for colours'),
    ({'data__condition': 'drawn'}, 'config.data.dataset = folder, and that is digits'),
    ({'data__condition_channels': 3}, 'must be 0 for'),
    ({'data__condition': '', 'data__condition_channels': 3}, 'needs a condition'),
    ({'sampling__task': 'inpaint'}, 'is for models of images alone'),
    ({'data__condition': '', 'sampling__condition': 'x'}, 'trained with config.data.condition'),
    ({'training__coupling': 'optimal_transport'}, 'is not for config.data.condition'),
    ({'sampling__num_conditions': 0}, 'must be positive'),
  ],
)
def test_what_does_not_go_with_a_condition_is_told(fields, said):
  with pytest.raises(UserError, match=said) as caught:
    build(tiny(**fields))
  assert '\n' not in str(caught.value)


def test_perceptrons_are_told_no_images():
  config = own.digits(base.vp('ddpmpp'))
  config.model = base.vp('mlp').model
  config.data.condition = 'lowres:4'
  with pytest.raises(UserError, match=r'needs config\.model\.name = ncsnpp, ddpm, .*; got mlp'):
    build(config)
