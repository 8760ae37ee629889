"""Chapter 3: from a score to samples: Langevin dynamics, its bias, and SGLD."""

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from data.points import Gaussian
from samplers.langevin import langevin_step, mala_state, mala_step, MALAState
from sde_lib import ScoreFn, VESDE
from training.sgld import polynomial_decay, TiedMeans
from tutorial import common

H = (0.01, 0.1, 0.3, 0.5)  # step sizes


def run(rng: jax.Array, score_fn: ScoreFn, x: jax.Array, h: float, adjusted: bool, steps: int):
  """x after so many Langevin steps at time 0, and the share of them that were taken."""
  t, rngs = jnp.zeros(len(x)), jax.random.split(rng, steps)

  def step(x: jax.Array, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    z = jax.random.normal(rng, x.shape)
    return langevin_step(x, score_fn(x, t), h, z)[0], jnp.ones(())

  def adjusted_step(state: MALAState, rng: jax.Array) -> tuple[MALAState, jax.Array]:
    state, taken = mala_step(rng, score_fn, state, t, h)
    return state, taken.mean()

  if adjusted:
    (x, _, _), taken = jax.lax.scan(adjusted_step, mala_state(score_fn, x, t), rngs)
  else:
    x, taken = jax.lax.scan(step, x, rngs)
  return x, taken.mean()


def biases(ax: Axes) -> list[str]:
  """Variances that Langevin dynamics leaves of a Gaussian, with and without the Metropolis test."""
  data = Gaussian.of(jnp.zeros(2), jnp.diag(jnp.array([1.0, 0.3])))
  score_fn = data.score_fn(VESDE(sigma_min=1e-4))
  start = data.sample(jax.random.key(0), 20_000)
  lines = ['N(0, diag(1, 0.3)): variances after 500 steps h    unadjusted      MALA   (taken)']
  means = {True: [], False: []}
  for h in H:
    found = {}
    for adjusted in (False, True):
      x, taken = jax.jit(run, static_argnums=(4, 5))(
        jax.random.key(1), score_fn, start, h, adjusted, 500
      )
      found[adjusted] = np.var(np.asarray(x), axis=0), float(taken)
      means[adjusted].append(found[adjusted][0][1])
    (ula, _), (mala, taken) = found[False], found[True]
    lines.append(
      f'{h:44.2f}   {ula[0]:.3f} {ula[1]:.3f}   {mala[0]:.3f} {mala[1]:.3f}   ({taken:.2f})'
    )
  line = np.linspace(0.005, 0.5, 100)
  ax.plot(line, 0.3 / (1 - line / 0.6), color='0.6', label='unadjusted, exact')
  ax.plot(H, means[False], 'o', label='unadjusted')
  ax.plot(H, means[True], 's', label='MALA')
  ax.axhline(0.3, color='k', lw=0.8)
  ax.set(xlabel='step size h', title='variance; the truth is 0.3')
  ax.title.set_fontsize(9)
  ax.legend(fontsize=8)
  return lines


def posterior(axes: list[Axes]) -> list[str]:
  """Fig. 1 of Welling & Teh: the posterior, and what SGLD draws of it."""
  example, sweeps = TiedMeans(), 10_000
  x = example.draw(jax.random.key(1), 100)
  line0, line1 = np.linspace(-1.5, 2.5, 201), np.linspace(-3.0, 3.0, 201)
  grid = np.stack(np.meshgrid(line0, line1), axis=-1).reshape(-1, 2)
  log_p = jax.jit(jax.vmap(lambda theta: example.log_posterior(theta, x)))(jnp.asarray(grid))
  p = np.asarray(jax.nn.softmax(log_p))

  schedule = polynomial_decay(0.01, 1e-4, 100 * sweeps)
  chains = jax.jit(jax.vmap(lambda seed: example.sample(seed, x, jnp.zeros(2), schedule, sweeps)))
  theta, weights = (np.asarray(v) for v in chains(jnp.arange(16)))
  weights = (weights / weights.sum()).ravel()
  theta = theta.reshape(-1, 2)

  box = (line0[0], line0[-1], line1[0], line1[-1])
  axes[0].imshow(p.reshape(201, 201), origin='lower', extent=box, aspect='auto', cmap='Blues')
  axes[0].set_title('posterior of (theta_1, theta_2)', fontsize=9)
  axes[1].hist2d(*theta.T, bins=100, range=[box[:2], box[2:]], weights=weights, cmap='Blues')
  axes[1].set_title('SGLD, 16 chains, minibatches of 1', fontsize=9)

  def moments(points: np.ndarray, w: np.ndarray) -> str:
    mean = w @ points
    std = np.sqrt(w @ (points - mean) ** 2)
    share = w[points[:, 1] > 0].sum()
    return f'{mean[0]:6.2f} {mean[1]:6.2f}  {std[0]:.2f} {std[1]:.2f}  {share:.2f}'

  return [
    'posterior of Welling & Teh: mean, standard deviation, p(theta_2 > 0)',
    f'  exact                       {moments(grid, p)}',
    f'  SGLD, steps 0.01 to 0.0001  {moments(theta, weights)}',
  ]


def draw() -> tuple[Figure, list[str]]:
  figure, axes = common.panels(3)
  lines = biases(axes[0]) + posterior(axes[1:])
  return figure, lines
