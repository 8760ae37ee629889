"""Sources of data: what they are asked for, whatever they lie in.

    source[3]                   # image 3, uint8 [H, W, C]
    source.batch(np.arange(2))  # 'data' uint8 [2, H, W, C], and 'label' int32 [2]

Images stay uint8 here; flips, dequantisation and scaling happen on the device.
"""

import abc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

Batch = dict[str, np.ndarray]


def spread(n: int, most: int) -> np.ndarray:
  """At most so many numbers, evenly over range(n)."""
  return np.linspace(0, n - 1, min(n, most)).round().astype(int)


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


class Images(Source, abc.ABC):
  """`source[i]` is image i, uint8 [H, W, C]; `batch` takes many.

  Attributes:
    shape: of an image.
    files: that the images are in, if each has one.
  """

  shape: tuple[int, int, int]
  files: Sequence[Path] = ()

  def __getitem__(self, i: int) -> np.ndarray:
    if not -len(self) <= i < len(self):
      raise IndexError(f'image {i} of {len(self)}')
    return self.gather(np.array([i % len(self)]))[0]

  def gather(self, indices: np.ndarray) -> np.ndarray:
    """Images of `indices` [n], each in [0, len): uint8 [n, *shape]."""
    return self.batch(indices)['data']

  @abc.abstractmethod
  def batch(self, indices: np.ndarray) -> Batch:
    """`gather` as 'data', and the labels as 'label', int32 [n] from 0 on, where there are any."""


class ImageSource(Images):
  """Images that are decoded one by one; they are kept in memory if all fit under 4 GiB."""

  def __init__(
    self,
    shape: tuple[int, int, int],
    length: int,
    read: Callable[[int], tuple[np.ndarray, int]],
    class_names: Sequence[str] = (),
    label: Callable[[int], int] | None = None,
    fingerprint: Callable[[], str] = lambda: '',
    files: Sequence[Path] = (),
  ):
    """`read(i)` decodes image i, of `shape`, and its label; it is called from several threads.

    `label(i)` is the label alone, which takes no time; `fingerprint()` that of the files.
    """
    self.shape = shape
    self.class_names, self.files = tuple(class_names), files
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

  def batch(self, indices: np.ndarray) -> Batch:
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
