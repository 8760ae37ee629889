"""Checkpoints of the released code: what becomes of them, and which are refused."""

from functools import partial
import sys

from flax import serialization, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
import pytest
from released_networks import setup_of, shapes_of, torch_content

from benchmarks.golden import config_of, load, released_state
from builders.training import abstract_state
from configs import base, own
import run_lib
from runtime.errors import UserError
from training import released_checkpoints
from training.released_torch import from_torch

PIXELS = 8


def tiny_config(photos) -> base.ConfigDict:
  """A tiny network, and data of its own."""
  config = own.digits(base.ve('ncsnpp'))
  config.data.update(dataset='folder', path=str(photos), num_channels=3)
  config.model.update(nf=8, ch_mult=(1, 1), attn_resolutions=())
  config.training.update(batch_size=4, n_iters=10, log_freq=1, eval_freq=100)
  config.training.update(snapshot_sampling=False)
  config.sampling.update(num_steps=25)
  config.eval.update(batch_size=4, num_samples=4, enable_sampling=False)
  return config


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  pixels = np.random.default_rng(0).integers(0, 256, (8, PIXELS, PIXELS, 3), np.uint8)
  for i, image in enumerate(pixels):
    Image.fromarray(image).save(folder / f'{i}.png')
  return folder


def released_file(path, setup, step: int, unread: dict | None = None):
  """A checkpoint of the JAX release, with random arrays for the network of a setup.

  `unread` are arrays that the released network holds beside them.
  """
  keys = jax.random.split(jax.random.key(0), 4)
  params, average, mu, nu = ({} for _ in range(4))
  for tree, key in zip((params, average, mu, nu), keys, strict=True):
    for name, value in traverse_util.flatten_dict(setup_params(setup, key), sep='/').items():
      group_norm = 'GroupNorm' in name
      tree[name] = np.asarray(value).reshape((1, 1, 1, -1) if group_norm else value.shape)
    tree.update(unread or {})
  nu = {k: v**2 for k, v in nu.items()}
  trees = {'params': params, 'ema': average, 'mu': mu, 'nu': nu}
  arrays = {f'{prefix}/{k}': v for prefix, tree in trees.items() for k, v in tree.items()}
  counts = {'step': np.int32(step), 'adam_step': np.int32(step - 2)}
  path.write_bytes(serialization.msgpack_serialize(released_state(arrays | counts)))
  ours = {k: v.reshape(-1) for k, v in average.items() if k not in (unread or {})}
  return traverse_util.unflatten_dict(ours, sep='/')


def setup_params(setup, key):
  return setup.model.init(key, (1, *setup.data_shape))


def test_an_imported_checkpoint_is_evaluated_and_trained_on(tmp_path, photos, caplog):
  config = tiny_config(photos)
  setup = run_lib.build(config)
  average = released_file(tmp_path / 'checkpoint_1', setup, step=8)
  workdir = tmp_path / 'run'
  caplog.set_level('INFO', 'score_sde')
  run_lib.import_released(config, workdir, tmp_path / 'checkpoint_1')
  assert 'of step 8' in caplog.text
  with run_lib.Checkpoints(workdir) as checkpoints:
    state = checkpoints.restore(8, abstract_state(setup))
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a.reshape(-1), b), state.ema_params, average
  )
  found = optax.tree_utils.tree_get_all_with_path(state.opt_state, 'count')
  counts = {path[-1].tuple_name: int(count) for path, count in found}
  assert counts == {'ScaleByAdamState': 6, 'ScaleByScheduleState': 8}

  (report,) = run_lib.evaluate(config, workdir)
  assert report['step'] == 8
  assert np.isfinite(report['loss'])
  run_lib.train(config, workdir)
  assert 'resuming' in caplog.text
  assert (workdir / 'checkpoints' / '10').is_dir()
  with pytest.raises(UserError, match='holds checkpoints already'):
    run_lib.import_released(config, workdir, tmp_path / 'checkpoint_1')


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, photos):
  config = tiny_config(photos)
  released_file(tmp_path / 'checkpoint_1', run_lib.build(config), step=8)
  for changes, said in (
    ({'nf': 16}, r'GaussianFourierProjection_0/W of its parameters has shape \(8,\), .* \(16,\)'),
    ({'attn_resolutions': (8,)}, r'its parameters lack AttnBlockpp_1'),
    ({'num_res_blocks': 2}, r'shape|lack'),
    (
      {'progressive_input': 'none'},
      r'its parameters have Downsample_0/.*network of the config not',
    ),
  ):
    other = tiny_config(photos)
    other.model.update(changes)
    with pytest.raises(UserError, match='checkpoint_1 does not fit the config: .*' + said):
      run_lib.import_released(other, tmp_path / 'run', tmp_path / 'checkpoint_1')
  assert not (tmp_path / 'run').exists()


def test_files_that_are_no_checkpoints_are_refused(tmp_path, photos):
  config = tiny_config(photos)
  whole = tmp_path / 'checkpoint_1'
  released_file(whole, run_lib.build(config), step=8)
  (tmp_path / 'half').write_bytes(whole.read_bytes()[:5000])
  (tmp_path / 'empty').write_bytes(b'')
  (tmp_path / 'other').write_bytes(serialization.msgpack_serialize({'step': np.int32(3)}))
  for path in (*sorted(photos.iterdir())[:1], *(tmp_path / n for n in ('half', 'empty', 'other'))):
    with pytest.raises(UserError, match='is not a checkpoint of the released'):
      run_lib.import_released(config, tmp_path / 'run', path)
  for path in (tmp_path, tmp_path / 'none'):
    with pytest.raises(UserError, match='is not a file'):
      run_lib.import_released(config, tmp_path / 'run', path)


@pytest.mark.parametrize('case', ['pytorch_ddpm_vp_cont', 'pytorch_npp_ve_cont_resid_in_fir'])
def test_every_array_of_a_pytorch_checkpoint_goes_where_its_moving_average_goes(case):
  arrays = load(case)
  setup = setup_of(arrays)
  found = from_torch(torch_content(arrays), shapes_of(setup))
  assert (found.step, found.adam_step, found.ema_rate) == (9, 7, 0.999)
  for name, average in found.ema_params.items():
    trained = name != 'GaussianFourierProjection_0/W'
    np.testing.assert_array_equal(found.params[name], (2 if trained else 1) * average)
    np.testing.assert_array_equal(found.mu[name], 3 * trained * average)
    np.testing.assert_array_equal(found.nu[name], 4 * trained * average)


def test_another_network_of_pytorch_is_told():
  arrays = load('pytorch_ddpm_vp_cont')
  content = torch_content(arrays)
  other = shapes_of(setup_of(load('pytorch_npp_ve_cont_resid_in_fir')))
  with pytest.raises(UserError, match=r'config\.model is that of another network'):
    from_torch(content, other)
  content['model'] = {'module.begin_conv.weight': np.zeros((8, 3, 3, 3))}
  with pytest.raises(UserError, match=r'NCSN\+\+, DDPM\+\+ and DDPM can be imported'):
    from_torch(content, other)


def load_here(path, setup):
  shape = 1, *setup.data_shape
  return released_checkpoints.load(path, setup.model, shape, setup.tx, 0.999)


def test_without_pytorch_its_checkpoints_are_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  (tmp_path / 'checkpoint_1.pth').write_bytes(b'PK')
  setup = setup_of(load('pytorch_ddpm_vp_cont'))
  with pytest.raises(UserError, match=r'checkpoint_1\.pth: .* pip install torch'):
    load_here(tmp_path / 'checkpoint_1.pth', setup)


def test_pytorch_files(tmp_path):
  """A real file gives what its arrays give; one that runs code is refused."""
  torch = pytest.importorskip('torch')
  arrays = load('pytorch_npp_ve_cont_resid_in_fir')
  setup = setup_of(arrays)
  content = torch_content(arrays)
  tensor = partial(jax.tree.map, torch.tensor)
  tensors = {
    'model': {k: tensor(v) for k, v in content['model'].items()},
    'optimizer': content['optimizer'] | {'state': tensor(content['optimizer']['state'])},
    'ema': content['ema'] | {'shadow_params': tensor(content['ema']['shadow_params'])},
  }
  torch.save(content | tensors, tmp_path / 'checkpoint_1.pth')
  state = load_here(tmp_path / 'checkpoint_1.pth', setup)
  found = from_torch(content, shapes_of(setup))
  for ours, theirs in ((state.params, found.params), (state.ema_params, found.ema_params)):
    flat = traverse_util.flatten_dict(ours, sep='/')
    assert flat.keys() == theirs.keys()
    assert all(jnp.array_equal(flat[name], theirs[name]) for name in flat)
  torch.save({'model': Unsafe()}, tmp_path / 'unsafe.pth')
  with pytest.raises(UserError, match='is not a checkpoint of the released'):
    load_here(tmp_path / 'unsafe.pth', setup)


class Unsafe:
  """Unpickling it calls a function."""

  def __reduce__(self):
    return print, ('code was run',)


# Networks without `conditional` are released with arrays that they do not read.


def test_an_unconditional_network_of_the_jax_release_is_imported(tmp_path, photos):
  config = tiny_config(photos)
  config.model.conditional = False
  setup = run_lib.build(config)
  frequencies = {'GaussianFourierProjection_0/W': np.ones(8, np.float32)}
  average = released_file(tmp_path / 'checkpoint_1', setup, 8, frequencies)
  state = load_here(tmp_path / 'checkpoint_1', setup)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a.reshape(-1), b), state.ema_params, average
  )
  told = run_lib.build(tiny_config(photos))
  with pytest.raises(UserError, match=r'parameters lack Dense_0'):
    load_here(tmp_path / 'checkpoint_1', told)  # that reads more than the file has
  released_file(tmp_path / 'checkpoint_2', told, 8)
  with pytest.raises(UserError, match=r'parameters have Dense_0/\w+ .* not'):
    load_here(tmp_path / 'checkpoint_2', setup)


@pytest.mark.parametrize('fourier', [True, False])
def test_an_unconditional_network_of_the_pytorch_release_is_imported(fourier):
  """Its blocks have maps of an embedding that there is not; Adam never saw their gradients."""
  arrays = load('pytorch_npp_ve_cont_resid_in_fir')
  config = config_of(arrays)
  config.model.conditional = False
  names = shapes_of(run_lib.build(config))
  kept = {
    k: v
    for k, v in arrays.items()
    if 'all_modules.1.' not in k
    and 'all_modules.2.' not in k
    and (fourier or not k.endswith('all_modules.0.W'))
  }
  content = torch_content(kept)
  order = [k for k in content['model'] if k != 'module.sigmas']
  unread = [i for i, k in enumerate(order) if '.Dense_0.' in k]
  assert unread
  for i in unread:
    del content['optimizer']['state'][i]
  found = from_torch(content, names)
  found = released_checkpoints._without_unread(found, names)
  told = from_torch(torch_content(arrays), shapes_of(setup_of(arrays)))
  for field in ('params', 'ema_params', 'mu', 'nu'):
    here, there = getattr(found, field), getattr(told, field)
    assert here.keys() == names.keys()
    for name, values in here.items():
      np.testing.assert_array_equal(values, there[name])
  with pytest.raises(UserError, match='another network'):
    from_torch(torch_content(arrays), names)  # one that has an embedding
