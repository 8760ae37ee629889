"""Geometry: an image of any size and mode to one of size x size pixels.

Pillow's filters are antialiased, as those of the released code are, and leave an image alone that
has the size already. Where an image comes to lie is a `Placement`, which what goes with an image,
such as a mask, can follow.
"""

from collections.abc import Callable
import dataclasses

from PIL import Image

from runtime.errors import UserError

_THIN = 4  # times the square: a longer image is never resized as a whole


@dataclasses.dataclass(frozen=True)
class Placement:
  """An image is resized to width x height; the square begins at (left, top) of that.

  The square may reach beyond the resized image, where left or top is negative.
  """

  width: int
  height: int
  left: int
  top: int


Fit = Callable[[tuple[int, int], int], Placement]  # of an image (width, height) in a square


def cropped(image_size: tuple[int, int], size: int) -> Placement:
  """The short side is that of the square, and the middle of the long one is kept."""
  ratio = size / min(image_size)
  width, height = round(image_size[0] * ratio), round(image_size[1] * ratio)
  return Placement(width, height, (width - size) // 2, (height - size) // 2)


def padded(image_size: tuple[int, int], size: int) -> Placement:
  """The long side is that of the square, and all of the image is kept in the middle."""
  ratio = size / max(image_size)
  width, height = (max(1, round(side * ratio)) for side in image_size)
  return Placement(width, height, -((size - width) // 2), -((size - height) // 2))


def stretched(image_size: tuple[int, int], size: int) -> Placement:
  """Both sides are those of the square."""
  return Placement(size, size, 0, 0)


FITS: dict[str, Fit] = {'crop': cropped, 'pad': padded, 'stretch': stretched}


def placed(
  image: Image.Image, place: Placement, size: int, background: str | float | tuple[int, ...] = 0
) -> Image.Image:
  """The square of side `size` of an image in its place, on a background where it does not reach."""
  if max(place.width, place.height) > _THIN * size:
    # Of a long image only the square: all of it would take memory by its length.
    across, down = image.width / place.width, image.height / place.height
    right = min((place.left + size) * across, image.width)
    bottom = min((place.top + size) * down, image.height)
    box = (place.left * across, place.top * down, right, bottom)
    return image.resize((size, size), Image.Resampling.BILINEAR, box)
  resized = image.resize((place.width, place.height), Image.Resampling.BILINEAR)
  if (place.width, place.height) == (size, size):
    return resized
  if place.left >= 0 and place.top >= 0:
    return resized.crop((place.left, place.top, place.left + size, place.top + size))
  square = Image.new(image.mode, (size, size), background)
  square.paste(resized, (-place.left, -place.top))
  return square


def crop(image: Image.Image, size: int) -> Image.Image:
  """The central square of side `size`, or of the short side where that is less."""
  size = min(size, *image.size)
  left, top = (image.width - size) // 2, (image.height - size) // 2
  return image.crop((left, top, left + size, top + size))


def stretch(image: Image.Image, size: int) -> Image.Image:
  """The whole image, whatever its shape."""
  return image.resize((size, size), Image.Resampling.BILINEAR)


def short_side_then_crop(image: Image.Image, size: int) -> Image.Image:
  """The central square, resized."""
  return placed(image, cropped(image.size, size), size)


def celeba(image: Image.Image, size: int) -> Image.Image:
  """The central 140 pixels of CelebA, the face without most of the background, resized."""
  return stretch(crop(image, 140), size)


def lsun(image: Image.Image, size: int) -> Image.Image:
  """As the released code has it: NCSNv2's order and filter at 128 pixels, others elsewhere."""
  if size == 128:
    return short_side_then_crop(image, size)
  return crop(image, min(image.size)).resize((size, size), Image.Resampling.BICUBIC)


def stored(image: Image.Image, size: int) -> Image.Image:
  """The image as it is; another size than the one stored is a mistake."""
  if image.size != (size, size):
    raise UserError(
      f'the records hold {image.height}x{image.width} images and config.data.image_size is {size}; '
      'set it to that, or name the files of the other resolution in --config.data.path'
    )
  return image
