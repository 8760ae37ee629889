"""A consistency model in all modes: what it draws, measures and completes, and what is refused."""

from pathlib import Path

import jax
import numpy as np
from PIL import Image
import pytest
from test_toy import TINY

from builders import weights
from builders.setup import build
from configs.edm import cifar10
from configs.toy import two_moons
import run_lib
from runtime.errors import UserError
from samplers.consistency import ConsistencySampler

GOLDEN = Path(__file__).parent.parent / 'golden'
JUMPS = {
  'distill.method': 'cd',
  'sampling.method': 'consistency',
  'sampling.num_steps': 0,
  'optim.optimizer': 'RAdam',
  'optim.grad_clip': -1.0,
}


def released(**fields):
  """The network of the released checkpoints of tests/golden."""
  config = cifar10.get_config('ncsnpp')
  config.model.update(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0)
  config.data.image_size = 16
  config.ema.half_life = 0.0
  config.eval.batch_size = 4
  config.update_from_flattened_dict(JUMPS | {k.replace('__', '.'): v for k, v in fields.items()})
  return config


def points(**fields):
  config = two_moons.get_config('edm')
  short = {'training.n_iters': 4, 'training.snapshot_freq': 4, 'training.n_jitted_steps': 1}
  config.update_from_flattened_dict(TINY | short | JUMPS | fields)
  return config


@pytest.fixture(scope='module')
def imported(tmp_path_factory) -> Path:
  root = tmp_path_factory.mktemp('imported')
  run_lib.import_released(released(), str(root), str(GOLDEN / 'jcm_cd.checkpoint'))
  return root


def test_released_models_keep_their_target():
  """That of consistency training is the last average, where the config has one."""
  config = released(distill__method='ct', distill__target_rate=0.9)
  state, _ = weights.imported(build(config), GOLDEN / 'jcm_ct.checkpoint')
  average, target = (jax.tree.leaves(tree) for tree in state.averages)
  assert any((a != b).any() for a, b in zip(average, target, strict=True))
  with pytest.raises(UserError, match='it is a score model'):
    weights.imported(build(config), GOLDEN / 'jcm_edm.checkpoint')


def test_an_image_is_completed_in_two_steps(imported, tmp_path):
  """What is known of it is in every sample, to the level; the rest is not the same in all."""
  levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  known = np.arange(16 * 16).reshape(16, 16) % 3 > 0
  Image.fromarray(levels).save(tmp_path / 'image.png')
  Image.fromarray(np.uint8(255 * known)).save(tmp_path / 'mask.png')
  config = released(
    sampling__task='inpaint', sampling__input=str(tmp_path / 'image.png'),
    sampling__mask=str(tmp_path / 'mask.png'), sampling__num_samples=4,
    sampling__consistency_times=(0.8,),
  )  # fmt: skip
  report = run_lib.sample(config, str(imported), str(tmp_path / 'out'))
  assert report == {'samples': 4, 'nfe': 2}
  (path,) = (tmp_path / 'out').glob('*/samples.npz')
  samples = np.load(path)['samples']
  np.testing.assert_array_equal(
    samples[:, known], np.broadcast_to(levels[known], (4, *levels[known].shape))
  )
  assert samples[:, ~known].std(0).mean() > 3


def test_a_model_of_points_is_trained_pictured_and_evaluated(tmp_path):
  config = points(**{'distill.method': 'ict', 'distill.start_steps': 2, 'distill.end_steps': 4})
  run_lib.distill(config, str(tmp_path))
  assert (tmp_path / 'samples' / 'iter_4' / 'sample.png').exists()
  (report,) = run_lib.evaluate(config, str(tmp_path))
  assert 0 < report['loss'] < 1000 and 'score_error' not in report and report['nfe'] == 1


def test_times_are_chosen_or_those_of_a_grid():
  """Four steps of the grid from 80 to eps; the last time is where they lead."""
  sampler = build(released(sampling__num_steps=4)).sampler
  assert isinstance(sampler, ConsistencySampler)
  roots = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 5)
  np.testing.assert_allclose(sampler.times, roots[1:-1] ** 7, rtol=1e-6)
  assert (sampler.eps, sampler.low, sampler.high) == (0.002, -1, 1)
  for steps in (0, 1):
    assert build(released(sampling__num_steps=steps)).sampler == ConsistencySampler(
      sampler.sde, 0.002, (), -1.0, 1.0
    )
  chosen = build(released(sampling__consistency_times=(9, 0.8), sampling__num_steps=3)).sampler
  assert chosen == ConsistencySampler(sampler.sde, 0.002, (9, 0.8), -1.0, 1.0)


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'sampling__method': 'pc'}, 'pc asks for a score, .* = cd makes .* has none: choose'),
    ({'sampling__method': 'ode'}, 'ode asks for a score'),
    ({'sampling__method': 'heun'}, 'heun asks for a score'),
    ({'distill__method': ''}, "is for consistency models, .* cd, ct, ict, ect make; got ''"),
    (
      {'distill__method': 'progressive', 'eval__enable_loss': False},
      "is for consistency models, .*; got 'progressive'",
    ),
    ({'eval__enable_bpd': True}, 'config.eval.enable_bpd asks for a likelihood'),
    ({'sampling__consistency_times': (0.5, 0.8)}, 'consistency_times: .* must fall between T = 80'),
    ({'sampling__consistency_times': (90.0,)}, 'consistency_times: .* must fall between T = 80'),
    ({'sampling__consistency_times': (0.002,)}, 'consistency_times: .* must fall between T = 80'),
    ({'sampling__consistency_times': (0.8,), 'sampling__num_steps': 4}, 'two answers: set num_st'),
    ({'sampling__labels': (1,)}, 'cannot be guided'),
    ({'sampling__guide': 'there', 'sampling__guide_scale': 2.0}, 'cannot be guided'),
    ({'model__num_classes': 10, 'sampling__guidance_scale': 2.0}, 'cannot be guided'),
    ({'sampling__task': 'colorize', 'sampling__conditioning': 'posterior'}, 'posterior guides'),
    ({'model__output': 'energy'}, 'an energy has a gradient, not a jump'),
  ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_a_line(fields, said):
  with pytest.raises(UserError, match=said) as caught:
    build(released(**fields))
  assert len(str(caught.value).splitlines()) == 1


def test_a_consistency_model_is_not_read_as_a_score(imported):
  config = released(distill__method='', sampling__method='heun', sampling__num_steps=18)
  with pytest.raises(UserError, match=r"config.distill.method: 'cd' there, '' now"):
    run_lib.sample(config, str(imported))
