"""How precise each product is on GPUs and TPUs, as the programs say that these would get."""

from functools import partial

import jax
import jax.numpy as jnp
import lowered
from lowered import PLATFORMS
import numpy as np
import pytest

from builders.evaluation import make_held_out_loss
from builders.training import make_classifier
import controllable_generation as control
from data import noise_scales, points
from evaluation import features, inception, metrics
from likelihood import encode, Likelihood
from models import layers, resample
from runtime.errors import UserError
from runtime.precision import full_precision, products_at
from sde_lib import VPSDE

X = jnp.zeros((2, 8, 8, 1))
KEY = jax.random.key(0)
SDE = VPSDE()


def all_at(precision: str, *texts: str) -> None:
  """Fails unless there are products, and each has that precision."""
  found = [p for text in texts for p in lowered.precisions(text)]
  assert found
  assert set(found) == {precision.upper()}


@pytest.fixture(scope='module')
def setup():
  return lowered.tiny()


@pytest.mark.parametrize(
  ('precision', 'platform'), [('default', 'cuda'), ('high', 'tpu'), ('highest', 'cuda')]
)
def test_a_training_step_has_the_precision_of_the_model(precision, platform):
  all_at(precision, lowered.training_step(lowered.tiny(model__precision=precision), platform))


@pytest.mark.parametrize('method', ['pc', 'dpm_solver++', 'adaptive_sde', 'langevin'])
def test_samplers_with_steps_of_their_own_have_it_too(method):
  one = {'training__single_scale': True, 'sampling__eps': 1e-5} if method == 'langevin' else {}
  setup = lowered.tiny(model__precision='high', sampling__method=method, **one)
  all_at('high', *lowered.sampler(setup, 'cuda').values())


@pytest.mark.parametrize('precision', ['default', 'high'])
def test_a_classifier_has_it_too(precision):
  setup = lowered.tiny(model__precision=precision, classifier__num_classes=3)
  classifier = make_classifier(setup)
  params = jax.eval_shape(lambda key: classifier.init(key, X.shape), KEY)

  def guide(params, x):
    log_prob = classifier.bind(params)
    return jax.grad(lambda x: log_prob(x, jnp.ones(2), jnp.zeros(2, int)).sum())(x)

  all_at(precision, lowered.lower(guide, 'cuda', params, X))


@pytest.mark.parametrize('platform', PLATFORMS)
def test_the_ode_sampler_is_at_full_precision(platform):
  texts = lowered.sampler(lowered.tiny(sampling__method='ode'), platform)
  all_at('highest', *texts.values())
  assert sum(bool(lowered.precisions(text)) for text in texts.values()) == 2  # slope, last step


@pytest.mark.parametrize('platform', PLATFORMS)
def test_likelihoods_and_encodings_are_at_full_precision(setup, platform):
  score_fn, sde = lowered.score_of(setup), setup.model.sde
  for run in (
    lambda: Likelihood(sde)(KEY, score_fn, X),
    lambda: Likelihood(sde, probe='exact')(KEY, score_fn, X),
    lambda: encode(sde, score_fn, X),
  ):
    with lowered.programs_of(platform, *lowered.MODULES) as texts:
      run()
    all_at('highest', *texts.values())


def test_a_bfloat16_network_multiplies_bfloat16_in_a_likelihood():
  setup = lowered.tiny(model__dtype='bfloat16')
  with lowered.programs_of('cuda', *lowered.MODULES) as texts:
    Likelihood(setup.model.sde)(KEY, lowered.score_of(setup), X)
  convolutions = [
    line for text in texts.values() for line in text.splitlines() if '.convolution(' in line
  ]
  assert convolutions and all('bf16>' in line and 'xf32>' not in line for line in convolutions)


def test_the_users_setting_for_all_of_jax_goes_before(setup):
  with jax.default_matmul_precision('high'):
    with lowered.programs_of('cuda', *lowered.MODULES) as texts:
      encode(setup.model.sde, lowered.score_of(setup), X)
    all_at('high', *texts.values())


@pytest.mark.parametrize('platform', PLATFORMS)
@pytest.mark.parametrize('around', ['default', 'high'])
def test_what_reports_and_theory_compute_is_at_full_precision(platform, around):
  rows = jnp.zeros((8, 4))
  gaussian = points.distribution('gaussian', 4)
  score, blur = gaussian.score_fn(SDE), control.GaussianBlur(1.0)
  programs = {
    'neighbours': (partial(metrics._kth_distance, 3), rows, rows),
    'balls': (metrics._inside, rows, rows, jnp.zeros(8)),
    'distances': (noise_scales._largest_square, rows, rows),
    'score': (score.__call__, rows, jnp.ones(8)),
    'points': (lambda key: gaussian.sample(key, 5), KEY),
    'blur': (lambda x: jax.vjp(blur, x)[1](x), X),
    'pixels': (full_precision(features.load('pixels').apply), (), jnp.zeros((2, 32, 32, 3))),
  }
  with products_at(around):
    for function, *args in programs.values():
      all_at('highest', lowered.lower(function, platform, *args))


def test_inception_is_at_full_precision():
  net, images = inception.InceptionV3(), jnp.zeros((1, 32, 32, 3), jnp.uint8)
  params = jax.eval_shape(net.init, KEY, images)
  all_at('highest', lowered.lower(net.apply, 'cuda', params, images))


def test_held_out_loss_is_at_full_precision(setup):
  loss = make_held_out_loss(setup)
  batch = {'data': np.zeros((2, 8, 8, 1), np.uint8), 'mask': np.ones(2, np.float32)}
  all_at('highest', lowered.lower(loss.sums, 'tpu', lowered.score_of(setup).params, batch, KEY))


def test_embeddings_and_fir_resampling_have_no_products_to_round():
  t, image = jnp.ones(3), jnp.zeros((1, 8, 8, 2))
  fourier = layers.GaussianFourierProjection(4)
  w = {'params': {'W': jnp.zeros(4)}}
  taps = (1.0, 3.0, 3.0, 1.0)
  for function, *args in (
    (fourier.apply, w, t),
    (lambda t: layers.positional_embedding(t, 8), t),
    (lambda x: resample.upsample(x, taps), image),
    (lambda x: resample.downsample(x, taps), image),
  ):
    for platform in PLATFORMS:
      text = lowered.lower(function, platform, *args)
      assert set(lowered.precisions(text)) <= {'HIGHEST'}


def test_a_product_without_full_precision_is_found(setup):
  """That the checks above would fail: one product too many, of the default."""

  def planted(x):
    return full_precision(lambda x: x @ x)(x) + x @ x

  with pytest.raises(AssertionError):
    all_at('highest', lowered.lower(planted, 'cuda', jnp.zeros((4, 4))))


def test_an_unknown_precision_is_refused():
  with pytest.raises(UserError, match=r'model\.precision'):
    lowered.tiny(model__precision='float32')
