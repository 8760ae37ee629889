"""Chapter 5: many levels of noise (Song & Ermon 2019), and how to choose them (2020)."""

import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from builders.evaluation import make_held_out_loss
from builders.setup import build
from builders.training import make_schedule, score_task
from configs.toy import ring
from data import sources
from data.noise_scales import largest_distance, num_scales, recommend, variance_ratio
from data.points import distribution, load
from samplers.langevin import LangevinSampler
from samplers.time_grids import TimeGrid
from sampling import AnnealedLangevin, NoPredictor, PCSampler
from sde_lib import VESDE
from training import loop
from tutorial import common


def share(x: jax.Array) -> float:
  """How many samples belong to the smaller of the two Gaussians, which has 0.2 of the data."""
  return float((np.asarray(x).sum(1) < 0).mean())


def annealed(sigma_max: float, n: int) -> float:
  """The share that annealed Langevin dynamics gives from level sigma_max on, by true scores."""
  data = distribution('two_gaussians', 2)
  ratio = (sigma_max / 0.1) ** (1 / 9)
  levels = num_scales(sigma_max, 0.1, min(ratio, 1.7))
  sde = VESDE(sigma_min=0.1, sigma_max=sigma_max)
  sampler = PCSampler(sde, NoPredictor(), AnnealedLangevin(0.2, 50), TimeGrid(levels, eps=0.0))
  x, _ = sampler(jax.random.key(0), data.score_fn(sde), (n, 2))
  return share(x)


def mixing(axes: list[Axes]) -> list[str]:
  """Fig. 3 of Song & Ermon 2019: weights by plain and by annealed Langevin dynamics."""
  data, n = distribution('two_gaussians', 2), 2000
  sde = VESDE(sigma_min=0.1, sigma_max=8.0)
  score_fn = data.score_fn(sde)
  exact = data.sample(jax.random.key(1), n)
  plain, nfe = LangevinSampler(sde, 0.0, 0.1, 1000)(jax.random.key(2), score_fn, (n, 2))
  sampler = PCSampler(sde, NoPredictor(), AnnealedLangevin(0.2, 100), TimeGrid(10, eps=0.0))
  cooled, cooled_nfe = sampler(jax.random.key(2), score_fn, (n, 2))
  rows = (
    ('data', exact, 0),
    ('Langevin dynamics', plain, nfe),
    ('annealed Langevin dynamics', cooled, cooled_nfe),
  )
  for ax, (name, x, _) in zip(axes, rows, strict=True):
    common.scatter(ax, x, 9.0, f'{name}: {share(x):.2f}')
  return ['share of the smaller mode, true scores (0.2 of the data):'] + [
    f'  {name:27} {share(x):.3f}, {n_evaluations} evaluations' for name, x, n_evaluations in rows
  ]


def first_level(ax: Axes) -> list[str]:
  """Technique 1: the share that is found, by the first level over the largest distance."""
  points = load('two_gaussians', 'test', 2).points[:2000]
  distance = largest_distance(points)
  factors = np.array([0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5])
  shares = [annealed(factor * distance, 2000) for factor in factors]
  ax.semilogx(factors, shares, 'o-')
  ax.axhline(0.2, color='k', lw=0.8)
  ax.set(xlabel='sigma_max / largest distance')
  ax.set_title('share of the smaller mode', fontsize=9)
  rows = ', '.join(f'{s:.2f} at {f:g}' for f, s in zip(factors, shares, strict=True))
  return [f'share by sigma_max, in units of the largest distance {distance:.1f}: {rows}']


def ratios(ax: Axes) -> list[str]:
  """Techniques 1, 2 and 4 on the digits that come with the code."""
  source = sources.load('digits', 'train', image_size=8, num_channels=1)
  images = source.gather(np.arange(len(source))) / np.float32(255)
  choice = recommend(images, n_steps=5)
  epsilon = np.geomspace(0.05, 20, 200) * choice.epsilon
  ratio, sigma = choice.ratio, choice.sigma_min
  for n_steps in (1, 5, 20):
    values = [variance_ratio(e, sigma, ratio, n_steps) for e in epsilon]
    ax.semilogx(epsilon / sigma**2, values, label=f'{n_steps} steps')
  ax.axvline(choice.epsilon / sigma**2, color='k', lw=0.8)
  ax.axhline(1.0, color='k', lw=0.8)
  ax.set(xlabel='epsilon / sigma_min^2', ylim=(0.9, ratio**2 + 0.1))
  ax.set_title('variance left at a level', fontsize=9)
  ax.legend(fontsize=8)
  return [
    f'digits, 64 dimensions: sigma_max {choice.sigma_max:.2f}, ratio {choice.ratio:.3f}, '
    f'{choice.num_scales} levels, epsilon {choice.epsilon:.2e}, snr {choice.snr:.3f}'
  ]


def averaging(ax: Axes) -> list[str]:
  """Technique 5: the error of the learnt score with and without a moving average."""
  setup = build(ring.get_config('ncsn'))
  task, source = score_task(setup), load('ring', 'train', 2)
  held_out = load('ring', 'test', 2)
  batch = held_out.batch(np.arange(5000)) | {'mask': np.ones(5000, bool)}
  sums, key = make_held_out_loss(setup).sums, setup.keys.key('eval')
  rows = []
  start = jax.jit(task.init)(setup.keys.key('init'))
  for state, step, _ in loop.updates(
    task, make_schedule(setup.config), setup.devices, setup.keys, source, start
  ):
    pair = (state.params, state.ema_params)
    both = [sums(params, batch, key)['score_error'] for params in pair]
    rows.append((step, *(float(total) / 5000 for total in both)))
  steps, plain, averaged = np.array(rows).T
  ax.semilogy(steps, plain, label='parameters')
  ax.semilogy(steps, averaged, label='their moving average')
  ax.set(xlabel='step')
  ax.set_title('error of the score', fontsize=9)
  ax.legend(fontsize=8)
  late = slice(len(steps) // 2, None)
  return [
    'ring, error of the score in the second half of training, mean +- standard deviation:',
    f'  parameters           {plain[late].mean():.4f} +- {plain[late].std():.4f}',
    f'  their moving average {averaged[late].mean():.4f} +- {averaged[late].std():.4f}',
  ]


def draw() -> tuple[Figure, list[str]]:
  figure, axes = common.panels(3, rows=2)
  lines = mixing(list(axes[0])) + first_level(axes[1][0]) + ratios(axes[1][1])
  return figure, lines + averaging(axes[1][2])
