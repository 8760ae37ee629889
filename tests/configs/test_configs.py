"""Configs: equal to the released ones, all of them build, and mistakes are told."""

import ast
from collections.abc import Iterator
import contextlib
import importlib
import json
from pathlib import Path
import re

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from builders import samplers
from builders.setup import build
from configs import __main__ as listing
from losses import by_variance, LikelihoodTimes, UniformTimes
from runtime.errors import UserError
from samplers.time_grids import TimeGrid

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / 'tests' / 'golden'
RELEASED = json.loads((GOLDEN / 'released_configs.json').read_text())
COUNTS = json.loads((GOLDEN / 'parameter_counts.json').read_text())
# Fields of the released configs that the released code does not read, by network; ours lack them.
UNREAD = {
  'ddpm': {'model.embedding_type'},  # its embedding is positional
  'ncsn': {'model.embedding_type', 'model.dropout'},
  'ncsnv2_64': {'model.embedding_type', 'model.dropout'},
  'ncsnv2_128': {'model.embedding_type', 'model.dropout'},
}
# Where a released config cannot run: the fields that are mended, with the released values.
MENDED = {
  've/ncsn/celeba': {'training.loss': 'vesde'},  # training.sde is meant
  've/ncsnv2/bedroom': {'training.continuous': True},  # False is misspelt there, and has no effect
}
SDES = ('ve', 'vp', 'subvp')
LATER = ('edm', 'flow')  # than the released code


def here(released: str) -> tuple[str, str, str]:
  """SDE, file and variant here of a released config."""
  sde, *rest = released.split('/')
  if len(rest) == 2:  # ve/ncsn/cifar10_124 is configs/ve/cifar10.py:ncsn_124
    dataset, _, techniques = rest[1].partition('_')
    return sde, dataset, rest[0] + (f'_{techniques}' if techniques else '')
  return sde, *re.fullmatch(r'(.*?(?:_256)?)_((?:ddpm|ncsnpp).*)', rest[0]).groups()


def config_of(sde: str, dataset: str, *variant: str):
  return importlib.import_module(f'configs.{sde}.{dataset}').get_config(*variant)


def flatten(tree: dict, prefix: str = '') -> dict:
  flat = {}
  for name, value in tree.items():
    inside = isinstance(value, dict)
    flat |= flatten(value, f'{prefix}{name}.') if inside else {prefix + name: value}
  return flat


def test_every_released_config_is_here_once_and_there_are_no_others():
  ours = {
    name
    for name, config in listing.all_configs()
    if not name.endswith('_likelihood')
    and config.data.dataset not in ('digits', 'folder', 'FashionMNIST')
    and config.training.sde not in LATER
    and not config.distill.method
  }
  assert len(RELEASED) == 39
  assert ours == {'configs/{}/{}.py:{}'.format(*here(name)) for name in RELEASED}


@pytest.mark.parametrize('name', RELEASED)
def test_fields_are_the_released_ones(name):
  ours = flatten(json.loads(json.dumps(config_of(*here(name)).to_dict())))
  theirs = flatten(RELEASED[name])
  mended = MENDED.get(name, {})
  assert {field: theirs[field] for field in mended} == mended
  left = (
    theirs.keys()
    - {'eval.enable_bpd', 'eval.bpd_dataset'}
    - UNREAD.get(ours['model.name'], set())
    - mended.keys()
  )
  assert {field: ours.get(field) for field in left} == {field: theirs[field] for field in left}


@pytest.mark.parametrize(
  ('sde', 'eps', 'sampling_eps'), [('vp', 1e-5, 1e-3), ('subvp', 1e-2, 1e-2)]
)
def test_configs_for_likelihood_are_those_of_score_flow(sde, eps, sampling_eps):
  """DDPM++ at times of its law, with the mean over pixels and without Z; the rest as released."""
  for name in ('ddpmpp_continuous', 'ddpmpp_deep_continuous'):
    config = config_of(sde, 'cifar10', f'{name}_likelihood')
    setup = build(config)
    assert setup.objective.times == LikelihoodTimes(setup.model.sde, eps)
    assert setup.objective.weight is by_variance and setup.objective.reduce_mean
    assert (config.sampling.eps, config.data.random_flip) == (sampling_eps, False)
    usual = flatten(config_of(sde, 'cifar10', name).to_dict())
    network = {k: v for k, v in flatten(config.to_dict()).items() if k[:5] in ('model', 'optim')}
    assert network.items() <= usual.items()


def test_mended_configs_are_what_they_were_meant_to_be():
  assert config_of('ve', 'celeba', 'ncsn').training.sde == 'vesde'
  assert not config_of('ve', 'bedroom', 'ncsnv2').training.continuous
  for dataset in ('ffhq', 'celebahq'):  # have no n_jitted_steps, and lack fields of eval
    config = config_of('ve', dataset)
    assert config.training.n_jitted_steps == 5
    assert config.eval.enable_loss


def fields_read() -> set[str]:
  """The fields that the code reads as <section>.<field>, or under another name of the section."""
  sections, reads = set(config_of('ve', 'cifar10')), {'seed'}
  rooms = ('builders', 'training', 'evaluation', 'workdir')
  paths = [ROOT / 'run_lib.py', *(path for room in rooms for path in (ROOT / room).glob('*.py'))]
  for path in paths:
    tree = ast.parse(path.read_text())
    section_of = {name: name for name in sections}
    for node in ast.walk(tree):
      if isinstance(node, ast.Assign):
        target, value = node.targets[0], node.value
        many = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        pairs = zip(target.elts, value.elts, strict=True) if many else [(target, value)]
        for left, right in pairs:
          if isinstance(left, ast.Name) and getattr(right, 'attr', None) in sections:
            section_of[left.id] = right.attr
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute):
        of = getattr(node.value, 'id', None), getattr(node.value, 'attr', None)
        reads |= {f'{section_of[name]}.{node.attr}' for name in of if name in section_of}
  return reads


def test_there_is_no_field_that_nothing_reads():
  reads = fields_read()
  assert {'model.fir_kernel', 'training.eval_freq', 'sampling.snr'} <= reads
  fields = set().union(*(flatten(config.to_dict()) for _, config in listing.all_configs()))
  assert fields - reads == set()


@contextlib.contextmanager
def shapes_not_checked() -> Iterator[None]:
  """Other tests run these networks, checked; that takes as long again as counting."""
  jaxtyping.config.update('jaxtyping_disable', True)
  try:
    yield
  finally:
    jaxtyping.config.update('jaxtyping_disable', False)


def test_networks_have_the_released_number_of_parameters():
  """They are counted as in docs/configs.md, whose table has a row for each config."""
  assert len(COUNTS) == 38  # the released code fails on ve/ncsnv2/bedroom
  configs, shown = dict(listing.all_configs()), (ROOT / 'docs' / 'configs.md').read_text()
  assert re.findall(r'^\| `(\S+)` \| \w+ \| \d+x\d+ \|', shown, re.M) == list(configs)
  with shapes_not_checked():
    for released, counts in COUNTS.items():
      name = 'configs/{}/{}.py:{}'.format(*here(released))
      row = listing.row(name, configs[name])
      assert row.endswith(f' | {counts["params"]:,} | {counts["leaves"]} |') and row in shown


@pytest.mark.slow  # counts the networks of all configs
def test_the_table_of_configs_is_the_one_that_is_printed():
  with shapes_not_checked():
    assert listing.table() in (ROOT / 'docs' / 'configs.md').read_text()


@pytest.mark.parametrize('sde', SDES)
@pytest.mark.parametrize('embedding', ['fourier', 'positional'])
@pytest.mark.parametrize('continuous', [True, False])
def test_any_embedding_goes_with_any_sde_and_kernel(sde, embedding, continuous):
  """What the network is told is finite and strictly monotone in t."""
  config = config_of(sde, 'digits')
  config.model.embedding_type = embedding
  config.training.continuous = continuous
  setup = build(config)
  model = setup.model
  t = jnp.linspace(1 / (model.chain.N - 1), model.sde.T, 50)
  told = np.asarray(model.conditioning(model.chain, t))
  assert np.isfinite(told).all()
  steps = np.diff(told)
  assert (steps > 0).all() or (steps < 0).all()


def test_sampling_has_its_own_steps_and_its_own_last_time():
  config = config_of('vp', 'digits')
  config.sampling.num_steps = 77
  setup = build(config)
  assert setup.model.chain == setup.model.sde.chain(1000)
  assert setup.sampler.grid == TimeGrid(77, config.sampling.eps)
  assert setup.objective.times == UniformTimes(config.training.eps)


@pytest.mark.parametrize(
  ('fields', 'released'),
  [
    ({}, True),
    ({'sampling.num_steps': 1000}, True),
    ({'sampling.num_steps': 77}, False),
    ({'sampling.grid': 'quadratic'}, False),
    ({'sampling.method': 'ode'}, True),
    ({'model.num_scales': 10}, False),  # as many as beta_max: there is no such chain
  ],
)
def test_steps_are_the_released_ones_at_the_chains_own_number(fields, released):
  config = config_of('vp', 'digits')
  config.sampling.num_steps = 0
  config.update_from_flattened_dict(fields)
  setup = build(config)
  assert setup.sampler.chain == (setup.model.chain if released else None)


@pytest.mark.parametrize(
  ('field', 'value', 'said'),
  [
    ('sampling.predictor', 'euler', 'did you mean .euler_maruyama.'),
    ('sampling.corrector', 'langevn', 'did you mean .langevin.'),
    ('training.sde', 'vpsd', 'did you mean .vpsde.'),
    ('model.progressive', 'skip', 'allowed: none, output_skip, residual'),
    ('model.sigma_min', -1.0, 'sigma_min < sigma_max'),
    ('model.num_scales', 1, 'at least 2'),
    ('training.batch_size', 0, 'must be positive'),
    ('data.image_size', 9, 'multiple of 2'),
    ('optim.optimizer', 'adam', 'did you mean .Adam.'),
    ('sampling.num_steps', -3, 'at least 0'),
    ('sampling.num_steps', 1, r'config\.sampling\.num_steps = 1 must be at least 2, or 0 for'),
    ('sampling.eps', 1.5, r'config\.sampling\.eps = 1\.5 must be below T = 1\.0'),
    ('training.eps', 1.0, r'config\.training\.eps = 1\.0 must be below T = 1\.0'),
    ('sampling.probability_flow', True, 'does not go with'),
  ],
)
def test_a_wrong_value_is_told(field, value, said):
  config = config_of('ve', 'digits')
  config.sampling.predictor = 'ancestral_sampling'
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=said):
    build(config)


def test_values_that_do_not_go_together_are_told():
  config = config_of('vp', 'digits')
  config.training.likelihood_weighting, config.training.continuous = True, False
  with pytest.raises(UserError, match='likelihood_weighting needs'):
    build(config)
  config = config_of('vp', 'digits')
  config.model.scale_by_sigma = True
  with pytest.raises(UserError, match='scale_by_sigma is for'):
    build(config)
  config = config_of('vp', 'digits')
  config.training.continuous = False
  config.model.num_scales = 10  # the DDPM chain needs more than beta_max = 20
  with pytest.raises(UserError, match=r'config\.model\.num_scales = 10 must be above'):
    build(config)


@pytest.mark.parametrize('sde', ['ve', 'vp', 'subvp'])
@pytest.mark.parametrize('method', samplers.METHODS)
def test_every_sampling_method_can_be_built(sde, method):
  config = config_of(sde, 'digits')
  config.sampling.method = method
  config.sampling.num_steps = 30
  config.model.output = 'energy' if method == 'mala' else ''
  if method in ('langevin', 'mala'):
    config.training.update(single_scale=True, eps=config.sampling.eps)
  if method == 'consistency':  # whose last time is that of training
    config.distill.method, config.training.eps = 'cd', config.sampling.eps
  sampler = build(config).sampler
  if hasattr(sampler, 'grid'):
    assert (sampler.grid.n, sampler.grid.eps) == (30, config.sampling.eps)
  else:
    assert sampler.eps == config.sampling.eps


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'method': 'heunn'}, 'did you mean .heun.'),
    ({'grid': 'log_snt'}, 'did you mean .log_snr.'),
    ({'method': 'unipc', 'order': 5}, 'order of unipc must be one of'),
    ({'method': 'ddim', 'eta': 2.0}, 'eta must be from 0'),
    ({'method': 'ode', 'ode_solver': 'dopri'}, 'did you mean .dopri5.'),
  ],
)
def test_samplers_that_cannot_be_are_told(fields, said):
  config = config_of('vp', 'digits')
  config.sampling.update(fields)
  with pytest.raises(UserError, match=said):
    build(config)


def test_an_unknown_variant_lists_those_that_exist():
  with pytest.raises(UserError, match=r"'ncsnp'.*allowed: ddpm, ncsn, .*did you mean 'ncsn"):
    config_of('ve', 'cifar10', 'ncsnp')


def test_ncsn_is_for_a_chain_and_for_its_own_normalisation():
  config = config_of('ve', 'cifar10', 'ncsn')
  config.training.continuous = True
  with pytest.raises(UserError, match=r'training.continuous = False'):
    build(config)
  config = config_of('ve', 'cifar10', 'ncsn')
  config.model.normalization = 'VarianceNorm'
  with pytest.raises(UserError, match=r'allowed: InstanceNorm\+\+'):
    build(config)


def test_released_spellings_are_taken():
  """The released code lowers the case of these, and calls a way to interpolate by another name."""
  config = config_of('ve', 'cifar10')
  fields = {'resblock_type': 'BigGAN', 'progressive_input': 'Residual', 'nonlinearity': 'Swish'}
  config.model.update(fields | {'embedding_type': 'Fourier', 'progressive_combine': 'SUM'})
  assert build(config).model == build(config_of('ve', 'cifar10')).model
  config = config_of('ve', 'cifar10', 'ncsnv2')
  config.model.interpolation = 'nearest_neighbor'
  assert build(config).model.net.interpolation == 'nearest'
