"""Chapter 9: consistency models (Song et al. 2023), which jump to the end of the flow."""

import jax
from jax import Array
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from builders.setup import Setup
from configs.toy import ring
from data import points
from main import default_workdir
from models.score import ModelScore
import run_lib
from samplers.base import GridSampler
from samplers.consistency import ConsistencySampler
from samplers.edm import EDM
from samplers.time_grids import Karras, TimeGrid
from sde_lib import SDE
from tutorial import common
from tutorial.sdes import shares_error

TEACHER = ('configs/toy/ring.py', 'edm')
STUDENT = {
  'sampling.method': 'consistency',
  'sampling.num_steps': 1,
  'training.time_mean': -1.1,
  'training.time_std': 2.0,
  'training.n_iters': 8000,
  'training.snapshot_freq': 8000,
  'training.snapshot_sampling': False,
  'optim.optimizer': 'RAdam',
  'optim.lr': 2e-3,
  'optim.warmup': 0,
  'optim.decay': 'cosine',
}
METHODS = {
  'cd': {'distill.num_steps': 40, 'distill.distance': 'l2'},
  'ict': {'distill.start_steps': 10, 'distill.end_steps': 80},
  'ect': {},
}
NAMES = {
  'cd': 'distillation',
  'ict': 'improved training',
  'ect': 'easy tuning',
}
STEPS = ('one step', 'two steps')
N, EPS, SECOND = 4000, 0.002, 1.5  # SECOND: the time of the second of two steps


def student(method: str) -> tuple[Setup, ModelScore]:
  """A consistency model of the ring, from its workdir, where it is trained if it is not yet."""
  teacher = default_workdir(*TEACHER)
  config = ring.get_config(TEACHER[1])
  config.update_from_flattened_dict(STUDENT | {'distill.method': method} | METHODS[method])
  run_lib.distill(config, f'{teacher}-{method}', '' if method == 'ict' else teacher)
  setup, params = run_lib.load(f'{teacher}-{method}')
  return setup, setup.model.bind(params)


def flow(sde: SDE, x: Array, times: np.ndarray) -> np.ndarray:
  """The probability flow of the true score through x at the first of n times: paths [n, N, 2].

  Heun's method between the times, which are close.
  """
  score_fn = points.distribution('ring', 2).score_fn(sde)

  def slope(x: Array, t: Array) -> Array:
    return sde.probability_flow(score_fn, x, jnp.full(len(x), t))

  def step(x: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
    t, s = pair
    first = slope(x, t)
    x += (s - t) / 2 * (first + slope(x + (s - t) * first, s))
    return x, x

  pairs = jnp.float32(times[:-1]), jnp.float32(times[1:])
  return np.concatenate([x[None], jax.jit(lambda x: jax.lax.scan(step, x, pairs)[1])(x)])


def draw_flow(ax: Axes, paths: np.ndarray) -> None:
  """Paths, in the colours of the modes where they end."""
  modes = np.asarray(points.distribution('ring', 2).means)
  for path in paths.swapaxes(0, 1)[:60]:
    k = np.square(path[-1] - modes).sum(-1).argmin()
    ax.plot(*path.T, color=f'C{k}', lw=0.7)
    ax.plot(*path[-1], 'o', ms=2.5, color=f'C{k}')
  common.frame(ax, 6.0, 'paths of the probability flow, and their ends')


def draw_jumps(ax: Axes, score_fn: ModelScore, paths: np.ndarray, times: np.ndarray) -> None:
  """From points along paths that bend, to where the consistency function says that these end."""
  shown = [path[np.abs(path).max(1) < 5.8] for path in paths.swapaxes(0, 1)[:400]]
  chosen = list[int]()
  for k in np.argsort([-_detour(path) for path in shown])[25:]:  # not those between two modes
    if all(np.linalg.norm(shown[k][-1] - shown[j][-1]) > 1 for j in chosen):
      chosen.append(k)
  for colour, k in enumerate(chosen[:6]):
    path, later = shown[k], times[-len(shown[k]) :]
    gone = np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))
    at = np.searchsorted(gone, gone[-1] * np.array([0.02, 0.25, 0.5, 0.75]))
    ends = score_fn.consistency(jnp.asarray(path[at]), jnp.float32(later[at]), EPS)
    ax.plot(*path.T, color='0.8', lw=3, zorder=0)
    for start, end in zip(path[at], np.asarray(ends), strict=True):
      style = {'arrowstyle': '->', 'color': f'C{colour}', 'lw': 0.9, 'shrinkA': 2, 'shrinkB': 0}
      ax.annotate('', end, start, arrowprops=style)
    ax.plot(*path[at].T, 'o', ms=3.5, color=f'C{colour}')
    ax.plot(*path[-1], 'kx', ms=6, mew=1.5)
  common.frame(ax, 6.0, f'jumps of {NAMES["cd"]}; x: where the path ends')


def _detour(path: np.ndarray) -> float:
  """How far a path [n, 2] is from the straight line between its ends, at most."""
  away, chord = path - path[0], path[-1] - path[0]
  across = away[:, 0] * chord[1] - away[:, 1] * chord[0]
  return float(np.abs(across).max() / np.linalg.norm(chord))


def draw() -> tuple[Figure, list[str]]:
  figure, axes = common.panels(3, rows=2)
  of_teacher, teacher = common.trained(*TEACHER)
  sde = of_teacher.model.sde
  times = TimeGrid(400, EPS, Karras()).times(sde)
  paths = flow(sde, sde.prior_sampling(jax.random.key(0), (N, 2)), times)
  students = {method: student(method)[1] for method in METHODS}
  draw_flow(axes[0][0], paths)
  draw_jumps(axes[0][1], students['cd'], paths, times)

  data = points.distribution('ring', 2).sample(jax.random.key(5), N)
  lines = [
    'ring: how far jumps from T = 20 end from the end of the flow; weights of the modes in',
    f'samples, total variation from the truth (of as many data: {shares_error(data):.3f})',
  ]
  for method, score_fn in students.items():
    jump = jax.jit(lambda score_fn, x, t: score_fn.consistency(x, jnp.full(len(x), t), EPS))
    away = [
      float(np.linalg.norm(jump(score_fn, x, jnp.float32(t)) - paths[-1], axis=-1).mean())
      for x, t in zip(paths[::10], times[::10], strict=True)
    ]
    axes[0][2].plot(times[::10], away, label=NAMES[method])
    found = []
    for n, later in enumerate(((), (SECOND,))):
      x, nfe = ConsistencySampler(sde, EPS, later)(jax.random.key(0), score_fn, (N, 2))
      found.append(f'{shares_error(np.asarray(x)):.3f} in {nfe}')
      if method == 'cd':
        common.scatter(axes[1][n], np.asarray(x), 4.5, f'{NAMES[method]}, {STEPS[n]}')
    lines.append(f'  {NAMES[method]:18} {away[0]:.3f}   {", ".join(found)} evaluations')
  axes[0][2].set(xscale='log', yscale='log', xlabel='t')
  axes[0][2].set_title('distance of a jump from the end of the flow', fontsize=9)
  axes[0][2].legend(fontsize=8)
  found = []
  for n in (2, 18):
    sampler = GridSampler(sde, EDM(2), TimeGrid(n, EPS, Karras()))
    x, nfe = sampler(jax.random.key(0), teacher, (N, 2))
    found.append(f'{shares_error(np.asarray(x)):.3f} in {nfe}')
  lines.append(f'  {"teacher, by Heun":18} {"":5}   {", ".join(found)} evaluations')
  common.scatter(axes[1][2], np.asarray(x), 4.5, f'teacher, {nfe} evaluations')
  return figure, lines
