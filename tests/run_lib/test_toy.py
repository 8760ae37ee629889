"""Points go through the same programs as images: training, resuming, evaluation, sampling."""

import logging

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from builders.data import load_source
from builders.setup import build
from builders.training import abstract_state
from configs.points import VARIANTS
from configs.toy import branches, checkerboard, gaussian, ring, swiss_roll, two_gaussians, two_moons
from configs.ve import digits
from losses import OneTime
from models.preconditioning import PRECONDITIONINGS
import run_lib
from runtime.errors import UserError
from training.checkpoints import Checkpoints
from training.step import TrainState
from workdir import artifacts, pictures

TINY = {
  'model.nf': 16,
  'model.num_layers': 1,
  'training.batch_size': 32,
  'training.n_iters': 12,
  'training.n_jitted_steps': 2,
  'training.log_freq': 2,
  'training.eval_freq': 4,
  'training.snapshot_freq': 6,
  'training.snapshot_freq_for_preemption': 6,
  'training.snapshot_samples': 64,
  'sampling.num_steps': 10,
  'sampling.n_steps_each': 2,
  'eval.batch_size': 64,
  'eval.num_samples': 100,
  'ebm.buffer_size': 64,
  'ebm.n_steps': 3,
}

UNSEEN = {'training__snapshot_sampling': False}


def tiny(variant: str, module=two_moons, **fields):
  config = module.get_config(variant)
  config.update_from_flattened_dict(TINY | {k.replace('__', '.'): v for k, v in fields.items()})
  return config


def final(workdir) -> TrainState:
  """The newest state of a run."""
  setup, _ = run_lib.load(workdir)
  with Checkpoints(epath.Path(workdir)) as checkpoints:
    state = checkpoints.restore_latest(abstract_state(setup))
  return state


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize(
  'module', [checkerboard, gaussian, ring, swiss_roll, two_gaussians, two_moons]
)
def test_every_variant_can_be_built(module, variant):
  setup = build(module.get_config(variant))
  assert setup.data_shape == ((10,) if module is gaussian else (2,))
  many_levels = ('ve', 'vp', 'subvp', 'edm', 'flow', 'energy', 'ncsn')
  assert isinstance(setup.objective.times, OneTime) == (variant not in many_levels)


def test_points_of_classes_are_told_to_the_network():
  for variant in branches.VARIANTS:
    setup = build(branches.get_config(variant))
    assert setup.model.num_classes == 2 and setup.true_score_fn is None
  assert load_source(setup.config, 'test').num_classes == 2
  with pytest.raises(
    UserError, match=r'num_classes is 3, and dataset .branches., .* has 2 classes'
  ):
    load_source(build(tiny('edm', branches, model__num_classes=3)).config, 'test')
  with pytest.raises(UserError, match='has no labels; choose another dataset'):
    load_source(build(tiny('ve', model__num_classes=2)).config, 'test')


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
  """Its replay buffer, too."""
  run_lib.train(tiny('cd', **UNSEEN), tmp_path / 'whole')
  run_lib.train(tiny('cd', **UNSEEN, training__n_iters=6), tmp_path / 'parts')
  run_lib.train(tiny('cd', **UNSEEN), tmp_path / 'parts')
  whole, parts = (final(tmp_path / name) for name in ('whole', 'parts'))
  assert int(whole.step) == 12
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  assert whole.replay.shape == (64, 2)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Of a run whose samples are pictures of points."""
  workdir = tmp_path_factory.mktemp('toy')
  run_lib.train(tiny('ve'), workdir)
  return workdir


def test_an_evaluation_tells_how_far_the_score_is_from_the_truth(workdir):
  (report,) = run_lib.evaluate(tiny('ve', eval__begin_ckpt=2), workdir)
  assert report['loss_images'] == 10_000 and 0 < report['score_error'] < report['loss']
  folder = workdir / 'eval' / 'step_12'
  with np.load(folder / 'samples_0.npz') as arrays:
    assert arrays['samples'].shape == (64, 2) and arrays['samples'].dtype == np.float32
  with np.load(folder / 'samples_1.npz') as arrays:
    assert arrays['samples'].shape == (36, 2)
  assert Image.open(folder / 'samples.png').size == (4 * pictures.POINT_BINS,) * 2
  assert (workdir / 'samples' / 'iter_6' / 'sample.png').exists()


def test_samples_of_points_are_drawn_with_their_trajectory(workdir):
  choices = {'sampling__trajectory': True, 'sampling__num_samples': 100}
  report = run_lib.sample(tiny('ve', **choices), workdir)
  assert report == {'samples': 100, 'nfe': 30}  # two corrections and one prediction a step
  folder = workdir / 'sample' / 'step_12'
  names = {path.name for path in folder.iterdir()}
  assert names == {'checkpoint.json', 'samples.npz', 'samples.png', 'trajectory.gif'}
  assert Image.open(folder / 'trajectory.gif').n_frames == 10


def test_a_picture_of_points_is_darkest_where_most_are():
  points = np.concatenate([np.full((90, 2), [1.0, 0.5]), np.full((10, 2), [-1.0, -1.0])])
  shade = np.asarray(pictures.PointDensities().overview(points))
  side = len(shade)

  def at(x: float, y: float) -> int:
    return shade[int((1 - y / 1.1) * side / 2), int((1 + x / 1.1) * side / 2)]

  assert at(1.0, 0.5) == 0 and 100 < at(-1.0, -1.0) < 250 and at(0.0, 0.0) == 255


@pytest.mark.parametrize('variant', ['ism', 'energy'])
def test_every_way_leads_to_the_score(tmp_path, variant):
  """Of a Gaussian: most of it is learnt in a few hundred steps."""
  fields = {'training__n_iters': 600, 'training__n_jitted_steps': 50, 'training__batch_size': 256}
  fields |= {'training__snapshot_freq': 600, 'training__snapshot_freq_for_preemption': 600}
  fields |= {'training__log_freq': 600, 'training__eval_freq': 600, 'model__nf': 32, 'data__dim': 2}
  fields |= UNSEEN | {'eval__enable_sampling': False}
  fields |= {'eval__batch_size': 5000, 'model__sigma_min': 0.5}
  config = tiny(variant, gaussian, **fields)
  run_lib.train(config, tmp_path / 'run')
  (report,) = run_lib.evaluate(config, tmp_path / 'run')
  setup, _ = run_lib.load(tmp_path / 'run')
  assert report['score_error'] < 0.1 * true_square(setup)


def true_square(setup) -> float:
  """What an all-zero score would have as its error."""
  objective, sde = setup.objective, setup.model.sde
  rngs = jax.random.split(jax.random.key(0), 3)
  x0 = setup.true_score_fn.data.sample(rngs[0], 5000)
  t = objective.times(rngs[1], 5000)
  alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
  x = alpha * x0 + sigma * jax.random.normal(rngs[2], x0.shape)
  return float(np.square(sigma * setup.true_score_fn(x, t)).mean())


def test_noise_levels_are_recommended_for_any_data(caplog, tmp_path):
  caplog.set_level(logging.INFO, 'score_sde')
  config = digits.get_config()
  config.eval.stats_path = str(tmp_path / 'digits.npz')
  chosen = run_lib.stats(config)
  assert 4 < chosen.sigma_max < 8  # the images are in [0, 1]^64
  assert f'--config.model.num_scales={chosen.num_scales}' in caplog.text
  of_points = run_lib.stats(two_gaussians.get_config())
  assert 14 < of_points.sigma_max < 25 and of_points.num_scales > 5


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'eval__enable_bpd': True}, 'eval.enable_bpd is for images'),
    ({'sampling__task': 'inpaint'}, 'sampling.task is for images'),
    ({'model__output': 'energies'}, "did you mean 'energy'"),
    ({'sampling__method': 'mala'}, 'needs config.model.output = energy'),
    ({'training__objective': 'cd'}, 'cd needs config.model.output = energy'),
    ({'model__num_classes': 3}, 'num_classes is 3, and dataset .two_moons., .* has no labels'),
    ({'data__dim': 3}, 'two_moons must be from 2 to 2; got 3'),
    ({'data__dim': 0}, 'two_moons'),
  ],
)
def test_a_mistake_is_answered_in_a_line(fields, said, tmp_path):
  with pytest.raises(UserError, match=said) as error:
    run_lib.train(tiny('ve', **fields), tmp_path / 'run')
  assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_a_buffer_is_not_smaller_than_a_batch(tmp_path):
  with pytest.raises(UserError, match='buffer_size = 31 must not be below'):
    run_lib.train(tiny('cd', ebm__buffer_size=31), tmp_path / 'run')


def test_points_have_no_classifier(tmp_path):
  with pytest.raises(UserError, match='a classifier is for images'):
    run_lib.train_classifier(tiny('ve'), tmp_path)
  config = digits.get_config()
  config.training.objective = 'esm'
  with pytest.raises(UserError, match='needs a true score'):
    build(config)


def test_a_workdir_from_before_a_field_was_there_is_still_good(tmp_path):
  """What its config lacks has the default; a value of one's own is another config."""
  run_lib.train(tiny('ve', **UNSEEN, training__n_iters=6), tmp_path)
  path = epath.Path(tmp_path / 'config.json')
  config = artifacts.read_json(path)
  config['ebm'] = {'buffer_size': config['ebm']['buffer_size']}
  del config['model']['output'], config['training']['single_scale']
  artifacts.write_json(path, config)
  setup, _ = run_lib.load(tmp_path)
  assert setup.model.preconditioning == PRECONDITIONINGS['scaled_score'] and setup.data_shape == (
    2,
  )
  with pytest.raises(UserError, match=r"output: '' there, 'energy' now"):
    run_lib.train(tiny('ve', model__output='energy'), tmp_path)
  run_lib.train(tiny('ve', **UNSEEN), tmp_path)
