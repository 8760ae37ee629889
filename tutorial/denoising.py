"""Chapter 2: denoising instead of derivatives (Vincent 2011)."""

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from data.points import parzen
from losses import dsm_loss, explicit_score_matching, Objective
from sde_lib import ScoreFn, SDE
from tutorial import common


def constant(points: jax.Array, sde: SDE, eps: float, score_fn: ScoreFn, n: int = 101) -> float:
  """Denoising minus explicit score matching of the Parzen density of points [K, 2] at time eps.

  The expectation over the noise is a sum over a grid of n^2, exact to rounding.
  """
  line = jnp.linspace(-6.0, 6.0, n)
  z = jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)
  weight = jnp.exp(-0.5 * jnp.square(z).sum(-1))
  x0, z = jnp.repeat(points, len(z), axis=0), jnp.tile(z, (len(points), 1))
  weight = jnp.tile(weight, len(points)) / weight.sum() / len(points)
  t = jnp.full(len(x0), eps)
  std = sde.sigma(t)
  denoising = dsm_loss(Objective(sde), score_fn, x0, t, z)
  explicit = explicit_score_matching(
    parzen(points).score_fn(sde), score_fn, x0 + std[:, None] * z, t
  )
  return float((weight * (denoising - std**2 * explicit)).sum())


def draw() -> tuple[Figure, list[str]]:
  setup, score_fn = common.trained('configs/toy/two_moons.py', 'dsm')
  _, autoencoder = common.trained('configs/toy/two_moons.py', 'dae')
  sde, eps = setup.model.sde, setup.config.training.eps
  true_score_fn, extent = setup.true_score_fn, 4.0
  some = jnp.asarray(true_score_fn.data.sample(jax.random.key(1), 200))
  kernels = parzen(some).score_fn(sde)

  with jax.enable_x64(True):
    few = jnp.asarray(np.asarray(some[:5]), jnp.float64)
    constants = [
      constant(few, sde, eps, f) for f in (kernels, lambda x, t: -x, lambda x, t: jnp.sin(x))
    ]
  rng_x, rng_z = jax.random.split(jax.random.key(2))
  x = true_score_fn.data.sample(rng_x, 10_000)
  t = jnp.full(len(x), eps)
  x = x + sde.sigma(t)[:, None] * jax.random.normal(rng_z, x.shape)

  def error(f: ScoreFn) -> float:
    return float(jnp.square(sde.sigma(t)[:, None] * (f(x, t) - true_score_fn(x, t))).mean())

  lines = [
    'denoising - explicit score matching, three different scores: '
    + ', '.join(f'{c:.7f}' for c in constants),
    'mean of (sigma (s - true))^2, two moons, sigma = 0.1:',
    f'  network, denoising score matching         {error(score_fn):.4f}',
    f'  denoising autoencoder, (r(x) - x)/sigma^2 {error(autoencoder):.4f}',
    f'  Parzen window of 200 points               {error(kernels):.4f}',
    f'  zero                                      {error(lambda x, t: 0 * x):.4f}',
  ]
  figure, axes = common.panels(4)
  points, t = common.at_eps(setup, common.plane(extent, 121))
  common.shade(axes[0], jnp.exp(true_score_fn.log_density(points, t)), extent, 'truth')
  common.arrows(axes[0], true_score_fn, eps, extent)
  common.shade(
    axes[1], jnp.exp(kernels.log_density(points, t)), extent, 'Parzen window of 200 points'
  )
  common.arrows(axes[1], kernels, eps, extent)
  for ax, f, title in (
    (axes[2], score_fn, 'denoising score matching'),
    (axes[3], autoencoder, 'denoising autoencoder'),
  ):
    common.scatter(ax, x[:1500], extent, title)
    common.arrows(ax, f, eps, extent)
  return figure, lines
