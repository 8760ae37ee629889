"""What a learned dequantisation brings: a trained model's bits/dim with it, and with uniform noise.

Images are whole numbers y, and a score model has a density p, per level, of x = y + u with u in
[0, 1)^D. For any density q(u | y) of that noise (Ho et al. 2019, https://arxiv.org/abs/1902.00275)

    log P(y) = log E_q[p(y + u) / q(u | y)] >= E_q[log p(y + u) - log q(u | y)],

with equality if q is what p itself says of u. Uniform noise is q = 1. Here every value has a
logistic law in logit space, whose place and scale a small network reads off the image:

    u = sigmoid(place + scale logit(v)),  v uniform in (0, 1);

place 0 and scale 1, what a new network says, is uniform noise. The model stays what it is. The
gradient of its log p, which the network of the noise is trained with, is its score at eps. In Song,
Durkan, Murray & Ermon 2021, https://arxiv.org/abs/2101.09258, q is a flow, whose values depend on
each other as well, trained for their bound. Both laws get the same v, so the gain is of the same
images and noise.

  python -m benchmarks.dequantization WORKDIR [--steps N] [--images N] [--json PATH]
"""

import dataclasses
import math
import tempfile
from typing import Any

from etils import epath
import flax.linen as nn
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common, runs
from builders.data import load_source
from builders.evaluation import make_bits_per_dim, make_bound
from builders.setup import Setup
from data.codec import Codec, level_noise
from models.score import Params
import run_lib
from sde_lib import ScoreFn

BATCH, RATE, AVERAGE = 64, 2e-3, 0.99
_EDGE = 1e-6  # v is kept so far from 0 and 1, where its logit would be infinite
_CALM = 3.0  # the largest absolute value of a scale's logarithm


class PlaceAndScale(nn.Module):
  """Of each value's noise, [B, H, W, C, 2], from images [B, H, W, C]; the scale as its logarithm.

  Attributes:
    features: of its hidden layers.
    depth: how many of them there are, each a 3x3 convolution.
  """

  features: int = 64
  depth: int = 4

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = nn.Conv(self.features, (3, 3))(x)
    for _ in range(self.depth - 1):
      h = h + nn.Conv(self.features, (3, 3))(nn.swish(nn.LayerNorm()(h)))
    last = nn.Conv(2 * x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros)
    return last(nn.swish(nn.LayerNorm()(h))).reshape(*x.shape, 2)


NETWORK = PlaceAndScale()


def noise_of(told: Array, v: Array) -> tuple[Array, Array]:
  """u [B, ...] and log q(u) [B] for place and scale, by uniform numbers v [B, ...]."""
  place, log_scale = told[..., 0], _CALM * jnp.tanh(told[..., 1] / _CALM)
  v = jnp.clip(v, _EDGE, 1 - _EDGE)
  h = place + jnp.exp(log_scale) * (jnp.log(v) - jnp.log1p(-v))
  # q = dv / du, and du / dv = scale u (1 - u) / (v (1 - v)).
  log_q = jnp.log(v) + jnp.log1p(-v) - log_scale - jax.nn.log_sigmoid(h) - jax.nn.log_sigmoid(-h)
  return jax.nn.sigmoid(h), log_q.reshape(len(v), -1).sum(-1)


@dataclasses.dataclass(frozen=True, eq=False)  # compiled as a function, which has to be hashable
class Learned:
  """Noise of the law that a network reads off the images; see `evaluation.bits_per_dim`."""

  codec: Codec
  params: Params

  def __call__(self, rngs: Array, images: Array) -> tuple[Array, Array]:
    return _draw(self.codec, self.params, images, jax.vmap(level_noise)(rngs, images))


def _draw(codec: Codec, params: Params, images: Array, v: Array) -> tuple[Array, Array]:
  u, log_q = noise_of(NETWORK.apply(params, codec.scaled(images)), v)
  return codec.between_levels(images, u), log_q


def loss(
  params: Params, images: Array, rng: Array, score_fn: ScoreFn, eps: float, codec: Codec
) -> Array:
  """What has the gradient of E[log q - log p], per value: that of log p is the score at eps."""
  x0, log_q = _draw(codec, params, images, jax.random.uniform(rng, images.shape))
  score = jax.lax.stop_gradient(score_fn(x0, jnp.full(len(x0), eps)))
  return (log_q - (score * x0).reshape(len(x0), -1).sum(-1)).mean() / codec.dim


def train(setup: Setup, model_params: Params, steps: int) -> Params:
  """The averaged parameters of the law, for a model that is what it is."""
  source, eps = load_source(setup.config, 'train'), setup.config.training.eps
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(RATE, steps))
  )

  @jax.jit
  def step(state: Any, images: Array, rng: Array, score_fn: ScoreFn) -> Any:
    params, average, moments = state
    gradient = jax.grad(loss)(params, images, rng, score_fn, eps, setup.codec)
    updates, moments = tx.update(gradient, moments, params)
    params = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda a, p: AVERAGE * a + (1 - AVERAGE) * p, average, params)
    return params, average, moments

  params = NETWORK.init(jax.random.key(0), jnp.zeros((1, *setup.codec.model_shape)))
  state, rows = (params, params, tx.init(params)), np.random.default_rng(0)
  score_fn = setup.model.bind(model_params)
  for i in range(steps):
    images = source.batch(rows.integers(0, len(source), BATCH))['data']
    rng = jax.random.fold_in(jax.random.key(1), i)
    state = step(state, jnp.asarray(images), rng, score_fn)
  return state[1]


def measure(workdir: str, steps: int, n_images: int) -> dict[str, dict[str, float]]:
  """For the exact value and the bound: with each noise, and how much less the learned one gives."""
  setup, params = run_lib.load(workdir)
  learned, results = Learned(setup.codec, train(setup, params, steps)), {}
  for name, whole in (('bound', make_bound(setup)), ('exact', make_bits_per_dim(setup))):
    source = runs.FirstImages(whole.source, n_images)
    uniform = dataclasses.replace(whole, source=source, repeats=1, batch_size=len(source))
    each = {}
    for noise, bits in (
      ('uniform', uniform),
      ('learned', dataclasses.replace(uniform, dequantization=learned)),
    ):
      with tempfile.TemporaryDirectory() as folder:
        each[noise] = bits.of_images(params, epath.Path(folder))[0].mean((0, 1))
    gain = each['uniform'] - each['learned']
    results[name] = {noise: float(values.mean()) for noise, values in each.items()} | {
      'gain': float(gain.mean()),
      'error': float(gain.std(ddof=1) / math.sqrt(len(gain))),
    }
  return results


def table(results: dict[str, dict[str, float]]) -> str:
  """What `measure` returns, as text."""
  rows = [
    [name, *(f'{of[noise]:.4f}' for noise in ('uniform', 'learned')),
     f'{of["gain"]:+.4f} ± {of["error"]:.4f}']
    for name, of in results.items()
  ]  # fmt: skip
  return common.table(['bits/dim', 'uniform noise', 'learned noise', 'gain'], rows)


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument('workdir', help='of the trained model')
  parser.add_argument('--steps', type=int, default=1000, help='of training the noise (1000)')
  parser.add_argument('--images', type=int, default=100, help='held-out ones, the first (100)')
  args = parser.parse_args()
  results = measure(args.workdir, args.steps, args.images)
  common.report(table(results), results, args.json)


if __name__ == '__main__':
  main()
