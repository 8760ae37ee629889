"""All combinations of what a config can choose: each is refused in a line, or is right.

Right is more than finite. In place of the network stands one that knows the scores of normal data
at every level of noise, if it is told the level in the way that the config says. Its loss is then
the least that there is, and its samples spread as the data do.
"""

import dataclasses
from functools import partial
import itertools

from flax import linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from builders.samplers import METHODS
from builders.setup import build, Setup
from builders.training import score_task
from configs import base, own
from losses import MATCHINGS
from models import score
from models.ncsnpp import EMBEDDING_TYPES
from runtime.errors import UserError
from sde_lib import expand
from training.step import eval_step

STD = 0.3  # of the data
PIXELS = 127.5 + 127.5 * STD * np.random.default_rng(0).standard_normal((256, 8, 8, 1))
KEY = jax.random.key(0)
OF_SCORES = [method for method in METHODS if method != 'consistency']
SDES = {name: base.SDES[name] for name in ('ve', 'vp', 'subvp')}  # which know chains


class Echo(nn.Module):
  """A network whose output is what it is told."""

  @nn.compact
  def __call__(self, x, told, train):
    return jnp.broadcast_to(expand(told, x), x.shape)


# What a network is told, back to the time: (told, N, log(sigma_min), log(sigma_max)) -> t.
TIME_OF = {
  score.log_sigma: lambda c, N, low, high: (c - low) / (high - low),
  score.noise_time: lambda c, N, low, high: 1 - c / (N - 1),
  score.noise_label: lambda c, N, low, high: 1 - c / (N - 1),
  score.scaled_time: lambda c, N, low, high: c / 999,
  score.log_scaled_time: lambda c, N, low, high: jnp.exp(c) / 999,
  score.chain_time: lambda c, N, low, high: c / (N - 1),
  score.log_chain_time: lambda c, N, low, high: jnp.expm1(c) / (N - 1),
}

# The output for normal data at x of variance v: what it is times x, and for what score -x / v.
OUTPUT = {
  'score': lambda alpha, sigma, v: -1 / v,
  'scaled_score': lambda alpha, sigma, v: -sigma / v,
  'noise': lambda alpha, sigma, v: sigma / v,
  'denoised': lambda alpha, sigma, v: alpha * STD**2 / v,
  'v': lambda alpha, sigma, v: alpha * sigma * (1 - STD**2) / (v * jnp.hypot(alpha, sigma)),
  'energy': lambda alpha, sigma, v: 1 - jnp.sqrt(sigma / v),  # -(1 - c)^2 x / sigma
}


class Oracle(nn.Module):
  """A network of one parameter, 1, that knows normal data."""

  model: score.ScoreModel
  output: str
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x, told, train, labels=None):
    sde, one = self.model.sde, self.param('one', nn.initializers.ones, ())
    ends = (jnp.log(getattr(sde, name, 1.0)) for name in ('sigma_min', 'sigma_max'))
    t = TIME_OF[self.model.conditioning](told, self.model.chain.N, *ends)
    alpha, sigma = (expand(v, x) for v in self.model.trained_with.kernel(t))
    return one * x * OUTPUT[self.output](alpha, sigma, (alpha * STD) ** 2 + sigma**2)


def config_of(sde: str, points: bool = False, **fields) -> ConfigDict:
  make = points_of if points else own.digits
  config = make(SDES[sde]('mlp' if points else 'ncsnpp'))
  config.data.update(centered=True)
  config.model.update(num_scales=200)
  config.training.update(batch_size=len(PIXELS), reduce_mean=True, eps=1e-3)
  config.sampling.update(eps=1e-3, num_steps=60, corrector='none')
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
  return config


def points_of(config: ConfigDict) -> ConfigDict:
  config.data.update(dataset='two_gaussians', dim=4)
  config.eval.features = ''
  return config


def setup_of(config: ConfigDict) -> Setup | None:
  """With the oracle; None if it is refused, as it must be, in one line that names a field."""
  try:
    setup = build(config)
  except UserError as error:
    assert 'config.' in str(error) and '\n' not in str(error)
    return None
  usual = {'vesde': 'scaled_score'}.get(config.training.sde, 'noise')
  oracle = Oracle(setup.model, config.model.output or usual)
  return dataclasses.replace(setup, model=dataclasses.replace(setup.model, net=oracle))


def batch_of(setup: Setup) -> dict:
  flat = jnp.float32(PIXELS / 127.5 - 1).reshape(len(PIXELS), -1)
  images = jnp.asarray(np.rint(PIXELS), jnp.uint8)
  return {'data': flat if setup.config.data.dim else images}


def losses_of(setup: Setup) -> np.ndarray:
  """The losses where the score is half, once and twice the right one, on the same noise."""
  evaluate = partial(
    eval_step, model=setup.model, codec=setup.codec, objective=setup.objective, rng=KEY
  )
  with jax.disable_jit():
    factors = 0.5, 1.0, 2.0
    each = [evaluate({'one': jnp.float32(one)}, batch_of(setup)).mean() for one in factors]
  return np.asarray(each)


@pytest.mark.parametrize('continuous', [True, False])
@pytest.mark.parametrize('sde', SDES)
def test_every_way_to_tell_the_level_and_to_read_the_network_is_one_objective(sde, continuous):
  found = []
  for embedding, output in itertools.product(EMBEDDING_TYPES, OUTPUT):
    fields = {'model__embedding_type': embedding, 'model__output': output}
    setup = setup_of(config_of(sde, training__continuous=continuous, **fields))
    found.append(losses_of(setup))
  assert np.isfinite(found).all()
  right = np.array(found)[:, 1]
  np.testing.assert_allclose(right, right[0], rtol=1e-3)
  # E ||sigma s + z||^2 = 1 - sigma^2 / v for each dimension.
  t = setup.objective.times(KEY, 100_000)
  alpha, sigma = setup.objective.kernels.kernel(t)
  least = 1 - jnp.mean(sigma**2 / ((alpha * STD) ** 2 + sigma**2))
  np.testing.assert_allclose(right[0], least, rtol=0.25)


@pytest.mark.parametrize('N', [100, 1000])
@pytest.mark.parametrize('embedding', EMBEDDING_TYPES)
def test_sub_vp_on_a_chain_is_read_as_released(N, embedding):
  """-F(x, 999 t) / sigma(t) at every t, and not at the nearest of N times, nor told (N - 1) t."""
  fields = {'training__continuous': False, 'model__embedding_type': embedding}
  setup = setup_of(config_of('subvp', model__num_scales=N, training__eps=1e-5, **fields))
  t = jnp.array([0.0131, 0.3007, 0.777, 1.0])
  found = dataclasses.replace(setup.model, net=Echo()).bind({})(jnp.zeros((4, 2, 2, 1)), t)
  told = np.log(999 * t) if embedding == 'fourier' else 999 * t
  sigma = 1 - np.exp(-0.5 * np.float64(t) ** 2 * 19.9 - np.float64(t) * 0.1)
  np.testing.assert_allclose(found[:, 0, 0, 0], -told / sigma, rtol=1e-5)
  drawn = setup.objective.times(KEY, 20_000)
  steps = np.unique(np.rint(np.asarray(drawn) * (N - 1)))
  assert len(steps) == N and drawn.min() == np.float32(setup.config.training.eps)


@pytest.mark.parametrize('single_scale', [False, True])
@pytest.mark.parametrize('objective', ['dsm', 'esm', *MATCHINGS])
def test_every_objective_is_least_at_the_score_of_the_data(objective, single_scale):
  """esm has its own data."""
  tried = 0
  for sde, continuous, points in itertools.product(SDES, (True, False), (True, False)):
    fields = {'training__objective': objective, 'training__continuous': continuous}
    if single_scale:
      fields |= {'training__single_scale': True, 'sampling__method': 'langevin'}
      fields |= {'training__eps': 0.3, 'sampling__eps': 0.3}
    setup = setup_of(config_of(sde, points, **fields))
    refused = objective in ('ism', 'esm') and not points
    assert (setup is None) == refused, (sde, continuous, points)
    if setup and objective != 'esm':
      below, right, above = losses_of(setup)
      assert right < min(below, above) < np.inf, (sde, continuous, points)
      tried += 1
  assert tried in (0, 6, 12)


def test_contrastive_divergence_goes_with_one_level_of_energies_alone():
  for sde, output, single, classes in itertools.product(SDES, OUTPUT, (True, False), (0, 3)):
    fields = {'training__objective': 'cd', 'model__output': output, 'model__num_classes': classes}
    fields |= {'training__single_scale': single, 'training__eps': 1e-3}
    fields |= {'sampling__method': 'langevin' if single else 'pc', 'ebm__buffer_size': 256}
    setup = setup_of(config_of(sde, **fields))
    assert (setup is not None) == (output == 'energy' and single and not classes)
    if setup:
      task = score_task(setup)
      state, metrics = jax.jit(task.update)(task.init(KEY), None, batch_of(setup), KEY)
      assert all(np.isfinite(v) for v in metrics.values()) and metrics['grad_norm'] > 0
      assert np.isfinite(state.replay).all()


@pytest.mark.parametrize('method', OF_SCORES)
def test_every_sampler_draws_the_data_or_is_refused(method):
  """Of models trained at all times, on a chain with more steps and with as many, and at one time.

  All are built; each is drawn from with one of the SDEs, taken in turn, since that is compiled.
  """
  ways = {'all': {}, 'chain': {'training__continuous': False}}
  ways['own chain'] = ways['chain'] | {'model__num_scales': 60}
  ways['one'] = {'training__single_scale': True, 'sampling__num_steps': 200}
  in_turn = itertools.cycle(SDES)
  for _ in range(OF_SCORES.index(method)):
    next(in_turn)
  for name, fields in ways.items():
    choices = {'sampling__method': method, 'sampling__sde_rtol': 0.2} | fields
    choices['model__output'] = 'energy' if method == 'mala' else ''
    choices['model__embedding_type'] = EMBEDDING_TYPES[name == 'chain']
    setups = {sde: setup_of(config_of(sde, **choices)) for sde in SDES}
    refused = (name == 'one') != (method in ('langevin', 'mala'))
    assert all((setup is None) == refused for setup in setups.values()), name
    known = {'own chain': ('pc', 'ode'), 'all': set(OF_SCORES) - {'adaptive_sde'}}  # which is slow
    if refused or method not in known.get(name, OF_SCORES):
      continue
    setup = setups[next(in_turn)]
    score_fn = setup.model.bind({'one': jnp.ones(())})
    x, nfe = setup.sampler(KEY, score_fn, (500, *setup.data_shape))
    assert nfe > 50 and abs(x.mean()) < 0.05
    assert x.std() == pytest.approx(STD, abs=0.06), name  # first orders


PAIRED = {'training__coupling': 'optimal_transport', 'training__sde': 'flow'}
PAIRED |= {'sampling__method': 'flow_heun'}


@pytest.mark.parametrize('method', OF_SCORES)
def test_paired_noise_is_sampled_by_the_probability_flow_alone(method):
  """What puts in noise, or follows a score, is refused; the same method without noise is not."""
  fields = PAIRED | {'sampling__method': method}
  noise = {'sampling__eta': 0.5, 'sampling__s_churn': 1.0, 'sampling__probability_flow': False}
  silent = {'sampling__eta': 0.0, 'sampling__s_churn': 0.0, 'sampling__probability_flow': True}
  never = ('adaptive_sde', 'langevin', 'mala', 'consistency')
  with_noise = ('pc', 'ddim', 'dpm_solver++', 'dpm_solver++_3m', 'euler', 'heun', *never)
  assert (setup_of(config_of('vp', **fields, **noise)) is None) == (method in with_noise)
  assert (setup_of(config_of('vp', **fields, **silent)) is None) == (method in never)
  corrected = silent | {'sampling__corrector': 'langevin'}
  assert (setup_of(config_of('vp', **fields, **corrected)) is None) == (method in (*never, 'pc'))


@pytest.mark.parametrize(
  ('sde', 'fields', 'said'),
  [
    ('vp', {'training__continuous': False, 'model__num_scales': 20}, 'num_scales = 20 must be'),
    ('ve', {'training__label_dropout': 1.0, 'model__num_classes': 3}, 'label_dropout = 1 tells'),
    ('ve', {'training__label_dropout': 0.0, 'model__num_classes': 3,
            'sampling__guidance_scale': 2.0}, 'guidance_scale = 2.0 needs the score of all'),
    ('ve', {'sampling__guide_scale': 2.0}, 'guide_scale = 2.0 needs a weaker model'),
    ('ve', {'sampling__guide': 'run', 'sampling__guide_ema': -2}, 'guide_ema must be at least -1'),
    ('ve', {'sampling__method': 'mala', 'model__output': 'energy', 'training__single_scale': True,
            'sampling__guide': 'run'}, 'mala knows no density'),
    ('ve', {'training__single_scale': True, 'sampling__method': 'ode'}, 'ode asks for all levels'),
    ('vp', {'training__single_scale': True, 'sampling__method': 'langevin',
            'sampling__eps': 1e-2}, r'sampling\.eps = 0\.01 must be config\.training\.eps'),
    ('vp', {'training__single_scale': True, 'sampling__method': 'langevin',
            'eval__enable_bpd': True}, 'enable_bpd asks for all levels'),
    ('vp', {'sampling__method': 'langevin'}, 'langevin is for config.training.single_scale'),
    ('ve', {'model__fir_kernel': (0.0, 0.0)}, r'fir_kernel = \(0.0, 0.0\) must not be all 0'),
    ('ve', {'model__nf': 2}, 'nf = 2 must be at least 4'),
    ('ve', {'sampling__predictor': 'none'}, 'both none'),
    ('ve', {'sampling__s_churn': 1.0, 'sampling__s_tmin': 3.0, 'sampling__s_tmax': 1.0}, 's_tmin'),
    ('ve', {'sampling__task': 'inpaint', 'sampling__method': 'ode'}, 'ode takes no constraint'),
    ('ve', {'sampling__task': 'inpaint', 'sampling__noise_std': 0.1}, 'needs config.*posterior'),
    ('ve', {'sampling__method': 'mala', 'model__output': 'energy', 'training__single_scale': True,
            'sampling__labels': (1,)}, 'mala knows no density'),
    ('subvp', {'model__name': 'ncsn', 'training__continuous': False}, 'set config.training.sde to'),
    ('vp', {'training__sde': 'edm', 'training__continuous': False}, 'edm has no chain'),
    ('vp', {'training__sde': 'flow', 'training__continuous': False}, 'flow has no chain'),
    ('vp', {'training__weight': 'edm', 'training__likelihood_weighting': True}, 'two weights'),
    ('vp', {'training__weight': 'sigmoid', 'training__continuous': False}, 'sigmoid needs'),
    ('vp', {'training__time_law': 'log_normal', 'training__continuous': False}, 'log_normal needs'),
    ('vp', {'model__output': 'edm', 'data__centered': False}, 'for data around 0'),
    ('vp', {'training__time_law': 'likelihood', 'training__continuous': False}, 'likelihood needs'),
    ('vp', {'training__single_scale': True, 'sampling__method': 'langevin',
            'training__stratified': True}, 'stratified spreads times'),
    ('vp', {'training__learned_weight': True, 'training__objective': 'ssm'}, 'weight needs .* dsm'),
    ('vp', {'training__coupling': 'optimal_transport'}, 'is for config.training.sde = flow'),
    ('vp', PAIRED | {'training__objective': 'ssm'}, 'needs config.training.objective = dsm'),
    ('vp', PAIRED | {'model__num_classes': 3}, 'is not for config.model.num_classes = 3'),
    ('vp', PAIRED | {'data__augment_probability': 0.1}, 'is not for config.data.augment_prob'),
    ('vp', PAIRED | {'sampling__task': 'inpaint'}, r'which config\.sampling\.task = inpaint needs'),
    ('vp', PAIRED | {'sampling__guide': 'weak'}, r'which config\.sampling\.guide = weak needs'),
    ('vp', PAIRED | {'eval__enable_bound': True}, r'which config\.eval\.enable_bound needs'),
    ('vp', PAIRED | {'sampling__labels': (1,)}, r'which config\.sampling\.labels = .* needs'),
    ('vp', {'ema__sigma_rels': (0.1,), 'ema__use': 2}, 'use must be below 2'),
  ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(sde, fields, said):
  if fields.get('model__name') == 'ncsn':
    config = SDES[sde]('ncsn')
    config.training.continuous, config.model.scale_by_sigma = False, False
  else:
    config = config_of(sde, **fields)
  with pytest.raises(UserError, match=said) as error:
    build(config)
  assert '\n' not in str(error.value)


def test_points_have_fourier_features():
  with pytest.raises(UserError, match='mlp needs config'):
    build(config_of('ve', points=True, model__embedding_type='positional'))


@pytest.mark.parametrize('change', [{'training__label_dropout': 0.0}, {'model__fir': False}])
def test_what_makes_sense_is_not_refused(change):
  """No guidance needs no score of all classes; without a filter its numbers are not read."""
  fields = {'model__num_classes': 3, 'model__fir_kernel': (1.0, 0.0)} | change
  if 'model__fir' in change:
    fields |= {'model__fir_kernel': (0.0, 0.0)}
  assert build(config_of('ve', **fields))
