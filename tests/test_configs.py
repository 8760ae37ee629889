"""Configs: equal to the released ones, all of them build, and mistakes are told."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import build_lib
from configs import base
from errors import UserError

GOLDEN = Path(__file__).parent / 'golden'
RELEASED = json.loads((GOLDEN / 'released_configs.json').read_text())
COUNTS = json.loads((GOLDEN / 'parameter_counts.json').read_text())
# Fields of the released configs that nothing here reads.
UNREAD = {
  'eval.enable_bpd', 'eval.bpd_dataset',  # likelihoods
  'model.normalization',  # GroupNorm in all of these
}  # fmt: skip
SDES = ('ve', 'vp', 'subvp')


def cifar10_variants() -> dict[str, tuple[str, str]]:
  """(sde, variant) here, by the name of the released config."""
  names = {}
  for name in RELEASED:
    sde, *rest = name.split('/')
    if rest[0].startswith('cifar10_'):
      names[name] = (sde, rest[0].removeprefix('cifar10_'))
    elif rest[0] == 'ddpm' and rest[1].startswith('cifar10'):
      names[name] = (sde, 'ddpm' + rest[1].removeprefix('cifar10'))
  return names


VARIANTS = cifar10_variants()


def config_of(sde: str, dataset: str, *variant: str):
  return importlib.import_module(f'configs.{sde}.{dataset}').get_config(*variant)


def flatten(tree: dict, prefix: str = '') -> dict:
  flat = {}
  for name, value in tree.items():
    inside = isinstance(value, dict)
    flat |= flatten(value, f'{prefix}{name}.') if inside else {prefix + name: value}
  return flat


def test_every_released_cifar10_config_is_here():
  assert len(VARIANTS) == 18
  for sde in SDES:
    module = importlib.import_module(f'configs.{sde}.cifar10')
    assert {v for s, v in VARIANTS.values() if s == sde} == set(module.VARIANTS)


@pytest.mark.parametrize('name', VARIANTS)
def test_fields_are_the_released_ones(name):
  ours = flatten(
    json.loads(json.dumps(config_of(VARIANTS[name][0], 'cifar10', VARIANTS[name][1]).to_dict()))
  )
  theirs = flatten(RELEASED[name])
  # The released ddpm never reads embedding_type: its embedding is positional.
  unread = UNREAD | ({'model.embedding_type'} if ours['model.name'] == 'ddpm' else set())
  assert {field: ours.get(field) for field in theirs.keys() - unread} == {
    field: value for field, value in theirs.items() if field not in unread
  }


@pytest.mark.parametrize('name', VARIANTS)
def test_networks_have_the_released_number_of_parameters(name):
  sde, variant = VARIANTS[name]
  setup = build_lib.build(config_of(sde, 'cifar10', variant))
  shapes = jax.eval_shape(lambda: setup.model.init(jax.random.key(0), (1, *setup.data_shape)))
  leaves = jax.tree.leaves(shapes)
  assert sum(leaf.size for leaf in leaves) == COUNTS[name]['params']
  assert len(leaves) == COUNTS[name]['leaves']


@pytest.mark.parametrize('sde', SDES)
@pytest.mark.parametrize('embedding', ['fourier', 'positional'])
@pytest.mark.parametrize('continuous', [True, False])
def test_any_embedding_goes_with_any_sde_and_kernel(sde, embedding, continuous):
  """What the network is told is finite and strictly monotone in t."""
  config = config_of(sde, 'digits')
  config.model.embedding_type = embedding
  config.training.continuous = continuous
  setup = build_lib.build(config)
  model = setup.model
  t = jnp.linspace(1 / (model.sde.N - 1), model.sde.T, 50)
  told = np.asarray(model.conditioning(model.sde, t))
  assert np.isfinite(told).all()
  steps = np.diff(told)
  assert (steps > 0).all() or (steps < 0).all()


def test_sampling_has_its_own_steps_and_its_own_last_time():
  config = config_of('vp', 'digits')
  config.sampling.num_steps = 77
  setup = build_lib.build(config)
  assert [setup.sampler.sde.N, setup.model.sde.N] == [77, 1000]
  assert setup.sampler.sde.eps == config.sampling.eps
  assert config.training.eps == setup.model.sde.eps
  config.sampling.num_steps = 0
  assert config.model.num_scales == build_lib.build(config).sampler.sde.N


@pytest.mark.parametrize(
  ('field', 'value', 'said'),
  [
    ('sampling.predictor', 'euler', 'did you mean .euler_maruyama.'),
    ('sampling.corrector', 'langevn', 'did you mean .langevin.'),
    ('training.sde', 'vpsd', 'did you mean .vpsde.'),
    ('model.progressive', 'skip', 'allowed: none, output_skip, residual'),
    ('model.sigma_min', -1.0, 'sigma_min < sigma_max'),
    ('model.num_scales', 1, 'N >= 2'),
    ('training.batch_size', 0, 'must be positive'),
    ('data.image_size', 9, 'multiple of 2'),
    ('optim.optimizer', 'adam', 'did you mean .Adam.'),
    ('sampling.num_steps', -3, 'N >= 2'),
    ('sampling.eps', 1.5, '0 <= eps < T'),
    ('sampling.probability_flow', True, 'does not go with'),
  ],
)
def test_a_wrong_value_is_told(field, value, said):
  config = config_of('ve', 'digits')
  config.sampling.predictor = 'ancestral_sampling'
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=said):
    build_lib.build(config)


def test_values_that_do_not_go_together_are_told():
  config = config_of('vp', 'digits')
  config.training.likelihood_weighting, config.training.continuous = True, False
  with pytest.raises(UserError, match='likelihood_weighting needs'):
    build_lib.build(config)
  config = config_of('vp', 'digits')
  config.model.scale_by_sigma = True
  with pytest.raises(UserError, match='scale_by_sigma is for'):
    build_lib.build(config)
  config = config_of('vp', 'digits')
  config.sampling.num_steps = 10  # the DDPM chain needs more than beta_max = 20
  with pytest.raises(UserError, match='more steps than beta_max'):
    build_lib.build(config)


@pytest.mark.parametrize('sde', ['ve', 'vp', 'subvp'])
@pytest.mark.parametrize('method', build_lib._CHOICES['sampling.method'])
def test_every_sampling_method_can_be_built(sde, method):
  config = config_of(sde, 'digits')
  config.sampling.method = method
  config.sampling.num_steps = 30
  sampler = build_lib.build(config).sampler
  assert sampler.sde.eps == config.sampling.eps
  # Methods that choose their own steps keep the chain that the model was trained with.
  assert (config.model.num_scales if method in ('ode', 'adaptive_sde') else 30) == sampler.sde.N


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'method': 'heunn'}, 'did you mean .heun.'),
    ({'grid': 'log_snt'}, 'did you mean .log_snr.'),
    ({'grid': 'log_snr'}, 'takes the steps of the chain'),
    ({'method': 'unipc', 'order': 5}, 'order of unipc must be one of'),
    ({'method': 'ddim', 'eta': 2.0}, 'eta must be from 0'),
    ({'method': 'ode', 'ode_solver': 'dopri'}, 'did you mean .dopri5.'),
  ],
)
def test_samplers_that_cannot_be_are_told(fields, said):
  config = config_of('vp', 'digits')
  config.sampling.update(fields)
  with pytest.raises(UserError, match=said):
    build_lib.build(config)


def test_an_unknown_variant_lists_those_that_exist():
  with pytest.raises(UserError, match=r"'ncsnp'.*allowed: ddpm, ncsnpp, .*did you mean 'ncsnpp'"):
    base.variant('ncsnp', importlib.import_module('configs.ve.cifar10').VARIANTS, 'cifar10.py')
