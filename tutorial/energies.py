"""Chapter 4: energies, and contrastive divergence (Du & Mordatch 2019)."""

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from samplers.langevin import LangevinSampler
from tutorial import common


def draw() -> tuple[Figure, list[str]]:
  figure, axes = common.panels(4)
  extent, lines = 4.0, ['two moons, sigma = 0.1:']
  setup, by_divergence = common.trained('configs/toy/two_moons.py', 'cd')
  smooth, by_denoising = common.trained('configs/toy/two_moons.py', 'energy')
  true_score_fn = setup.true_score_fn
  grid = common.plane(extent, 121)
  points, t = common.at_eps(setup, grid)
  truth = jnp.exp(true_score_fn.log_density(points, t))
  common.shade(axes[0], truth, extent, 'truth')
  # The noise-conditional energy, at the time when sigma is the same.
  sigma = setup.model.sde.sigma(t)
  same = smooth.model.sde.time_of_log_snr(-jnp.log(sigma))
  for ax, f, time, title in (
    (axes[1], by_divergence, t, 'exp(-E), contrastive divergence'),
    (axes[2], by_denoising, same, 'exp(-E), denoising score matching'),
  ):
    log_p = f.log_density(points, time)
    p = jax.nn.softmax(log_p)  # on the grid
    common.shade(ax, p, extent, title)
    log_truth = jax.nn.log_softmax(true_score_fn.log_density(points, t))
    kl = float((jnp.exp(log_truth) * (log_truth - jax.nn.log_softmax(log_p))).sum())
    lines.append(f'  KL(truth || exp(-E) / Z) {kl:.3f} nats: {title.removeprefix("exp(-E), ")}')
  sampler = LangevinSampler(setup.model.sde, setup.config.training.eps, 0.02, 1000, adjusted=True)
  x, nfe = sampler(jax.random.key(0), by_divergence, (3000, 2))
  common.scatter(axes[3], x, extent, 'MALA on the energy of contrastive divergence')
  upper = float((np.asarray(x)[:, 1] > 0).mean())
  lines.append(f'  MALA, {nfe} evaluations: share of samples with y > 0: {upper:.3f} (truth 0.5)')
  return figure, lines
