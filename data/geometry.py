"""Geometry and colours: an image of any size and mode to one of size x size pixels, grey or RGB.

Pillow's filters are antialiased, as those of the released code are, and leave an image alone that
has the size already.
"""

import numpy as np
from PIL import Image

from runtime.errors import UserError


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
  ratio = size / min(image.size)
  shape = round(image.width * ratio), round(image.height * ratio)
  return crop(image.resize(shape, Image.Resampling.BILINEAR), size)


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


def convert(image: Image.Image, num_channels: int) -> Image.Image:
  """8-bit grey or RGB. 16-bit values keep their high byte; what is transparent becomes white."""
  if image.mode[0] in 'IF':
    values = np.asarray(image)
    if values.dtype.kind == 'f' or values.min() < 0 or values.max() > 65535:
      raise ValueError(f'pixels of Pillow mode {image.mode} are neither 8-bit nor 16-bit')
    image = Image.fromarray((values >> 8).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return image.convert('L' if num_channels == 1 else 'RGB')
