"""The classifier of noisy images: it learns the posterior of the class, at every level of noise."""

import json

from etils import epath
import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from builders.setup import build
import builders.training
from configs import base, own
from data import sources
from data.points import Mixture
from losses import UniformTimes
from models.classifier import Classifier, ClassLogProb
import run_lib
from runtime.errors import UserError
from sde_lib import SDE, subVPSDE, VESDE
from training import loop
from training.averages import WarmingRate
from training.classifier import cross_entropy, evaluate, LEVELS, load
from training.optim import adam, LearningRate
from training.step import apply_gradients, init_state, Metrics, TrainState

KEY = jax.random.key(0)
TWO = Mixture(
  weights=jnp.array([0.3, 0.7]),
  means=jnp.array([[0.6, 0.4], [-0.5, 0.0]]),
  stds=jnp.array([0.4, 0.3]),
)


class Mlp(nn.Module):
  """Logits of the class of a point; like the real network it is told the noise of x / alpha."""

  @nn.compact
  def __call__(self, x: Array, log_ratio: Array, train: bool) -> Array:
    h = jnp.concatenate([x, log_ratio[:, None], jnp.exp(-log_ratio)[:, None] / 10], -1)
    for _ in range(2):
      h = nn.tanh(nn.Dense(16)(h))
    return nn.Dense(2)(h)


def draw(rng: Array, n: int) -> tuple[Array, Array]:
  """Points [n, 2] of the mixture, and the components [n] that they are of."""
  rng_y, rng_x = jax.random.split(rng)
  y = jax.random.bernoulli(rng_y, TWO.weights[1], (n,)).astype(jnp.int32)
  return TWO.means[y] + TWO.stds[y, None] * jax.random.normal(rng_x, (n, 2)), y


def exact(sde: SDE, x: Array, t: Array) -> Array:
  """p_t(y | x) [B, 2] by Bayes' rule."""
  alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
  variance = (alpha * TWO.stds) ** 2 + sigma**2
  squares = jnp.square(x[:, None] - alpha[:, None] * TWO.means).sum(-1)
  return jax.nn.softmax(jnp.log(TWO.weights) - jnp.log(variance) - 0.5 * squares / variance)


@pytest.mark.parametrize(('sde', 'eps'), [(VESDE(0.1, 3.0), 1e-3), (subVPSDE(0.1, 6.0), 0.05)])
def test_training_finds_the_posterior(sde, eps):
  classifier = Classifier(Mlp(), sde)
  tx = adam(LearningRate(0.02), beta1=0.9, eps=1e-8, weight_decay=0, grad_clip=1)

  def drawn(rng: Array, n: int) -> tuple[Array, Array, Array, Array]:
    rngs = jax.random.split(rng, 3)
    x0, y = draw(rngs[0], n)
    t = UniformTimes(eps)(rngs[1], n)
    return x0, t, jax.random.normal(rngs[2], x0.shape), y

  def step(state: TrainState, rng: Array) -> tuple[TrainState, Metrics]:
    example = drawn(rng, 512)

    def loss_fn(params: dict) -> tuple[Array, dict]:
      return cross_entropy(classifier.bind(params), *example)[0].mean(), {}

    differentiate = jax.value_and_grad(loss_fn, has_aux=True)
    return apply_gradients(state, differentiate, tx, (WarmingRate(0.99),))

  @jax.jit
  def train() -> ClassLogProb:
    state = init_state(KEY, classifier, tx, (1, 2))
    state, _ = jax.lax.scan(step, state, jax.random.split(KEY, 400))
    return classifier.bind(state.ema_params)

  @jax.jit
  def compare(log_prob: ClassLogProb) -> tuple[Array, ...]:
    x0, t, z, y = drawn(jax.random.key(1), 4000)
    x = sde.alpha(t)[:, None] * x0 + sde.sigma(t)[:, None] * z
    found, truth = jnp.exp(log_prob.of_all(x, t)), exact(sde, x, t)
    loss, correct = cross_entropy(log_prob, x0, t, z, y)
    return found, truth, y, jnp.exp(log_prob(x, t, y)), loss, correct

  found, truth, y, of_label, loss, correct = map(np.asarray, compare(train()))
  rows = np.arange(len(y))
  np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(of_label, found[rows, y], rtol=1e-5)
  np.testing.assert_allclose(loss, -np.log(of_label), rtol=1e-4, atol=1e-6)
  # A tenth of what the prior, the best guess without x, is away from the posterior.
  assert np.abs(found - truth).mean() < 0.1 * np.abs(TWO.weights - truth).mean()
  assert loss.mean() - -np.log(truth[rows, y]).mean() < 0.01
  assert correct.mean() == pytest.approx((truth.argmax(-1) == y).mean(), abs=0.01)


class Guess(nn.Module):
  """A network that finds class 0 the most probable of ten, with probability 1/2, everywhere."""

  def __call__(self, x: Array, log_ratio: Array, train: bool) -> Array:
    one = jnp.where(jnp.arange(10) == 0, jnp.log(9.0), 0.0)
    return jnp.broadcast_to(one, (len(x), 10))


def test_every_held_out_image_counts_once_at_each_level():
  config = own.digits(base.vp('ddpmpp'))
  config.eval.batch_size = 128
  setup = build(config)
  guessing = Classifier(Guess(), setup.model.sde)
  held_out = sources.load('digits', 'test', image_size=8, num_channels=1)
  report = evaluate(
    guessing,
    setup.codec,
    {},
    held_out,
    builders.training.classifier_times(setup),
    128,
    setup.devices,
    setup.keys,
  )
  share = 27 / 297  # zeros among the last 297 digits
  loss = share * np.log(2) + (1 - share) * np.log(18)
  assert report['images'] == 297 and len(report['levels']) == LEVELS
  for row in (report, *report['levels']):
    assert row['accuracy'] == pytest.approx(share) and row['loss'] == pytest.approx(loss, rel=1e-5)
  edges = [row['t'] for row in report['levels']]
  assert edges[0][0] == pytest.approx(config.training.eps) and edges[-1][1] == 1
  assert [row[1] for row in edges[:-1]] == [row[0] for row in edges[1:]]


def tiny_config(**fields) -> ConfigDict:
  config = own.digits(base.ve('ncsnpp'))
  config.training.update(log_freq=2, eval_freq=2, snapshot_freq=4, snapshot_freq_for_preemption=2)
  config.classifier.update(batch_size=16, n_iters=6, warmup=0)
  config.update_from_flattened_dict(fields)
  return config


class Linear(nn.Module):
  """In the place of the Wide ResNet, which takes long to compile."""

  num_outputs: int
  blocks_per_group: int
  channel_multiplier: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array, log_ratio: Array, train: bool) -> Array:
    return nn.Dense(self.num_outputs)(x.reshape(len(x), -1)) * log_ratio[:, None]


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
  """It leaves checkpoints, metrics and a report, and what sampling loads."""
  monkeypatch.setattr(builders.training, 'WideResnet', Linear)
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  report = run_lib.train_classifier(tiny_config(), str(whole))
  with monkeypatch.context() as patch:
    patch.setattr(loop.Stop, 'agreed', lambda self, step, every: step == 3)
    with pytest.raises(SystemExit):
      run_lib.train_classifier(tiny_config(), str(parts))
  assert run_lib.train_classifier(tiny_config(), str(parts)) == report
  setup = build(tiny_config())
  chosen = tiny_config().to_dict(), builders.training.classifier_task(setup)
  params = [load(epath.Path(r), *chosen, setup.devices, setup.keys) for r in (whole, parts)]
  jax.tree.map(np.testing.assert_array_equal, *params)

  folder = whole / 'classifier'
  assert sorted(p.name for p in (folder / 'checkpoints').iterdir()) == ['4', '6']
  lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  for name in ('accuracy', 'eval_accuracy', 'loss', 'eval_loss'):
    assert [line['step'] for line in lines if name in line] == [2, 4, 6]
  assert json.loads((folder / 'report.json').read_text()) == report
  x, t, y = jnp.zeros((2, 8, 8, 1)), jnp.array([0.1, 0.9]), jnp.array([3, 4])
  log_prob = builders.training.make_classifier(setup).bind(params[0])(x, t, y)
  assert log_prob.shape == (2,) and log_prob.dtype == jnp.float32 and (log_prob < 0).all()

  with pytest.raises(UserError, match='channel_multiplier: 1 there, 2 now'):
    other = tiny_config(**{'classifier.channel_multiplier': 2}).to_dict()
    load(epath.Path(whole), other, chosen[1], setup.devices, setup.keys)


def test_a_classifier_that_is_not_there_is_told(tmp_path):
  setup = build(tiny_config())
  task = builders.training.classifier_task(setup)
  with pytest.raises(UserError, match=r'train it first \(--mode train_classifier\)'):
    load(epath.Path(tmp_path), tiny_config().to_dict(), task, setup.devices, setup.keys)


def test_a_classifier_for_other_noise_than_the_models_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(tiny_config().to_dict()))
  with pytest.raises(UserError, match=r'sigma_max: 5.0 there, 50.0 now'):
    run_lib.train_classifier(tiny_config(**{'model.sigma_max': 50.0}), str(tmp_path))
