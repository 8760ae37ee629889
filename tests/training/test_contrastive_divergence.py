"""Contrastive divergence on a small energy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.codec import PointCodec
from data.points import distribution
from losses import Objective, OneTime
from models import score
from models.mlp import MLP
from models.preconditioning import PRECONDITIONINGS
from models.score import ScoreModel
from sde_lib import VESDE
from training import contrastive_divergence
from training.averages import ConstantRate
from training.contrastive_divergence import ContrastiveDivergence

KEY = jax.random.key(0)
SDE = VESDE(0.1, 3.0)
NET = MLP(nf=32, num_layers=1, conditional=False)
MODEL = ScoreModel(NET, SDE.chain(1000), score.log_sigma, PRECONDITIONINGS['energy'], True, True)
DIVERGENCE = ContrastiveDivergence(n_steps=5, step_size=0.02, buffer_size=300)
TX = optax.adam(3e-3)
CHOICES = {'model': MODEL, 'objective': Objective(SDE, OneTime(1e-5)), 'divergence': DIVERGENCE}
CHOICES |= {'codec': PointCodec((2,))}
DATA = distribution('two_moons', 2)


@pytest.fixture(scope='module')
def step():
  return jax.jit(
    lambda state, batch: contrastive_divergence.train_step(
      state, batch, KEY, tx=TX, averages=(ConstantRate(0.99),), **CHOICES
    )
  )


@pytest.fixture(scope='module')
def start():
  return contrastive_divergence.init_state(KEY, MODEL, TX, (1, 2), DIVERGENCE)


def batch(k: int) -> dict[str, jax.Array]:
  return {'data': DATA.sample(jax.random.key(k), 64)}


def test_only_the_samples_of_a_step_are_replaced(step, start):
  state, metrics = step(start, batch(0))
  changed = (np.asarray(state.replay) != np.asarray(start.replay)).any(1)
  assert changed.sum() == 64 and start.replay.shape == (300, 2)
  assert int(state.step) == 1 and np.isfinite(metrics['energy_gap'])
  # They begin with the spread of the prior, 3.
  assert abs(float(start.replay.std()) / 3 - 1) < 0.15


def test_a_step_depends_on_its_number_and_the_key_alone(step, start):
  state, _ = step(start, batch(0))
  one, _ = step(state, batch(1))
  copied = jax.tree.map(lambda x: jnp.asarray(np.array(x)), state)  # as a checkpoint gives it back
  two, _ = step(copied, batch(1))
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_training_lowers_the_energy_of_data_and_samples_come_to_them(step, start):
  state = start
  for k in range(300):
    state, _ = step(state, batch(k))
  x, t = DATA.sample(jax.random.key(999), 1000), jnp.zeros(1000)
  far = 3 * jax.random.normal(KEY, (1000, 2))

  def ratio(state) -> float:
    energy = MODEL.bind(state.params).energy
    return float(energy(x, t).mean() / energy(far, t).mean())

  def distance(points) -> float:
    return np.linalg.norm(np.asarray(points)[:, None] - np.asarray(x), axis=-1).min(1).mean()

  assert ratio(state) < 0.2 * ratio(start)
  assert distance(state.replay) < 0.5 * distance(start.replay)


def test_samples_of_the_model_have_no_gradient_on_average():
  """With x- drawn like x+, the gradient of the gap is zero but for chance."""
  score_fn = MODEL.bind(MODEL.init(KEY, (1, 2)))
  t = jnp.zeros(20_000)

  def gap(params, positive, negative):
    f = MODEL.bind(params)
    return f.energy(positive, t).mean() - f.energy(negative, t).mean()

  x = jax.random.normal(KEY, (2, 20_000, 2))
  same = optax.tree.norm(jax.grad(gap)(score_fn.params, *x))
  other = optax.tree.norm(jax.grad(gap)(score_fn.params, x[0], 2 * x[1]))
  assert same < 0.1 * other


def test_negative_samples_are_langevin_dynamics():
  """From far away they move down the energy."""
  score_fn = MODEL.bind(MODEL.init(KEY, (1, 2)))
  x = 3 * jax.random.normal(KEY, (500, 2))
  moved = ContrastiveDivergence(n_steps=40, step_size=0.01).sample(
    KEY, score_fn, x, t := jnp.zeros(500)
  )
  assert score_fn.energy(moved, t).mean() < 0.3 * score_fn.energy(x, t).mean()
