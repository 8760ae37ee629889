"""What is known of an image is known for certain, and keeps nothing of what is not."""

import numpy as np
from PIL import Image
import pytest

from data import geometry, masks
from data.decoding import Decoder
from runtime.errors import UserError

HALF = np.zeros((8, 8), np.uint8)
HALF[:, :4] = 255
LEFT = HALF > 0


def saved(path, image, **options):
  image = image if isinstance(image, Image.Image) else Image.fromarray(image)
  image.save(path, **options)
  return str(path)


def palette(colours, indices=LEFT):
  image = Image.frombytes('P', (8, 8), indices.astype(np.uint8).tobytes())
  image.putpalette(colours)
  return image


def known(path, size=8, fit='crop'):
  return masks.load(path).at(size, geometry.FITS[fit])


@pytest.mark.parametrize(
  ('image', 'suffix'),
  [
    (HALF, 'png'),
    (HALF // 255, 'png'),
    (LEFT, 'png'),
    (HALF // 255 + 128, 'png'),
    (palette([0, 0, 0, 255, 255, 255]), 'png'),
    (palette([0, 0, 0, 128, 0, 0]), 'png'),
    (palette([9, 9, 9, 9, 9, 9]), 'png'),  # its two colours are one to the eye
    (HALF.astype(np.uint16) * 257, 'png'),
    (HALF.astype(np.uint16), 'png'),
    (HALF.astype(np.uint16) // 255 + 65534, 'png'),
    (HALF.astype(np.float32) / 255, 'tif'),
    (HALF.astype(np.float32) - 1000, 'tif'),
    (HALF.astype(np.int32), 'tif'),
    (-np.int32(~LEFT), 'tif'),
    (np.dstack([HALF, HALF, 0 * HALF]), 'png'),
    (np.dstack([*3 * [0 * HALF + 255], HALF]), 'png'),  # a hole cut out of white
    (np.dstack([*3 * [0 * HALF + 30], HALF]), 'png'),  # and of a dark picture
    (np.dstack([0 * HALF + 30, HALF]), 'png'),  # grey and alpha
    (np.dstack([*3 * [0 * HALF], HALF]), 'webp'),
    (np.kron(HALF, np.ones((32, 32), np.uint8)), 'jpg'),
  ],
)
def test_two_values_are_two_values_whatever_they_are(tmp_path, image, suffix):
  options = {'quality': 30} if suffix == 'jpg' else {'lossless': True} if suffix == 'webp' else {}
  path = saved(tmp_path / f'mask.{suffix}', image, **options)
  np.testing.assert_array_equal(known(path), LEFT)
  np.testing.assert_array_equal(known(path, 16), np.kron(LEFT, np.ones((2, 2), bool)))


def test_what_transparency_means_is_said(tmp_path, caplog):
  caplog.set_level('INFO')
  for paint in (0, 255):
    path = saved(tmp_path / 'a.png', np.dstack([*3 * [0 * HALF + paint], 255 - HALF]))
    np.testing.assert_array_equal(known(path), ~LEFT)
    assert 'transparent pixels are painted, its opaque ones are known' in caplog.text
    caplog.clear()
  known(saved(tmp_path / 'b.png', np.dstack([HALF, HALF, HALF, 0 * HALF + 255])))
  assert not caplog.text


@pytest.mark.parametrize(
  ('image', 'said'),
  [
    (HALF * 0 + 255, 'all white, so that nothing is to be painted'),
    (HALF * 0, 'all black: nothing is known'),
    (HALF * 0 + 128, 'of one value, 128; it takes two values'),
    (HALF.astype(np.uint16) * 0 + 700, 'of one value, 700; it takes two values'),
    (np.tile(np.linspace(0, 255, 8).astype(np.uint8), (8, 1)), 'values between .* in 50 %'),
    (np.uint8(np.arange(64).reshape(8, 8) % 3 * 127), 'values between .* in 33 %'),
  ],
)
def test_what_is_no_mask_is_refused(tmp_path, image, said):
  with pytest.raises(UserError, match=said) as error:
    known(saved(tmp_path / 'mask.png', image))
  assert '\n' not in str(error.value)


def test_a_scratch_is_painted_however_thin(tmp_path):
  mask = np.full((256, 256), 255, np.uint8)
  mask[:, 120:132] = 0
  expected = np.ones((8, 8), bool)
  expected[:, 3:5] = False
  np.testing.assert_array_equal(known(saved(tmp_path / 'a.png', mask)), expected)
  mask = np.full((250, 250), 255, np.uint8)
  mask[31, 249] = 0  # one pixel, and 31.25 of them are one of the network's
  expected = np.ones((8, 8), bool)
  expected[:1, 7] = False
  np.testing.assert_array_equal(known(saved(tmp_path / 'b.png', mask))[[0, 2]], expected[[0, 2]])
  sparse = np.zeros((256, 256), np.uint8)
  sparse[::64] = 255
  with pytest.raises(UserError, match=r'at 8x8 pixels nothing of the mask .* stays known'):
    known(saved(tmp_path / 'c.png', sparse))


# Image, mask and what they are fitted to: the same shapes, a mask of the network's size, larger and
# smaller masks, a ratio that is not whole, an image smaller than the network's.
@pytest.mark.parametrize(
  ('image', 'mask', 'size'),
  [
    ((64, 64), (64, 64), 8),
    ((64, 64), (8, 8), 8),
    ((20, 20), (8, 8), 8),
    ((61, 61), (61, 61), 8),
    ((61, 61), (200, 200), 8),
    ((8, 8), (32, 32), 32),
    ((8, 8), (8, 8), 32),
    ((48, 96), (48, 96), 16),
    ((48, 96), (24, 48), 16),
    ((48, 96), (16, 16), 16),
    ((90, 31), (16, 16), 16),
    ((16, 2000), (16, 16), 16),
  ],
)
@pytest.mark.parametrize('fit', ['crop', 'pad', 'stretch'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_known_pixels_keep_nothing_of_the_hole(image, mask, size, fit, channels):
  """A picture of 200 with a hole of 0, or of 255: what is known is 200, to the level."""
  is_known = np.ones(mask, bool)
  is_known[mask[0] // 3 : mask[0] // 2 + 1, mask[1] // 3 : mask[1] // 2 + 1] = False
  hole = masks.Mask(is_known, 'mask')
  decoder = Decoder(channels, fit=fit, background='#c8c8c8')
  place = geometry.FITS[fit]
  for paint in (0, 255):
    source = np.where(hole.of_image(image[::-1], size, place), 200, paint).astype(np.uint8)
    picture = Image.fromarray(source).convert(decoder.mode)
    pixels, found = masks.known_pixels(picture, hole, decoder, size)
    assert set(np.unique(pixels[found][..., : min(channels, 3)])) == {200}
    assert found.any() and not found.all()
    np.testing.assert_array_equal(found & ~hole.at(size, place), False)
  if mask == (size, size) and min(image) >= size and (fit != 'pad' or image[0] == image[1]):
    np.testing.assert_array_equal(found, is_known)  # a mask for the network is taken as it is


def test_far_from_the_hole_an_image_is_what_it_always_was():
  image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
  is_known = np.ones((64, 64), bool)
  is_known[:24, :24] = False
  decoder = Decoder(3)
  pixels, found = masks.known_pixels(image, masks.Mask(is_known, 'mask'), decoder, 8)
  whole = np.asarray(decoder.fitted(image, 8))
  np.testing.assert_array_equal(pixels[4:], whole[4:])
  assert (pixels[found] != whole[found]).any() and not found[:3, :3].any() and found[3:].all()


def test_a_mask_of_another_shape_than_the_image_is_refused():
  wide = masks.Mask(np.tile(LEFT, (1, 2)), 'wide')
  with pytest.raises(UserError, match='the mask wide has 16x8 pixels and an image 8x8'):
    masks.known_pixels(Image.new('L', (8, 8)), wide, Decoder(1), 8)
  with pytest.raises(UserError, match='16x8 pixels and an image 8x16'):
    masks.known_pixels(Image.new('L', (8, 16)), wide, Decoder(1), 8)
