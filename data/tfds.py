"""TensorFlow's files without TensorFlow: prepared TFDS datasets, and TFRecords.

`tfds.builder` and the array_record reader need no TensorFlow. The official preparation of CIFAR-10,
MNIST and Fashion-MNIST does, so it is done here from the official files, into the same layout:
afterwards `tfds.data_source('cifar10')` reads it anywhere.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import difflib
import functools
import gzip
import io
import logging
import os
from pathlib import Path
import re
import shlex
import struct
import tarfile
import threading
from typing import Any
import zlib

import numpy as np
from PIL import Image

from runtime.errors import cannot_write, unknown, UserError

logger = logging.getLogger('score_sde')

_PROBE_SECONDS = 12  # an unreachable network is reported within this time


@dataclasses.dataclass(frozen=True)
class Official:
  """The official files of a dataset: for each split their names and the number of images."""

  files: dict[str, tuple[str, ...]]
  images: dict[str, int]
  read: Callable[[Sequence[bytes]], tuple[np.ndarray, np.ndarray]]  # [N, H, W, C], [N]
  classes: Sequence[str] = ()  # label names, where the official builder takes them from the archive


def _read_cifar(batches: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
  """Records of 1 label byte and 3072 pixel bytes in channel, row, column order."""
  if any(len(batch) % 3073 for batch in batches):
    raise ValueError('a file is not a whole number of 3073-byte records')
  records = np.concatenate([np.frombuffer(batch, np.uint8).reshape(-1, 3073) for batch in batches])
  if records[:, 0].max(initial=0) > 9:
    raise ValueError('a label is above 9')
  return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def _read_idx(images_and_labels: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
  """Two idx files: a header of big-endian int32 (magic number, dimensions), then uint8 values."""
  arrays = []
  for data, magic, ndim in zip(images_and_labels, (2051, 2049), (3, 1), strict=True):
    header = np.frombuffer(data[: 4 * (1 + ndim)], '>i4').tolist()
    if header[:1] != [magic] or len(header) != 1 + ndim:
      raise ValueError(f'an idx file begins with {header[:1]}, not with the magic number {magic}')
    if np.prod(header[1:]) != len(data) - 4 * (1 + ndim):
      raise ValueError(f'an idx file has {len(data)} bytes, not those of shape {header[1:]}')
    arrays.append(np.frombuffer(data, np.uint8, offset=4 * (1 + ndim)).reshape(header[1:]))
  images, labels = arrays
  if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max(initial=0) > 9:
    raise ValueError('the idx files do not hold 28x28 images and as many labels from 0 to 9')
  return images[..., None], labels


_IDX = Official(
  files={
    'train': ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'),
    'test': ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'),
  },
  images={'train': 60000, 'test': 10000},
  read=_read_idx,
)
OFFICIAL = {
  'cifar10': Official(
    files={
      'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
      'test': ('test_batch.bin',),
    },
    images={'train': 50000, 'test': 10000},
    read=_read_cifar,
    classes=(
      *('airplane', 'automobile', 'bird', 'cat', 'deer'),
      *('dog', 'frog', 'horse', 'ship', 'truck'),
    ),
  ),
  'mnist': _IDX,
  'fashion_mnist': _IDX,
}


def prepared_builder(
  name: str, *, path: str = '', data_dir: str = '', also: Sequence[str] = ()
) -> Any:
  """The `tfds.core.DatasetBuilder` of `name`, prepared as array_record files in TFDS's `data_dir`.

  Args:
    name: a TFDS name, `set`, `set/config` or `set/config:version`.
    path: where cifar10, mnist or fashion_mnist is prepared from if it is not prepared yet: an
      archive (.tar, .tar.gz) or a folder with the official files. Empty: they are downloaded.
    data_dir: TFDS's data directory; empty: TFDS_DATA_DIR or ~/tensorflow_datasets.
    also: names beside those of TFDS, for the error that says what is allowed.

  Raises:
    UserError: no such dataset or config; not prepared, with the command that does it; no network;
      bad files.
  """
  import tensorflow_datasets as tfds

  # A namespace ('huggingface:x') would send TFDS to the network, so only plain names pass.
  if not re.fullmatch(r'\w+(/[\w.\-]+)?(:[\d.*]+)?', name):
    raise UserError(f'{name!r} is not a TFDS name; write it as set, set/config or set/config:1.2.3')
  head, _, config = name.partition(':')[0].partition('/')
  try:
    configs = tfds.builder_cls(head).builder_configs
  except tfds.core.DatasetNotFoundError:
    configs = {}
  if config and configs and config not in configs:
    raise unknown(f'TFDS config of {head}', config, configs)

  def make() -> Any:
    return tfds.builder(name, data_dir=data_dir or None)

  try:
    builder = make()
  except tfds.core.DatasetNotFoundError as error:
    names = {n.lower(): n for n in [*tfds.list_builders(with_community_datasets=False), *also]}
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    raise UserError(
      f'dataset {name!r} does not exist; allowed: {", ".join(also)} or a name of TensorFlow '
      'Datasets (https://www.tensorflow.org/datasets/catalog)'
      + (f'; did you mean {names[near[0]]!r}?' if near else '')
    ) from error
  except Exception as error:  # TFDS has many, AssertionError for an unknown version among them
    raise UserError(f'TFDS cannot open {name!r}: {_one_line(error)}') from error

  if not _is_prepared(builder):
    if head not in OFFICIAL:
      command = f'tfds build {name} --file_format=array_record'
      if data_dir:
        command += f' --data_dir={shlex.quote(data_dir)}'
      raise UserError(
        f'TFDS dataset {name!r} is not prepared in {builder.data_dir}; name its place with '
        '--config.data.tfds_dir, or run once, in an environment of its own: '
        f'pip install tensorflow tensorflow-datasets && {command}'
      )
    _prepare(builder, path)
    builder = make()
  formats = {file_format.value for file_format in builder.info.available_file_formats()}
  if 'array_record' not in formats:
    raise UserError(
      f'TFDS dataset {name!r} is prepared as {", ".join(sorted(formats))}, without random access; '
      'add array_record files: pip install tensorflow tensorflow-datasets && tfds convert_format '
      f'--dataset_version_dir={shlex.quote(str(builder.data_dir))} --out_file_format=array_record'
    )
  return builder


def _one_line(error: BaseException) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


def _is_prepared(builder: Any) -> bool:
  # `builder.is_prepared()` says the same, with a warning in the log each time.
  return os.path.exists(Path(builder.data_dir) / 'dataset_info.json')


def _prepare(builder: Any, path: str) -> None:
  """Writes the dataset of the official `builder`, from `path` or else from the network."""
  official_class: Any = type(builder)
  name = builder.name
  official = OFFICIAL[name]
  urls = list(official_class.url_infos)
  try:
    if path:
      origins = {path: Path(path).expanduser()}
    else:
      origins = _download(name, urls, Path(builder.data_dir_root))
    splits = _read_splits(official, origins)
  except (ValueError, OSError, EOFError, tarfile.TarError, zlib.error) as error:
    raise UserError(
      f'cannot prepare {name} from {path or "the download"} ({_one_line(error)}); '
      f'--config.data.path must be an archive or a folder of the official files: {" ".join(urls)}'
    ) from error

  # The same name, features and layout.
  class Prepared(official_class, skip_registration=True):  # type: ignore[call-arg]  # of TFDS
    name = official_class.name
    __module__ = official_class.__module__

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
      if official.classes:
        self.info.features['label'].names = official.classes
      return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
      for i, (image, label) in enumerate(zip(*splits[split], strict=True)):
        png = io.BytesIO()
        Image.fromarray(image.squeeze()).save(png, 'png')
        example = {'image': png.getvalue(), 'label': int(label)}
        if 'id' in self.info.features:
          example['id'] = f'{split}_{i:05d}'
        yield i, example

  logger.info('preparing %s in %s, once', name, builder.data_dir)
  try:  # TFDS writes to incomplete.* and renames that at the end: a broken run leaves nothing
    Prepared(data_dir=builder.data_dir_root).download_and_prepare(file_format='array_record')
  except OSError as error:
    if not _is_prepared(builder):  # else another process was faster
      raise cannot_write(builder.data_dir, error, 'set config.data.tfds_dir') from error


def _download(name: str, urls: Sequence[str], data_dir: Path) -> dict[str, Path]:
  """The files behind `urls`, by TFDS's download manager, which keeps them and checks sha256."""
  import requests
  import tensorflow_datasets as tfds

  answer: list[str] = []

  def probe() -> None:
    try:
      with requests.get(urls[0], stream=True, timeout=_PROBE_SECONDS / 2) as response:
        answer.append('' if response.ok else f'HTTP status {response.status_code}')
    except requests.RequestException as error:
      answer.append(type(error).__name__)

  # TFDS would retry for minutes. A thread, because no timeout bounds the look-up of a host name.
  thread = threading.Thread(target=probe, daemon=True)
  thread.start()
  thread.join(_PROBE_SECONDS)
  problem = answer[0] if answer else f'no answer in {_PROBE_SECONDS} s'
  if not problem:
    try:
      manager = tfds.download.DownloadManager(
        download_dir=data_dir / 'downloads', dataset_name=name
      )
      return {url: Path(file) for url, file in manager.download({url: url for url in urls}).items()}
    except Exception as error:  # of requests, urllib3, TFDS and the file system
      problem = _one_line(error)
  raise UserError(
    f'cannot download {name} ({problem}); fetch {" ".join(urls)} where there is a network, '
    'and pass the archive, or the folder that holds the files, as --config.data.path'
  )


def _read_splits(
  official: Official, origins: dict[str, Path]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Images [N, H, W, C] and labels [N] of each split, in the official order."""
  wanted = {name for names in official.files.values() for name in names}
  found: dict[str, bytes] = {}
  for base, data in _members(origins, wanted):
    payload = gzip.decompress(data) if data[:2] == b'\x1f\x8b' else data
    if found.setdefault(base, payload) != payload:
      raise ValueError(f'two different files are named {base}; name the folder of one dataset')
  if missing := sorted(wanted - set(found)):
    raise ValueError(f'it has no {", ".join(missing)}')
  splits = {}
  for split, names in official.files.items():
    splits[split] = official.read([found[name] for name in names])
    if len(splits[split][0]) != official.images[split]:
      raise ValueError(f'{len(splits[split][0])} images for {split}, not {official.images[split]}')
  return splits


def _members(origins: dict[str, Path], wanted: set[str]) -> Iterator[tuple[str, bytes]]:
  """The `wanted` files in folders (searched recursively) and archives (read, never extracted).

  The keys of `origins` end in the official names: TFDS gives a downloaded file one of its own.
  """
  for label, origin in origins.items():
    if origin.is_dir():
      for file in sorted(origin.rglob('*')):
        if (base := _base(file.name)) in wanted and file.is_file():
          yield base, file.read_bytes()
    elif (base := _base(label)) in wanted:
      yield base, origin.read_bytes()
    else:
      with tarfile.open(origin) as archive:
        for member in archive:
          if (base := _base(member.name)) in wanted and member.isfile():
            stream = archive.extractfile(member)
            assert stream is not None  # which it is of folders
            yield base, stream.read()


def _base(name: str) -> str:
  """The official name of a file: no folders, no .gz, and '-idx3' where a copy has '.idx3'."""
  return name.rpartition('/')[2].removesuffix('.gz').replace('.idx', '-idx')


def parse_example(record: bytes) -> Any:
  """The features of a serialised tf.train.Example, a mapping from their names."""
  from tensorflow_datasets.proto import tf_example_pb2

  return tf_example_pb2.Example.FromString(record).features.feature


@functools.cache
def _crc32c_table() -> list[int]:
  table = list(range(256))
  for _ in range(8):
    table = [c >> 1 ^ (0x82F63B78 if c & 1 else 0) for c in table]
  return table


def _masked_crc32c(data: bytes) -> int:
  """TFRecord's checksum: CRC-32C, rotated right by 15 bits, plus a constant."""
  table, crc = _crc32c_table(), 0xFFFFFFFF
  for byte in data:
    crc = crc >> 8 ^ table[(crc ^ byte) & 255]
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def tfrecord_spans(file: Path) -> list[tuple[int, int]]:
  """Offset and size of each record: uint64 size, uint32 crc of it, the record, uint32 crc of that.

  Only the checksum of the size is verified; that of the data would read every byte in Python.
  """
  spans: list[tuple[int, int]] = []
  end = file.stat().st_size
  with open(file, 'rb') as stream:
    while header := stream.read(12):
      offset = stream.tell()
      size, crc = struct.unpack('<QI', header) if len(header) == 12 else (end, 0)
      if len(header) == 12 and crc != _masked_crc32c(header[:8]):
        raise UserError(f'{file} is not a TFRecord file, or is damaged, at byte {offset - 12}')
      if offset + size + 4 > end:
        raise UserError(f'{file} is cut off in its record {len(spans)}; download it again')
      spans.append((offset, size))
      stream.seek(offset + size + 4)
  return spans
