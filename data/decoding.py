"""From an image file to what a dataset has of it: uint8 [size, size, C].

    decoder = Decoder(num_channels=3, fit='crop')
    decoder.pixels(Image.open('a.jpg'), 64)   # uint8 [64, 64, 3]

Two channels are grey and alpha, four are RGB and alpha; with one or three, what is transparent
shows a background.
"""

from collections.abc import Callable
import dataclasses

import numpy as np
from PIL import Image, ImageColor, ImageOps

from data import deep, geometry
from runtime.errors import unknown, UserError

Image.MAX_IMAGE_PIXELS = None  # `Decoder.max_pixels` is the limit, and has a field to raise it

MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # of so many channels
MAX_PIXELS = 178_956_970  # Pillow's own limit
_REDUCE_ABOVE = 2**25  # pixels of a JPEG, which is then decoded at a half, a quarter or an eighth
_ORIENTATION = 0x0112  # of EXIF


@dataclasses.dataclass(frozen=True)
class Decoder:
  """How images of any size and mode become those of a dataset.

  Attributes:
    num_channels: 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha).
    fit: how an image that is not square comes into a square: crop, pad or stretch.
    background: a colour, where an image is transparent or does not reach.
    span: what is black and white in images of more than 8 bits; None: as they tell, or as the
      `deep.Usual` of a dataset says.
    max_pixels: of an image as it is decoded.
  """

  num_channels: int = 3
  fit: str = 'crop'
  background: str = 'white'
  span: deep.Span | None = None
  max_pixels: int = MAX_PIXELS

  def __post_init__(self) -> None:
    if self.num_channels not in MODES:
      raise UserError(
        f'config.data.num_channels is {self.num_channels}; allowed: 1 (grey), 2 (grey and alpha), '
        '3 (RGB), 4 (RGB and alpha)'
      )
    if self.fit not in geometry.FITS:
      raise unknown('config.data.fit', self.fit, geometry.FITS)
    try:
      ImageColor.getrgb(self.background)
    except ValueError as error:
      raise UserError(
        f'config.data.background={self.background!r} is no colour; give a name, such as white, or '
        '#rrggbb'
      ) from error

  @property
  def mode(self) -> str:
    """Pillow's mode of the images."""
    return MODES[self.num_channels]

  def pixels(
    self,
    image: Image.Image,
    size: int,
    usual: deep.Usual | None = None,
    own_fit: Callable[[Image.Image, int], Image.Image] | None = None,
    upright: bool = True,
  ) -> np.ndarray:
    """An image, opened and not yet loaded, as uint8 [size, size, num_channels].

    Args:
      image: the image.
      size: of the square, in pixels.
      usual: the span of images of more than 8 bits; by default this image says it alone.
      own_fit: the geometry of a dataset that has its own.
      upright: turned as its EXIF says.

    Raises:
      ValueError, OSError and others of Pillow: if it cannot be decoded.
    """
    converted = self.colours(image, None if own_fit else size, usual, upright)
    fitted = own_fit(converted, size) if own_fit else self.fitted(converted, size)
    return np.asarray(fitted).reshape(size, size, self.num_channels)

  def fitted(self, image: Image.Image, size: int) -> Image.Image:
    """An image of the right mode in the square."""
    place = geometry.FITS[self.fit](image.size, size)
    return geometry.placed(image, place, size, self.behind())

  def behind(self) -> tuple[int, ...] | int:
    """The background as a pixel; transparent, where there is alpha."""
    colour = Image.new('RGB', (1, 1), ImageColor.getrgb(self.background)[:3])
    grey = colour.convert('L').getpixel((0, 0))
    rgb = colour.getpixel((0, 0))
    assert isinstance(grey, int) and isinstance(rgb, tuple)  # by their modes
    return {1: grey, 2: (grey, 0), 3: rgb, 4: (*rgb, 0)}[self.num_channels]

  def colours(
    self,
    image: Image.Image,
    size: int | None = None,
    usual: deep.Usual | None = None,
    upright: bool = True,
  ) -> Image.Image:
    """An image of the right mode, at its own resolution.

    If it is to be shown at `size` pixels, a large JPEG is decoded at no less than twice that.
    """
    if size and image.format == 'JPEG' and image.width * image.height > _REDUCE_ABOVE:
      image.draft(image.mode, (2 * size, 2 * size))
    if image.width * image.height > self.max_pixels:
      raise ValueError(
        f'{image.width}x{image.height} pixels are more than config.data.max_pixels = '
        f'{self.max_pixels}; raise that, which takes memory, or store the image smaller'
      )
    if deep.is_deep(image):
      image = self._shallow(image, usual)
    if upright:
      image = ImageOps.exif_transpose(image)
    if image.has_transparency_data or self.num_channels in (2, 4):
      image = image.convert('RGBA')
    if image.mode == 'RGBA' and self.num_channels in (1, 3):
      behind = Image.new('RGBA', image.size, (*ImageColor.getrgb(self.background)[:3], 255))
      image = Image.alpha_composite(behind, image)
    return image.convert(self.mode)

  def _shallow(self, image: Image.Image, usual: deep.Usual | None) -> Image.Image:
    pixels = deep.read(image)
    orientation = image.getexif().get(_ORIENTATION, 1)  # after, as this may load the image
    span = self.span or pixels.told or (usual.span(pixels) if usual else pixels.own_span())
    shown = pixels.image(span)
    shown.getexif()[_ORIENTATION] = orientation
    return shown
