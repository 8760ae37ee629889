"""The Inception network of FID and the distances between features, beside torch-fidelity's."""

import errno
from functools import cache
import hashlib
import http.client

from agreement import error, GOLDEN
import inception_example
from inception_example import images, SIZES
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from builders.setup import build
from configs.vp.digits import get_config
from evaluation import inception, inception_weights, metrics
from evaluation.metrics import Moments
from runtime.errors import UserError

MESH = build(get_config()).devices.mesh


@pytest.fixture(scope='module', params=['inception', 'live'])
def theirs(request, tmp_path_factory) -> dict[str, np.ndarray]:
  """Golden numbers; where torch-fidelity is installed, also what it says here and now."""
  if request.param == 'live':
    try:
      inception_example.torch_fidelity()
    except ImportError as missing:
      pytest.skip(str(missing))
    return inception_example.of_torch_fidelity(tmp_path_factory.mktemp('weights'))
  with np.load(GOLDEN / 'inception.npz') as arrays:
    return dict(arrays)


@cache
def params() -> dict:
  return inception_weights.convert(inception_example.weights())


@cache
def pool_3(height: int, width: int) -> np.ndarray:
  apply = jax.jit(inception.InceptionV3().apply)
  return np.asarray(apply({'params': params()}, images(height, width)))


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_features_and_logits(theirs, size):
  name, features = f'{size[0]}x{size[1]}', pool_3(*size)
  logits = inception.logits(params(), features)
  assert error(features, theirs[f'{name} pool_3'], quantity='pool_3') < 2e-6
  assert error(logits, theirs[f'{name} logits'], quantity='logits') < 4e-6
  with_bias = inception.logits(params(), features, bias=True)
  np.testing.assert_allclose(with_bias - logits, [params()['fc']['bias']], atol=1e-4)


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_resizing_is_that_of_tensorflow_1(theirs, size):
  """Up to the last bit, which XLA may round otherwise."""
  name, x = f'{size[0]}x{size[1]}', jnp.asarray(images(*size), jnp.float32)
  small, large = inception.resize_as_tf1(x, 7), inception.resize_as_tf1(x[:, :9, :9], 20)
  assert error(small, theirs[f'{name} small'], quantity='resize') < 3e-7
  assert error(large, theirs[f'{name} large'], quantity='resize') < 3e-7


def test_distances_of_features(theirs):
  """The last as exact shares: of 1500 samples or 1200 images, not one is counted otherwise."""
  samples, data = inception_example.features()
  a, b = Moments.of(samples), Moments.of(data)
  fid = metrics.frechet_distance(a.mean, a.cov, b.mean, b.cov)
  assert error([fid], [theirs['frechet_inception_distance']], quantity='FID') < 1e-9
  for name, found in (
    ('inception_score', metrics.inception_score(samples)),
    ('kernel_inception_distance', metrics.kernel_distance(samples, data)),
  ):
    expected = [theirs[f'{name}_mean'], theirs[f'{name}_std']]
    assert error([found], [expected], quantity=name) < 1e-9
  found = metrics.precision_recall(samples, data, MESH)
  np.testing.assert_allclose(found, [theirs['precision'], theirs['recall']], atol=1e-7)


def test_grey_images_are_colour_images_of_three_equal_channels():
  grey = jnp.asarray(images(8, 8)[..., :1])
  of_grey, of_colour = (inception.preprocess(x) for x in (grey, grey.repeat(3, -1)))
  np.testing.assert_array_equal(of_grey, of_colour)
  assert of_grey.shape == (1, 299, 299, 3) and -1 <= of_grey.min() < of_grey.max() < 1


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_a_constant_image_of_any_size_stays_exactly_so(size):
  """Between equal pixels interpolation adds nothing, and (x - 128) / 128 does not round."""
  for value in (0, 128, 255):
    x = inception.preprocess(jnp.full((1, *size, 3), value, jnp.uint8))
    np.testing.assert_array_equal(x, np.full((1, 299, 299, 3), (value - 128) / 128, np.float32))


def test_images_of_the_size_that_the_network_sees_are_not_interpolated():
  x = jnp.asarray(images(299, 299), jnp.float32)
  np.testing.assert_array_equal(inception.resize_as_tf1(x, 299), x)


def test_means_at_the_border_count_no_padding():
  np.testing.assert_allclose(inception.average_pool(jnp.ones((1, 5, 4, 2))), 1, rtol=1e-6)


@pytest.fixture
def torch_file(tmp_path, monkeypatch):
  """The file that is published, as far as this test goes; the folder of the cache is `tmp_path`."""
  path = tmp_path / 'published.pth'
  path.write_bytes(b'weights')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(inception_weights, 'URL', path.as_uri())
  monkeypatch.setattr(inception_weights, 'SHA256', hashlib.sha256(b'weights').hexdigest())
  monkeypatch.setattr(inception_weights, 'read_torch', lambda data: inception_example.weights())
  return path


def test_weights_are_downloaded_and_converted_once(torch_file, monkeypatch):
  first = inception_weights.load()
  monkeypatch.setattr(inception_weights, 'URL', 'file:///nowhere')
  again = inception_weights.load()
  assert jax.tree.structure(first) == jax.tree.structure(again)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  cache = torch_file.parent / 'score_sde'
  assert [p.name for p in cache.iterdir()] == ['inception-2015-12-05.npz']
  kept = cache / 'inception-2015-12-05.npz'
  jax.tree.map(np.testing.assert_array_equal, first, inception_weights.load(str(kept)))
  np.savez(kept, sha256=inception_weights.SHA256, some=np.zeros(3))
  with pytest.raises(UserError, match=r'was not converted from .* remove it'):
    inception_weights.load()
  kept.write_bytes(b'PK')
  with pytest.raises(UserError, match=r'is damaged .* remove it'):
    inception_weights.load(str(torch_file))


def test_a_full_disk_costs_the_cache_alone(torch_file, monkeypatch):
  def full(file, **arrays):
    file.write(b'part')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(np, 'savez', full)
  inception_weights.load()
  assert not list((torch_file.parent / 'score_sde').iterdir())


def test_a_file_of_pytorch_is_read_as_its_arrays(tmp_path, monkeypatch):
  """With the counters that PyTorch's batch normalisation keeps, which convert ignores."""
  torch = pytest.importorskip('torch')
  path, weights = tmp_path / 'weights.pth', inception_example.weights()
  counter = {'Conv2d_1a_3x3.bn.num_batches_tracked': np.array(7)}
  torch.save({k: torch.from_numpy(v) for k, v in (counter | weights).items()}, path)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(inception_weights, 'SHA256', hashlib.sha256(path.read_bytes()).hexdigest())
  jax.tree.map(np.testing.assert_array_equal, inception_weights.load(str(path)), params())


def test_other_weights_than_those_of_fid_are_refused(torch_file, monkeypatch):
  torch_file.write_bytes(b'others')
  for path in ('', str(torch_file)):
    with pytest.raises(UserError, match=r'has sha256 .* config\.eval\.inception_path'):
      inception_weights.load(path)
  with pytest.raises(UserError, match='No such file'):
    inception_weights.load('nowhere.pth')
  monkeypatch.setattr(inception_weights, 'URL', 'file:///nowhere')
  with pytest.raises(UserError, match='cannot download file:///nowhere'):
    inception_weights.load()

  def breaks_off(*args, **kwargs):
    raise http.client.IncompleteRead(b'part', 100)

  monkeypatch.setattr(inception_weights.urllib.request, 'urlopen', breaks_off)
  with pytest.raises(UserError, match=r'cannot download .* 100 more expected'):
    inception_weights.load()
  assert not (torch_file.parent / 'score_sde').exists()


def test_weights_of_another_network_are_refused():
  weights = inception_example.weights()
  name, bn = 'Mixed_6b.branch7x7_2.conv.weight', 'Mixed_5b.branch1x1.bn.weight'
  with pytest.raises(UserError, match=r'7x7_2\.conv\.weight is \(128, 128, 7, 1\), not'):
    inception_weights.convert(weights | {name: weights[name].swapaxes(2, 3)})
  for n in (1, 63):  # of which one would do for all 64 channels, if it were not looked at
    with pytest.raises(UserError, match=rf'1x1\.bn\.weight is \({n},\), not \(64,\)'):
      inception_weights.convert(weights | {bn: weights[bn][:n]})
  with pytest.raises(UserError, match=r'they have AuxLogits\.fc\.bias'):
    inception_weights.convert(weights | {'AuxLogits.fc.bias': np.zeros(1000)})
  del weights['fc.bias']
  with pytest.raises(UserError, match=r'fc\.bias \(1008,\) is missing'):
    inception_weights.convert(weights)
