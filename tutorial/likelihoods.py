"""Chapter 7: exact likelihoods, latents, and what an image leaves open."""

import math

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from controllable_generation import BoundedMean, Mask, PosteriorGuidance
from data import sources
from likelihood import bits_per_dim, decode, encode, interpolate, Likelihood
from samplers.base import GridSampler
from samplers.multistep import DPMSolver
from samplers.time_grids import log_snr, TimeGrid
from tutorial import common


def points() -> list[str]:
  """log p(x) of the ring by the probability flow, and the truth."""
  setup, score_fn = common.trained('configs/toy/ring.py', 've')
  x = jnp.asarray(setup.true_score_fn.data.sample(jax.random.key(0), 500))
  eps = setup.config.training.eps
  x, t = x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), jnp.full(500, eps)
  truth = setup.true_score_fn.log_density(x, t)
  likelihood = Likelihood(setup.model.sde, eps, probe='exact')
  exact, _, nfe = likelihood(jax.random.key(2), setup.true_score_fn, x)
  learnt, _, _ = likelihood(jax.random.key(2), score_fn, x)
  return [
    f'ring, log p(x) in nats, mean of 500 points: {truth.mean():.3f} in closed form,',
    f'  {exact.mean():.3f} by the flow of the true score ({nfe} evaluations; largest difference '
    f'{np.abs(exact - truth).max():.3f}),',
    f'  {learnt.mean():.3f} by the flow of the learnt score',
  ]


def draw() -> tuple[Figure, list[str]]:
  figure, axes = common.panels(3)
  lines = points()
  setup, score_fn = common.trained('configs/vp/digits.py')
  sde, eps, dim = setup.model.sde, setup.config.training.eps, setup.codec.dim
  source = sources.load('digits', 'test', image_size=8, num_channels=1)
  pixels = jnp.asarray(source.gather(np.arange(32)), jnp.float32)
  x = 2 * (pixels + jax.random.uniform(jax.random.key(0), pixels.shape)) / 256 - 1
  logp, _, nfe = Likelihood(sde, eps)(jax.random.key(1), score_fn, x)
  bits = np.asarray(bits_per_dim(logp, dim, setup.codec.level_width))
  lines.append(
    f'digits: {bits.mean():.2f} +- {bits.std() / math.sqrt(len(bits)):.2f} bits/dim of {len(bits)} '
    f'held-out images, {nfe} evaluations'
  )

  z, _ = encode(sde, score_fn, x[:16], eps)
  back, _ = decode(sde, score_fn, z, eps)
  error = float(jnp.sqrt(jnp.square(back - x[:16]).mean()))
  lines.append(
    f'        encoded and decoded again: rms difference {error:.4f}, pixels from -1 to 1'
  )
  weights = jnp.linspace(0.0, 1.0, 8)
  z0, z1 = (jnp.repeat(z[i : i + 8], 8, axis=0) for i in (0, 8))
  between, _ = decode(sde, score_fn, interpolate(z0, z1, jnp.tile(weights, 8)), eps, 1e-3, 1e-3)
  common.show_images(axes[0], between, 8, 'interpolated between latents')
  scales = jnp.repeat(jnp.linspace(0.4, 1.2, 8), 8)[:, None, None, None]
  cold, _ = decode(sde, score_fn, scales * jnp.tile(z[:8], (8, 1, 1, 1)), eps, 1e-3, 1e-3)
  common.show_images(axes[1], cold, 8, 'temperature 0.4 (above) to 1.2')

  known = Mask(jnp.broadcast_to(jnp.arange(8)[:, None, None] < 4, (8, 8, 1)).astype(jnp.float32))
  y = known(jnp.repeat(x[:8], 7, axis=0))
  guided = BoundedMean(PosteriorGuidance(score_fn, known, y, sde), sde, -1.0, 1.0)
  sampler = GridSampler(sde, DPMSolver(2), TimeGrid(25, setup.config.sampling.eps, log_snr))
  painted, nfe = sampler(jax.random.key(2), guided, y.shape)
  kept = float(jnp.abs(known(painted) - y).max())
  lines.append(f'        inpainted, {nfe} evaluations: known pixels differ by at most {kept:.4f}')
  rows = jnp.concatenate([y.reshape(8, 7, 8, 8, 1)[:, :1], painted.reshape(8, 7, 8, 8, 1)], axis=1)
  common.show_images(axes[2], rows.reshape(64, 8, 8, 1), 8, 'lower half painted, seven times')
  return figure, lines
