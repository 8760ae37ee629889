"""Images of more than 8 bits a pixel: what is black in them, and what is white.

A file of 16 bits, of int32 or of floats may hold 8 or 12 bits of range. Where it does not tell, the
largest value of all such images of a dataset says which.
"""

from collections.abc import Callable, Sequence
import dataclasses
import io
import logging
import re
import threading
from typing import Any

import numpy as np
from PIL import Image

from data.images import spread

logger = logging.getLogger('score_sde')

LOOKED_AT = 2000  # images, at most, of whose values a range is taken
_BITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)  # that sensors and formats have
_SAMPLES = re.compile(r'(L|LA|RGB|RGBA|RGBX);16([BLN])')  # Pillow's names of 16 bits a channel
_TIFF_LOWEST, _TIFF_HIGHEST = (340, 280), (341, 281)  # tags: of samples, of 16-bit ones


@dataclasses.dataclass(frozen=True)
class Span:
  """What is shown as black, and what as white."""

  black: float
  white: float

  def levels(self, values: np.ndarray) -> np.ndarray:
    """Values as uint8, of whole numbers by their high bits; what is outside is black or white."""
    values, width = values.astype(np.float64) - self.black, self.white - self.black
    if self.black == 0 and width >= 255 and width == int(width):
      levels = np.floor(values * (256 / (width + 1)))
    else:
      levels = np.round(values * (255 / width))
    return levels.clip(0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Deep:
  """The pixels of an image of more than 8 bits.

  Attributes:
    colours: [H, W] or [H, W, 3], whole numbers or floats, as they are stored.
    alpha: uint8 [H, W], if there is any.
    told: the span, if the file tells it.
    bits: how many the file says are significant; 0 if it says nothing.
  """

  colours: np.ndarray
  alpha: np.ndarray | None = None
  told: Span | None = None
  bits: int = 0

  def own_span(self) -> Span:
    """What its own values say."""
    low, high = float(self.colours.min()), float(self.colours.max())
    return _span(low, high, self.colours.dtype.kind == 'f', self.bits)

  def image(self, span: Span) -> Image.Image:
    """As an image of 8 bits."""
    image = Image.fromarray(span.levels(self.colours))
    if self.alpha is not None:
      image.putalpha(Image.fromarray(self.alpha))
    return image


def is_deep(image: Image.Image) -> bool:
  """Whether an image, opened and not yet loaded, has more than 8 bits a channel."""
  return image.mode[0] in 'IF' or _samples(image) is not None


def read(image: Image.Image) -> Deep:
  """The pixels of such an image, opened and not yet loaded.

  Raises:
    ValueError: if some are not numbers.
  """
  if (samples := _samples(image)) is None:
    values = np.asarray(image)
    if not np.isfinite(values).all():
      raise ValueError('some of its pixels are not finite numbers')
    return Deep(values, told=_told(image, values), bits=_significant_bits(image))
  stream: Any = image.fp  # type: ignore[attr-defined]  # of files that are opened
  where = stream.tell()
  stream.seek(0)
  data = stream.read()
  stream.seek(where)  # from where Pillow goes on
  bits = _significant_bits(image)
  if samples[1] == 'LA':  # which Pillow reads as RGBA
    pairs = _decoded(data, 'I;32B', 'I').astype(np.uint32)
    return Deep(pairs >> 16, ((pairs & 0xFFFF) >> 8).astype(np.uint8), bits=bits)
  # Pillow keeps the high byte of each; with the bytes the other way round, the low one.
  other = f'{samples[1]};16{"L" if samples[2] == "B" else "B"}'
  high, low = np.asarray(image), _decoded(data, other)
  values = high.astype(np.uint16) << 8 | low
  told = _told(image, values)
  if samples[1] == 'RGBA':
    return Deep(values[..., :3], high[..., 3], told, bits)
  return Deep(values, None, told, bits)


def _samples(image: Image.Image) -> re.Match[str] | None:
  """16 bits a channel that Pillow would cut to 8: its name of them, `_SAMPLES`."""
  if image.format not in ('PNG', 'TIFF'):
    return None
  for tile in getattr(image, 'tile', ()):
    name = tile.args if isinstance(tile.args, str) else (tile.args or ('',))[0]
    if match := _SAMPLES.fullmatch(str(name)):
      return match
  return None


def _decoded(data: bytes, raw_mode: str, mode: str = '') -> np.ndarray:
  """A file decoded as if its pixels were of another raw mode of Pillow's."""
  image: Any = Image.open(io.BytesIO(data))
  if mode:
    image._mode = mode
  image.tile = [
    tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))
    for tile in image.tile
  ]
  return np.asarray(image)


def _told(image: Image.Image, values: np.ndarray) -> Span | None:
  """The span that a file tells, if its values agree."""
  if image.format in ('PPM', 'JPEG2000') and values.dtype.kind != 'f':
    return Span(0, 65535)  # Pillow makes it so, of whatever the file has
  if image.format != 'TIFF':
    return None
  tags: Any = image.tag_v2  # type: ignore[attr-defined]
  told = [
    [float(np.max(tags[tag])) for tag in both if tag in tags]
    for both in (_TIFF_LOWEST, _TIFF_HIGHEST)
  ]
  black, white = (told[0] or [0.0])[0], (told[1] or [0.0])[0]
  if not told[1]:
    bits = int(np.max(tags.get(258, 0)))
    black, white = 0.0, float(2**bits - 1) if bits in (9, 10, 12, 14) else 0.0
  fits = black < white and black <= values.min() and values.max() <= white
  return Span(black, white) if fits else None


def _significant_bits(image: Image.Image) -> int:
  """Of the chunk sBIT of a PNG; 0 without one."""
  if image.format != 'PNG':
    return 0
  stream: Any = image.fp  # type: ignore[attr-defined]
  if stream is None or stream.closed:
    return 0
  where = stream.tell()
  stream.seek(8)
  bits = 0
  while len(head := stream.read(8)) == 8 and head[4:] not in (b'IDAT', b'IEND'):
    size = int.from_bytes(head[:4], 'big')
    body = stream.read(size + 4)
    if head[4:] == b'sBIT' and 1 <= size <= 4:
      bits = max(body[: 3 if size > 2 else 1])
  stream.seek(where)
  return bits


class Usual:
  """The span of the images of a dataset that do not tell theirs, found when it is first asked for.

  It is the same in every process and on every day, as long as the images are.
  """

  def __init__(self, images: Callable[[], Sequence[Callable[[], Image.Image]]], where: str):
    """`images()` are all of them, each opened by a call; `where` names them."""
    self._images, self._where = images, where
    self._lock = threading.Lock()
    self._spans: dict[bool, Span] | None = None

  @property
  def was_asked(self) -> bool:
    """Whether there are such images, as far as they were read."""
    return self._spans is not None

  def span(self, pixels: Deep) -> Span:
    """Of the pixels of an image; what they say themselves, if no image like it was looked at."""
    with self._lock:
      if self._spans is None:
        self._spans = self._look()
      return self._spans.get(pixels.colours.dtype.kind == 'f') or pixels.own_span()

  def _look(self) -> dict[bool, Span]:
    ranges: dict[bool, list[tuple[float, float, int]]] = {False: [], True: []}
    images = self._images()
    for i in spread(len(images), LOOKED_AT):
      try:
        with images[i]() as image:
          if is_deep(image):
            deep = read(image)
            if deep.told is None:
              low, high = float(deep.colours.min()), float(deep.colours.max())
              ranges[deep.colours.dtype.kind == 'f'].append((low, high, deep.bits))
      except Exception:  # a damaged image is told when it is read itself
        logger.debug('image %d of %s cannot be read', i, self._where)
    spans = {}
    for floats, found in ranges.items():
      if found:
        low, high = min(low for low, _, _ in found), max(high for _, high, _ in found)
        bits = {bits for _, _, bits in found}
        spans[floats] = _span(low, high, floats, bits.pop() if len(bits) == 1 else 0)
        self._tell(len(found), low, high, spans[floats])
    return spans

  def _tell(self, n: int, low: float, high: float, span: Span) -> None:
    if span != Span(0, 65535):
      logger.warning(
        '%s: %d images of more than 8 bits do not tell their range; their values are from %g to %g,'
        ' so %g is black and %g is white. Fix that with --config.data.black=%g '
        '--config.data.white=%g',
        self._where, n, low, high, span.black, span.white, span.black, span.white,
      )  # fmt: skip


def _span(low: float, high: float, floats: bool, bits: int) -> Span:
  """Of values from `low` to `high`, of which the files say that so many bits are significant."""
  if low == high == 0:
    return Span(0, 1) if floats else Span(0, 65535)
  if floats and 0.25 < high <= 1 and low >= -1:
    return Span(0 if low >= 0 else -1, 1)
  if low < 0 or high > 65535 or (floats and high < 64):
    return Span(min(low, 0), high if high > min(low, 0) else high + 1)
  if bits and high < 2**bits:
    return Span(0, 2**bits - 1)
  return Span(0, next(2**b - 1 for b in _BITS if high < 2**b))
