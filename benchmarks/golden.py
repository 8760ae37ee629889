"""The golden numbers of tests/golden, and how far this machine's are from them.

Those are what the released code computed: scores and losses of small networks, single steps of
samplers, solutions of an ODE. The tests hold a CPU to them; `benchmarks.accelerator` looks at
whatever device it runs on, at full and at reduced precision of products.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
import json
from pathlib import Path
from unittest import mock

from flax import traverse_util
import jax
from jax import Array
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from builders.setup import build, Setup
from configs import base
from data.points import Mixture
import likelihood
import losses
from losses import Objective
from models.score import Params
from samplers.steps import ChainStep
from sampling import CORRECTORS, PREDICTORS
from sde_lib import ScoreFn, subVPSDE, VESDE, VPSDE
from training import flat_tables
from training.flat_tables import network_parameters
from training.released_checkpoints import from_jax

FOLDER = Path(__file__).parent.parent / 'tests' / 'golden'
NETWORKS = (
  'npp_ve_cont_resid_in_fir',
  'npp_vp_cont_ddpmpp',
  'ddpm_vp_disc',
  'ncsnv2_64',
  'npp_ve_disc',
  'npp_ve_outskip_inskip_sum',
  'ncsn',
)
SDES = {'ve': VESDE, 'vp': VPSDE, 'subvp': subVPSDE}
SOLVED = ('ve', 'vp')  # of whose ODE there are solutions
# The data of the numbers of SDEs and samplers, whose score is known.
DATA = Mixture(
  weights=np.float32([0.3, 0.7]),
  means=np.float32([[[0.5, -0.2], [0.1, 0.9]], [[-0.6, 0.3], [-0.4, -0.1]]])[..., None],
  stds=np.float32([0.25, 0.15]),
)

Arrays = dict[str, np.ndarray]


def load(case: str) -> Arrays:
  """The arrays of a case, by name."""
  with np.load(FOLDER / f'{case}.npz') as arrays:
    return dict(arrays)


def config_of(arrays: Arrays) -> ConfigDict:
  """The config here of a released configuration, which is stored with the arrays as JSON."""
  released = ConfigDict(json.loads(str(arrays['config'])))
  if 'num_classes' in released.model:
    del released.model.num_classes  # noise scales of NCSN there, classes of images here
  make = {'vesde': base.ve, 'vpsde': base.vp}[released.training.sde]
  config = make(released.model.name)
  for section in config:
    if section in released and isinstance(config[section], ConfigDict):
      known = {k: v for k, v in released[section].items() if k in config[section]}
      config[section].update({k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})
  return config


def tree(arrays: Arrays, prefix: str) -> dict:
  """The arrays under a prefix, as a tree."""
  inside = {k.removeprefix(prefix + '/'): v for k, v in arrays.items() if k.startswith(prefix)}
  return traverse_util.unflatten_dict(inside, sep='/')


def released_state(arrays: Arrays) -> dict:
  """The released State of a case; what the case lacks of it is zero, or the moving average."""
  average = tree(arrays, 'ema')
  zeros = jax.tree.map(np.zeros_like, average)
  params = tree(arrays, 'params') or average
  mu, nu = tree(arrays, 'mu') or zeros, tree(arrays, 'nu') or zeros
  moments = jax.tree.map(lambda m, v: {'grad_ema': m, 'grad_sq_ema': v}, mu, nu)
  return {
    'step': arrays.get('step', np.int32(0)),
    'optimizer': {
      'target': params,
      'state': {'step': arrays.get('adam_step', np.int32(0)), 'param_states': moments},
    },
    'lr': np.float32(2e-4),
    'model_state': {},
    'ema_rate': np.float32(0.999),
    'params_ema': average,
    'rng': np.zeros(2, np.uint32),
  }


def parameters(arrays: Arrays, setup: Setup) -> Params:
  """The averaged parameters of a case, as those of a released checkpoint come in."""
  shapes = network_parameters(setup.model, (1, *setup.data_shape))
  average = from_jax(released_state(arrays)).ema_params
  return flat_tables.fit(average, shapes, 'moving averages')


@jax.jit
def score_of(score_fn: ScoreFn, x: Array, t: Array) -> Array:
  """The score, compiled once for all that is asked of a network."""
  return score_fn(x, t)


def errors(ours: Array, theirs: np.ndarray, *terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The absolute errors, and those relative to the largest entry of each example.

  Or relative to that of the terms of a difference, where it is larger.
  """
  a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert a.shape == b.shape
  axes = tuple(range(1, b.ndim))
  scale = np.max([np.abs(v).max(axes, keepdims=True) for v in (b, *terms)], axis=0)
  absolute = np.abs(a - b)
  return absolute, absolute / np.maximum(scale, 1e-30)


def error(ours: Array, theirs: np.ndarray) -> float:
  """The largest error, relative to the largest entry of each example."""
  return float(errors(ours, theirs)[1].max())


def loss_inputs(arrays: Arrays, setup: Setup) -> tuple[Array, Array, Array]:
  """Data, times and noise of the losses of a case."""
  x0, z, t = (jnp.asarray(arrays[f'io/{name}']) for name in ('data', 'z', 't'))
  if not setup.model.continuous:
    chain, labels = setup.model.chain, arrays['io/loss_labels']
    # SMLD counts its noise scales from the largest, DDPM its steps from the smallest.
    smld = setup.config.training.sde == 'vesde'
    t = chain.time(jnp.asarray(chain.N - 1 - labels if smld else labels))
  return x0, t, z


def mean_losses(arrays: Arrays, setup: Setup, params: Params) -> dict[str, tuple[Array, Array]]:
  """By name, the mean loss here and the released one, for each weighting and reduction."""
  inputs, found = loss_inputs(arrays, setup), {}
  score_fn = partial(score_of, setup.model.bind(params))
  for name in arrays:
    if name.startswith('io/loss_') and name != 'io/loss_labels':
      objective = Objective(
        kernels=setup.model.trained_with,
        weight=losses.by_likelihood if 'lw1' in name else losses.by_variance,
        reduce_mean='rm1' in name,
      )
      ours = losses.dsm_loss(objective, score_fn, *inputs).mean()
      found[name] = ours, arrays[name]
  return found


def network_errors(case: str) -> dict[str, float]:
  """Relative errors of the score, and of the losses, of one of `NETWORKS`."""
  arrays = load(case)
  setup = build(config_of(arrays))
  params = parameters(arrays, setup)
  score = score_of(setup.model.bind(params), arrays['io/x'], arrays['io/t'])
  of_losses = [error(*pair) for pair in mean_losses(arrays, setup, params).values()]
  return {'score': error(score, arrays['io/score_ema']), 'losses': max(of_losses)}


@contextmanager
def _given_noise(noise: Array) -> Iterator[None]:
  """Every draw that is traced is this noise."""
  with mock.patch.object(jax.random, 'normal', lambda key, shape=(), dtype=None: noise):
    yield


def step_errors(name: str) -> dict[str, float]:
  """Relative errors of single steps of predictors and correctors, for one of `SDES`.

  Of the sub-VP SDE there are no ancestral and no Langevin steps. The released code truncates times
  to an index of its tables.
  """
  arrays = load(f'step_{name}_N1000')
  chain = SDES[name]().chain(1000)
  score_fn = DATA.score_fn(chain.sde)
  x, t, noise = (jnp.float32(arrays[key]) for key in ('x', 't', 'noise'))
  i = jnp.trunc(t * (chain.N - 1))
  at = ChainStep(t, jnp.full_like(t, 1 / chain.N), i, chain)
  steps = {}
  for predictor in ('euler_maruyama', 'reverse_diffusion', 'ancestral_sampling'):
    steps[f'pred_{predictor}_pf0'] = partial(_predict, predictor)
  for corrector in ('langevin', 'ald'):
    steps[f'corr_{corrector}_n1'] = partial(_correct, corrector, float(arrays['snr']))
  found = {}
  for key, step in steps.items():
    if f'{key}_x' in arrays:
      with _given_noise(noise[0]):
        ours = jax.jit(partial(step, score_fn))(x, at)
      theirs = (arrays[f'{key}_{result}'] for result in ('x', 'xmean'))
      found[key] = max(error(a, b) for a, b in zip(ours, theirs, strict=True))
  return found


def _predict(name, score_fn, x, step):
  rng, rsde = jax.random.key(0), step.chain.sde.reverse(score_fn)
  return PREDICTORS[name]().update_fn(rng, rsde, x, step)


def _correct(name, snr, score_fn, x, step):
  rng, rsde = jax.random.key(0), step.chain.sde.reverse(score_fn)
  return CORRECTORS[name](snr, 1).update_fn(rng, rsde, x, step)


def ode_error(name: str) -> float:
  """The largest absolute error of the probability flow ODE's solutions, for one of `SOLVED`."""
  arrays = load(f'ode_{name}')
  sde = SDES[name]()
  x, _ = likelihood.decode(
    sde, DATA.score_fn(sde), jnp.asarray(arrays['z']), eps=float(arrays['eps'])
  )
  return float(errors(x, arrays['x_tol1e-05_denoise0'])[0].max())
