"""Datasets by their names, each a source of images with random access.

    source = load('CIFAR10', 'train', image_size=32, num_channels=3)
    source.batch(np.arange(2))  # 'data' uint8 [2, 32, 32, 3], and 'label' int32 [2]

Images stay uint8 here; flips, dequantisation and scaling happen on the device.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data import deep, geometry, packed, tar
from data.decoding import Decoder
from data.folder import fingerprint, read_folder, shown
from data.images import Images, ImageSource, spread
from data.records import Reader, Records
from data.tfds import parse_example, prepared_builder, tfrecord_spans
from runtime.errors import unknown, UserError

logger = logging.getLogger('score_sde')

_DIGITS = Path(__file__).parent.parent / 'assets' / 'digits.npz'


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What is to be read, and as which images.

  Attributes:
    name: 'digits', 'folder', 'tar', 'packed', 'CIFAR10', 'MNIST', 'FashionMNIST', 'SVHN', 'CELEBA',
      'LSUN', 'FFHQ', 'CelebAHQ' in any case, or a name of TensorFlow Datasets such as
      'oxford_flowers102'.
    image_size: pixels.
    decoder: how images in files become those of the dataset.
    path: the images of 'folder', the shards of 'tar' and 'packed'; the TFRecord files of 'FFHQ' and
      'CelebAHQ'; the official archive or files that CIFAR10, MNIST or FashionMNIST is prepared from
      where there is no network.
    data_dir: TFDS's data directory; empty for its default.
    category: of LSUN, such as 'bedroom' or 'church_outdoor'.
    held_out: the subfolder of a folder with the images of its split test; by default found by name.
    labelled: classes are wanted: images outside of the folders of classes are left out.
    skip_damaged: leave out images that cannot be read; all are read now to find them. Those that
      are packed were read before.
  """

  name: str
  image_size: int
  decoder: Decoder
  path: str = ''
  data_dir: str = ''
  category: str = ''
  held_out: str = ''
  labelled: bool = True
  skip_damaged: bool = False

  def images(self, split: str) -> Images:
    """The images of one split, each uint8 [image_size, image_size, C].

    Args:
      split: 'train' or 'test'; the latter is whichever split the dataset holds out.

    Raises:
      UserError: unknown name, split or category; data that are missing, not prepared or damaged. A
        damaged image raises when it is first read, unless it is left out.
    """
    return kind_of(self.name).images(self, split)

  def reader(self, split: str) -> Reader:
    """What reads the same one by one; its errors are those of `images`."""
    if self.image_size < 1:
      raise UserError(f'config.data.image_size is {self.image_size}; it must be at least 1')
    if self.decoder.fit != 'crop' and kind_of(self.name).has_own_fit:
      raise UserError(
        f'config.data.fit = {self.decoder.fit} is for folders, and dataset {self.name!r} has a '
        'geometry of its own; leave it at crop'
      )
    read = Reader.of(self.records(split), self.decoder, self.image_size, self.path or self.name)
    if self.skip_damaged:
      read = dataclasses.replace(read, records=read.records.only(read.readable()))
    _, label = read(0)  # a wrong path or image_size shows now, not in the first training step
    if label < 0:  # TFDS has -1 for every image of a split whose labels are secret
      read = dataclasses.replace(read, records=dataclasses.replace(read.records, class_names=()))
    return read

  def records(self, split: str) -> Records:
    """The same as they are stored; its errors are those of `images`."""
    if split not in ('train', 'test'):
      raise unknown('split', split, ('train', 'test'))
    try:
      records = kind_of(self.name).records(self, split)
    except OSError as error:
      raise UserError(f'cannot open dataset {self.name!r}: {error}') from error
    if not records.length:
      raise UserError(f'dataset {self.name!r} has no images in split {split}')
    return records


def load(
  name: str,
  split: str,
  *,
  image_size: int,
  num_channels: int,
  decoder: Decoder | None = None,
  **where: Any,
) -> Images:
  """The images of one split of a `Dataset`, whose further fields are `where`."""
  decoder = dataclasses.replace(decoder or Decoder(), num_channels=num_channels)
  return Dataset(name, image_size, decoder, **where).images(split)


def _digits(dataset: Dataset, split: str) -> Records:
  del dataset  # there is one
  with np.load(_DIGITS) as file:
    part = slice(1500) if split == 'train' else slice(1500, None)
    images, labels = file['images'][part], file['labels'][part]
  return Records(
    len(images),
    lambda i: (Image.fromarray(images[i]), labels[i]),
    lambda i: f'digits {split} {i}',
    geometry.stretch,
    [str(digit) for digit in range(10)],
    labels.__getitem__,
  )


def _folder(dataset: Dataset, split: str) -> Records:
  found = read_folder(dataset.path, dataset.held_out, dataset.labelled)
  files, labels = found.told(split, dataset.path)
  of_training = split == 'test' and found.test is None

  def all_splits() -> Sequence[Callable[[], Image.Image]]:
    every = [*found.train.files, *(found.test.files if found.test else [])]
    return [functools.partial(Image.open, file) for file in every]

  return Records(
    len(files),
    lambda i: (Image.open(files[i]), labels[i]),
    lambda i: shown(files[i]),
    None,
    found.class_names,
    labels.__getitem__,
    files,
    files.__getitem__,
    upright=True,
    of_training=of_training,
    all_splits=all_splits,
  )


@dataclasses.dataclass(frozen=True)
class _TFDSSet:
  """A dataset of TensorFlow Datasets that has a name of ours.

  Attributes:
    own: this name.
    name: there.
    held_out: its evaluation split; '' picks test or validation.
    fit: its geometry.
  """

  own: str
  name: str
  held_out: str
  fit: Callable[[Image.Image, int], Image.Image]

  def full_name(self, dataset: Dataset) -> str:
    """`set` or `set/config`, as TFDS has it."""
    config = dataset.name.partition('/')[2]
    if self.own == 'LSUN':
      config = config or dataset.category
      if not config:
        raise UserError("LSUN needs a category; set config.data.category, such as 'bedroom'")
    return f'{self.name}/{config}' if config else self.name


_TFDS_SETS = (
  _TFDSSet('CIFAR10', 'cifar10', 'test', geometry.stretch),
  _TFDSSet('MNIST', 'mnist', 'test', geometry.stretch),
  _TFDSSet('FashionMNIST', 'fashion_mnist', 'test', geometry.stretch),
  _TFDSSet('SVHN', 'svhn_cropped', 'test', geometry.stretch),
  _TFDSSet('CELEBA', 'celeb_a', 'validation', geometry.celeba),
  _TFDSSet('LSUN', 'lsun', 'validation', geometry.lsun),
)


def _tfds_set(name: str) -> _TFDSSet | None:
  """The one that is meant by a name of ours or of TFDS, `set` or `set/config`."""
  head = name.partition('/')[0].lower()
  return next((known for known in _TFDS_SETS if head in (known.own.lower(), known.name)), None)


def _tfds(dataset: Dataset, split: str) -> Records:
  from tensorflow_datasets.core.decode import DeserializeMethod
  from tensorflow_datasets.core.features import ClassLabel
  from tensorflow_datasets.core.features import Image as ImageFeature

  known = _tfds_set(dataset.name)
  name = known.full_name(dataset) if known else dataset.name
  held_out, fit = (known.held_out, known.fit) if known else ('', None)
  data_dir, also = os.path.expanduser(dataset.data_dir), [*KINDS, *(k.own for k in _TFDS_SETS)]
  builder = prepared_builder(name, path=dataset.path, data_dir=data_dir, also=also)
  info = builder.info
  if 'image' not in info.features or not isinstance(info.features['image'], ImageFeature):
    raise UserError(
      f'TFDS dataset {name!r} has no image: its features are {", ".join(info.features)}'
    )
  of_training = False
  if split == 'test':
    split = held_out or next((s for s in ('test', 'validation') if s in info.splits), 'train')
    of_training = split == 'train'
    if of_training:
      logger.warning('%s has no split test or validation: testing on the training images.', name)
  if split not in info.splits:
    raise unknown(f'split of TFDS dataset {name}', split, info.splits)
  try:
    # Raw records: Pillow on the image alone is several times faster than TFDS on all features.
    records = builder.as_data_source(
      split, deserialize_method=DeserializeMethod.RAW_BYTES, file_format='array_record'
    )
    length = len(records)
  except Exception as error:  # of the C++ reader, which has its own
    raise UserError(
      f'cannot read TFDS dataset {name!r} ({error}); delete {builder.data_dir} and prepare it again'
    ) from error

  class_names = ()
  if 'label' in info.features and isinstance(info.features['label'], ClassLabel):
    class_names = info.features['label'].names

  def read(i: int) -> tuple[Image.Image, int]:
    features = parse_example(records[i])
    image = Image.open(io.BytesIO(features['image'].bytes_list.value[0]))
    return image, features['label'].int64_list.value[0] if class_names else 0

  def label(i: int) -> int:
    return parse_example(records[i])['label'].int64_list.value[0]

  where = f'TFDS dataset {name}, split {split}, image'
  return Records(
    length, read, lambda i: f'{where} {i}', fit, class_names, label,
    of_training=of_training,
  )  # fmt: skip


def _tfrecords(dataset: Dataset, split: str) -> Records:
  """TFRecord files of tf.train.Example: 'shape' int64 [3], 'data' uint8 bytes, channels first."""
  path = dataset.path
  root = Path(path).expanduser()
  folder, pattern = (root, '*.tfrecord*') if os.path.isdir(root) else (root.parent, root.name)
  files = sorted(folder.glob(pattern)) if path else []
  if not files:
    raise UserError(
      f'no TFRecord files at --config.data.path={path!r}; name a file, a folder of *.tfrecords, or '
      'a glob pattern'
    )
  if split == 'test':
    logger.warning('TFRecord files have no test split: testing on the training images.')
  spans = [(file, offset, size) for file in files for offset, size in tfrecord_spans(file)]

  def read(i: int) -> tuple[Image.Image, int]:
    file, offset, size = spans[i]
    with open(file, 'rb') as stream:
      stream.seek(offset)
      features = parse_example(stream.read(size))
    shape = features['shape'].int64_list.value
    data = np.frombuffer(features['data'].bytes_list.value[0], np.uint8)
    return Image.fromarray(data.reshape(shape).transpose(1, 2, 0).squeeze()), 0

  where = lambda i: f'{spans[i][0]}, byte {spans[i][1]}'  # noqa: E731
  return Records(len(spans), read, where, geometry.stored, files=files)


def _tar(dataset: Dataset, split: str) -> Records:
  return tar.read_tars(dataset.path, dataset.held_out).records(split)


def _packed(dataset: Dataset, split: str) -> Records:
  return packed.open_packed(dataset.path).records(split)


def _packed_images(dataset: Dataset, split: str) -> Images:
  decoder = dataset.decoder
  images = packed.open_packed(dataset.path)
  return images.images(split, dataset.image_size, decoder.num_channels, decoder.fit)


def _decoded(dataset: Dataset, split: str) -> Images:
  """Images that are decoded when they are first asked for."""
  read = dataset.reader(split)
  records, decoder, size = read.records, read.decoder, read.size
  source = ImageSource(
    (size, size, decoder.num_channels),
    records.length,
    read,
    records.class_names,
    records.label,
    functools.partial(fingerprint, dataset.path, records.files),
    [records.file(i) for i in range(records.length)] if records.file else (),
  )
  if read.usual.was_asked:
    refuse_one_value(source)
  return source


@dataclasses.dataclass(frozen=True)
class Kind:
  """What is to be known of a kind of dataset; `Dataset` asks it.

  Attributes:
    records: opens the images of a split as they are stored.
    images: makes of them those of a network; by default they are decoded.
    of_users: it lies in `config.data.path`, and others may have the same name.
    has_own_fit: its images come to their size in a way of their own, whatever `config.data.fit` is.
  """

  records: Callable[[Dataset, str], Records]
  images: Callable[[Dataset, str], Images] = _decoded
  of_users: bool = False
  has_own_fit: bool = False


# By the name in a config, in any case. All other names are of TensorFlow Datasets.
KINDS = {
  'folder': Kind(_folder, of_users=True),
  'tar': Kind(_tar, of_users=True),
  'packed': Kind(_packed, _packed_images, of_users=True),
  'digits': Kind(_digits, has_own_fit=True),
  'FFHQ': Kind(_tfrecords, has_own_fit=True),
  'CelebAHQ': Kind(_tfrecords, has_own_fit=True),
}


def kind_of(name: str) -> Kind:
  """The kind of the dataset of this name."""
  named = (kind for known, kind in KINDS.items() if known.lower() == name.lower())
  return next(named, Kind(_tfds, has_own_fit=_tfds_set(name) is not None))


def refuse_one_value(source: Images) -> None:
  """Raises UserError if all images are of one and the same value, so that nothing is seen."""
  first = source[0]
  for i in spread(len(source), deep.LOOKED_AT):
    image = source[i]
    if image.min() < image.max() or image.flat[0] != first.flat[0]:
      return
  raise UserError(
    f'every pixel of all images is {first.flat[0]} of 255, so that there is nothing to learn; look '
    'at the files, and at --config.data.black and --config.data.white if they have more than 8 bits'
  )
