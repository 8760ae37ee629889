"""Image sources with random access.

    source = load('CIFAR10', 'train', image_size=32, num_channels=3)
    source.batch(np.arange(2))  # 'data' uint8 [2, 32, 32, 3], and 'label' int32 [2]

Images stay uint8 here; flips, dequantisation and scaling happen on the device.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import errno
import functools
import io
import logging
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data import deep, geometry
from data.decoding import Decoder
from data.folder import fingerprint, read_folder, shown
from data.tfds import parse_example, prepared_builder, tfrecord_spans
from runtime.errors import Failure, unknown, UserError

logger = logging.getLogger('score_sde')

Batch = dict[str, np.ndarray]


class Source(Protocol):
  """Images or points, with random access.

  Attributes:
    class_names: of the classes, in the order of their labels; empty where there are no labels.
  """

  class_names: Sequence[str] = ()

  @property
  def num_classes(self) -> int:
    """How many classes there are; 0 where there are no labels."""
    return len(self.class_names)

  def __len__(self) -> int: ...

  def batch(self, indices: np.ndarray) -> Batch:
    """What `indices` [n] stand for: 'data' [n, ...], and 'label' int32 [n] if there are labels."""

  def class_counts(self) -> Sequence[int] | None:
    """How many examples each class has, if that is soon known."""
    return None

  def fingerprint(self) -> str:
    """What tells the files of a user from others, wherever they lie; empty where there are none."""
    return ''


_MEMORY_LIMIT = 4 * 2**30  # bytes; a larger set is decoded anew each time
_COUNTED = 200_000  # images, at most, whose labels are looked at when training begins
# Of a file that was there when its folder was listed: its disk or network is lost, or the machine
# is short of something.
_OUT_OF_REACH = (
  errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO,
  errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
  errno.ECONNRESET, errno.ECONNABORTED, errno.EREMOTEIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
)  # fmt: skip
_DIGITS = Path(__file__).parent.parent / 'assets' / 'digits.npz'


class ImageSource(Source):
  """`source[i]` is image i, uint8 [image_size, image_size, num_channels]; `batch` takes many.

  Decoded images are kept in memory if all of them fit under 4 GiB.

  Attributes:
    shape: of an image.
  """

  def __init__(
    self,
    shape: tuple[int, int, int],
    length: int,
    read: Callable[[int], tuple[np.ndarray, int]],
    class_names: Sequence[str] = (),
    label: Callable[[int], int] | None = None,
    fingerprint: Callable[[], str] = lambda: '',
  ):
    """`read(i)` decodes image i, of `shape`, and its label; it is called from several threads.

    `label(i)` is the label alone, which takes no time; `fingerprint()` that of the files.
    """
    self.shape = shape
    self.class_names = tuple(class_names)
    self._label, self._fingerprint = label, fingerprint
    self._length = length
    self._read = read
    fits = length * int(np.prod(shape)) <= _MEMORY_LIMIT
    self._images = np.empty((length, *shape), np.uint8) if fits else None
    self._labels = np.zeros(length if fits else 0, np.int32)
    self._decoded = np.zeros(length, bool)

  def class_counts(self) -> Sequence[int] | None:
    if self._label is None or not self.num_classes or self._length > _COUNTED:
      return None
    labels = np.array([self._label(i) for i in range(self._length)])
    return np.bincount(labels, minlength=self.num_classes).tolist()

  def fingerprint(self) -> str:
    return self._fingerprint()

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, i: int) -> np.ndarray:
    if not -self._length <= i < self._length:
      raise IndexError(f'image {i} of {self._length}')
    return self.gather(np.array([i % self._length]))[0]

  def gather(self, indices: np.ndarray) -> np.ndarray:
    """Images of `indices` [n], each in [0, len): uint8 [n, *shape]."""
    return self.batch(indices)['data']

  def batch(self, indices: np.ndarray) -> Batch:
    """`gather` as 'data', and the labels as 'label', int32 [n] from 0 on, where there are any."""
    if self._images is None:
      read = [self._read(int(i)) for i in indices]
      images = np.stack([image for image, _ in read])
      labels = np.array([label for _, label in read], np.int32)
    else:
      # Two threads may decode the same image: they write the same bytes, then the mark.
      for i in indices[~self._decoded[indices]]:
        self._images[i], self._labels[i] = self._read(int(i))
        self._decoded[i] = True
      images, labels = self._images[indices], self._labels[indices]
    return {'data': images} | ({'label': labels} if self.num_classes else {})


@dataclasses.dataclass(frozen=True)
class Records:
  """Images as they are stored, in any size and mode.

  Attributes:
    length: how many there are.
    read: (i) -> image i, opened and not yet loaded, and its label, 0 where there are none.
    where: (i) -> the name of image i in an error message.
    fit: the geometry of a dataset that has its own; None: the decoder's.
    class_names: of the labels, if there are any.
    upright: images are turned as their EXIF says.
    label: (i) -> its label alone, if that takes no time.
    files: of the user, if they are.
    of_training: though another split was asked for, as there is no other.
    all_splits: () -> what opens each image, of all splits if they are at hand.
  """

  length: int
  read: Callable[[int], tuple[Image.Image, int]]
  where: Callable[[int], str]
  fit: Callable[[Image.Image, int], Image.Image] | None
  class_names: Sequence[str] = ()
  label: Callable[[int], int] | None = None
  files: Sequence[Path] = ()
  upright: bool = False
  of_training: bool = False
  all_splits: Callable[[], Sequence[Callable[[], Image.Image]]] | None = None

  def opened(self, i: int) -> Image.Image:
    return self.read(i)[0]

  def only(self, kept: Sequence[int]) -> 'Records':
    """These of the images."""
    label = self.label
    return dataclasses.replace(
      self,
      length=len(kept),
      read=lambda i: self.read(kept[i]),
      where=lambda i: self.where(kept[i]),
      label=None if label is None else lambda i: label(kept[i]),
      files=[self.files[i] for i in kept] if self.files else (),
    )


@dataclasses.dataclass(frozen=True)
class Reader:
  """`reader(i)` is image i as a network's dataset has it, uint8 [size, size, C], and its label."""

  records: Records
  decoder: Decoder
  size: int
  usual: deep.Usual  # of images of more than 8 bits

  @classmethod
  def of(cls, records: Records, decoder: Decoder, size: int, where: str) -> 'Reader':
    def images() -> Sequence[Callable[[], Image.Image]]:
      if records.all_splits:
        return records.all_splits()
      return [functools.partial(records.opened, i) for i in range(records.length)]

    return cls(records, decoder, size, deep.Usual(images, shown(where)))

  def __call__(self, i: int) -> tuple[np.ndarray, int]:
    return self.decoded(i)[0]

  def decoded(self, i: int) -> tuple[tuple[np.ndarray, int], Image.Image]:
    """The same, and the image as it was opened.

    Raises:
      UserError: if it is damaged, or is none.
      Failure: if it cannot be reached any more.
    """
    records = self.records
    try:
      image, label = records.read(i)
      with image:
        pixels = self.decoder.pixels(image, self.size, self.usual, records.fit, records.upright)
      return (pixels, int(label)), image
    except UserError as error:
      raise UserError(f'{records.where(i)}: {error}') from error
    except Exception as error:  # Pillow, protobuf and array_record each have a dozen
      if isinstance(error, FileNotFoundError) and _has_entries(os.path.dirname(error.filename)):
        raise UserError(
          f'{records.where(i)} cannot be read: it is not there any more; put it back, and repeat '
          'the command: it goes on'
        ) from error
      if isinstance(error, MemoryError) or getattr(error, 'errno', None) in _OUT_OF_REACH:
        reason = getattr(error, 'strerror', '') or 'out of memory'
        raise Failure(
          f'{records.where(i)} cannot be read any more ({reason}); see to that, for example '
          'connect its disk again, and repeat the command: it goes on'
        ) from error
      raise UserError(
        f'{records.where(i)} cannot be read as an image ({error}); replace or remove it, or leave '
        'out all such with --config.data.skip_damaged'
      ) from error

  def readable(self) -> list[int]:
    """The numbers of the images that can be read, all of which are; the others are logged.

    Raises:
      UserError: if there are none, or a class has none.
    """
    damaged: list[tuple[int, str]] = []

    def check(i: int) -> None:
      try:
        self(i)
      except UserError as error:
        damaged.append((i, str(error)))

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
      for _ in pool.map(check, range(self.records.length)):
        pass
    lost = {i for i, _ in damaged}
    kept = [i for i in range(self.records.length) if i not in lost]
    if damaged:
      first = min(damaged)[1]
      if not kept:
        raise UserError(f'none of {self.records.length} images can be read; the first: {first}')
      logger.warning(
        'left out: %d of %d images, which cannot be read, such as: %s',
        len(damaged), self.records.length, first.partition('; replace')[0],
      )  # fmt: skip
      self._check_classes(lost, kept)
    return kept

  def _check_classes(self, lost: set[int], kept: list[int]) -> None:
    if (label := self.records.label) and (names := self.records.class_names):
      gone = {label(i) for i in lost} - {label(i) for i in kept}
      if gone:
        raise UserError(f'of class {names[min(gone)]} no image can be read; replace them')


def _has_entries(folder: str) -> bool:
  """Whether a folder is there, and is not the empty one that an unmounted disk leaves behind."""
  try:
    with os.scandir(folder) as entries:
      return any(entries)
  except OSError:
    return False


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
    upright=True,
    of_training=of_training,
    all_splits=all_splits,
  )


def _tfds(name: str, split: str, path: str, data_dir: str, held_out: str, fit: Any) -> Records:
  """A TFDS dataset. `held_out` names its evaluation split; '' picks test or validation."""
  from tensorflow_datasets.core.decode import DeserializeMethod
  from tensorflow_datasets.core.features import ClassLabel
  from tensorflow_datasets.core.features import Image as ImageFeature

  also = ['folder', *_LOCAL, *(own for own, _, _, _ in _TFDS)]
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
}  # and folder
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
) -> ImageSource:
  """The images of one split of a dataset, each uint8 [image_size, image_size, num_channels].

  Args:
    name: 'digits', 'folder', 'CIFAR10', 'MNIST', 'FashionMNIST', 'SVHN', 'CELEBA', 'LSUN', 'FFHQ',
      'CelebAHQ' in any case, or a name of TensorFlow Datasets such as 'oxford_flowers102'.
    split: 'train' or 'test'; the latter is whichever split the dataset holds out.
    image_size: pixels.
    num_channels: 1 (luminance), 2 (and alpha), 3 (RGB) or 4 (and alpha).
    path: the images of 'folder'; the TFRecord files of 'FFHQ' and 'CelebAHQ'; the official archive
      or files that CIFAR10, MNIST or FashionMNIST is prepared from where there is no network.
    data_dir: TFDS's data directory; empty for its default.
    category: of LSUN, such as 'bedroom' or 'church_outdoor'.
    decoder: how images in files become those of the dataset; by default cropped, on white.
    held_out: the subfolder of a folder with the images of its split test; by default found by name.
    labelled: classes are wanted: images outside of the folders of classes are left out.
    skip_damaged: leave out images that cannot be read; all are read now to find them.

  Raises:
    UserError: unknown name, split or category; data that are missing, not prepared or damaged. A
      damaged image raises when it is first read, unless it is left out.
  """
  decoder = dataclasses.replace(decoder or Decoder(), num_channels=num_channels)
  if image_size < 1:
    raise UserError(f'config.data.image_size is {image_size}; it must be at least 1')
  if decoder.fit != 'crop' and _has_own_fit(name):
    raise UserError(
      f'config.data.fit = {decoder.fit} is for folders, and dataset {name!r} has a geometry of its '
      'own; leave it at crop'
    )
  records = open_records(name, split, path, data_dir, category, held_out, labelled)
  files = records.files
  read = Reader.of(records, decoder, image_size, path or name)
  if skip_damaged:
    records = records.only(read.readable())
    read = dataclasses.replace(read, records=records)
  _, label = read(0)  # a wrong path or image_size shows now, not in the first training step
  source = ImageSource(
    (image_size, image_size, num_channels),
    records.length,
    read,
    # TFDS has -1 for every image of a split whose labels are secret.
    records.class_names if label >= 0 else (),
    records.label,
    functools.partial(fingerprint, path, files),
  )
  if read.usual.was_asked:
    refuse_one_value(source)
  return source


def refuse_one_value(source: ImageSource) -> None:
  """Raises UserError if all images are of one and the same value, so that nothing is seen."""
  first = source[0]
  for i in deep.spread(len(source), deep.LOOKED_AT):
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
