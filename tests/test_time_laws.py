"""The laws of training times: where they lie, that strata keep the expectation, score_flow's."""

import dataclasses
from functools import partial

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from test_golden_sde import DATA, GOLDEN

from builders.setup import build
from configs import base, own
from data.codec import PointCodec
import losses
from losses import (
  ChainTimes,
  dsm_loss,
  ImportanceSampled,
  LikelihoodTimes,
  LogNormalTimes,
  Objective,
  OneTime,
  Stratified,
  UniformTimes,
)
from models import score
from models.mlp import MLP
from models.preconditioning import PRECONDITIONINGS
from models.score import ScoreModel
from sde_lib import EDMSDE, RectifiedFlow, SDE, subVPSDE, VESDE, VPSDE
from training.averages import ConstantRate
from training.step import init_state, train_step

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Cosine(SDE):
  """An SDE that says no more than it must: no formula of its log-SNR, nor of the inverse."""

  def alpha(self, t):
    return jnp.cos(1.5 * t)

  def sigma(self, t):
    return jnp.sin(1.5 * t)


SDES = [VESDE(), VPSDE(), subVPSDE(), EDMSDE(), RectifiedFlow(), Cosine()]
every_sde = pytest.mark.parametrize('sde', SDES, ids=lambda s: type(s).__name__)
LAWS = {
  'uniform': lambda sde: UniformTimes(1e-3, sde.T),
  'chain': lambda sde: ChainTimes(sde.chain(50), 1e-3),
  'one': lambda sde: OneTime(0.3),
  'log_normal': lambda sde: LogNormalTimes(sde, eps=1e-3),
  'likelihood': lambda sde: LikelihoodTimes(sde, 1e-3),
}


def of_score_flow(name: str) -> dict[str, np.ndarray]:
  return dict(np.load(GOLDEN / f'score_flow_{name}.npz'))


@pytest.mark.parametrize(
  ('key', 'sde'), [('vp__eps1e-05', VPSDE()), ('subvp__eps0.01', subVPSDE()),
                   ('subvp__eps1e-05', subVPSDE())]
)  # fmt: skip
def test_likelihood_times_are_those_of_score_flow(key, sde):
  """Its closed forms without their shortcut for small exponents: ln(e^B - 1), 2 ln(e^B - 1) - B."""
  file = of_score_flow('importance_time')
  law = LikelihoodTimes(sde, float(key.partition('eps')[2]))
  assert law.total == pytest.approx(float(file[f'{key}/Z_exact']), rel=1e-6)
  times = law.quantile(jnp.asarray(file['u'], jnp.float32))
  error = agreement.error(times, file[f'{key}/t_exact'], quantity='time')
  np.testing.assert_allclose(times, file[f'{key}/t_exact'], rtol=1e-5)
  assert error < 1e-5
  weight = 2 * (sde.log_snr(jnp.float32(law.eps)) - sde.log_snr(jnp.float32(file['t_grid'])))
  np.testing.assert_allclose(weight, file[f'{key}/cum_weight_exact'], rtol=1e-5, atol=1e-5)


@every_sde
def test_likelihood_times_have_the_density_that_they_say(sde):
  """By quadrature of g^2 / sigma^2, for an SDE without closed forms too."""
  eps = 1e-3
  law, u = LikelihoodTimes(sde, eps), np.array([0.0, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
  t = np.asarray(law.quantile(jnp.float32(u)), np.float64)

  def rate_at(t):
    return jnp.square(sde.diffusion_coef(t) / sde.sigma(t))

  nodes, weights = np.polynomial.legendre.leggauss(200)
  low, high = np.log(np.array([[eps, *t], [*t, sde.T]]))[..., None]  # in log t it is smooth
  with jax.enable_x64(True):
    at = np.exp((low + high) / 2 + (high - low) / 2 * nodes)
    rate = np.asarray(rate_at(jnp.asarray(at)))
    here = np.asarray(rate_at(jnp.asarray(t)))
  parts = (rate * at * weights).sum(1) * (high - low)[:, 0] / 2
  assert law.total == pytest.approx(sum(parts), rel=1e-4)
  np.testing.assert_allclose(np.cumsum(parts)[:-1] / sum(parts), u, atol=1e-4)
  np.testing.assert_allclose(t[[0, -1]], [eps, sde.T], rtol=1e-3)
  density = np.asarray(law.density(jnp.float32(t)))
  np.testing.assert_allclose(density * law.total, here, rtol=1e-3)


def test_where_the_weight_is_infinite_there_is_no_law():
  with pytest.raises(ValueError, match='no noise at eps'):
    LikelihoodTimes(VPSDE(), 0.0)
  assert LikelihoodTimes(VESDE(), 0.0).total == pytest.approx(2 * np.log(5000))


@pytest.mark.parametrize(
  ('sde', 'weight'),
  [(sde, losses.by_likelihood) for sde in (VPSDE(), RectifiedFlow(), Cosine())]
  + [(subVPSDE(), losses.BySigmoid(1.0))],
)
def test_importance_sampling_keeps_the_expectation(sde, weight):
  """That over uniform times: the mean over quantiles of what is asked of a score at each time."""
  eps, n = 1e-3, 20_000
  u = (jnp.arange(n) + 0.5) / n
  law = LikelihoodTimes(sde, eps)

  def score_fn(x, t):
    return -x

  x0, z = jnp.zeros((n, 1)), jnp.ones((n, 1))
  drawn = dsm_loss(
    Objective(sde, weight=ImportanceSampled(weight, law)), score_fn, x0, law.quantile(u), z
  )
  grid = jnp.concatenate([jnp.float32([eps]), law.quantile(u), jnp.float32([sde.T])])
  x0, z = jnp.zeros((n + 2, 1)), jnp.ones((n + 2, 1))
  uniform = dsm_loss(Objective(sde, weight=weight), score_fn, x0, grid, z)
  exact = np.trapezoid(np.float64(uniform), np.float64(grid)) / (sde.T - eps)
  assert float(drawn.mean()) == pytest.approx(exact, rel=1e-3)
  if weight is losses.by_likelihood:  # nothing of the weight's variance is left
    alpha, sigma = sde.kernel(law.quantile(u))
    constant = ImportanceSampled(weight, law)(sde, law.quantile(u), alpha, sigma)
    np.testing.assert_allclose(constant**2, law.total / (sde.T - eps), rtol=1e-4)


@pytest.mark.parametrize(
  ('name', 'sde'), [('vp__eps1e-05', VPSDE()), ('subvp__eps0.01', subVPSDE())]
)
def test_losses_are_those_of_score_flow(name, sde):
  """With importance its loss is ours of the weight variance at these times: Z is left out."""
  file = of_score_flow('weighted_loss')
  data, z = (jnp.asarray(file[key], jnp.float32) for key in ('data', 'z'))
  law = LikelihoodTimes(sde, float(name.partition('eps')[2]))
  score_fn, span = DATA.score_fn(sde), sde.T - law.eps
  for mean in (0, 1):
    for weighted, important, weight in (
      (0, 0, losses.by_variance),
      (1, 0, losses.by_likelihood),
      (1, 1, losses.by_variance),
    ):
      t = jnp.asarray(file[f'{name}/{"t_iw" if important else "t_uniform"}'], jnp.float32)
      expected = file[f'{name}__rm{mean}__lw{weighted}__iw{important}/each']
      objective = Objective(sde, weight=weight, reduce_mean=bool(mean))
      each = dsm_loss(objective, score_fn, data, t, z)
      agreement.error(each, expected, quantity='loss by time')
      np.testing.assert_allclose(each, expected, rtol=1e-3)  # its std jumps by 5e-4 near t = 0.01
      if important:
        true = dataclasses.replace(objective, weight=ImportanceSampled(losses.by_likelihood, law))
        each_true = dsm_loss(true, score_fn, data, t, z)
        np.testing.assert_allclose(each_true, law.total / span * each, rtol=1e-4)


@pytest.mark.parametrize(
  ('sde', 'law'), [*[(VPSDE(), law) for law in LAWS], (Cosine(), 'likelihood')]
)
def test_strata_hold_a_time_each_and_keep_the_law(sde, law):
  """Each is by itself of the law; a batch has one time between two of n successive quantiles."""
  of_sde, n = LAWS[law](sde), 16
  times = Stratified(of_sde)(KEY, n)
  assert ((times >= np.float32(1e-3)) & (times <= np.float32(sde.T))).all()
  edges = np.asarray(of_sde.quantile(jnp.arange(n + 1) / n * 0.999999))
  ordered = np.sort(np.asarray(times))
  slack = 1 + 1e-5
  assert (edges[:-1] <= slack * ordered).all() and (ordered <= slack * edges[1:]).all()
  rngs = jax.random.split(KEY, 4000)
  first = np.asarray(jax.vmap(lambda rng: Stratified(of_sde)(rng, 3)[1])(rngs))
  independent = np.asarray(of_sde(KEY, 4000))
  assert stats.ks_2samp(first, independent).pvalue > 1e-3


def test_a_stratum_at_the_end_is_a_time():
  """u = 0, and what rounds to 1, are the ends of every law."""
  for sde in SDES:
    for law in LAWS.values() if sde == VPSDE() else (LAWS['likelihood'], LAWS['log_normal']):
      t = law(sde).quantile(jnp.array([0.0, np.nextafter(np.float32(1), 0)]))
      assert (
        np.isfinite(t).all() and (t >= np.float32(1e-3)).all() and (t <= np.float32(sde.T)).all()
      )


def test_strata_take_variance_from_a_mean():
  """Of what is smooth in t a mean over n strata has about 1 / n^2 of the variance."""
  law = UniformTimes(1e-3)

  def variance(law) -> float:
    rngs = jax.random.split(KEY, 500)
    return float(jax.vmap(lambda rng: jnp.sin(6 * law(rng, 32)).mean())(rngs).var())

  assert variance(Stratified(law)) < 0.01 * variance(law)


def test_independent_times_are_drawn_as_ever():
  """Their bits: what a run made before draws when it goes on."""
  n, chain = 7, VESDE().chain(50)
  expected = {
    'uniform': jax.random.uniform(KEY, (n,), minval=1e-3, maxval=1.0),
    'chain': jnp.maximum(chain.time(jax.random.randint(KEY, (n,), 0, 50)), 1e-3),
    'one': jnp.full(n, 0.3),
    'log_normal': jnp.clip(
      VESDE().time_of_log_snr(-(-1.2 + 1.2 * jax.random.normal(KEY, (n,)))), 1e-3, 1.0
    ),
  }
  for law, times in expected.items():
    np.testing.assert_array_equal(LAWS[law](VESDE())(KEY, n), times)


@dataclasses.dataclass(frozen=True)
class Counting:
  """A law that notes how many times are drawn of it together."""

  drawn: list[int]

  def __call__(self, rng, n):
    self.drawn.append(n)
    return jnp.full(n, 0.5)

  def quantile(self, u):
    return self(None, len(u))


def test_strata_are_of_the_whole_batch():
  """In however many parts it is taken."""
  drawn: list[int] = []
  reading = PRECONDITIONINGS['noise']
  model = ScoreModel(
    MLP(nf=4, num_layers=1), VPSDE().chain(10), score.scaled_time, reading, True, True
  )
  tx = optax.sgd(1e-3)
  step = partial(
    train_step, model=model, codec=PointCodec((2,)), objective=Objective(VPSDE(), Counting(drawn)),
    tx=tx, averages=(ConstantRate(0.9),), grad_accum=4,
  )  # fmt: skip
  state = jax.eval_shape(lambda: init_state(KEY, model, tx, (1, 2)))
  jax.eval_shape(step, state, {'data': jax.ShapeDtypeStruct((8, 2), jnp.float32)}, KEY)
  assert drawn == [8]


def test_configs_choose_the_law():
  def objective(**fields) -> Objective:
    config = own.digits(base.vp('ddpmpp'))
    config.training.update(fields)
    return build(config).objective

  law = LikelihoodTimes(VPSDE(), 1e-5)
  of_score_flow = objective(time_law='likelihood')
  assert (of_score_flow.times, of_score_flow.weight) == (law, losses.by_variance)
  unbiased = ImportanceSampled(losses.by_likelihood, law)
  for fields in ({'likelihood_weighting': True}, {'weight': 'likelihood'}):
    assert objective(time_law='likelihood', **fields).weight == unbiased
  sigmoid = objective(time_law='likelihood', weight='sigmoid', weight_bias=1.0)
  assert sigmoid.weight == ImportanceSampled(losses.BySigmoid(1.0), law)
  assert objective(time_law='likelihood', stratified=True).times == Stratified(law)
  assert objective(stratified=True).times == Stratified(UniformTimes(1e-5, 1.0))
  assert isinstance(objective(continuous=False, stratified=True).times.law, ChainTimes)
