"""EDM as the consistency models of CIFAR-10 released it: network, loss, sampler, training steps.

golden/README.md says what the arrays are. Tolerances are ten times what float32 and float64 of the
released code differ by, as a part of the largest value.
"""

from pathlib import Path

from flax import serialization, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from builders.setup import build, Setup
from configs.edm import cifar10
from losses import dsm_loss
from runtime.errors import UserError
from samplers import base
from samplers.base import GridSampler
from samplers.edm import EDM
from samplers.time_grids import Karras, TimeGrid
from training import released_checkpoints
from training.averages import HalfLife
from training.step import optimize, TrainState

GOLDEN = Path(__file__).parent / 'golden'
CHECKPOINT = GOLDEN / 'jcm_edm.checkpoint'


def config_of_case():
  config = cifar10.get_config('ncsnpp')
  config.model.update(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0)
  config.data.image_size = 16
  config.ema.ramp_up = 0.0  # as there
  return config


@pytest.fixture(scope='module')
def setup() -> Setup:
  return build(config_of_case())


@pytest.fixture(scope='module')
def golden() -> dict[str, np.ndarray]:
  with np.load(GOLDEN / 'jcm_edm.npz') as arrays:
    return dict(arrays)


def load(setup: Setup, path: Path = CHECKPOINT) -> TrainState:
  shape = (1, *setup.data_shape)
  return released_checkpoints.load(path, setup.model, shape, setup.tx, 2 ** (-512 / 500_000))


@pytest.fixture(scope='module')
def state(setup) -> TrainState:
  return load(setup)


def check(got, expected: np.ndarray, tolerance: float) -> None:
  np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_network_and_its_readings(setup, state, golden):
  """F, the denoiser and the score, at noise from 0.002 to 80."""
  x, t = (jnp.asarray(golden[f'wrappers/{name}']) for name in ('x', 't'))
  score_fn = setup.model.bind(state.ema_params)

  @jax.jit
  def read(x, t):
    scaled = x * golden['wrappers/denoiser/c_in'][:, None, None, None]
    return score_fn._network(t)(scaled)[0], score_fn.denoised(x, t), score_fn(x, t)

  output, denoised, score = read(x, t)
  check(output, golden['wrappers/network_out/params_ema'], 2e-4)
  check(denoised, golden['wrappers/denoiser/params_ema'], 2e-4)
  check(score, golden['wrappers/score/params_ema'], 2e-4)
  label = setup.model.conditioning(setup.model.chain, t)
  np.testing.assert_allclose(label, golden['wrappers/denoiser/c_noise'], rtol=2e-6, atol=1e-7)
  sde = setup.model.sde
  np.testing.assert_allclose(sde.diffusion_coef(t), golden['wrappers/sde/diffusion'], rtol=1e-6)
  np.testing.assert_allclose(sde.prior_logp(x), golden['wrappers/sde/prior_logp'], rtol=1e-5)


def test_loss_and_its_gradient(setup, state, golden):
  """The released loss is the sum over pixels, ours half of it."""
  data, z, t = (jnp.asarray(golden[f'dsm/{name}']) for name in ('data', 'z', 't'))

  def loss(params):
    each = dsm_loss(setup.objective, setup.model.bind(params), data, t, z)
    return 2 * each.mean(), 2 * each

  (mean, each), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
  check(each, golden['dsm/each'], 5e-6)
  check(mean, golden['dsm/mean'], 5e-6)
  gradient = traverse_util.flatten_dict(gradient, sep='/')
  norms = [float(jnp.linalg.norm(gradient[name])) for name in golden['dsm/leaf_names']]
  check(norms, golden['dsm/leaf_norms'], 1e-5)
  for name in ('Conv_1/kernel', 'Dense_0/kernel'):
    check(gradient[name], golden[f'dsm/grad/{name}'], 1e-4)


@pytest.mark.parametrize('n', [5, 18])
@pytest.mark.parametrize('order', [1, 2])
@pytest.mark.parametrize('noise_removal', [False, True])
def test_samples(setup, state, golden, n, order, noise_removal, monkeypatch):
  """The Heun sampler and Euler's, over grids of n times from 80 to 0.002, and then to 0."""
  prior = 80.0 * jnp.asarray(golden['samples/prior_z'])
  monkeypatch.setattr(base, 'draw_prior', lambda sde, rng, shape, sharding: prior)
  grid = TimeGrid(n, 0.002, Karras(7.0))
  np.testing.assert_allclose(grid.times(setup.model.sde), golden[f'samples/grid__N{n}'], rtol=4e-6)
  sampler = GridSampler(setup.model.sde, EDM(order), grid, noise_removal)
  x, nfe = sampler(jax.random.key(0), setup.model.bind(state.ema_params), prior.shape)
  assert nfe == order * (n - 1) + noise_removal
  name = f'samples/{("euler", "heun")[order - 1]}__N{n}__denoise{int(noise_removal)}'
  check(x, golden[name], 1e-4)


def test_the_config_samples_as_published(setup):
  """18 times, 35 evaluations."""
  sampler = setup.sampler
  assert sampler == GridSampler(setup.model.sde, EDM(2, 0.0, 0.0, 1e9, 1.0), TimeGrid(
    18, 0.002, Karras(7.0)))  # fmt: skip


def test_training_goes_on_from_a_released_checkpoint(setup, state, golden):
  """Three steps of Adam, and of the moving average, from step 1234 on."""

  @jax.jit
  def step(state, image, t, z):
    return optimize(
      state, image, t, z, jax.random.key(0),
      model=setup.model, objective=setup.objective, tx=setup.tx,
      averages=(HalfLife(500_000, 512, ramp_up=0),),
    )  # fmt: skip

  for i, expected in enumerate(golden['train/losses']):
    t = jnp.exp(1.2 * golden['train/t_normal'][i] - 1.2)
    state, metrics = step(state, golden['train/image'][i], t, golden['train/z'][i])
    np.testing.assert_allclose(2 * metrics['loss'], expected, rtol=5e-6)
  assert int(state.step) == int(golden['train/step'])
  for part, tree in (('params', state.params), ('params_ema', state.ema_params)):
    for name, value in traverse_util.flatten_dict(tree, sep='/').items():
      expected = golden[f'train/{part}/{name}']
      np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=f'{part} {name}')


def test_what_is_no_diffusion_model_is_refused(setup, tmp_path):
  content = serialization.msgpack_restore(CHECKPOINT.read_bytes())
  path = tmp_path / 'checkpoint_1'
  path.write_bytes(serialization.to_bytes(content | {'target_params': content['params']}))
  with pytest.raises(UserError, match='it is a consistency model'):
    load(setup, path)
  path.write_bytes(serialization.to_bytes(content | {'opt_state': {'0': {}, '1': {}, '2': {}}}))
  with pytest.raises(UserError, match='it was not Adam'):
    load(setup, path)
