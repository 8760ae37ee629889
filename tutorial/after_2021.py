"""Chapter 8: what changed after 2021: EDM, straight paths, post-hoc averages, guidance."""

from etils import epath
import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
import optax

from builders.setup import Setup
from builders.training import abstract_state
from controllable_generation import Autoguidance, ClassifierFreeGuidance
from data import points
from data.points import ClassMixture, Mixture
from losses import LogNormalTimes, TimeLaw, UniformTimes
from main import default_workdir
from models.preconditioning import PRECONDITIONINGS
from models.score import ModelScore
from samplers.base import GridSampler
from samplers.edm import FlowSolver
from samplers.ode import Observer
from samplers.time_grids import TimeGrid
from sde_lib import EDMSDE, RectifiedFlow, ScoreFn, SDE, VESDE, VPSDE
from training.averages import combination
from training.checkpoints import Checkpoints
from tutorial import common

CONFIG = 'configs/toy/branches.py'
LEARNABLE = 0.05  # share of the loss, above which a noise level has something to teach
SAMPLES, LABEL = 4000, 1
RARE = 0.001  # samples are outliers where at most this share of the class has so low a density


def coefficients(ax: Axes) -> None:
  """What EDM's preconditioning multiplies with: c_skip, c_out, c_in over sigma."""
  edm = PRECONDITIONINGS['edm'].for_data(0.5)
  sigma = jnp.geomspace(1e-3, 1e2, 200)[:, None]
  one, alpha = jnp.ones_like(sigma), jnp.ones_like(sigma)
  seen = []

  def network(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    seen.append(x)
    return jnp.zeros_like(x), x

  skip = edm.denoised(network, one, alpha, sigma)
  out = edm.denoised(lambda x: (one, x), 0 * one, alpha, sigma)
  for name, values in (('c_skip', skip), ('c_out', out), ('c_in', seen[0])):
    ax.plot(sigma[:, 0], values[:, 0], label=name)
  ax.set(xscale='log', xlabel='sigma', ylim=(0, 2.1))
  ax.set_title('EDM: D = c_skip x + c_out F(c_in x)', fontsize=9)
  ax.legend(fontsize=8)


def laws(ax: Axes, data: Mixture) -> list[str]:
  """Where training draws its noise levels, and how much of the loss can be learnt there.

  Data are scaled to the standard deviation 0.5, and EDM's loss to 1 for F = 0.
  """
  std = float(np.sqrt(np.trace(data.cov()) / 2))
  scaled = Mixture(data.weights, 0.5 / std * (data.means - data.mean()), 0.5 / std * data.stds)
  x0 = scaled.sample(jax.random.key(0), 4000)
  z = jax.random.normal(jax.random.key(1), x0.shape)
  score_fn, levels = scaled.score_fn(EDMSDE()), np.geomspace(2e-3, 80.0, 40)

  @jax.jit
  def loss(sigma: jax.Array) -> jax.Array:
    """The least loss at a level, that of the true score: 1 if all that F could say is noise."""
    t = jnp.full(len(x0), sigma)
    x = x0 + sigma * z
    error = jnp.square(x + sigma**2 * score_fn(x, t) - x0).mean()
    return error * (sigma**2 + 0.25) / (0.5 * sigma) ** 2

  learnable = 1 - np.array([float(loss(sigma)) for sigma in levels])
  ax.fill_between(levels, learnable, color='0.85', label='loss that can be learnt')
  chosen: dict[str, tuple[TimeLaw, SDE]] = {
    'VE, uniform t': (UniformTimes(1e-5), VESDE(0.01, 50.0)),
    'VP, uniform t': (UniformTimes(1e-5), VPSDE()),
    'EDM, log-normal': (LogNormalTimes(EDMSDE(), eps=2e-3), EDMSDE()),
    'flow, logit-normal': (LogNormalTimes(RectifiedFlow(), 0.0, 1.0, 1e-3), RectifiedFlow()),
  }
  lines = [f'noise levels of training where more than {LEARNABLE:.0%} of the loss can be learnt:']
  edges = np.linspace(np.log(1e-3), np.log(1e3), 100)
  for name, (law, sde) in chosen.items():
    t = law(jax.random.key(2), 100_000)
    log_noise = -np.asarray(sde.log_snr(t), np.float64)
    density, _ = np.histogram(log_noise, edges, density=True)
    ax.plot(np.exp((edges[1:] + edges[:-1]) / 2), density, lw=1.2, label=name)
    share = np.mean(np.interp(log_noise, np.log(levels), learnable) > LEARNABLE)
    lines.append(f'  {name:20} {share:4.0%} of them')
  ax.set(xscale='log', xlabel='sigma / alpha', xlim=(1e-3, 1e3), ylim=(0, 0.95), yticks=[])
  ax.set_title('noise levels that training draws', fontsize=9)
  ax.legend(fontsize=7, loc='upper center', ncols=2, columnspacing=1.0)
  return lines


def paths(ax: Axes) -> list[str]:
  """The probability flow of three peaks in one dimension, from the same noise: VP, and flow."""
  data = Mixture(jnp.array([0.3, 0.4, 0.3]), jnp.array([[-1.5], [0.0], [1.5]]), jnp.full(3, 0.1))
  key, eps, few = jax.random.key(3), 1e-3, (10, 20, 40)
  lines = [
    'three peaks, true score: the share of the way that is made at t < 0.2, and the rms distance',
    f'of a method from the end of the exact path, by evaluations {"".join(f"{n:7}" for n in few)}',
  ]
  chosen: dict[str, tuple[SDE, str]] = {
    'VP': (VPSDE(), 'tab:orange'),
    'flow': (RectifiedFlow(), 'tab:blue'),
  }
  for name, (sde, colour) in chosen.items():
    seen = list[tuple[float, np.ndarray]]()

    def end(order: int, n: int, observe: Observer | None = None, sde: SDE = sde) -> jax.Array:
      sampler = GridSampler(sde, FlowSolver(order), TimeGrid(n, eps))
      return sampler(key, data.score_fn(sde), (1000, 1), observe=observe)[0]

    def note(fraction: float, x: jax.Array, seen: list[tuple[float, np.ndarray]] = seen) -> None:
      seen.append((1 - fraction, np.asarray(x)[:, 0]))

    exact = end(2, 500, note)
    t, x = (np.array(column) for column in zip(*seen, strict=True))
    way = np.abs(np.diff(x, axis=0)).sum(1)
    lines.append(f'  {name:5} {way[t[1:] < 0.2].sum() / way.sum():4.0%} of the way at t < 0.2')
    for order, method in ((1, 'Euler'), (2, 'Heun')):
      ends = (end(order, n if order == 1 else n // 2 + 1) for n in few)
      errors = ''.join(f'{jnp.sqrt(jnp.square(x - exact).mean()):7.3f}' for x in ends)
      lines.append(f'        {method:51} {errors}')
    drawn = ax.plot(t, x[:, :24], lw=0.7, color=colour)
    drawn[0].set_label(name)
  ax.set(xlabel='t', xlim=(1, 0), ylim=(-2.9, 3.6), yticks=[])
  ax.set_title('paths from noise (left) to data', fontsize=9)
  ax.legend(fontsize=8, loc='upper center')
  return lines


def averages(ax: Axes, setup: Setup, truth: ClassMixture) -> list[str]:
  """The error of averages of every width, made of the snapshots when training was over."""
  root, kept = epath.Path(default_workdir(CONFIG, 'edm')), setup.config.ema.sigma_rels
  with Checkpoints(root, create=False) as checkpoints:
    steps = checkpoints.steps()
    like = abstract_state(setup)
    there = [a for step in steps for a in checkpoints.restore_averages(step, like)[1:]]
    last = checkpoints.restore_params(steps[-1], like)
  x0, labels = truth.sample_labelled(jax.random.key(4), SAMPLES)
  rng_t, rng_z = jax.random.split(jax.random.key(5))
  t = setup.objective.times(rng_t, SAMPLES)
  x = x0 + t[:, None] * jax.random.normal(rng_z, x0.shape)
  of_class = [truth.of_class(label).score_fn(setup.model.sde) for label in (0, 1)]
  true = jnp.where(labels[:, None] == 0, of_class[0](x, t), of_class[1](x, t))

  @jax.jit
  def error(score_fn: ModelScore) -> jax.Array:
    """E |sigma (s - s_true)|^2, the loss above its least value."""
    return jnp.square(t[:, None] * (score_fn(x, t) - true)).sum(1).mean()

  widths, errors = np.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2]), []
  for width in widths:
    coefficients, _ = combination([(s, r) for s in steps for r in kept], float(width), steps[-1])
    total = optax.tree.zeros_like(last)
    for coefficient, average in zip(coefficients, there, strict=True):
      total = optax.tree.add_scale(total, float(coefficient), average)
    errors.append(float(error(setup.model.bind(total, labels=labels))))
  without = float(error(setup.model.bind(last, labels=labels)))
  ax.plot(widths, errors, '.-', label='made afterwards')
  ax.plot(kept, np.interp(kept, widths, errors), 'o', label='kept in training')
  ax.axhline(without, color='0.5', lw=0.8, ls='--', label='parameters, not averaged')
  ax.set(xlabel='width sigma_rel of the average', ylim=(0, None))
  ax.set_title('error of the score, by average', fontsize=9)
  ax.legend(fontsize=8)
  best = int(np.argmin(errors))
  return [
    f'branches, error of the score by width of the average, of {len(steps)} snapshots:',
    '  '
    + ', '.join(
      f'{widths[i]:g}: {errors[i]:.4f}' for i in sorted({0, best, *np.searchsorted(widths, kept)})
    )
    + f'; not averaged {without:.4f}',
  ]


def guidance(axes: list[Axes], setup: Setup, strong: ModelScore, truth: ClassMixture) -> list[str]:
  """Samples of one class: true, unguided, by classifier-free guidance, and by autoguidance."""
  other, weak = common.trained(CONFIG, 'guide')
  labels, data = jnp.full(SAMPLES, LABEL), truth.of_class(LABEL)
  model = setup.model.bind(strong.params, labels=labels)
  guide = other.model.bind(weak.params, labels=labels)
  chosen: dict[str, ScoreFn] = {
    'no guidance': model,
    'classifier-free, 2': ClassifierFreeGuidance(model, strong, 2.0),
    'autoguidance, 2': Autoguidance(model, guide, 2.0),
    'the guide alone': guide,
  }
  log_density = jax.jit(data.log_density)
  rare = np.quantile(log_density(data.sample(jax.random.key(6), 50_000)), RARE)
  drawn = {'truth': data.sample(jax.random.key(7), SAMPLES)}
  for name, score_fn in chosen.items():
    drawn[name], nfe = setup.sampler(jax.random.key(8), score_fn, (SAMPLES, 2))
  lines = [f'branches, {SAMPLES} samples of a class, {nfe} evaluations each:']
  lines.append(f'  {"":20} outliers   twigs missing   total variation of the branches')
  for name, x in drawn.items():
    lost = np.asarray(log_density(x)) < rare
    missing, variation = coverage(truth, np.asarray(x))
    lines.append(f'  {name:20} {lost.mean():7.1%}    {missing:4} of {TWIGS}     {variation:.3f}')
    if name == 'the guide alone':  # which no one would draw from
      continue
    ax = axes[list(drawn).index(name)]
    if name == 'truth':  # in front of the other class
      a, b = np.asarray(truth.of_class(1 - LABEL).sample(jax.random.key(9), SAMPLES)).T
      ax.scatter(a, b, s=1, linewidths=0, color='0.8')
    for of_kind, size, colour in ((~lost, 1, 'tab:blue'), (lost, 4, 'tab:orange')):
      a, b = np.asarray(x)[of_kind].T
      ax.scatter(a, b, s=size, linewidths=0, color=colour)
    ax.set(xlim=(-2.4, 3.3), ylim=(-2.9, 2.5), xticks=[], yticks=[])
    ax.set_title(f'{name}: {lost.mean():.1%} outliers', fontsize=9)
  return lines


TWIGS = 2 ** (points.BRANCHINGS - 1)  # branches of the last row, of a class


def coverage(truth: ClassMixture, x: np.ndarray) -> tuple[int, float]:
  """Of samples [N, 2]: twigs with less than half of their share, and how far all shares are off."""
  own = np.asarray(truth.classes) == LABEL
  of_branch = own.sum() // (2 * TWIGS - 1)  # normal distributions
  shares = np.asarray(truth.weights)[own].reshape(-1, of_branch).sum(1)
  shares /= shares.sum()
  away = np.square(x[:, None] - np.asarray(truth.means)[own]).sum(-1)
  found = np.bincount(away.argmin(1) // of_branch, minlength=len(shares)) / len(x)
  missing = (found[-TWIGS:] < shares[-TWIGS:] / 2).sum()
  return int(missing), float(0.5 * np.abs(found - shares).sum())


def draw() -> tuple[Figure, list[str]]:
  figure, axes = common.panels(4, rows=2)
  setup, strong = common.trained(CONFIG, 'edm')
  truth = points.distribution('branches', 2)
  assert isinstance(truth, ClassMixture)
  coefficients(axes[0][0])
  lines = laws(axes[0][1], truth)
  lines += paths(axes[0][2])
  lines += averages(axes[0][3], setup, truth)
  lines += guidance(list(axes[1]), setup, strong, truth)
  return figure, lines
