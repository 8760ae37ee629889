"""Chapter 6: from noise levels to SDEs (Song et al. 2021): PC samplers and the probability flow."""

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from data import points
from samplers.base import GridSampler, Sampler
from samplers.multistep import DPMSolver
from samplers.time_grids import log_snr, TimeGrid
from sampling import (
  AncestralSampling,
  Langevin,
  NoCorrector,
  ODESampler,
  PCSampler,
  ReverseDiffusion,
)
from sde_lib import subVPSDE, VESDE, VPSDE
from tutorial import common


def forward(axes: list[Axes]) -> None:
  """Paths of the three SDEs from the same data in one dimension, in units of their scale."""
  x0 = jnp.array([-3.0, -1.0, 2.0])
  for ax, sde in zip(axes, (VESDE(0.05, 20.0), VPSDE(), subVPSDE()), strict=True):
    n = 500
    dt, x, path = 1 / n, jnp.repeat(x0, 8), []
    for i in range(n):
      t = jnp.full(x.shape, i * dt)
      scale = jnp.sqrt(10 * sde.alpha(t) ** 2 + sde.sigma(t) ** 2)
      path.append(x / scale)
      drift, diffusion = sde.sde(x[:, None], t)
      z = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), x.shape)
      x = x + drift[:, 0] * dt + diffusion * np.sqrt(dt) * z
    for k, line in enumerate(np.array(path).T):
      ax.plot(np.linspace(0, 1, n), line, lw=0.6, color=f'C{k // 8}')
    ax.set_title(f'{type(sde).__name__}: x(t) / scale', fontsize=9)
    ax.set(xlabel='t', yticks=[])


def shares_error(x: np.ndarray) -> float:
  """Total variation between the weights of the eight modes in samples and in the data."""
  data = points.distribution('ring', 2)
  nearest = np.square(np.asarray(x)[:, None] - np.asarray(data.means)).sum(-1).argmin(1)
  found = np.bincount(nearest, minlength=8) / len(x)
  return float(0.5 * np.abs(found - np.asarray(data.weights)).sum())


def reverse(axes: list[Axes]) -> list[str]:
  """Samplers on the learnt score of the ring."""
  setup, score_fn = common.trained('configs/toy/ring.py', 've')
  sde, eps = setup.model.sde, 1e-3
  chosen: dict[str, Sampler] = {
    'reverse diffusion': PCSampler(sde, ReverseDiffusion(), NoCorrector(), TimeGrid(200, eps)),
    'PC: reverse diffusion, Langevin': PCSampler(
      sde, ReverseDiffusion(), Langevin(0.16, 1), TimeGrid(100, eps)
    ),
    'ancestral': PCSampler(sde, AncestralSampling(), NoCorrector(), TimeGrid(200, eps)),
    'probability flow, Dormand-Prince': ODESampler(sde, eps),
    'probability flow, DPM-Solver++ 2M': GridSampler(sde, DPMSolver(2), TimeGrid(25, eps, log_snr)),
  }
  n = 4000
  floor = shares_error(points.distribution('ring', 2).sample(jax.random.key(5), n))
  lines = ['ring, learnt score: weights of the modes, total variation from the truth']
  lines.append(f'  {"data":34} {floor:.3f}')
  for name, sampler in chosen.items():
    x, nfe = sampler(jax.random.key(0), score_fn, (n, 2))
    lines.append(f'  {name:34} {shares_error(x):.3f}, {nfe} evaluations')
    if name.startswith('PC'):
      common.scatter(axes[0], x, 4.5, f'{name}, {nfe} evaluations')
  seen = []
  sampler = chosen['probability flow, Dormand-Prince']
  x, _ = sampler(jax.random.key(1), score_fn, (40, 2), observe=lambda _, x: seen.append(x))
  path = np.stack([np.asarray(v) for v in seen])
  axes[1].plot(*path[-60:].transpose(2, 0, 1), lw=0.6, color='0.5')
  axes[1].plot(*np.asarray(x).T, 'o', ms=3)
  common.frame(axes[1], 9.0, 'paths of the probability flow, and their ends')
  return lines


def digits(ax: Axes) -> list[str]:
  """PC samples of the trained digits."""
  setup, score_fn = common.trained('configs/vp/digits.py')
  x, nfe = setup.sampler(jax.random.key(0), score_fn, (64, *setup.data_shape))
  common.show_images(ax, x, 8, f'digits, {nfe} evaluations')
  return []


def draw() -> tuple[Figure, list[str]]:
  figure, axes = common.panels(3, rows=2)
  forward(list(axes[0]))
  return figure, reverse(list(axes[1])) + digits(axes[1][2])
