"""Chapter 1: a score from data alone (Hyvarinen 2005)."""

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax

from losses import implicit_score_matching
from tutorial import common


def fit_gaussian(x: jax.Array, steps: int = 2000) -> tuple[jax.Array, jax.Array]:
  """mu [d] and M [d, d] that minimise the score matching loss of s(x) = -M (x - mu) on x [n, d]."""
  t = jnp.zeros(len(x))  # which this score does not ask for

  def loss(params: dict[str, jax.Array]) -> jax.Array:
    m = params['root'] @ params['root'].T
    return implicit_score_matching(lambda x, t: -(x - params['mu']) @ m, x, t).mean()

  tx = optax.adam(optax.cosine_decay_schedule(0.05, steps))

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  params = {'mu': jnp.zeros(x.shape[1]), 'root': jnp.eye(x.shape[1])}
  (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, steps))((params, tx.init(params)))
  return params['mu'], params['root'] @ params['root'].T


def draw() -> tuple[Figure, list[str]]:
  rng = jax.random.key(0)
  cov = jnp.array([[1.0, 0.6], [0.6, 0.8]])
  x = jax.random.multivariate_normal(rng, jnp.array([0.5, -0.5]), cov, (500,))
  mu, m = fit_gaussian(x)
  sample_mean, sample_cov = np.mean(x, 0), np.cov(x.T, bias=True)
  lines = [
    'Gaussian, 500 points: mu by score matching - sample mean, largest entry: '
    f'{np.abs(mu - sample_mean).max():.1e}',
    '                      M^-1 by score matching - sample covariance:         '
    f'{np.abs(np.linalg.inv(m) - sample_cov).max():.1e}',
  ]

  setup, score_fn = common.trained('configs/toy/two_gaussians.py', 'ism')
  true_score_fn, extent = setup.true_score_fn, 9.0
  points, t = common.at_eps(setup, common.plane(extent, 121))
  density = jnp.exp(true_score_fn.log_density(points, t))
  error = jnp.linalg.norm(score_fn(points, t) - true_score_fn(points, t), axis=1)
  near = density > 1e-3 * density.max()
  weighted = float((density * error).sum() / density.sum())
  lines += [
    f'two Gaussians: |s - true|, mean over the data                    {weighted:.3f}',
    f'               mean over the square where p > max p / 1000       {error[near].mean():.3f}',
    f'               mean over the rest of the square                  {error[~near].mean():.3f}',
  ]

  figure, axes = common.panels(4)
  common.scatter(axes[0], x, 3.5, 'Hyvärinen: data, and -M (x - mu)')
  common.arrows(axes[0], lambda x, t: -(x - mu) @ m, 0.0, 3.5)
  common.shade(axes[1], density, extent, 'true score')
  common.arrows(axes[1], true_score_fn, setup.config.training.eps, extent)
  common.shade(axes[2], density, extent, 'learnt by implicit score matching')
  common.arrows(axes[2], score_fn, setup.config.training.eps, extent)
  common.shade(axes[3], jnp.log10(error), extent, 'log10 |s - true|', 'magma')
  return figure, lines
