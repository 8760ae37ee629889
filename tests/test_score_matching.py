"""All kinds of score matching ask for the same score: exact expectations over a Parzen density.

The data are five points; with the noise of one level their density is a mixture of Gaussians. An
expectation over points and noise is a sum over the points and a grid of noise, whose error is that
of rounding, as everything is smooth and falls off fast.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from builders import setup
from configs.vp import digits
from data.codec import PointCodec
from data.points import Gaussian, parzen
import losses
from losses import (
  dsm_loss,
  explicit_score_matching,
  hutchinson_score_matching,
  implicit_score_matching,
  MATCHINGS,
  Objective,
  OneTime,
  score_matching_loss,
  sliced_score_matching,
  UniformTimes,
)
from models import score
from models.mlp import MLP
from models.preconditioning import PRECONDITIONINGS
from models.score import ScoreModel
from sde_lib import VESDE, VPSDE
from training.averages import ConstantRate
from training.step import init_state, train_step

KEY = jax.random.key(0)
SDE = VESDE(0.5, 5.0)
POINTS = np.array([[0.0, 1.0], [-1.0, 0.3], [0.7, -0.8], [1.5, 0.2], [-0.4, -1.1]])
SIGNS = np.array(list(itertools.product([-1.0, 1.0], repeat=2)))
THETA = 0.3


@pytest.fixture
def nodes():
  """Points x0, noise z, and the weight of each, in float64."""
  with jax.enable_x64(True):
    line = np.linspace(-8, 8, 65)
    z = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    weight = np.exp(-0.5 * (z**2).sum(1))
    x0, n = np.repeat(POINTS, len(z), axis=0), len(POINTS)
    weight = np.tile(weight / weight.sum(), n) / n
    yield jnp.asarray(x0), jnp.asarray(np.tile(z, (n, 1))), jnp.asarray(weight)


def perturbed(theta):
  """The true score plus theta times a field that is not a gradient."""
  true_score_fn = parzen(jnp.asarray(POINTS)).score_fn(SDE)

  def field(x):
    return jnp.stack([jnp.sin(x[:, 1]) + x[:, 0] * x[:, 1], jnp.cos(x[:, 0])], axis=1)

  return true_score_fn, lambda x, t: true_score_fn(x, t) + theta * field(x), field


def over_signs(loss):
  """The expectation of a loss over all probes."""

  def mean(score_fn, x, t):
    return sum(loss(score_fn, x, t, jnp.broadcast_to(v, x.shape)) for v in SIGNS) / len(SIGNS)

  return mean


MATCHED = {
  'implicit': implicit_score_matching,
  'sliced': over_signs(sliced_score_matching),
  'hutchinson': over_signs(hutchinson_score_matching),
}


def excess(nodes, loss, sde=SDE):
  """J(theta) - J(0) of loss(score_fn, x0, z, x, t)."""
  x0, z, weight = nodes
  t = jnp.full(len(x0), 0.4)
  x = x0 + sde.sigma(t)[:, None] * z

  @jax.jit
  def mean(theta):
    return (weight * loss(perturbed(theta)[1], x0, z, x, t)).sum()

  return float(mean(THETA) - mean(0.0))


def half_square(nodes):
  """1/2 theta^2 E ||field||^2: what a perturbation costs, whatever the loss."""
  x0, z, weight = nodes
  x = x0 + SDE.sigma(jnp.full(len(x0), 0.4))[:, None] * z
  return float(0.5 * THETA**2 * (weight * jnp.square(perturbed(0.0)[2](x)).sum(1)).sum())


@pytest.mark.parametrize('name', MATCHED)
def test_every_objective_is_explicit_score_matching_and_a_constant(nodes, name):
  """So its minimum is at the true score, whatever the model."""
  found = excess(nodes, lambda score_fn, x0, z, x, t: MATCHED[name](score_fn, x, t))
  np.testing.assert_allclose(found, half_square(nodes), rtol=1e-6)


def test_explicit_score_matching_is_half_the_squared_error(nodes):
  true_score_fn, _, _ = perturbed(0.0)
  found = excess(nodes, lambda f, x0, z, x, t: explicit_score_matching(true_score_fn, f, x, t))
  np.testing.assert_allclose(found, half_square(nodes), rtol=1e-6)


def test_denoising_is_explicit_score_matching_of_the_parzen_density(nodes):
  """Vincent 2011: they differ by 1/2 E ||z / sigma||^2 - 1/2 E ||grad log q||^2."""
  x0, z, weight = nodes
  t = jnp.full(len(x0), 0.4)
  sigma = SDE.sigma(t)
  x = x0 + sigma[:, None] * z
  true_score_fn, some, _ = perturbed(THETA)
  for score_fn in (true_score_fn, some, lambda x, t: -(x**3)):
    denoising = dsm_loss(Objective(SDE), score_fn, x0, t, z) / sigma**2
    explicit = explicit_score_matching(true_score_fn, score_fn, x, t)
    constant = (weight * (denoising - explicit)).sum()
    norm = (weight * jnp.square(true_score_fn(x, t)).sum(1)).sum()
    np.testing.assert_allclose(constant, 0.5 * (2 / sigma[0] ** 2 - norm), rtol=1e-5)


@pytest.mark.parametrize('likelihood_weighting', [False, True])
@pytest.mark.parametrize('reduce_mean', [False, True])
def test_all_objectives_have_the_scale_of_denoising(nodes, reduce_mean, likelihood_weighting):
  """So that learning rates and gradient clipping mean the same."""
  weight = losses.by_likelihood if likelihood_weighting else losses.by_variance
  dsm = Objective(SDE, weight=weight, reduce_mean=reduce_mean)
  target = excess(nodes, lambda f, x0, z, x, t: dsm_loss(dsm, f, x0, t, z))
  other = dataclasses.replace(dsm, matching=MATCHINGS['ism'])
  found = excess(nodes, lambda f, x0, z, x, t: score_matching_loss(other, f, x0, t, z, KEY))
  np.testing.assert_allclose(found, target, rtol=1e-6)


@pytest.mark.parametrize('name', ['ssm', 'ssm_vr'])
def test_random_directions_do_not_change_the_expectation(name):
  """The mean over many keys is the implicit loss."""
  x = jax.random.normal(KEY, (4, 2))
  t, score_fn = jnp.full(4, 0.4), perturbed(THETA)[1]
  keys = jax.random.split(KEY, 1000)
  found = jax.jit(jax.vmap(lambda rng: MATCHINGS[name](score_fn, x, t, rng)))(keys)
  error = 4 * found.std(0) / np.sqrt(len(keys)) + 1e-5
  assert (jnp.abs(found.mean(0) - implicit_score_matching(score_fn, x, t)) < error).all()


def test_the_loss_of_ncsn_is_its_weighted_sum():
  """Song & Ermon 2019, Eq. 5 and 6: the mean over levels, each weighed by sigma_i^2."""
  rng = np.random.RandomState(0)
  x0, z = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(4, 6, 3)))

  def score_fn(x, t):
    return jnp.sin(x) * (1 + t[:, None])

  sigmas, total = np.geomspace(0.5, 5.0, 4), 0.0
  for i, sigma in enumerate(sigmas):
    noisy = x0 + sigma * z[i]
    away = score_fn(noisy, jnp.full(6, i / 3)) + (noisy - x0) / sigma**2
    total += sigma**2 * 0.5 * np.square(away).sum(1) / 4
  chain = Objective(SDE.chain(4))
  ours = [dsm_loss(chain, score_fn, x0, jnp.full(6, i / 3), z[i]) for i in range(4)]
  np.testing.assert_allclose(sum(ours) / 4, total, rtol=1e-5)


def gaussian_loss(x):
  """Implicit score matching of s(x) = -M (x - mu), M = L L^T, on the data."""

  def loss(mu, root):
    m = root @ root.T
    return implicit_score_matching(lambda x, t: -(x - mu) @ m, x, jnp.zeros(len(x))).mean()

  return loss


def test_hyvarinens_gaussian_has_its_minimum_at_the_moments_of_the_sample():
  """mu is the sample mean and M the inverse of the sample covariance (2005, Sec. 3.1)."""
  with jax.enable_x64(True):
    rng = np.random.RandomState(0)
    x = jnp.asarray(rng.normal(size=(200, 3)) @ rng.normal(size=(3, 3)) + 1.0)
    mean, cov = x.mean(0), jnp.cov(x.T, bias=True)
    loss, root = gaussian_loss(x), jnp.linalg.cholesky(jnp.linalg.inv(cov))
    gradients = jax.grad(loss, (0, 1))(mean, root)
    assert max(float(jnp.abs(g).max()) for g in gradients) < 1e-10

    tx, params = optax.lbfgs(), (jnp.zeros(3), jnp.eye(3))
    value_and_grad = optax.value_and_grad_from_state(lambda p: loss(*p))

    def step(carry, _):
      params, state = carry
      value, grad = value_and_grad(params, state=state)
      updates, state = tx.update(
        grad, state, params, value=value, grad=grad, value_fn=lambda p: loss(*p)
      )
      return (optax.apply_updates(params, updates), state), None

    (found, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, 60)
    np.testing.assert_allclose(found[0], mean, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.inv(found[1] @ found[1].T), cov, atol=1e-5)


def small(sde, output) -> ScoreModel:
  return ScoreModel(
    MLP(nf=16, num_layers=1),
    sde.chain(1000),
    score.scaled_time,
    PRECONDITIONINGS[output],
    True,
    True,
  )


def bound(model, shape=(1, 2)):
  params = model.init(KEY, shape)
  return model.bind(jax.tree.map(lambda p: p + 0.1, params))


def test_a_denoising_autoencoder_is_a_score():
  """(r(x) - x) / sigma^2, whose loss is the squared error of r over sigma^2 (Vincent 2011)."""
  score_fn = bound(small(SDE, 'denoised'))
  x0, z = jax.random.normal(KEY, (2, 7, 2))
  t = jnp.full(7, 0.3)
  sigma = SDE.sigma(t)[:, None]
  x = x0 + sigma * z
  restored = score_fn.denoised(x, t)
  np.testing.assert_allclose(score_fn(x, t), (restored - x) / sigma**2, rtol=1e-5, atol=1e-5)
  loss = dsm_loss(Objective(SDE), score_fn, x0, t, z)
  np.testing.assert_allclose(
    loss, 0.5 * jnp.square((restored - x0) / sigma).sum(1), rtol=1e-4, atol=1e-4
  )


def test_what_an_autoencoder_restores_is_tweedies_mean():
  sde = VPSDE()
  score_fn, x, t = bound(small(sde, 'denoised')), jax.random.normal(KEY, (5, 2)), jnp.full(5, 0.4)
  np.testing.assert_allclose(
    sde.reverse(score_fn).denoise(x, t), score_fn.denoised(x, t), rtol=1e-4, atol=1e-5
  )


def image_energy() -> ScoreModel:
  config = digits.get_config()
  config.model.nf, config.model.output = 8, 'energy'
  config.model.ch_mult, config.model.attn_resolutions = (1,), ()
  return setup.build(config).model


@pytest.mark.parametrize('kind', ['points', 'images'])
def test_the_score_of_an_energy_is_a_gradient(kind):
  """Its line integral between two points is the difference of the log-densities."""
  points = kind == 'points'
  model = small(SDE, 'energy') if points else image_energy()
  shape = (2,) if points else (8, 8, 1)
  score_fn = bound(model, (1, *shape))
  a, way = 0.3 * jax.random.normal(KEY, (2, 1, *shape))
  nodes, weights = np.polynomial.legendre.leggauss(12)  # exact for what is so smooth
  steps = jnp.asarray((nodes + 1) / 2, jnp.float32).reshape(-1, *[1] * len(shape))
  score = jax.jit(score_fn.__call__)(a + steps * way, jnp.full(len(nodes), 0.4))
  integral = (weights / 2) @ np.asarray(score * way).reshape(len(nodes), -1).sum(1)
  ends = score_fn.log_density(jnp.concatenate([a, a + way]), jnp.full(2, 0.4))
  np.testing.assert_allclose(ends[1] - ends[0], integral, rtol=2e-3, atol=1e-3)


def test_an_energy_is_trained_as_a_score_is():
  model, tx = small(SDE, 'energy'), optax.adam(1e-2)
  state = init_state(KEY, model, tx, (1, 2))
  step = jax.jit(
    lambda state: train_step(
      state, {'data': jnp.asarray(np.repeat(POINTS, 40, 0), jnp.float32)}, KEY,
      model=model, codec=PointCodec((2,)), tx=tx,
      objective=Objective(SDE, UniformTimes(0.0), reduce_mean=True),
      averages=(ConstantRate(0.9),),
    )
  )  # fmt: skip
  found = []
  for _ in range(150):
    state, metrics = step(state)
    found.append(float(metrics['loss']))
  assert np.mean(found[-20:]) < 0.8 * np.mean(found[:20])


def test_what_is_not_an_energy_says_so():
  score_fn = bound(small(SDE, 'score'))
  with pytest.raises(ValueError, match='no energy'):
    score_fn.log_density(jnp.zeros((1, 2)), jnp.zeros(1))


def test_one_level_of_noise_is_that_of_the_smallest_time():
  t = OneTime(0.01)(KEY, 5)
  np.testing.assert_array_equal(t, np.full(5, np.float32(0.01)))


def test_implicit_score_matching_is_known_for_a_gaussian():
  """At the true score of N(mu, C) it is -1/2 tr C^-1 on average, and so is every estimate of it."""
  data = Gaussian.of(jnp.zeros(3), jnp.diag(jnp.array([0.5, 1.0, 2.0])))
  sde = VESDE(1e-3, 1.0)
  x = data.sample(KEY, 40_000)
  loss = implicit_score_matching(data.score_fn(sde), x, jnp.zeros(len(x)))
  assert abs(float(loss.mean()) + 0.5 * 3.5) < 4 * float(loss.std()) / 200


def test_the_mean_over_dimensions_is_two_thirds_of_half_the_sum_in_three():
  """For every objective as for denoising, so that they keep one scale in any dimension."""
  x0, z = jax.random.normal(KEY, (2, 5, 3))
  t = jnp.full(5, 0.4)
  for matching in (None, *MATCHINGS.values()):
    summed, mean = (
      score_matching_loss(
        Objective(SDE, matching=matching, reduce_mean=r), lambda x, t: jnp.sin(x), x0, t, z, KEY
      )
      for r in (False, True)
    )
    np.testing.assert_allclose(mean, 2 / 3 * summed, rtol=1e-5)
