"""Non-leaky augmentation: transformations are SciPy's and Pillow's, and the network is told."""

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
from scipy import ndimage

from builders import teachers
from builders.networks import pytorch_release_has
from builders.setup import build, Setup
from builders.training import score_task
from configs import base, own
from configs.edm import cifar10
from data.augmentation import Augmentation, LABELS, Parameters, resample, transformed
from data.codec import ImageCodec
from losses import LogNormalTimes, Objective
from models.preconditioning import PRECONDITIONINGS
from models.score import Params, ScoreModel
from runtime.errors import UserError
from sde_lib import EDMSDE
from training.averages import ConstantRate
from training.fine_tuning import Place
from training.optim import adam, LearningRate
from training.step import Metrics, train_step, TrainState
from workdir.same_config import LEARNED, MODEL

KEY = jax.random.key(0)
NAMES = [field.name for field in dataclasses.fields(Parameters)]
SIZE = 32


def blobs(n: int, channels: int = 2, height: int = SIZE, width: int = SIZE) -> np.ndarray:
  """Smooth images, so that all good ways to resample agree: sums of blots, also at the edges."""
  rng = np.random.default_rng(1)
  y, x = np.mgrid[:height, :width]
  images = np.zeros((n, height, width, channels), np.float32)
  for i, c, _ in itertools.product(range(n), range(channels), range(6)):
    cy, cx, wide = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(4, 7)
    blot = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * wide**2))
    images[i, :, :, c] += rng.uniform(-1, 1) * blot
  return images


def chosen(n: int = 1, **values: float | np.ndarray) -> Parameters:
  """What happens to n images: only what is said."""
  none = dict.fromkeys(NAMES, 0.0)
  return Parameters(**{k: jnp.full(n, v, jnp.float32) for k, v in (none | values).items()})


def by_scipy(image: np.ndarray, forward: np.ndarray, order: int = 3) -> np.ndarray:
  """An image [H, W, C] under a map (x, y, 1) -> (x, y, 1) of places around its centre."""
  backward = np.linalg.inv(forward)
  centre = (np.array(image.shape[:2]) - 1) / 2
  linear, shift = backward[1::-1, 1::-1], backward[1::-1, 2]
  offset = centre - linear @ centre + shift
  channels = [ndimage.affine_transform(image[..., c], linear, offset, order=order, mode='reflect')
              for c in range(image.shape[-1])]  # fmt: skip
  return np.stack(channels, axis=-1)


def turned(angle: float) -> np.ndarray:
  cos, sin = np.cos(angle), np.sin(angle)
  return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def stretched(along: float, direction: float) -> np.ndarray:
  return turned(direction) @ np.diag([along, 1 / along, 1]) @ turned(-direction)


def moved(right: float, down: float) -> np.ndarray:
  return np.array([[1, 0, right], [0, 1, down], [0, 0, 1]])


def scaled(by: float) -> np.ndarray:
  return np.diag([by, by, 1])


# What happens, and the map of the paper's Table 6; x is to the right and y down.
EACH = [
  ({'scaling': 1.5}, scaled(2**0.3)),
  ({'scaling': -2.0}, scaled(2**-0.4)),
  ({'rotation': 0.7}, turned(0.7)),
  ({'rotation': -2.9}, turned(-2.9)),
  ({'anisotropy': 1.2, 'direction': 0.5}, stretched(2**0.24, 0.5)),
  ({'anisotropy': -1.0, 'direction': 2.0}, stretched(2**-0.2, 2.0)),
  ({'right': 0.6, 'down': -1.1}, moved(0.6 * SIZE / 8, -1.1 * SIZE / 8)),
  ({'right': 3.7, 'down': 9.0}, moved(3.7 * SIZE / 8, 9.0 * SIZE / 8)),  # more than its size
  (
    {'mirrored': 1, 'scaling': -1, 'rotation': 1, 'anisotropy': 1, 'direction': 2, 'right': 1},
    moved(SIZE / 8, 0) @ stretched(2**0.2, 2) @ turned(1) @ scaled(2**-0.2) @ np.diag([-1, 1, 1]),
  ),
]


def test_each_transformation_is_scipys():
  """All at once, in the order of the paper; SciPy's cubic splines differ where images are rough."""
  images = blobs(len(EACH))
  stacked = jax.tree.map(lambda *rows: jnp.concatenate(rows), *(chosen(**what) for what, _ in EACH))
  found = jax.jit(transformed)(jnp.asarray(images), stacked)
  for image, (what, forward), ours in zip(images, EACH, found, strict=True):
    np.testing.assert_allclose(ours, by_scipy(image, forward), atol=0.02, err_msg=str(what))
    assert np.abs(ours - image).max() > 0.1  # it is not just little that happens


def test_mirror_images_are_pillows():
  """And a quarter turn: pixels come to lie on pixels."""
  pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
  picture, ways = Image.fromarray(pixels), Image.Transpose
  turn = {'rotation': np.pi / 2}  # clockwise, where Pillow turns the other way
  cases = (
    ({'mirrored': 1}, ways.FLIP_LEFT_RIGHT, 0),
    ({'upended': 1}, ways.FLIP_TOP_BOTTOM, 0),
    ({'mirrored': 1, 'upended': 1}, ways.ROTATE_180, 0),
    (turn, ways.ROTATE_270, 3.0),
    (turn | {'mirrored': 1}, ways.TRANSVERSE, 3.0),
  )
  stacked = jax.tree.map(lambda *a: jnp.concatenate(a), *(chosen(**what) for what, _, _ in cases))
  found = jax.jit(transformed)(jnp.stack([jnp.float32(pixels)] * len(cases)), stacked)
  for ours, (_, way, tolerance) in zip(found, cases, strict=True):
    np.testing.assert_allclose(ours, np.asarray(picture.transpose(way)), atol=tolerance)


def test_images_of_any_shape_move_by_whole_pixels_and_go_on_as_mirror_images():
  images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 16, 1)).astype(np.float32)
  shift = chosen(right=1.5, down=-2.0)  # by 3 pixels, and by 2
  found = jax.jit(transformed)(jnp.asarray(images), shift)
  expected = np.pad(images[0, :, :, 0], ((0, 2), (3, 0)), mode='symmetric')[2:, :16]
  np.testing.assert_allclose(found[0, :, :, 0], expected, atol=0.02)


def test_what_is_made_smaller_does_not_alias():
  """Stripes too fine to be seen at half the size become grey; what has no stripes stays."""
  stripes = np.where(np.arange(SIZE) % 2, 1, -1) * np.ones((SIZE, 1))
  halved = jnp.diag(jnp.array([2.0, 2.0, 1.0]))[None]
  images = np.stack([stripes, stripes.T, np.full_like(stripes, 0.3)]).astype(np.float32)[..., None]
  found = np.asarray(jax.jit(resample)(jnp.asarray(images), jnp.repeat(halved, 3, axis=0)))
  inner = found[:, 10:-10, 10:-10]  # beside the edges its mirror image joins
  assert np.abs(inner[:2]).max() < 0.2 and np.abs(stripes[::2, ::2]).min() == 1
  np.testing.assert_allclose(found[2], 0.3, atol=1e-5)


def test_an_image_to_which_nothing_happens_stays_to_the_bit():
  """Each, in a batch of others; at a probability of 0 it is all of them."""
  images = jax.random.normal(KEY, (64, 8, 8, 1))
  augment = jax.jit(lambda p, x: Augmentation(p)(KEY, x), static_argnums=0)
  same, labels = augment(0.0, images)
  np.testing.assert_array_equal(same, images)
  assert labels.shape == (64, LABELS) and not labels.any()
  found, labels = augment(0.3, images)
  still, mirrored = ~labels.any(1), (labels[:, 0] == 1) & ~labels[:, 1:].any(1)
  assert still.sum() > 2 and mirrored.sum() > 2
  np.testing.assert_array_equal(found[still], images[still])
  np.testing.assert_array_equal(found[mirrored], images[mirrored][:, :, ::-1])
  changed = np.abs(found - images).reshape(64, -1).max(1) > 0
  np.testing.assert_array_equal(changed, ~still)


def test_what_happens_has_the_laws_of_the_paper():
  n, p = 40_000, 0.12
  drawn = Augmentation(p).draw(KEY, n)
  a = {name: np.asarray(getattr(drawn, name), np.float64) for name in NAMES}
  near = {'atol': 4 * np.sqrt(0.25 / n)}  # four standard errors
  shares = [np.mean(a[name] != 0) for name in NAMES]
  np.testing.assert_allclose(shares, [0.5, p / 2, *[p] * 6], **near)
  np.testing.assert_array_equal(a['right'] != 0, a['down'] != 0)
  np.testing.assert_array_equal(a['direction'] != 0, a['anisotropy'] != 0)
  for name in ('scaling', 'anisotropy', 'right', 'down'):
    there = a[name][a[name] != 0]
    np.testing.assert_allclose([there.mean(), there.std()], [0, 1], atol=0.06)
  for name in ('rotation', 'direction'):
    there = a[name][a[name] != 0]
    assert np.abs(there).max() <= np.pi + 1e-6
    np.testing.assert_allclose([there.mean(), there.std()], [0, np.pi / np.sqrt(3)], atol=0.12)
  kinds = np.stack([a[name] != 0 for name in ('scaling', 'rotation', 'anisotropy', 'right')])
  np.testing.assert_allclose(np.corrcoef(kinds), np.eye(4), atol=0.03)  # each by itself
  np.testing.assert_array_equal(drawn.labels[:, 0], a['mirrored'])


def test_the_labels_are_the_papers():
  """cos a_3 - 1 and sin a_3; a_5 cos a_4 and a_5 sin a_4; the others as they are."""
  values = dict(zip(NAMES, (1, 1, 0.5, 2.0, 0.7, -1.5, 0.3, -0.2), strict=True))
  expected = [1, 1, 0.5, np.cos(2.0) - 1, np.sin(2.0), -1.5 * np.cos(0.7), -1.5 * np.sin(0.7)]
  np.testing.assert_allclose(chosen(**values).labels[0], [*expected, 0.3, -0.2], rtol=1e-6)
  assert not chosen().labels.any()


def tiny(**fields) -> Setup:
  config = own.digits(base.edm('ddpmpp'))
  config.model.update(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
  return build(config)


def test_zero_labels_change_nothing():
  """To the bit; and one array more is all that the network has for them."""
  augmented, plain = (tiny(data__augment_probability=p).model for p in (0.5, 0.0))
  shapes = jax.eval_shape(lambda: augmented.init(KEY, (1, 8, 8, 1)))
  leaves, tree = jax.tree.flatten(shapes)
  drawn = [
    0.3 * jax.random.normal(KEY, leaf.shape) for leaf in leaves
  ]  # the last layer begins at 0
  params = jax.tree.unflatten(tree, drawn)
  assert params['augmentation']['kernel'].shape == (LABELS, 8)
  x, t = jax.random.normal(KEY, (3, 8, 8, 1)), jnp.full(3, 0.5)
  zeros = jnp.zeros((3, LABELS))
  score = jax.jit(lambda score_fn: score_fn(x, t))
  expected = score(plain.bind(params))  # as students do, without what their teacher was told
  np.testing.assert_array_equal(score(augmented.bind(params)), expected)
  np.testing.assert_array_equal(score(augmented.bind(params, augment_labels=zeros)), expected)
  told = score(augmented.bind(params, augment_labels=zeros.at[1, 4].set(1.0)))
  differs = np.abs(told - expected).max((1, 2, 3))
  assert differs[1] > 1e-3 and differs[0] == differs[2] == 0
  with pytest.raises(ValueError, match='not told of augmentation'):
    plain.bind(params, augment_labels=zeros)


class Told(nn.Module):
  """A network of two arrays: how much of x it gives back, and what it makes of the labels."""

  @nn.compact
  def __call__(self, x, time, train, augment_labels=None):
    share = self.param('share', nn.initializers.ones, x.shape[1:])
    if augment_labels is None:
      return share * x
    of_labels = self.param('of_labels', nn.initializers.ones, (LABELS,))
    return share * x + (augment_labels @ of_labels)[:, None, None, None]


def step_of(augmented: bool, probability: float | None, **choices) -> tuple[Metrics, Params]:
  """The loss, and the parameters after a training step on 16 images, of that network."""
  sde = EDMSDE()
  model = ScoreModel(
    Told(), sde.chain(10), lambda chain, t: t, PRECONDITIONINGS['edm'], True, True,
    augmented=augmented,
  )  # fmt: skip
  tx = adam(LearningRate(0.01), beta1=0.9, eps=1e-8, weight_decay=0, grad_clip=-1)
  params = {'share': jnp.ones((8, 8, 1)), 'of_labels': jnp.ones(LABELS)}
  params = params if augmented else {'share': params['share']}
  images = jax.random.randint(KEY, (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
  state, metrics = jax.jit(
    lambda state: train_step(
      state, {'data': images}, KEY, model=model, codec=ImageCodec((8, 8, 1), centered=True),
      objective=Objective(sde, LogNormalTimes(sde)), tx=tx, averages=(ConstantRate(0.9),),
      augmentation=None if probability is None else Augmentation(probability), **choices,
    )
  )(TrainState(jnp.int32(3), params, (params,), tx.init(params)))  # fmt: skip
  return metrics, state.params


def test_training_is_on_augmented_images_that_are_told():
  """In parts the same; at a probability of 0 what it would be without, to the bit."""
  metrics, params = step_of(True, 0.5)
  in_parts, params_in_parts = step_of(True, 0.5, grad_accum=4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4),
    (metrics, params), (in_parts, params_in_parts),
  )  # fmt: skip
  assert (params['of_labels'] != 1).all()
  never, without = step_of(True, 0.0), step_of(False, None)
  assert never[0]['loss'] == without[0]['loss'] != metrics['loss']
  np.testing.assert_array_equal(never[1]['share'], without[1]['share'])
  np.testing.assert_array_equal(never[1]['of_labels'], jnp.ones(LABELS))


def test_a_run_of_a_config_draws_what_happens_to_its_batches(monkeypatch):
  """The network of the config is told; nothing is computed. Evaluation augments nothing."""
  drawn = []

  def draw(self: Augmentation, rng: Array, n: int) -> Parameters:
    drawn.append((self.probability, n))
    return chosen(n)

  monkeypatch.setattr(Augmentation, 'draw', draw)
  task = score_task(tiny(data__augment_probability=0.3))
  batch = {'data': jnp.zeros((16, 8, 8, 1), jnp.uint8)}
  state = jax.eval_shape(task.init, KEY)
  jax.eval_shape(task.update, state, None, batch, KEY)
  assert drawn == [(0.3, 16)]
  jax.eval_shape(task.evaluate, state.params, None, batch, KEY)
  assert len(drawn) == 1


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'model__conditional': False}, 'needs a network that can be told what was done'),
    ({'data__augment_probability': 1.5}, 'must be from 0 to 1'),
    (
      {'training__objective': 'cd', 'model__output': 'energy', 'training__single_scale': True,
       'sampling__method': 'langevin', 'sampling__eps': 0.002},
      'does not go with config.training.objective = cd',
    ),
  ],
)  # fmt: skip
def test_where_it_makes_no_sense_it_is_refused(fields, said):
  with pytest.raises(UserError, match=said):
    tiny(**{'data__augment_probability': 0.1} | fields)


def test_students_see_images_as_they_are_whatever_their_teacher_saw():
  of_students = {'distill__method': 'ct', 'sampling__method': 'consistency'}
  with pytest.raises(UserError, match='set it to 0, whatever it was for the teacher'):
    tiny(**of_students, data__augment_probability=0.1)
  teacher, student = tiny(data__augment_probability=0.1), tiny(**of_students)
  teachers._check_fits(Place(epath.Path('teacher'), None), teacher, student)


def test_points_and_networks_without_labels_are_refused():
  points = base.edm('mlp')
  points.data.update(dataset='ring', dim=2, augment_probability=0.1)
  points.eval.features = ''
  ncsn = base.ve('ncsnv2_64')
  ncsn.data.augment_probability = 0.1
  for config, said in ((points, 'is for images'), (ncsn, 'needs a network that can be told')):
    with pytest.raises(UserError, match=said):
      build(config)


def test_a_network_that_is_told_is_none_of_the_pytorch_release():
  config = base.ve('ncsnpp')
  assert pytorch_release_has(config)
  config.data.augment_probability = 0.1
  assert not pytorch_release_has(config)


def test_the_published_settings_are_a_variant():
  """With images mirrored by the augmentation alone; it is part of the model that is learned."""
  config = cifar10.get_config('ddpmpp_cond_augmented')
  assert (config.data.augment_probability, config.data.random_flip) == (0.12, False)
  assert config.model.num_classes == 10
  plain = cifar10.get_config('ddpmpp').data
  assert (plain.augment_probability, plain.random_flip) == (0.0, True)
  assert 'data.augment_probability' in MODEL and 'data.augment_probability' in LEARNED
