"""The bound on likelihoods: against exact densities, and score_flow's numbers."""

import dataclasses
import math

import agreement
from analytic import gaussian
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden_sde import DATA as GOLDEN_DATA
from test_likelihood import bits_of_known, few_digits, TWO
from test_time_laws import of_score_flow

from builders.evaluation import make_bound
from builders.setup import build
from configs import base, own
from data.codec import ImageCodec
from evaluation.bits_per_dim import parts_of_error
from likelihood import bits_per_dim, importance_weighted, LikelihoodBound
from losses import LikelihoodTimes
from runtime.errors import UserError
from sde_lib import EDMSDE, RectifiedFlow, SDE, subVPSDE, VESDE, VPSDE

KEY = jax.random.key(0)
DATA = jax.tree.map(jnp.asarray, GOLDEN_DATA)
# With the prior and the smallest time of each so that neither costs anything.
SDES = [VESDE(sigma_max=20.0), VPSDE(), subVPSDE(), EDMSDE(20.0), RectifiedFlow()]
EPS = {VESDE: 1e-5, VPSDE: 1e-5, subVPSDE: 1e-3, EDMSDE: 2e-3, RectifiedFlow: 2e-3}
N = 4000
NORMAL = gaussian(jnp.zeros(2), 0.4)


def error_of_bound(sde: SDE, data, score_fn, form: str) -> tuple[float, float]:
  """log p(x) minus the bound, in nats on average over x of the data, and its standard error.

  The average takes the chance of single images out; each has times and noise of its own.
  """
  x = data.sample(jax.random.key(7), N)  # not of the key of the bound's own noise
  bound = LikelihoodBound(sde, EPS[type(sde)], form, n_times=20, n_groups=2)
  each, _, nfe = bound(KEY, score_fn, x)
  assert nfe == 22
  gap = np.asarray(data.log_density(x) - each, np.float64)
  return gap.mean(), gap.std() / math.sqrt(N)


@pytest.mark.parametrize(
  ('sde', 'form', 'data'),
  [*[(sde, 'dsm', TWO) for sde in SDES], (VPSDE(), 'ssm', TWO), (VPSDE(), 'dsm', NORMAL)],
)
def test_the_bound_is_met_by_the_exact_score(sde, form, data):
  """Of a mixture and of a Gaussian: with an exact score the reverse SDE is the data's own."""
  gap, error = error_of_bound(sde, data, data.score_fn(sde), form)
  assert error < 0.025 and abs(gap) < 4 * error + 0.004


def test_a_wrong_score_costs_half_of_its_weighed_error():
  """For a score that is c times the exact one of N(0, s^2): a known integral, above the exact."""
  sde, std = VPSDE(), 0.4
  exact = NORMAL.score_fn(sde)
  gap, error = error_of_bound(sde, NORMAL, lambda x, t: 0.8 * exact(x, t), 'dsm')
  t = LikelihoodTimes(sde, 1e-5).quantile((jnp.arange(2000) + 0.5) / 2000)
  alpha, sigma = (np.float64(v) for v in sde.kernel(t))
  share = sigma**2 / ((alpha * std) ** 2 + sigma**2)  # E ||sigma s||^2 / D
  cost = 0.5 * LikelihoodTimes(sde, 1e-5).total * 0.2**2 * 2 * share.mean()
  assert cost > 0.3 and abs(gap - cost) < 4 * error + 0.004


def test_what_the_data_lose_at_a_large_eps_is_in_the_bound():
  """At eps = 0.1 the step to clean data costs bits, and the bound stays above."""
  sde = subVPSDE()
  x = jnp.asarray(DATA.sample(jax.random.key(7), N))
  bound = LikelihoodBound(sde, 0.1, n_times=20, n_groups=2)
  each, *_ = bound(KEY, DATA.score_fn(sde), x)
  gap = np.asarray(DATA.log_density(x) - each)
  assert gap.mean() > 0.05 and gap.mean() > 4 * gap.std() / math.sqrt(N)


def test_the_standard_error_is_that_of_the_bound():
  """Of 500 bounds of one x they spread as they say; stratified and controlled, more closely."""
  sde, x = VPSDE(), jnp.broadcast_to(jnp.array([0.3, -0.2]), (500, 2))
  score_fn = TWO.score_fn(sde)
  spread = {}
  for sigma_data in (0.5, 1e6):  # 1e6: nothing is added, as in the released code
    each, error, _ = LikelihoodBound(sde, n_times=50, sigma_data=sigma_data)(KEY, score_fn, x)
    spread[sigma_data] = float(each.std())
    assert float(jnp.sqrt(jnp.square(error).mean())) == pytest.approx(spread[sigma_data], rel=0.15)
  assert spread[0.5] < 0.3 * spread[1e6]


def test_a_bound_does_not_depend_on_its_batch():
  sde, x = VPSDE(), TWO.sample(KEY, 6)
  rngs = jax.random.split(KEY, 6)
  bound = LikelihoodBound(sde, n_times=4, n_groups=2)
  whole, *_ = bound(rngs, TWO.score_fn(sde), x)
  part, *_ = bound(rngs[2:5], TWO.score_fn(sde), x[2:5])
  np.testing.assert_allclose(part, whole[2:5], rtol=1e-4, atol=1e-4)


def test_the_prior_is_met_on_average():
  for sde in SDES:
    mean, std = jax.random.normal(KEY, (3, 2)), jnp.array([0.5, 1.0, 2.0])
    expected = sde.prior_cross_entropy(mean, std)
    z = jax.random.normal(KEY, (20_000, 3, 2))
    drawn = -jax.vmap(sde.prior_logp)(mean + std[:, None] * z)
    error = 4 * drawn.std(0) / math.sqrt(20_000) + 1e-4
    assert (jnp.abs(drawn.mean(0) - expected) < error).all()


@pytest.mark.parametrize(
  ('key', 'sde'), [('vp__eps1e-05', VPSDE()), ('subvp__eps0.01', subVPSDE())]
)
def test_integrands_are_those_of_score_flow(key, sde):
  """Draw by draw, with the drift's divergence D f, which we integrate, put back."""
  file, eps = of_score_flow('bound'), float(key.partition('eps')[2])
  law, score_fn, dim = LikelihoodTimes(sde, eps), DATA.score_fn(sde), 4
  data = jnp.asarray(file['data'], jnp.float32)
  names = [name for name in file if name.startswith(key) and name.endswith('integrand')]
  assert len(names) == (3 if key.startswith('vp') else 1)
  for name in names:
    _, _, form, iw, offset, _, centered, _ = name.replace('/', '__').split('__')
    bound = LikelihoodBound(sde, eps, form, sigma_data=1e6)
    u, z, v = (
      jnp.asarray(file[k], jnp.float32).reshape(-1, *file[k].shape[2:])
      for k in ('u', 'noise', 'probe_rademacher')
    )
    t = law.quantile(u) if iw == 'iw1' else eps + u * (sde.T - eps)
    rate = 1 / law.density(t) if iw == 'iw1' else jnp.ones_like(t)
    x = jnp.tile(data, (len(file['u']), 1, 1, 1))
    ours = law.density(t) * rate * law.total * bound.bracket(score_fn, x, t, z, v)
    ours -= 2 * dim * rate * sde.drift_coef(t)
    expected = file[name].reshape(-1)
    np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-2)
    # The parts at the two ends, for the noise that is given.
    alpha, sigma = (float(f(jnp.float32(sde.T))) for f in (sde.alpha, sde.sigma))
    at_end = alpha * data + sigma * jnp.asarray(file['prior_noise'], jnp.float32)
    prior = -np.asarray(sde.prior_logp(at_end))
    np.testing.assert_allclose(prior, file[f'{key.partition("__")[0]}/neg_prior_logp'], rtol=1e-5)
    n, t = jnp.asarray(file['offset_noise'], jnp.float32), jnp.full(len(data), eps)
    # ||sigma s + n||^2 / 2 - D / 2 - D log alpha: the offset without its cancelling entropies.
    released = dataclasses.replace(bound, form='dsm').bracket(score_fn, data, t, n, n)
    squares = jnp.square(n).reshape(len(n), -1).sum(-1)
    last = 0.5 * (released + squares - dim) - dim * jnp.log(sde.alpha(t))
    np.testing.assert_allclose(last, file[f'{key}/offset'], atol=5e-4)
    nats = prior + file[name].mean(0) / 2 + (np.asarray(last) if offset == 'offset1' else 0)
    width = 2 / 256 if centered == 'centered1' else 1 / 256
    bits = bits_per_dim(-nats, dim, width)
    agreement.error(bits, file[name.replace('integrand', 'bpd')], quantity='bits/dim')
    np.testing.assert_allclose(bits, file[name.replace('integrand', 'bpd')], atol=2e-4)


@pytest.mark.parametrize('centered', [False, True])
def test_uniform_dequantisation_is_that_of_score_flow(centered):
  file, name = of_score_flow('dequantization'), f'centered{int(centered)}'
  codec = ImageCodec((2, 2, 1), centered=centered)
  x0 = codec.between_levels(jnp.asarray(file['image_uint8']), jnp.asarray(file['uniform_u']))
  np.testing.assert_allclose(x0, file[f'uniform_dequantized__{name}'], atol=1e-6)
  assert -math.log2(codec.level_width) == file[f'bpd_constant__{name}']


def test_a_bound_with_noise_of_another_law_is_that_of_score_flow():
  """The bits/dim that its dequantiser is trained on, of noise u between levels with density q(u).

  The drift's divergence is taken at a random time there; here it is integrated, and put back.
  """
  file, key, sde = of_score_flow('dequantization'), 'vp__eps1e-05__iw1__offset1__centered1', VPSDE()
  given = {name: jnp.asarray(value, jnp.float32) for name, value in file.items() if value.ndim}
  codec, law, score_fn = (
    ImageCodec((2, 2, 1), centered=True),
    LikelihoodTimes(sde),
    DATA.score_fn(sde),
  )
  x0 = codec.between_levels(given['image_uint8'], given[f'{key}/noise'])
  np.testing.assert_allclose(x0, given[f'{key}/dequantized'], atol=1e-6)
  bound, ones, dim = LikelihoodBound(sde, sigma_data=1e6), jnp.ones(len(x0)), 4
  alpha, sigma = sde.kernel(sde.T * ones[0])
  nats = -sde.prior_logp(alpha * x0 + sigma * given['prior_noise'])
  t = law.quantile(given['time_u'])
  nats += 0.5 * law.total * bound.bracket(score_fn, x0, t, given['z'], given['z'])
  nats -= dim * sde.drift_coef(law.eps + given['drift_time_u'] * (sde.T - law.eps))
  alpha, sigma = (float(f(jnp.float32(law.eps))) for f in (sde.alpha, sde.sigma))
  n = given['offset_noise']
  s = score_fn(alpha * x0 + sigma * n, law.eps * ones)
  last = jnp.square(sigma * s + n).reshape(len(n), -1).sum(-1)
  nats += 0.5 * last - 0.5 * dim - dim * math.log(alpha)
  log_q = -given[f'{key}/log_det_term']
  logp = importance_weighted(-nats[None, None], log_q[None])[0]
  np.testing.assert_allclose(-logp, given[f'{key}/nats_each'], rtol=2e-3, atol=2e-2)
  bits = bits_per_dim(logp, dim, codec.level_width)
  np.testing.assert_allclose(bits, given[f'{key}/bpd_each'], atol=1e-2)


def test_what_is_no_bound_is_refused():
  with pytest.raises(UserError, match='form of the bound'):
    LikelihoodBound(VPSDE(), form='exact')
  with pytest.raises(ValueError, match='groups of one size'):
    LikelihoodBound(VPSDE(), n_times=25)
  with pytest.raises(ValueError, match='no noise at eps'):
    LikelihoodBound(VPSDE(), eps=0.0)


def test_parts_of_an_error_are_those_that_the_values_have():
  """Of three nested normal laws; what cannot be told apart is None."""
  rng, (repeats, probes, images) = np.random.default_rng(0), (4, 3, 4000)
  values = 3.0 * rng.normal(size=(1, 1, images)) + 2.0 * rng.normal(size=(repeats, 1, images))
  values = values + rng.normal(size=(repeats, probes, images))
  parts = parts_of_error(values, 'probes')
  variances = {'images': 9, 'dequantization': 4 / repeats, 'probes': 1 / (repeats * probes)}
  for name, variance in variances.items():
    assert parts[name] == pytest.approx(math.sqrt(variance / images), rel=0.05)
  total = values.mean((0, 1)).var(ddof=1) / images
  assert sum(error**2 for error in parts.values()) == pytest.approx(total, rel=1e-6)
  once = parts_of_error(values[:1, :1], 'probes')
  assert (once['dequantization'], once['probes']) == (None, None)
  assert once['images'] == pytest.approx(math.sqrt(14 / images), rel=0.05)
  assert parts_of_error(values[:, :, :1], 'probes')['images'] is None


def test_evaluation_bounds_every_image(tmp_path):
  """Above the exact bits/dim of the model, within its error; in a table by the image's number."""
  config = own.digits(base.vp('ddpmpp'))
  config.eval.update(enable_bound=True, bpd_repeats=2, batch_size=4, bound_times=20, num_probes=2)
  few, folder = few_digits(), epath.Path(tmp_path)
  exact = bits_of_known(config, few)
  bound = dataclasses.replace(make_bound(build(config)), source=few, model=exact.model)
  report = bound.measure({}, 0, folder) | exact.measure({}, 0, folder)
  assert exact.is_in(report) and bound.is_in(report)
  config.eval.bound_times = 40
  assert not make_bound(build(config)).is_in(report)
  error = report['bound_test_error_of_draws'] + report['bpd_test_error_of_probes'] + 0.002
  assert abs(report['bound_test'] - report['bpd_test']) < 4 * error
  assert (report['bpd_test_probes'], report['bound_test_times']) == (2, 20)
  assert (report['bpd_test_rtol'], report['bpd_test_eps']) == (1e-5, 1e-5)
  for name in ('bound_test', 'bpd_test'):
    head, *rows = (tmp_path / f'{name}.csv').read_text().splitlines()
    assert head == 'image,bits_per_dim,std_error'
    numbers, bits, errors = np.array([row.split(',') for row in rows], float).T
    np.testing.assert_array_equal(numbers, np.arange(10))
    assert bits.mean() == pytest.approx(report[name], abs=1e-5) and (errors > 0).all()
    parts = [v for k, v in report.items() if k.startswith(f'{name}_error_of')]
    assert math.hypot(*parts) == pytest.approx(report[f'{name}_std_error'], rel=0.2)


def test_a_bound_has_its_times_in_ten_draws():
  config = own.digits(base.vp('ddpmpp'))
  config.eval.update(bound_times=95)
  with pytest.raises(UserError, match='bound_times = 95 must be a multiple of 10'):
    build(config)
