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


def _digits(split: str, _: str) -> Records:
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


def _folder(split: str, path: str, held_out: str = '', labelled: bool = True) -> Records:
  found = read_folder(path, held_out, labelled)
  files, labels = found.told(split, path)
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


def _tfds(name: str, split: str, path: str, data_dir: str, held_out: str, fit: Any) -> Records:
  """A TFDS dataset. `held_out` names its evaluation split; '' picks test or validation."""
  from tensorflow_datasets.core.decode import DeserializeMethod
  from tensorflow_datasets.core.features import ClassLabel
  from tensorflow_datasets.core.features import Image as ImageFeature

  also = [*OF_USERS, *_LOCAL, *(own for own, _, _, _ in _TFDS)]
  builder = prepared_builder(name, path=path, data_dir=data_dir, also=also)
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


def _tfrecords(split: str, path: str) -> Records:
  """TFRecord files of tf.train.Example: 'shape' int64 [3], 'data' uint8 bytes, channels first."""
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


_LOCAL: dict[str, Callable[[str, str], Records]] = {
  'digits': _digits,
  'FFHQ': _tfrecords,
  'CelebAHQ': _tfrecords,
}
OF_USERS = ('folder', 'tar', 'packed')  # in `config.data.path`
_TFDS = (  # name in a config, name in TFDS, evaluation split, geometry
  ('CIFAR10', 'cifar10', 'test', geometry.stretch),
  ('MNIST', 'mnist', 'test', geometry.stretch),
  ('FashionMNIST', 'fashion_mnist', 'test', geometry.stretch),
  ('SVHN', 'svhn_cropped', 'test', geometry.stretch),
  ('CELEBA', 'celeb_a', 'validation', geometry.celeba),
  ('LSUN', 'lsun', 'validation', geometry.lsun),
)


def load(
  name: str,
  split: str,
  *,
  image_size: int,
  num_channels: int,
  path: str = '',
  data_dir: str = '',
  category: str = '',
  decoder: Decoder | None = None,
  held_out: str = '',
  labelled: bool = True,
  skip_damaged: bool = False,
) -> Images:
  """The images of one split of a dataset, each uint8 [image_size, image_size, num_channels].

  Args:
    name: 'digits', 'folder', 'tar', 'packed', 'CIFAR10', 'MNIST', 'FashionMNIST', 'SVHN', 'CELEBA',
      'LSUN', 'FFHQ', 'CelebAHQ' in any case, or a name of TensorFlow Datasets such as
      'oxford_flowers102'.
    split: 'train' or 'test'; the latter is whichever split the dataset holds out.
    image_size: pixels.
    num_channels: 1 (luminance), 2 (and alpha), 3 (RGB) or 4 (and alpha).
    path: the images of 'folder', the shards of 'tar' and 'packed'; the TFRecord files of 'FFHQ' and
      'CelebAHQ'; the official archive or files that CIFAR10, MNIST or FashionMNIST is prepared from
      where there is no network.
    data_dir: TFDS's data directory; empty for its default.
    category: of LSUN, such as 'bedroom' or 'church_outdoor'.
    decoder: how images in files become those of the dataset; by default cropped, on white.
    held_out: the subfolder of a folder with the images of its split test; by default found by name.
    labelled: classes are wanted: images outside of the folders of classes are left out.
    skip_damaged: leave out images that cannot be read; all are read now to find them. Those that
      are packed were read before.

  Raises:
    UserError: unknown name, split or category; data that are missing, not prepared or damaged. A
      damaged image raises when it is first read, unless it is left out.
  """
  if name.lower() == 'packed':
    return packed.open_packed(path).images(
      split, image_size, num_channels, decoder.fit if decoder else ''
    )
  read = open_reader(
    name,
    split,
    image_size=image_size,
    num_channels=num_channels,
    path=path,
    data_dir=data_dir,
    category=category,
    decoder=decoder,
    held_out=held_out,
    labelled=labelled,
    skip_damaged=skip_damaged,
  )
  records = read.records
  source = ImageSource(
    (image_size, image_size, num_channels),
    records.length,
    read,
    records.class_names,
    records.label,
    functools.partial(fingerprint, path, records.files),
    [records.file(i) for i in range(records.length)] if records.file else (),
  )
  if read.usual.was_asked:
    refuse_one_value(source)
  return source


def open_reader(
  name: str,
  split: str,
  *,
  image_size: int,
  num_channels: int,
  path: str = '',
  data_dir: str = '',
  category: str = '',
  decoder: Decoder | None = None,
  held_out: str = '',
  labelled: bool = True,
  skip_damaged: bool = False,
) -> Reader:
  """What reads the images of one split as a dataset has them; see `load`."""
  decoder = dataclasses.replace(decoder or Decoder(), num_channels=num_channels)
  if image_size < 1:
    raise UserError(f'config.data.image_size is {image_size}; it must be at least 1')
  if decoder.fit != 'crop' and _has_own_fit(name):
    raise UserError(
      f'config.data.fit = {decoder.fit} is for folders, and dataset {name!r} has a geometry of its '
      'own; leave it at crop'
    )
  records = open_records(name, split, path, data_dir, category, held_out, labelled)
  read = Reader.of(records, decoder, image_size, path or name)
  if skip_damaged:
    read = dataclasses.replace(read, records=records.only(read.readable()))
  _, label = read(0)  # a wrong path or image_size shows now, not in the first training step
  if label < 0:  # TFDS has -1 for every image of a split whose labels are secret
    read = dataclasses.replace(read, records=dataclasses.replace(read.records, class_names=()))
  return read


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


def open_records(
  name: str,
  split: str,
  path: str = '',
  data_dir: str = '',
  category: str = '',
  held_out: str = '',
  labelled: bool = True,
) -> Records:
  """The images of one split as they are stored; arguments and errors are those of `load`."""
  if split not in ('train', 'test'):
    raise unknown('split', split, ('train', 'test'))
  try:
    if name.lower() == 'folder':
      records = _folder(split, path, held_out, labelled)
    elif name.lower() == 'tar':
      records = tar.read_tars(path, held_out).records(split)
    elif name.lower() == 'packed':
      records = packed.open_packed(path).records(split)
    else:
      records = _open(name, split, path, os.path.expanduser(data_dir), category)
  except OSError as error:
    raise UserError(f'cannot open dataset {name!r}: {error}') from error
  if not records.length:
    raise UserError(f'dataset {name!r} has no images in split {split}')
  return records


def _has_own_fit(name: str) -> bool:
  own = {n.lower() for n in _LOCAL}
  return name.partition('/')[0].lower() in own.union(*({n.lower(), t} for n, t, _, _ in _TFDS))


def _open(name: str, split: str, path: str, data_dir: str, category: str) -> Records:
  for own, opener in _LOCAL.items():
    if name.lower() == own.lower():
      return opener(split, path)
  head, _, config = name.partition('/')
  for own, tfds_name, held_out, fit in _TFDS:
    if head.lower() in (own.lower(), tfds_name):
      if own == 'LSUN':
        config = config or category
        if not config:
          raise UserError("LSUN needs a category; set config.data.category, such as 'bedroom'")
      full = f'{tfds_name}/{config}' if config else tfds_name
      return _tfds(full, split, path, data_dir, held_out, fit)
  return _tfds(name, split, path, data_dir, '', None)
