"""Masks of images: which pixels are known, and their values from known pixels alone.

A mask is an image of two values, whatever they are: the brighter is known, the darker is to be
painted. If it has transparent and opaque pixels, what is opaque is known and what is transparent is
to be painted. Where a mask is larger than the images of a network, a pixel any part of which is
unknown is unknown: a scratch stays, however thin.
"""

import dataclasses
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data import deep, geometry
from data.decoding import Decoder
from runtime.errors import UserError

logger = logging.getLogger('score_sde')

_BETWEEN = 0.1  # the share of pixels, at most, that may lie in the middle half between two values
_LEAST_WEIGHT = 0.25  # of the known pixels among all that a smaller one is made of
_NEAR = 1e-6  # a pixel that reaches this far into another does not touch it


@dataclasses.dataclass(frozen=True)
class Mask:
  """Which pixels of an image are known.

  Attributes:
    known: bool [H, W], at the mask's own resolution.
    name: of its file.
  """

  known: np.ndarray
  name: str

  @property
  def size(self) -> tuple[int, int]:
    """Width and height."""
    return self.known.shape[1], self.known.shape[0]

  def at(self, size: int, fit: geometry.Fit) -> np.ndarray:
    """The known pixels of the square of a network, bool [size, size].

    What lies beside the mask, where it is padded, is known to be background.

    Raises:
      UserError: if there are none left.
    """
    place = fit(self.size, size)
    here = np.arange(size)
    known = self._all_known(here, here, 1.0, 1.0, place, beyond=True)
    if not known.any():
      raise UserError(
        f'at {size}x{size} pixels nothing of the mask {self.name} stays known: a pixel any part of '
        'which is to be painted is painted; leave larger parts known'
      )
    return known

  def of_image(self, image_size: tuple[int, int], size: int, fit: geometry.Fit) -> np.ndarray:
    """The known pixels of an image of (width, height), bool [height, width].

    Raises:
      UserError: if the mask is neither square nor of the shape of the image.
    """
    width, height = image_size
    if self.size[0] != self.size[1] and not _same_shape(self.size, image_size):
      raise UserError(
        f'the mask {self.name} has {self.size[0]}x{self.size[1]} pixels and an image '
        f'{width}x{height}; give a mask of the shape of the images, or a square one, which is for '
        'the square that the network sees'
      )
    seen = fit(image_size, size)
    across, down = width / seen.width, height / seen.height  # image pixels to one of the square
    columns, rows = np.arange(width) / across - seen.left, np.arange(height) / down - seen.top
    place = fit(self.size, size)
    return self._all_known(rows, columns, 1 / down, 1 / across, place, beyond=False)

  def _all_known(
    self,
    rows: np.ndarray,
    columns: np.ndarray,
    height: float,
    width: float,
    place: geometry.Placement,
    beyond: bool,
  ) -> np.ndarray:
    """Whether all that lies in rectangles of the square is known, bool [len(rows), len(columns)].

    They begin at `rows` and `columns` of the square, in its pixels, in which the mask has its
    place, and are so high and so wide. What lies beyond the mask is known, or is as its edge.
    """
    spans = []
    for starts, length, first, n, fitted in (
      (rows, height, place.top, self.size[1], place.height),
      (columns, width, place.left, self.size[0], place.width),
    ):
      scale = n / fitted
      low = np.floor((starts + first) * scale + _NEAR).astype(int)
      high = np.ceil((starts + length + first) * scale - _NEAR).astype(int)
      low, high = (
        (low.clip(0, n), high.clip(0, n)) if beyond else (low.clip(0, n - 1), high.clip(1, n))
      )
      spans.append((low, np.maximum(low, high)))
    unknown = np.pad(np.cumsum(np.cumsum(~self.known, 0), 1), ((1, 0), (1, 0)))
    (top, bottom), (left, right) = spans
    inside = unknown[bottom][:, right] - unknown[bottom][:, left]
    return inside - unknown[top][:, right] + unknown[top][:, left] == 0


def _same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
  """Whether one is the other, larger or smaller, to within a pixel of the smaller."""
  small, large = sorted((a, b))
  scale = max(large[0] / small[0], large[1] / small[1])
  return all(abs(n * scale - m) <= scale for n, m in zip(small, large, strict=True))


def load(path: str) -> Mask:
  """The mask in an image file.

  Raises:
    UserError: if it cannot be read, or does not have two values.
  """
  place = Path(path).expanduser()
  if not place.is_file():
    raise UserError(
      f'config.sampling.mask={path!r} is not a file; name an image that is white where '
      'pixels are known, and black where they are to be painted'
    )
  try:
    with Image.open(place) as image:
      alpha, values = _alpha_and_values(image)
  except Exception as error:  # Pillow has a dozen
    raise UserError(f'{path} cannot be read as an image ({error})') from None
  if alpha is not None and alpha.min() < alpha.max():
    logger.info(
      'mask %s: its transparent pixels are painted, its opaque ones are known; save it without '
      'transparency, white and black, to say it by colours',
      path,
    )
    values = alpha
  return Mask(_two_values(values, path), path)


def _alpha_and_values(image: Image.Image) -> tuple[np.ndarray | None, np.ndarray]:
  """Alpha [H, W] where there is any, and grey values [H, W]; of a palette, its colours'."""
  if deep.is_deep(image):
    pixels = deep.read(image)
    low, high = float(pixels.colours.min()), float(pixels.colours.max())
    if low == high and pixels.alpha is None:
      return None, pixels.colours.astype(np.float64)
    image = pixels.image(deep.Span(low, max(high, low + 1)))
  image = ImageOps.exif_transpose(image)
  alpha = None
  if image.has_transparency_data:
    image = image.convert('RGBA')
    alpha = np.asarray(image.getchannel('A')).astype(np.float64)
  values = np.asarray(image.convert('L'))
  if image.mode == 'P' and values.min() == values.max():
    values = np.asarray(image)  # the numbers of its colours, which are all the same to the eye
  return alpha, values.astype(np.float64)


def known_pixels(
  image: Image.Image, mask: Mask, decoder: Decoder, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """An image in the square of a network, none of whose known pixels has any of the unknown in it.

  Where a filter reaches over unknown pixels, v = sum_i w_i k_i v_i / sum_i w_i k_i, with k_i = 1 of
  the known pixels and 0 of the others; elsewhere it is what the filter makes of the whole image.

  Args:
    image: of the mode of the decoder, at its own resolution.
    mask: which of its pixels are known.
    decoder: fits it into the square.
    size: of the square.

  Returns:
    The pixels, uint8 [size, size, C], and which of them are known, bool [size, size].
  """
  fit = geometry.FITS[decoder.fit]
  place = fit(image.size, size)
  known = mask.of_image(image.size, size, fit).astype(np.float32)
  resize = lambda x: np.asarray(geometry.placed(Image.fromarray(x), place, size))  # noqa: E731
  pixels = np.array(decoder.fitted(image, size)).reshape(size, size, -1)
  reached = resize(np.ones_like(known)) > 0.5  # the rest is background
  weight = resize(known)
  mixed = reached & (weight < 1 - _NEAR)
  if mixed.any():
    alpha = np.asarray(image.getchannel('A')) / np.float32(255) if 'A' in image.mode else 1.0
    for i, band in enumerate(image.getbands()):
      share = known if band == 'A' else known * alpha  # what is transparent has no colour
      total = resize(np.asarray(image.getchannel(i), np.float32) * share)
      mean = total / np.maximum(resize(share), _NEAR)
      pixels[mixed, i] = np.round(mean[mixed]).clip(0, 255)
  return pixels, mask.at(size, fit) & (~reached | (weight >= _LEAST_WEIGHT))


def _two_values(values: np.ndarray, name: str) -> np.ndarray:
  """Where the brighter of two values is, bool, and for certain.

  Raises:
    UserError: if there is one value, or there are many.
  """
  low, high = values.min(), values.max()
  if low == high:
    what = {255: 'white, so that nothing is to be painted', 0: 'black: nothing is known'}
    raise UserError(
      f'the mask {name} is all {what.get(low, f"of one value, {low:g}")}; it takes two values, the '
      'brighter where pixels are known and the darker where they are to be painted'
    )
  part = (values - low) / (high - low)
  between = float(((part > 0.25) & (part < 0.75)).mean())
  if between > _BETWEEN:
    raise UserError(
      f'the mask {name} has values between black and white in {100 * between:.0f} % of its pixels; '
      'it takes two values, the brighter where pixels are known and the darker where they are to be'
      ' painted'
    )
  return part >= 0.75
