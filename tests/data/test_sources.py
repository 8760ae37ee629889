"""Images come out whole, in the right geometry and order; a mistake costs one line."""

import contextlib
import gzip
import io
import itertools
import json
from pathlib import Path
import struct
import subprocess
import sys
import tarfile
import time

import numpy as np
from PIL import Image
import pytest

from data import geometry, sources, tfds
from data.batches import eval_batches, train_batches
from data.folder import image_files
from data.images import ImageSource
from data.sources import load
from runtime.errors import Failure, UserError


def numbered(n, read=None):
  """n images of 2x2 pixels; image i is filled with i."""
  fill = lambda i: np.full((2, 2, 1), i, np.uint8)  # noqa: E731
  return ImageSource((2, 2, 1), n, lambda i: ((read or fill)(i), 0))


def take(batches, n):
  """The numbers of the images in the first n batches: [n, rows]."""
  return np.stack([batch['data'][:, 0, 0, 0] for batch in itertools.islice(batches, n)])


def noise(*shape):
  return np.random.RandomState(0).randint(0, 256, shape, np.uint8)


def save(array, file, **options):
  file.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(file, **options)


def folder(path, size, channels=3, split='train'):
  shape = {'image_size': size, 'num_channels': channels}
  return load('folder', split, path=str(path), labelled=False, **shape)


# Batches


@pytest.mark.parametrize(('n', 'batch'), [(40, 8), (37, 8), (5, 16), (1, 4)])
def test_each_epoch_is_a_permutation(n, batch):
  stream = take(train_batches(numbered(n), batch, seed=0), 4 * n // batch + 1).ravel()
  epochs = [tuple(stream[e * n : (e + 1) * n]) for e in range(3)]
  assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
  if n > 30:
    assert len({*epochs, tuple(range(n))}) == 4


def test_resuming_equals_an_uninterrupted_run():
  whole = take(train_batches(numbered(37), 8, seed=3), 20)
  for start in (1, 7, 19):
    rest = take(train_batches(numbered(37), 8, seed=3, start=start), 20 - start)
    np.testing.assert_array_equal(rest, whole[start:])
  far = take(train_batches(numbered(37), 8, seed=3, start=10**9), 2)
  np.testing.assert_array_equal(far, take(train_batches(numbered(37), 8, seed=3, start=10**9), 2))


def test_seeds_give_different_orders():
  orders = {take(train_batches(numbered(40), 40, seed=s), 3).tobytes() for s in range(5)}
  assert len(orders) == 5


def test_the_order_never_changes():
  """A run that was saved by an older version resumes with the same images."""
  np.testing.assert_array_equal(
    take(train_batches(numbered(10), 5, seed=42), 3),
    [[1, 8, 5, 3, 7], [9, 4, 0, 6, 2], [9, 5, 8, 7, 6]],
  )


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_share_each_global_batch(processes):
  whole = take(train_batches(numbered(37), 8, seed=1), 6)
  parts = [
    take(train_batches(numbered(37), 8, seed=1, process_index=p, process_count=processes), 6)
    for p in range(processes)
  ]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize('processes', [1, 2, 4])
@pytest.mark.parametrize('n', [1, 8, 11, 16])
def test_evaluation_sees_every_image_once_in_order(n, processes):
  parts = [
    list(eval_batches(numbered(n), 8, process_index=p, process_count=processes))
    for p in range(processes)
  ]
  assert {len(part) for part in parts} == {-(-n // 8)}
  seen = [
    batch['data'][batch['mask']][:, 0, 0, 0] for step in zip(*parts, strict=True) for batch in step
  ]
  assert np.concatenate(seen).tolist() == list(range(n))
  assert all(batch['data'].shape == (8 // processes, 2, 2, 1) for part in parts for batch in part)


def test_bad_batch_arguments():
  with pytest.raises(UserError, match='divisible by 3'):
    train_batches(numbered(10), 8, seed=0, process_count=3)
  with pytest.raises(UserError, match='positive'):
    eval_batches(numbered(10), 0)
  with pytest.raises(UserError, match='seed'):
    train_batches(numbered(10), 8, seed=-1)


def test_an_error_in_a_worker_surfaces_as_itself():
  def read(i):
    raise UserError('image 3 is damaged')

  with pytest.raises(UserError, match='image 3 is damaged'):
    next(train_batches(numbered(10, read), 4, seed=0))


def test_images_are_decoded_once_and_only_while_they_fit_in_memory(monkeypatch):
  calls = []
  read = lambda i: calls.append(i) or np.full((2, 2, 1), i, np.uint8)  # noqa: E731
  source = numbered(6, read)
  for _ in range(3):
    assert [int(image[0, 0, 0]) for image in source] == list(range(6))
  assert calls == list(range(6))
  source[0][:] = 99  # a copy: the user's changes do not reach the memory
  assert source[-6].max() == 0
  monkeypatch.setattr('data.images._MEMORY_LIMIT', 6 * 4 - 1)
  calls.clear()
  source = numbered(6, read)
  assert (source.gather(np.array([4, 4, 1]))[:, 0, 0, 0] == [4, 4, 1]).all() and len(calls) == 3
  with pytest.raises(IndexError):
    source[6]


def test_import_is_cheap_and_leaving_does_not_hang():
  code = """if True:
    import sys
    from data import sources
    from data.batches import train_batches
    assert not {'grain', 'jax', 'tensorflow_datasets'} & set(sys.modules)
    source = sources.load('digits', 'train', image_size=8, num_channels=1)
    closed = train_batches(source, 64, seed=0)
    next(closed)
    closed.close()
    left_open = train_batches(source, 64, seed=0)
    next(left_open)
    assert 'tensorflow' not in sys.modules
  """
  root = Path(sources.__file__).parent.parent
  subprocess.run([sys.executable, '-c', code], cwd=root, timeout=60, check=True)


# Geometry and colours


@pytest.mark.parametrize('fit', [
  geometry.stretch, geometry.short_side_then_crop, geometry.lsun, geometry.stored,
])  # fmt: skip
@pytest.mark.parametrize('size', [32, 128])
def test_an_image_of_the_right_size_is_left_alone(fit, size):
  image = noise(size, size, 3)
  np.testing.assert_array_equal(np.asarray(fit(Image.fromarray(image), size)), image)


def test_celeba_takes_the_central_140_pixels():
  image = noise(218, 178, 3)
  got = geometry.celeba(Image.fromarray(image), 140)
  np.testing.assert_array_equal(np.asarray(got), image[39:179, 19:159])
  assert geometry.celeba(Image.fromarray(image), 64).size == (64, 64)


def test_lsun_crops_after_resizing_at_128_and_before_it_elsewhere():
  image = Image.fromarray(noise(300, 257, 3))
  small = image.resize((128, round(300 * 128 / 257)), Image.Resampling.BILINEAR)
  at_128 = np.asarray(small)[10 : 10 + 128]
  np.testing.assert_array_equal(np.asarray(geometry.lsun(image, 128)), at_128)
  square = Image.fromarray(np.asarray(image)[21 : 21 + 257])
  at_256 = np.asarray(square.resize((256, 256), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(np.asarray(geometry.lsun(image, 256)), at_256)


def test_shrinking_averages(tmp_path):
  """Antialiased: a checkerboard becomes grey instead of black or white."""
  board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
  save(board, tmp_path / 'a.png')
  assert abs(folder(tmp_path, 8, 1)[0].astype(int) - 127).max() <= 8


@pytest.mark.parametrize('shape', [(10, 30, 3), (30, 10, 3), (31, 10, 3)])
def test_a_folder_image_is_cropped_centrally(tmp_path, shape):
  image = noise(*shape)
  save(image, tmp_path / 'a.png')
  top, left = (shape[0] - 10) // 2, (shape[1] - 10) // 2
  got = folder(tmp_path, 10)[0]
  np.testing.assert_array_equal(got, image[top : top + 10, left : left + 10])


def test_hidden_folders_and_files_are_no_images(tmp_path):
  image = noise(4, 4, 3)
  for name in ('a.png', '.b.png', '.ipynb_checkpoints/c.png', 'd/.e/f.png', 'd/g.png'):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    save(image, tmp_path / name)
  assert [file.name for file in image_files(tmp_path)] == ['a.png', 'g.png']


def test_large_batches_are_prepared_two_ahead():
  calls = []

  class Large:
    num_classes = 0

    def __len__(self):
      return 1000

    def batch(self, indices):
      calls.append(len(indices))
      return {'data': np.broadcast_to(np.uint8(0), (len(indices), 2**29))}  # without their bytes

  with contextlib.closing(train_batches(Large(), 8, seed=0)) as batches:
    next(batches)
    time.sleep(0.2)
  assert calls[0] == 1 and 2 <= len(calls) - 1 <= 4


def test_colours(tmp_path):
  grey, red = np.full((4, 4), 90, np.uint8), np.full((4, 4, 3), (255, 0, 0), np.uint8)
  clear = np.zeros((4, 4, 4), np.uint8)
  save(grey, tmp_path / 'a.png')
  save(red, tmp_path / 'b.jpg', quality=95)
  save(clear, tmp_path / 'c.png')  # transparent everywhere
  save((grey.astype(np.uint16) << 8) + 7, tmp_path / 'd.png')
  Image.fromarray(red).convert('P').save(tmp_path / 'e.PNG')
  Image.fromarray(red).convert('CMYK').save(tmp_path / 'f.tif')
  expected = [(90, 90, 90), (255, 0, 0), (255, 255, 255), (90, 90, 90), (255, 0, 0), (255, 0, 0)]
  rgb, luminance = folder(tmp_path, 4), folder(tmp_path, 4, 1)
  assert len(rgb) == 6 and rgb[0].dtype == np.uint8
  for i, colour in enumerate(expected):
    assert abs(rgb[i].astype(int) - colour).max() <= 2, i
    assert abs(luminance[i].astype(int) - np.dot(colour, (0.299, 0.587, 0.114))).max() <= 2, i


def test_exif_orientation_is_honoured(tmp_path):
  image = noise(8, 8, 3)
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by 90 degrees clockwise
  save(image, tmp_path / 'a.png', exif=exif)
  np.testing.assert_array_equal(folder(tmp_path, 8)[0], np.rot90(image, -1))


# Folders


def test_a_folder_is_searched_recursively_in_a_fixed_order(tmp_path):
  for i, name in enumerate(['b/x.png', 'a/y.jpeg', 'a/deep/z.bmp', 'c.webp']):
    save(np.full((4, 4), 60 * i, np.uint8), tmp_path / name)
  (tmp_path / 'notes.txt').write_text('not an image')
  (tmp_path / '._c.png').write_text('left by another system')
  (tmp_path / 'b' / 'loop').symlink_to(tmp_path)
  got = [int(image[0, 0, 0]) for image in folder(tmp_path, 4, 1)]
  np.testing.assert_allclose(got, [120, 60, 0, 180], atol=2)


@pytest.mark.parametrize('held_out', ['test', 'validation', 'val'])
def test_subfolders_are_splits(tmp_path, caplog, held_out):
  save(np.zeros((4, 4), np.uint8), tmp_path / 'train' / 'a.png')
  assert len(folder(tmp_path, 4, 1, 'test')) == 1 and 'training images' in caplog.text
  caplog.clear()
  save(np.ones((4, 4), np.uint8), tmp_path / held_out / 'a.png')
  assert [folder(tmp_path, 4, 1, s)[0].max() for s in ('train', 'test')] == [0, 1]
  assert not caplog.text


def test_folder_mistakes(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='no images in'):
    folder(tmp_path, 4)
  for path in ('', tmp_path / 'missing', __file__):
    with pytest.raises(UserError, match=r'--config\.data\.path'):
      folder(path, 4)
  save(noise(4, 4), tmp_path / 'a.png')
  (tmp_path / 'b.png').write_bytes((tmp_path / 'a.png').read_bytes()[:40])
  save(np.full((4, 4), np.nan, np.float32), tmp_path / 'c.tif')
  source = folder(tmp_path, 4)
  for i in (1, 2):
    with pytest.raises(UserError, match=f'{"abc"[i]}.* cannot be read .* replace or remove'):
      source[i]
  with pytest.raises(UserError, match=r'b\.png'):
    list(eval_batches(source, 2))

  def refuse(path):
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.setattr(sources.os, 'scandir', refuse)
  with pytest.raises(UserError, match=r'cannot list .* \(Permission denied'):
    folder(tmp_path, 4)


def test_argument_mistakes():
  with pytest.raises(UserError, match="split 'eval' does not exist"):
    load('digits', 'eval', image_size=8, num_channels=1)
  with pytest.raises(UserError, match='num_channels is 5; allowed'):
    load('digits', 'train', image_size=8, num_channels=5)
  with pytest.raises(UserError, match='image_size is 0'):
    load('digits', 'train', image_size=0, num_channels=1)


def test_digits():
  train = load('DIGITS', 'train', image_size=8, num_channels=1)
  test = load('digits', 'test', image_size=16, num_channels=3)
  assert (len(train), len(test), train.shape, test.shape) == (1500, 297, (8, 8, 1), (16, 16, 3))
  assert train.gather(np.arange(1500)).min() == 0 and train.gather(np.arange(1500)).max() == 255
  image = test[5]
  assert (image == image[..., :1]).all() and image.max() > 100


# TFRecords


def tfrecord(image, shape=None):
  """One framed record as StyleGAN's tools write it."""
  from tensorflow_datasets.proto import tf_example_pb2

  chw = image.transpose(2, 0, 1)
  example = tf_example_pb2.Example()
  example.features.feature['shape'].int64_list.value.extend(shape or chw.shape)
  example.features.feature['data'].bytes_list.value.append(chw.tobytes())
  data = example.SerializeToString()
  size = struct.pack('<Q', len(data))
  return size + struct.pack('<I', tfds._masked_crc32c(size)) + data + b'\0\0\0\0'


def ffhq(path, size=4, split='train', channels=3):
  return load('FFHQ', split, image_size=size, num_channels=channels, path=str(path))


def test_crc32c_known_answer():
  """RFC 3720, B.4: 32 bytes of zeros have CRC-32C 8a9136aa."""
  rotated = (0x8A9136AA >> 15 | 0x8A9136AA << 17) & 0xFFFFFFFF
  assert tfds._masked_crc32c(bytes(32)) == (rotated + 0xA282EAD8) % 2**32


def test_tfrecords(tmp_path, caplog):
  images = noise(5, 4, 4, 3)
  (tmp_path / 'r-0.tfrecords').write_bytes(b''.join(tfrecord(image) for image in images[:3]))
  (tmp_path / 'r-1.tfrecords').write_bytes(b''.join(tfrecord(image) for image in images[3:]))
  for path, n in ((tmp_path, 5), (tmp_path / 'r-*', 5), (tmp_path / 'r-0.tfrecords', 3)):
    source = ffhq(path)
    np.testing.assert_array_equal(source.gather(np.arange(len(source))), images[:n])
  assert not caplog.text and ffhq(tmp_path, 4, 'test', 1).shape == (4, 4, 1) and caplog.text


def test_tfrecord_mistakes(tmp_path):
  good = tfrecord(noise(4, 4, 3))
  file = tmp_path / 'a.tfrecords'
  for path in ('', tmp_path, tmp_path / 'missing', tmp_path / '*.tfrecords'):
    with pytest.raises(UserError, match=r'no TFRecord files at --config\.data\.path'):
      ffhq(path)
  for data, message in (
    (good + good[:-2], 'cut off in its record 1'),
    (good + good[:5], 'cut off in its record 1'),
    (b'x' * 50, 'not a TFRecord file'),
    (b'', 'no images'),
    (tfrecord(noise(4, 4, 3), shape=(3, 4, 5)), 'byte 12 cannot be read'),
  ):
    file.write_bytes(data)
    with pytest.raises(UserError, match=message):
      ffhq(file)
  file.write_bytes(good)
  with pytest.raises(UserError, match=r'4x4 images and .*image_size is 8'):
    ffhq(file, 8)


# TensorFlow Datasets


@pytest.fixture
def small(monkeypatch):
  """Official sets of a few images, and their files by split: {name: (images, {file: bytes})}."""
  counts = {'train': 10, 'test': 4}
  cifar, idx = tfds.OFFICIAL['cifar10'], tfds.OFFICIAL['mnist']
  for name, official in (('cifar10', cifar), ('mnist', idx), ('fashion_mnist', idx)):
    monkeypatch.setitem(tfds.OFFICIAL, name, tfds.dataclasses.replace(official, images=counts))
  colour, grey, labels = noise(14, 32, 32, 3), noise(14, 28, 28), np.arange(14, dtype=np.uint8) % 10
  records = np.concatenate([labels[:, None], colour.transpose(0, 3, 1, 2).reshape(14, -1)], 1)
  names = [name for split in ('train', 'test') for name in cifar.files[split]]
  cuts = np.split(records, [2, 4, 6, 8, 10])
  cifar_files = {name: cut.tobytes() for name, cut in zip(names, cuts, strict=True)}
  idx_files = {}
  for prefix, part in (('train', slice(0, 10)), ('t10k', slice(10, 14))):
    head = struct.pack('>4i', 2051, len(grey[part]), 28, 28)
    idx_files[f'{prefix}-images-idx3-ubyte'] = head + grey[part].tobytes()
    head = struct.pack('>2i', 2049, len(grey[part]))
    idx_files[f'{prefix}-labels-idx1-ubyte'] = head + labels[part].tobytes()
  return {'cifar10': (colour, cifar_files), 'mnist': (grey[..., None], idx_files)}


def write_tar(path, files, prefix='some/folder/'):
  with tarfile.open(path, 'w:gz') as archive:
    for name, data in files.items():
      member = tarfile.TarInfo(prefix + name)
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return str(path)


def as_set(images):
  return {image.tobytes() for image in images}


def test_cifar10_prepares_itself_from_the_archive(tmp_path, small):
  import tensorflow_datasets as tfds

  images, files = small['cifar10']
  archive = write_tar(tmp_path / 'cifar-10-binary.tar.gz', files)
  options = {'image_size': 32, 'num_channels': 3, 'data_dir': str(tmp_path / 'tfds')}
  train = load('CIFAR10', 'train', path=archive, **options)
  assert as_set(train) == as_set(images[:10])
  Path(archive).unlink()  # it is prepared now
  test = load('cifar10', 'test', **options)
  assert as_set(test) == as_set(images[10:])
  for source in (train, test):
    batch = source.batch(np.arange(len(source)))
    numbers = [[i.tobytes() for i in images].index(image.tobytes()) for image in batch['data']]
    assert [number % 10 for number in numbers] == batch['label'].tolist()
    assert source.class_names[0] == 'airplane' and source.num_classes == 10
  # Anyone else's plain TFDS reads it, with the official labels.
  official = tfds.data_source('cifar10', split='train', data_dir=options['data_dir'])
  for i in range(10):
    label = [image.tobytes() for image in images].index(official[i]['image'].tobytes())
    assert official[i]['label'] == label % 10 and official[i]['id'] == b'train_%05d' % label
  assert 'tensorflow' not in sys.modules


@pytest.mark.parametrize('kind', ['archive', 'gz', 'dots'])
@pytest.mark.parametrize('name', ['MNIST', 'FashionMNIST'])
def test_mnist_prepares_itself_from_any_copy(tmp_path, small, kind, name):
  images, files = small['mnist']
  path = tmp_path / 'raw'
  path.mkdir()
  if kind == 'archive':
    path = write_tar(tmp_path / 'mnist.tgz', files)
  else:
    for file, data in files.items():
      target = path / (file + '.gz' if kind == 'gz' else file.replace('-idx', '.idx'))
      target.write_bytes(gzip.compress(data) if kind == 'gz' else data)
  options = {'image_size': 28, 'path': str(path), 'data_dir': str(tmp_path / 'tfds')}
  train = load(name, 'train', num_channels=1, **options)
  assert as_set(train) == as_set(images[:10])
  rgb = load(name, 'test', num_channels=3, **options)
  assert as_set(rgb) == as_set(np.repeat(images[10:], 3, axis=-1))


def test_preparation_refuses_bad_files_and_leaves_nothing(tmp_path, small):
  data_dir = tmp_path / 'tfds'

  def attempt(name, path):
    load(name, 'train', image_size=8, num_channels=1, path=str(path), data_dir=str(data_dir))

  cifar, mnist = small['cifar10'][1], small['mnist'][1]
  short = {**cifar, 'test_batch.bin': cifar['test_batch.bin'][:-1]}
  few = {**cifar, 'test_batch.bin': cifar['test_batch.bin'][:3073]}
  label = {**cifar, 'test_batch.bin': b'\x0b' + cifar['test_batch.bin'][1:]}
  absent = {name: data for name, data in cifar.items() if name != 'data_batch_3.bin'}
  image_file = 'train-images-idx3-ubyte'
  magic = {**mnist, image_file: b'\0\0\0\0' + mnist[image_file][4:]}
  cut = {**mnist, image_file: mnist[image_file][:-1]}
  for i, (name, files, message) in enumerate((
    ('cifar10', short, '3073-byte records'),
    ('cifar10', few, '1 images for test, not 4'),
    ('cifar10', label, 'above 9'),
    ('cifar10', absent, r'no data_batch_3\.bin'),
    ('mnist', magic, 'magic number 2051'),
    ('mnist', cut, 'not those of shape'),
    ('mnist', {**mnist, image_file: b''}, 'magic number'),
  )):  # fmt: skip
    with pytest.raises(UserError, match=message):
      attempt(name, write_tar(tmp_path / f'{i}.tgz', files))
  (tmp_path / 'no.tar').write_bytes(b'PK not a tar file')
  for path in (tmp_path / 'no.tar', tmp_path / 'missing.tar.gz'):
    with pytest.raises(UserError, match=r'must be an archive or a folder .*cifar-10-binary.tar.gz'):
      attempt('cifar10', path)
  for sub in ('MNIST', 'FashionMNIST'):  # two datasets in one folder, with the same file names
    for file, data in mnist.items():
      (tmp_path / 'both' / sub).mkdir(parents=True, exist_ok=True)
      (tmp_path / 'both' / sub / file).write_bytes(data[:-1] + sub[:1].encode())
  with pytest.raises(UserError, match='two different files'):
    attempt('mnist', tmp_path / 'both')
  assert not data_dir.exists() or not list(data_dir.rglob('*.json'))


def test_a_preparation_that_breaks_off_leaves_nothing(tmp_path, small, monkeypatch):
  archive = write_tar(tmp_path / 'a.tgz', small['cifar10'][1])
  options = {'image_size': 32, 'num_channels': 3, 'data_dir': str(tmp_path / 'tfds')}
  with monkeypatch.context() as patch:

    def fail(array):
      raise OSError(28, 'No space left on device')

    patch.setattr(tfds.Image, 'fromarray', fail)
    with pytest.raises(Failure, match=r'cannot write .*No space left'):
      load('CIFAR10', 'train', path=archive, **options)
  assert not list((tmp_path / 'tfds').rglob('*array_record*'))
  assert len(load('CIFAR10', 'train', path=archive, **options)) == 10


@pytest.mark.parametrize('failure', ['refused', 'silence', 'status'])
def test_no_network_is_reported_at_once(tmp_path, monkeypatch, failure):
  import requests

  def get(url, **_):
    if failure == 'silence':
      time.sleep(5)
    if failure == 'status':
      response = requests.Response()
      response.status_code, response.raw = 503, io.BytesIO()
      return response
    raise requests.ConnectionError

  monkeypatch.setattr(requests, 'get', get)
  monkeypatch.setattr(tfds, '_PROBE_SECONDS', 0.2)
  begin = time.time()
  with pytest.raises(UserError, match=r'cannot download mnist .*https://.*--config\.data\.path'):
    load('MNIST', 'train', image_size=28, num_channels=1, data_dir=str(tmp_path))
  assert time.time() - begin < 4


def test_the_network_is_used_where_there_is_one(tmp_path, small, monkeypatch):
  import requests
  import tensorflow_datasets as tfds

  images, files = small['cifar10']
  response = requests.Response()
  response.status_code, response.raw = 200, io.BytesIO()
  monkeypatch.setattr(requests, 'get', lambda url, **_: response)
  stored = Path(write_tar(tmp_path / 'a_name_of_tfds.tar.gz', files))
  monkeypatch.setattr(
    tfds.download.DownloadManager, 'download', lambda self, urls: dict.fromkeys(urls, stored)
  )
  train = load('CIFAR10', 'train', image_size=32, num_channels=3, data_dir=str(tmp_path / 'tfds'))
  assert as_set(train) == as_set(images[:10])


def test_a_damaged_prepared_set(tmp_path, small):
  """Damage of the files, or a format without random access, is said in one line."""
  archive = write_tar(tmp_path / 'a.tgz', small['cifar10'][1])
  options = {'image_size': 32, 'num_channels': 3, 'data_dir': str(tmp_path / 'tfds')}
  load('CIFAR10', 'train', path=archive, **options)
  home = tmp_path / 'tfds' / 'cifar10' / '3.0.2'
  info = json.loads((home / 'dataset_info.json').read_text())
  (home / 'dataset_info.json').write_text(json.dumps({**info, 'fileFormat': 'tfrecord'}))
  for file in home.glob('*array_record*'):
    file.rename(str(file).replace('array_record', 'tfrecord'))
  with pytest.raises(UserError, match=r'prepared as tfrecord.*convert_format.*array_record'):
    load('CIFAR10', 'train', **options)
  (home / 'dataset_info.json').write_text(json.dumps(info))
  for file in home.glob('*tfrecord*'):
    target = Path(str(file).replace('tfrecord', 'array_record'))
    file.rename(target)
    target.write_bytes(target.read_bytes()[:100])
  with pytest.raises(UserError, match='cifar10'):
    load('CIFAR10', 'train', **options)
  (home / 'dataset_info.json').write_text('{')
  with pytest.raises(UserError, match='cannot open'):
    load('CIFAR10', 'train', **options)


def prepare_fake(official, data_dir, images, **config):
  """Prepares `images`, {split: [array]}, as if they were the TFDS dataset `official`."""

  class Fake(official, skip_registration=True):
    name = official.name
    __module__ = official.__module__

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in images}

    def _generate_examples(self, split):
      for i, image in enumerate(images[split]):
        png = io.BytesIO()
        Image.fromarray(image).save(png, 'png')
        yield i, {'id': str(i), 'image': png.getvalue()}

  Fake(data_dir=data_dir, **config).download_and_prepare(file_format='array_record')


def test_other_tfds_sets_and_their_splits(tmp_path, caplog):
  import tensorflow_datasets as tfds

  images = {'train': list(noise(3, 40, 48, 3)), 'validation': list(255 - noise(2, 40, 48, 3))}
  lsun = tfds.builder_cls('lsun')
  prepare_fake(lsun, tmp_path, images, config='bedroom')
  prepare_fake(lsun, tmp_path, {'train': images['train']}, config='cat')
  options = {'image_size': 40, 'num_channels': 3, 'data_dir': str(tmp_path)}
  for name, category in (('LSUN', 'bedroom'), ('lsun/bedroom', '')):
    for split, own in (('train', 'train'), ('test', 'validation')):
      source = load(name, split, category=category, **options)
      assert source.num_classes == 0
      assert as_set(source) == as_set(image[:, 4:44] for image in images[own])
  with pytest.raises(UserError, match="'validation' does not exist; allowed: train"):
    load('LSUN', 'test', category='cat', **options)

  class Unheard(lsun, skip_registration=True):  # the user's own builder: TFDS has files, no code
    name = 'unheard'
    VERSION = '1.0.0'
    BUILDER_CONFIGS = ()

  prepare_fake(Unheard, tmp_path, {'train': images['train']})
  caplog.clear()
  assert as_set(load('unheard', 'train', **options)) == as_set(i[:, 4:44] for i in images['train'])
  assert not [r for r in caplog.records if r.levelname == 'WARNING' and r.name == 'root']
  assert len(load('unheard', 'test', **options)) == 3 and 'training images' in caplog.text


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('LSUN', {}, 'needs a category'),
    ('LSUN', {'category': 'bedrom'}, "did you mean 'bedroom'"),
    ('LSUN', {'category': 'bedroom'}, 'tfds build lsun/bedroom --file_format=array_record --data'),
    ('lsun/church_outdoor', {}, 'tfds build lsun/church_outdoor '),
    ('CELEBA', {}, 'tfds build celeb_a '),
    ('svhn', {}, 'tfds build svhn_cropped '),
    ('oxford_flowers102', {}, 'tfds build oxford_flowers102 '),
    ('cifr10', {}, "did you mean 'CIFAR10'"),
    ('oxford_flower', {}, "did you mean 'oxford_flowers102'"),
    ('huggingface:mnist', {}, 'is not a TFDS name'),
    ('cifar10:1.0.0', {}, 'cannot open'),
  ],
)
def test_a_set_that_is_not_there(tmp_path, monkeypatch, name, options, message):
  def network(*_, **__):
    raise AssertionError('nothing to look for on the network')

  monkeypatch.setattr('socket.socket.connect', network)
  monkeypatch.setattr('socket.getaddrinfo', network)
  with pytest.raises(UserError, match=message) as error:
    load(name, 'train', image_size=8, num_channels=3, data_dir=str(tmp_path), **options)
  assert '\n' not in str(error.value)
