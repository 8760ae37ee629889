"""What `--mode sample` leaves behind, with a score that is known in place of a network."""

import dataclasses

from etils import epath
import flax
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from builders.evaluation import make_drawing
from builders.requests import make_sample_request
from builders.setup import build, Setup
from configs.vp.digits import get_config
from controllable_generation import GaussianBlur
from evaluation import sample as sample_lib
from evaluation.known_levels import with_block_means
from evaluation.sample import draw_samples
from models.score import ScoreModel
from runtime.errors import UserError
from sde_lib import expand, SDE

FIELDS = {'sampling.method': 'ddim', 'sampling.num_steps': 30}
FIELDS |= {'sampling.num_samples': 3}
MASK = np.uint8(255 * (np.arange(64).reshape(8, 8) % 3 > 0))


class Model(ScoreModel):
  """Of images around a mean, which depends on the class; its network is not asked."""

  def bind(self, params, dropout_rng=None, **told):
    return Gaussians(0.05 * told['labels'] if told else jnp.zeros(1), self.sde)


@flax.struct.dataclass
class Gaussians:
  """The score of N(mean, 0.2^2 I), with a mean for each example."""

  mean: jax.Array
  sde: SDE = flax.struct.field(pytree_node=False)

  def __call__(self, x, t):
    alpha, sigma = expand(self.sde.alpha(t), x), expand(self.sde.sigma(t), x)
    return (alpha * expand(self.mean, x) - x) / (0.04 * alpha**2 + sigma**2)


def setup_of(
  num_classes: int = 0, batch_size: int = 4, num_channels: int = 1, others=(), **fields
) -> Setup:
  """The set-up of the digits with that model; a field of `sampling` is passed by its name."""
  config = get_config()
  config.update_from_flattened_dict(FIELDS | {f'sampling.{k}': v for k, v in fields.items()})
  config.update_from_flattened_dict(dict(others))
  config.eval.batch_size = batch_size
  config.data.num_channels = num_channels
  setup = build(config)
  model = Model(**vars(setup.model) | {'num_classes': num_classes})
  return dataclasses.replace(setup, model=model)


@pytest.fixture
def inputs(tmp_path):
  """Two grey images of other sizes than the network's, and a mask of its size."""
  folder = tmp_path / 'inputs'
  folder.mkdir()
  rng = np.random.default_rng(0)
  for name, shape in (('a', (16, 16)), ('b', (24, 16))):
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f'{name}.png')
  Image.fromarray(MASK).save(tmp_path / 'mask.png')
  return folder


def draw_requested(setup, folder) -> dict:
  request = make_sample_request(setup)
  return draw_samples(make_drawing(setup), setup.keys, request, None, None, epath.Path(folder))


def draw(setup, folder) -> dict[str, np.ndarray]:
  report = draw_requested(setup, folder)
  arrays = dict(np.load(folder / 'samples.npz'))
  assert report == {'samples': len(arrays['samples']), 'nfe': int(arrays['nfe'])}
  return arrays


def test_samples_as_a_grid_arrays_and_single_pictures(tmp_path):
  arrays = draw(setup_of(5, labels=(4,), num_samples=6, trajectory=True), tmp_path)
  samples = arrays['samples']
  assert samples.shape == (6, 8, 8, 1) and samples.dtype == np.uint8 and arrays['nfe'] == 30
  for i, sample in enumerate(samples):  # from two rounds of four
    np.testing.assert_array_equal(Image.open(tmp_path / f'sample_{i}.png'), sample[..., 0])
  assert len(np.unique(samples.reshape(6, -1), axis=0)) == 6
  assert Image.open(tmp_path / 'samples.png').size == (3 * 66 + 2, 2 * 66 + 2)
  gif = Image.open(tmp_path / 'trajectory.gif')
  # Before each of 29 steps, and the samples; Pillow drops repetitions.
  assert 10 < gif.n_frames <= 30
  assert Image.open(tmp_path / 'trajectory.png').size == (10 * 66 + 2, 4 * 66 + 2)


@pytest.mark.parametrize('conditioning', ['constraint', 'posterior'])
def test_inpainting_keeps_what_is_known(tmp_path, inputs, conditioning):
  mask, rng = tmp_path / 'mask.png', np.random.default_rng(0)
  Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(inputs / 'a.png')
  setup = setup_of(task='inpaint', input=str(inputs), mask=str(mask), conditioning=conditioning)
  samples = draw(setup, tmp_path / 'out')['samples']
  assert samples.shape == (6, 8, 8, 1)
  a = np.asarray(Image.open(inputs / 'a.png'), np.int32)
  known = MASK > 0
  away = np.abs(samples[:3, ..., 0].astype(np.int32) - a)
  assert away[:, known].max() <= 2  # levels
  assert away[:, ~known].max() > 30
  assert len(np.unique(samples.reshape(6, -1), axis=0)) == 6
  names = {p.name for p in (tmp_path / 'out').iterdir()}
  assert names == {'samples.png', 'samples.npz', *(f'{n}_{i}.png' for n in 'ab' for i in range(3))}


# Each SDE, time of the end, codec, and way to the end, of steps of the chain or not.
EXACTLY = {
  've': {'training.sde': 'vesde', 'sampling.method': 'pc', 'sampling.eps': 1e-3},
  'vp': {'data.centered': True, 'sampling.method': 'pc', 'sampling.eps': 0.05},
  'vp chain': {'sampling.method': 'pc', 'model.num_scales': 30, 'sampling.uint8': 'round'},
  'vp noisy': {'data.centered': True, 'sampling.noise_removal': False},
  'subvp': {'training.sde': 'subvpsde', 'data.uniform_dequantization': True},
  'subvp posterior': {'training.sde': 'subvpsde', 'sampling.conditioning': 'posterior'},
  'adaptive': {'data.centered': False, 'sampling.method': 'adaptive_sde', 'sampling.sde_rtol': 0.5},
}


@pytest.mark.parametrize(
  ('task', 'name'),
  [('inpaint', name) for name in EXACTLY]
  + [(task, name) for task in ('colorize', 'superres') for name in ('vp', 'vp chain', 'subvp')],
)
def test_what_is_known_comes_back_exactly(tmp_path, task, name):
  """All 256 levels of pixels that are not painted; sums over colours; sums over blocks."""
  rng = np.random.default_rng(0)
  colours = rng.integers(0, 256, (16, 16, 3), np.uint8)
  colours[..., 0] = np.arange(256).reshape(16, 16)
  image = colours[:8, :8] if task == 'superres' else colours
  Image.fromarray(image).save(tmp_path / 'image.png')
  mask = np.arange(256).reshape(16, 16) % 11 > 0
  Image.fromarray(np.uint8(255 * mask)).save(tmp_path / 'mask.png')
  places = {'input': str(tmp_path / 'image.png'), 'mask': str(tmp_path / 'mask.png')}
  others = {'data.image_size': 16} | EXACTLY[name]
  setup = setup_of(num_channels=3, task=task, factor=2, num_samples=2, others=others, **places)
  samples = draw(setup, tmp_path / 'out')['samples'].astype(int)
  for sample in samples:
    if task == 'inpaint':
      np.testing.assert_array_equal(sample[mask], colours[mask])
    elif task == 'colorize':
      np.testing.assert_array_equal(sample.sum(-1), colours.astype(int).sum(-1))
    else:
      sums = sample.reshape(8, 2, 8, 2, 3).sum((1, 3))
      np.testing.assert_array_equal(sums, 4 * image.astype(int))
  assert np.abs(samples[0] - samples[1]).max() > 10  # what is not known is drawn


def test_levels_are_moved_no_further_than_their_mean_asks():
  """And never beyond 0 or 255; what agrees already is only rounded."""
  rng = np.random.default_rng(0)
  known = rng.integers(0, 256, (5, 4, 4, 3)).astype(np.float64)
  right = known + 0.4 * rng.uniform(-1, 1, known.shape)
  means = np.repeat(known.mean(-1, keepdims=True), 3, -1)
  gray = (1, 1, 3)
  right += means - right.mean(-1, keepdims=True)
  assert np.abs(with_block_means(right, means, gray) - right).max() < 1
  far = known + rng.normal(0, 200, known.shape)
  for wanted in (means, np.zeros_like(far), np.full_like(far, 255.0)):
    got = with_block_means(far, wanted, gray).astype(int)
    np.testing.assert_array_equal(got.sum(-1), np.rint(wanted.sum(-1)))
    inside = (got > 0) & (got < 255)
    shift = np.where(inside, got - far, np.nan)
    spread = np.nanmax(shift, -1, initial=-1e9) - np.nanmin(shift, -1, initial=1e9)
    assert spread.max() <= 1 + 1e-9


def test_superresolution_keeps_the_means_of_blocks(tmp_path, inputs):
  setup = setup_of(task='superres', factor=2, input=str(inputs / 'a.png'), num_samples=2)
  known = make_sample_request(setup).problem.read(setup.codec)
  y, operator = known.y, known.operator
  samples = draw(setup, tmp_path / 'out')['samples'] / 127.5 - 1
  inside = np.all(np.abs(samples) < 0.99, axis=0)  # clipped pixels change the mean of their block
  whole = np.asarray(operator(jnp.float32(inside)[None]))[0] == 1
  assert whole.any()
  means = np.asarray(operator(jnp.float32(samples)))
  np.testing.assert_allclose(means[:, whole], y.repeat(2, 0)[:, whole], atol=0.01)


def test_colorization_keeps_the_grey_of_an_image(tmp_path, inputs):
  fields = {'task': 'colorize', 'input': str(inputs / 'a.png'), 'conditioning': 'posterior'}
  samples = draw(setup_of(num_channels=3, **fields), tmp_path / 'out')['samples'] / 255
  grey = np.asarray(Image.open(inputs / 'a.png').resize((8, 8), Image.Resampling.BILINEAR)) / 255
  inside = np.all((samples > 0.01) & (samples < 0.99), axis=-1)  # a clipped colour changes the mean
  assert inside.mean() > 0.5
  away = np.abs(samples.mean(-1) - grey)
  assert away[inside].max() < 0.01 and samples.std(-1).mean() > 0.02


def test_deblurred_samples_blur_to_the_image(tmp_path, inputs):
  """To within the noise that the image is said to have, and are sharper than it."""
  choices = {'conditioning': 'posterior', 'noise_std': 0.02, 'blur_std': 0.8}
  blurred = GaussianBlur(0.8)(
    jax.random.uniform(jax.random.key(3), (1, 8, 8, 1), maxval=0.3) + 0.35
  )
  image = np.asarray(255 * blurred[0, ..., 0]).astype(np.uint8)
  Image.fromarray(image).save(inputs / 'a.png')
  setup = setup_of(task='deblur', input=str(inputs / 'a.png'), **choices)
  samples = draw(setup, tmp_path / 'out')['samples'] / 255
  away = np.asarray(GaussianBlur(0.8)(jnp.float32(samples)))[..., 0] - image / 255
  assert np.sqrt(np.square(away).mean()) < 3 * 0.02
  assert samples.std() > 1.2 * (image / 255).std()


def test_classes_are_the_ones_asked_for_and_guidance_scales_them(tmp_path):
  assert list(draw(setup_of(5, num_samples=6), tmp_path / 'all')['labels']) == [0, 1, 2, 3, 4, 0]
  two = draw(setup_of(5, 200, num_samples=200, labels=(4, 0)), tmp_path / 'two')
  assert list(two['labels'][:5]) == [4, 0, 4, 0, 4]
  scaled = draw(
    setup_of(5, 200, num_samples=200, labels=(4, 0), guidance_scale=2.0), tmp_path / 'scale'
  )
  for arrays, mean in ((two, 0.2), (scaled, 0.4)):  # guidance moves the mean away from that of all
    means = (arrays['samples'].reshape(100, 2, -1) / 127.5 - 1).mean((0, 2))
    np.testing.assert_allclose(means, [mean, 0], atol=0.02)


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'task': 'inpaint'}, 'is neither an image nor a folder'),
    ({'task': 'inpaint', 'input': '.'}, "mask='' is not a file"),
    ({'task': 'inpaint', 'input': '.', 'mask': 'white.png'}, 'is all white'),
    ({'task': 'inpaint', 'input': '.', 'mask': 'text.png'}, 'cannot be read as an image'),
    ({'task': 'colorize', 'input': '.'}, 'needs a model of colour images'),
    ({'task': 'superres', 'input': '.', 'factor': 3}, 'must be at least 2 and divide'),
    ({'task': 'deblur', 'input': '.'}, 'needs config.sampling.conditioning = posterior'),
    ({'task': 'draw'}, 'allowed: '),
    ({'labels': (3, 10)}, 'has 10; allowed: 0 to 9'),
  ],
)
def test_mistakes_are_told_in_one_line(tmp_path, inputs, monkeypatch, fields, said):
  monkeypatch.chdir(inputs)
  Image.new('L', (8, 8), 'white').save('white.png')
  (tmp_path / 'text.png').write_text('not a picture')
  if 'text' in fields.get('mask', ''):
    fields = fields | {'mask': str(tmp_path / 'text.png')}
  with pytest.raises(UserError, match=said) as error:
    draw_requested(setup_of(**fields), tmp_path / 'out')
  assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()


# What is stopped, and what cannot be written.


def counted(setup: Setup, drawn: list[int], stop_at: int = -1) -> Setup:
  """The same, but that it notes each round in `drawn`, and is interrupted where that is so long."""

  def draw(*args, **kwargs):
    if len(drawn) == stop_at:
      drawn.append(-1)
      raise KeyboardInterrupt
    drawn.append(len(drawn))
    return setup.sampler(*args, **kwargs)

  return dataclasses.replace(setup, sampler=draw)


def files_in(folder) -> dict[str, bytes]:
  """What is in a folder, but for how long it took."""
  arrays = dict(np.load(folder / 'samples.npz'))
  del arrays['seconds']
  parts = {f'samples.npz/{name}': array.tobytes() for name, array in arrays.items()}
  return parts | {p.name: p.read_bytes() for p in folder.iterdir() if p.name != 'samples.npz'}


def test_drawing_that_is_stopped_goes_on_and_leaves_the_same_files(tmp_path):
  fields = {'labels': (3, 1), 'num_samples': 14, 'trajectory': True}
  setup, whole = setup_of(5, **fields), tmp_path / 'whole'
  draw(setup, whole)
  stopped, drawn = tmp_path / 'stopped', []
  for at in (0, 2, 4):  # of four rounds; each time it goes on, and all but the last is kept
    with pytest.raises(KeyboardInterrupt):
      draw_requested(counted(setup, drawn, at), stopped)
  draw_requested(counted(setup, drawn), stopped)
  assert drawn.count(-1) == 3 and len(drawn) == 4 + 3
  assert files_in(stopped) == files_in(whole)
  assert len(list(whole.iterdir())) == 14 + 4  # no rounds among them
  stamp = (stopped / 'samples.npz').stat().st_mtime_ns
  draw_requested(counted(setup, drawn), stopped)  # all is there
  assert len(drawn) == 4 + 3 and (stopped / 'samples.npz').stat().st_mtime_ns == stamp


def test_pictures_that_were_stopped_are_written_and_nothing_is_drawn_again(tmp_path, monkeypatch):
  setup, drawn = setup_of(num_samples=10), []
  draw(setup, tmp_path / 'whole')
  write = sample_lib.artifacts.write_png

  def stop(path, picture):
    if path.name == 'sample_7.png':
      raise KeyboardInterrupt
    write(path, picture)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(sample_lib.artifacts, 'write_png', stop)
    draw_requested(counted(setup, drawn), tmp_path / 'stopped')
  draw_requested(counted(setup, drawn), tmp_path / 'stopped')
  assert drawn == [0, 1, 2] and files_in(tmp_path / 'stopped') == files_in(tmp_path / 'whole')


@pytest.mark.parametrize('what', ['image', 'mask'])
def test_samples_of_other_inputs_are_drawn_anew(tmp_path, inputs, what):
  mask, drawn = tmp_path / 'mask.png', []
  setup = setup_of(task='inpaint', input=str(inputs), mask=str(mask))
  draw_requested(counted(setup, drawn), tmp_path / 'out')
  before = np.load(tmp_path / 'out' / 'samples.npz')['samples']
  changed = inputs / 'b.png' if what == 'image' else mask
  Image.fromarray(255 - np.asarray(Image.open(changed))).save(changed)
  draw_requested(counted(setup, drawn), tmp_path / 'out')
  assert drawn == [0, 1, 2, 3]
  assert not np.array_equal(np.load(tmp_path / 'out' / 'samples.npz')['samples'], before)


@pytest.mark.parametrize('stem', ['x' * 240, 'x' * 249, 'é' * 124])
def test_a_long_name_is_a_name(tmp_path, inputs, stem):
  (inputs / 'a.png').rename(inputs / f'{stem}.png')
  setup = setup_of(task='superres', factor=2, input=str(inputs), num_samples=2)
  draw(setup, tmp_path / 'out')
  assert (tmp_path / 'out' / f'{stem}_1.png').exists()


@pytest.mark.parametrize(('stem', 'n'), [('x' * 250, 1), ('x' * 249, 11), ('é' * 125, 1)])
def test_a_name_that_is_too_long_is_told_before_anything_is_drawn(tmp_path, inputs, stem, n):
  (inputs / 'a.png').rename(inputs / f'{stem}.png')
  setup = setup_of(task='superres', factor=2, input=str(inputs), num_samples=n)
  with pytest.raises(UserError, match='is too long a name for a file') as error:
    draw_requested(counted(setup, drawn := []), tmp_path / 'out')
  assert '\n' not in str(error.value) and drawn == []


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_drawn(tmp_path):
  (tmp_path / 'out').write_text('a file')
  with pytest.raises(UserError, match=r'cannot write to .*out .*; choose another'):
    draw_requested(counted(setup_of(), drawn := []), tmp_path / 'out')
  assert drawn == []


def test_classes_that_come_in_turn_are_said(tmp_path, caplog):
  caplog.set_level('INFO', logger='score_sde')
  draw_requested(setup_of(3, num_samples=5, num_steps=2), tmp_path)
  assert 'samples are of the classes 0, 1, 2 in turn' in caplog.text
  assert sample_lib._classes(np.array([4, 4])) == 'class 4'
  assert sample_lib._classes(np.arange(3000) % 1000) == '1000 classes in turn, 0, 1 ... 999'
