"""The objective, the training step and what surrounds it, on small problems with known answers."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

from analytic import gaussian
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
import pytest

from builders.evaluation import make_drawing
from builders.setup import build, Setup
from builders.training import abstract_state, make_schedule, score_task
from configs import base, own
from configs.toy import two_moons
from data import sources
from data.points import load as load_points
import losses
from losses import ChainTimes, Objective, UniformTimes
import run_lib
from runtime.devices import all_devices, Keys
from runtime.errors import UserError
from sde_lib import subVPSDE, VESDE, VPSDE
from training import loop
from training.checkpoints import Checkpoints
from training.step import Metrics, TrainState


def tiny_setup(make=base.vp, network: str = 'ddpmpp', **fields) -> Setup:
  config = own.digits(make(network))
  config.model.update(nf=8, ch_mult=(1,), attn_resolutions=())
  config.training.update(batch_size=4, n_iters=6, log_freq=3, eval_freq=3)
  config.training.update(snapshot_freq=6, snapshot_freq_for_preemption=6)
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
  return build(config)


@pytest.mark.parametrize('sde', [VESDE(), VPSDE(), subVPSDE()])
@pytest.mark.parametrize('continuous', [True, False])
@pytest.mark.parametrize('weighted', [True, False])
def test_loss_of_the_true_score_of_a_gaussian(sde, continuous, weighted):
  """E ||std s + z||^2 = D v / (v + std^2) with v = alpha^2 std_0^2, for the score of N(m, std_0^2).

  It is also the minimum: a score that is 5 % off is worse by (0.05 std)^2 E ||s||^2.
  """
  if weighted and not continuous:
    pytest.skip('likelihood weighting is for continuous time')
  data, n, d = gaussian(jnp.full(2, 0.5), 0.3), 20_000, 2
  keys = jax.random.split(jax.random.key(0), 3)
  x0 = 0.5 + 0.3 * jax.random.normal(keys[0], (n, d))
  kernels, times = sde, UniformTimes(1e-5)
  if not continuous:
    kernels = sde.chain(1000)
    times = ChainTimes(kernels)
  t = times(keys[1], n)
  z = jax.random.normal(keys[2], (n, d))
  alpha, std = kernels.kernel(t)
  v = (alpha * 0.3) ** 2

  def true_score(x, t, scale=1.0):
    return scale * (alpha[:, None] * 0.5 - x) / (v + std**2)[:, None]

  weigh = losses.by_likelihood if weighted else losses.by_variance
  objective = Objective(kernels, times, weigh)
  weight = (sde.diffusion_coef(t) / std) ** 2 if weighted else 1.0
  assert data.score_fn(sde)(x0, t).shape == x0.shape
  for scale, excess in ((1.0, 0.0), (1.05, 0.05**2 * std**2 / (v + std**2))):
    each = losses.dsm_loss(objective, lambda x, t, s=scale: true_score(x, t, s), x0, t, z)
    error = each - 0.5 * weight * d * (v / (v + std**2) + excess)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(n)
  mean = dataclasses.replace(objective, reduce_mean=True)
  np.testing.assert_allclose(
    losses.dsm_loss(mean, true_score, x0, t, z),
    losses.dsm_loss(objective, true_score, x0, t, z) * 2 / d,
    rtol=1e-5,
  )


def test_times_fill_their_range():
  t = UniformTimes(0.1)(jax.random.key(0), 10_000)
  assert 0.1 <= t.min() < 0.101 and 0.999 < t.max() <= 1
  chain = VPSDE().chain(50)
  steps = chain.index(ChainTimes(chain)(jax.random.key(0), 10_000))
  assert set(np.asarray(steps).tolist()) == set(range(50))


def test_steps_in_one_call_are_single_steps():
  """A scan over three training steps, and the steps one by one."""
  one, three = (tiny_setup(training__n_jitted_steps=n) for n in (1, 3))
  source = sources.load('digits', 'train', image_size=8, num_channels=1)
  task = score_task(one)
  init = jax.jit(lambda: task.init(one.keys.key('init')))
  ends = [
    list(
      loop.updates(
        task,
        make_schedule(setup.config),
        setup.devices,
        setup.keys,
        source,
        init(),
      )
    )
    for setup in (one, three)
  ]
  assert [step for _, step, _ in ends[1]] == [3, 6]
  assert ends[0][-1][0].step == ends[1][-1][0].step == 6
  ours = np.concatenate([measured['loss'] for _, _, measured in ends[1]])
  theirs = np.stack([measured['loss'] for _, _, measured in ends[0]])
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    ends[0][-1][0].params,
    ends[1][-1][0].params,
  )


def test_calls_never_run_past_what_is_due():
  """With 4 steps in a call and something due every 3, 6 or 10 steps, nothing is missed."""
  setup = tiny_setup(training__n_iters=20, training__eval_freq=10)
  step, seen = 0, []
  while step < 20:
    step += 4 if make_schedule(setup.config).steps_to_event(step) >= 4 else 1
    seen.append(step)
  assert {3, 6, 9, 10, 12, 15, 18, 20} <= set(seen)


def test_blocks_that_are_computed_again_need_less_memory():
  """A step of training with `model.remat`: XLA would undo it on CPUs, were it not told."""
  bytes_of = []
  for remat in (False, True):
    setup = tiny_setup(model__remat=remat, model__num_res_blocks=4, training__batch_size=64)
    task, rng = score_task(setup), setup.keys.key('train')
    images = {'data': jax.ShapeDtypeStruct((64, 8, 8, 1), jnp.uint8)}
    step = jax.jit(task.update, compiler_options=loop.compiler_options())
    compiled = step.lower(jax.eval_shape(task.init, rng), None, images, rng).compile()
    bytes_of.append(compiled.memory_analysis().temp_size_in_bytes)
  assert bytes_of[1] < 0.7 * bytes_of[0]


@pytest.mark.parametrize('sde', [base.ve, base.vp])
def test_bfloat16_is_float32_to_its_precision(sde):
  """The score in bfloat16, with the same float32 parameters, differs by a few percent."""
  single, half = (tiny_setup(sde, 'ncsnpp', model__dtype=d) for d in ('float32', 'bfloat16'))
  keys = jax.random.split(jax.random.key(0), 2)
  params = jax.jit(single.model.init, static_argnums=1)(keys[0], (1, 8, 8, 1))
  # The last convolution starts at zero: without this the score would hardly be there.
  params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(keys[1], p.shape), params)
  x, t = jax.random.normal(keys[1], (4, 8, 8, 1)), jnp.linspace(0.1, 0.9, 4)
  a, b = (jax.jit(s.model.bind(params).__call__)(x, t) for s in (single, half))
  assert b.dtype == jnp.float32
  error = np.linalg.norm((a - b).reshape(4, -1), axis=-1)
  assert (error < 0.05 * np.linalg.norm(a.reshape(4, -1), axis=-1)).all() and error.max() > 0


def one_step(**fields) -> tuple[TrainState, Metrics]:
  setup = tiny_setup(base.ve, 'ncsnpp', training__batch_size=8, optim__warmup=0, **fields)
  task = score_task(setup)
  images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
  batch = setup.devices.put({'data': images})
  return jax.jit(task.update)(
    jax.jit(task.init)(setup.keys.key('init')), None, batch, setup.keys.key('train')
  )


@pytest.mark.parametrize(
  'fields', [{'training__grad_accum': 4}, {'model__remat': True, 'model__dropout': 0.2}]
)
def test_what_saves_memory_takes_the_same_step(fields):
  plain = {name: value for name, value in fields.items() if name == 'model__dropout'}
  (a, of_a), (b, of_b) = one_step(**plain), one_step(**fields)
  assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(of_a[name], of_b[name], rtol=1e-5)
  # Adam's first moment is (1 - beta1) times the clipped gradient.
  moments = [optax.tree.get(state.opt_state, 'mu') for state in (a, b)]
  jax.tree.map(lambda m, n: np.testing.assert_allclose(m, n, rtol=1e-3, atol=1e-6), *moments)


def test_a_picture_that_cannot_be_drawn_does_not_stop_training(tmp_path, caplog):
  def fail(*_, **__):
    raise FloatingPointError('the solver came to t = 0.3 only')

  setup, root = tiny_setup(training__snapshot_samples=4), epath.Path(tmp_path)
  setup = dataclasses.replace(setup, sampler=fail)
  state = SimpleNamespace(step=6, ema_params=None)
  run_lib._at_snapshot(setup, root, state, SimpleNamespace(signal=0))
  assert 'no picture: the solver came to t = 0.3' in caplog.text
  assert (root / 'index.html').exists() and not list(root.glob('samples/*/*.png'))


def drawn_snapshot(setup: Setup, root: Path) -> np.ndarray | None:
  """The picture of step 6."""
  state = SimpleNamespace(step=6, ema_params=None)
  run_lib._at_snapshot(setup, epath.Path(root), state, SimpleNamespace(signal=0))
  path = root / 'samples' / 'iter_6' / 'sample.png'
  return np.asarray(Image.open(path)) if path.exists() else None


def test_a_snapshot_is_drawn_in_rounds_of_a_micro_batch(tmp_path):
  """Where it is no larger than one, it is drawn at once, with the same key as ever."""
  shapes, keys, seen = [], [], []

  def noise(rng, score_fn, shape, **_):
    shapes.append(shape[0])
    keys.append(rng)
    seen.extend(score_fn.told['labels'].tolist())
    return jax.random.normal(rng, shape), 1

  fields = {'training__batch_size': 16, 'model__num_classes': 10}
  for accum, n in ((1, 8), (2, 8), (4, 10)):
    setup = tiny_setup(training__grad_accum=accum, training__snapshot_samples=n, **fields)
    drawn_snapshot(dataclasses.replace(setup, sampler=noise), tmp_path / str(accum))
  assert shapes == [8, 8, 4, 4, 4]
  assert seen[-12:] == [*range(10), 0, 1]
  assert keys[0] == setup.keys.key('snapshot', 6) == keys[1] and len(set(map(str, keys))) == 4
  one, two, rounds = (
    np.asarray(Image.open(p)) for p in sorted(tmp_path.glob('*/samples/iter_6/sample.png'))
  )
  np.testing.assert_array_equal(one, two)
  assert rounds.shape == (3 * 66 + 2, 4 * 66 + 2, 3) and rounds[:66].std() > 0


@pytest.mark.parametrize(
  'error',
  [
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 40000000000 bytes.'),
    MemoryError(),
  ],
)
def test_a_snapshot_that_memory_is_too_short_for_does_not_stop_training(tmp_path, caplog, error):
  """Whenever training comes by, there is one line that names the fields."""

  def fail(*_, **__):
    raise error

  setup = tiny_setup(training__batch_size=4, training__snapshot_samples=8)
  setup = dataclasses.replace(setup, sampler=fail)
  for _ in range(2):
    caplog.clear()
    assert drawn_snapshot(setup, tmp_path) is None
    (line,) = (record.getMessage() for record in caplog.records)
    assert 'out of memory for 4 samples at a time. Training goes on' in line
    assert 'config.training.snapshot_samples below that' in line
  with pytest.raises(jax.errors.JaxRuntimeError, match='another error'):
    error = jax.errors.JaxRuntimeError('INTERNAL: another error')
    drawn_snapshot(setup, tmp_path)


def test_training_goes_on_to_its_end_without_memory_for_pictures(tmp_path, monkeypatch, caplog):
  def fail(*_, **__):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

  build = run_lib.build
  monkeypatch.setattr(
    run_lib, 'build', lambda config: dataclasses.replace(build(config), sampler=fail)
  )
  config = two_moons.get_config()  # whose network compiles soonest
  config.training.update(n_iters=4, snapshot_freq=2, n_jitted_steps=1, eval_freq=4)
  run_lib.train(config, str(tmp_path))
  assert caplog.text.count('no picture: out of memory') == 2
  run_lib.train(config, str(tmp_path))  # which finds the picture of the last step missing
  assert caplog.text.count('no picture: out of memory') == 3
  assert (tmp_path / 'checkpoints' / '4').exists()


def test_parts_of_a_batch_that_cannot_be_are_told():
  with pytest.raises(UserError, match=r'batch_size = 4 must be .* devices, 1, times .* = 3'):
    run_lib.train(tiny_setup(training__grad_accum=3).config, 'unused')


@pytest.mark.parametrize(('how', 'expected'), [('truncate', 127), ('round', 128)])
@pytest.mark.parametrize('centered', [False, True])
def test_pixels_become_whole_numbers(how, expected, centered):
  def constant(rng, score_fn, shape, **_):
    x = np.full(shape, 0.5, np.float32)
    x[0], x[1] = -3, 3
    return jnp.asarray(2 * x - 1 if centered else x), 7

  setup = tiny_setup(sampling__uint8=how, data__centered=centered)
  setup = dataclasses.replace(setup, sampler=constant)
  drawing = make_drawing(setup)
  images, nfe = drawing.samples_of({}, jax.random.key(0), 4, {}, progress=lambda _: None)
  assert images.shape == (4, 8, 8, 1) and images.dtype == np.uint8 and nfe == 7
  assert [int(image.max()) for image in images] == [0, 255, expected, expected]


def test_a_network_that_cannot_be_is_told():
  with pytest.raises(UserError, match=r'config.model does not make a network: .*groups'):
    abstract_state(tiny_setup(model__nf=90))  # 22 groups do not share 90 channels


def test_what_is_frozen_is_read_and_never_kept(tmp_path):
  """A teacher is not donated nor saved, and may be another without a new program."""

  def init(rng):
    w = jax.random.normal(rng, (2,))
    return TrainState(jnp.int32(0), {'w': w}, ({'w': w + 0},), ())

  def update(state, frozen, batch, rng):
    traced.append(1)
    w = state.params['w'] - 0.5 * (state.params['w'] - frozen['w'])
    loss = jnp.square(w - frozen['w']).sum() + 0 * batch['data'].sum()
    state = state.replace(step=state.step + 1, params={'w': w}, averages=({'w': w + 0},))
    return state, {'loss': loss, 'grad_norm': loss}

  traced, devices = [], all_devices()
  teacher = jax.device_put({'w': jnp.array([3.0, -1.0])}, devices.replicated)
  task = loop.Task(
    section='model', init=init, update=update, evaluate=lambda params, frozen, batch, rng: {},
    purposes=('init', 'train', 'eval'), batch_size=4, frozen=teacher,
  )  # fmt: skip
  schedule = loop.Schedule(20, 5, 10, 1000, 20, 20)
  source = load_points('two_moons', 'train', 2)
  given = task, schedule, devices, Keys(0, devices), epath.Path(tmp_path), source, source
  state = loop.train(*given)
  np.testing.assert_allclose(state.params['w'], teacher['w'], atol=1e-4)  # which is still there
  abstract = loop.abstract_state(task, devices, Keys(0, devices))
  with Checkpoints(tmp_path) as checkpoints:
    saved = checkpoints.restore(20, abstract)
  sizes = [x.size for x in jax.tree.leaves(saved)]
  assert sorted(sizes) == [1, 2, 2]

  one_step, _ = loop.compile_steps(task, schedule, devices, abstract)
  batch, key = devices.put({'data': np.zeros((4, 2), np.float32)}), Keys(0, devices).key('train')
  traced.clear()
  for sign in (1, -1):
    other = jax.tree.map(lambda w, sign=sign: sign * w, teacher)
    start = jax.jit(init)(key)
    new, _ = one_step(start, other, batch, key)
    assert not other['w'].is_deleted() and start.params['w'].is_deleted()
    half_way = 0.5 * (jax.jit(init)(key).params['w'] + other['w'])
    np.testing.assert_allclose(new.params['w'], half_way, rtol=1e-6)
  assert len(traced) == 1
