"""What is stored, what a network sees of it, and the way back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.codec import Codec, ImageCodec, PointCodec

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (400, 4, 4, 3), np.uint8)
CENTERED = [False, True]


def codec(**choices) -> ImageCodec:
  return ImageCodec((4, 4, 3), **choices)


@pytest.mark.parametrize('centered', CENTERED)
def test_all_levels_lie_between_low_and_high(centered):
  of = codec(centered=centered)
  levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  x = of.scaled(levels).ravel()
  assert (x[0], x[-1]) == (of.low, of.high) and of.unit == of.high - of.low
  np.testing.assert_allclose(np.diff(x), of.unit / 255, rtol=1e-4)
  assert of.level_width == of.unit / 256 and of.centre == pytest.approx(x.mean(), abs=1e-6)


@pytest.mark.parametrize('centered', CENTERED)
@pytest.mark.parametrize('nearest_level', [False, True])
def test_an_image_comes_back_from_where_its_levels_are(centered, nearest_level):
  """Exactly, also from half a level above it, if truncated, or half below, if rounded."""
  of = codec(centered=centered, nearest_level=nearest_level)
  for away in (0.0, of.unit / (-600 if nearest_level else 600)):
    back = of.to_stored(of.scaled(IMAGES) + np.float32(away))
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, IMAGES)


@pytest.mark.parametrize(('nearest_level', 'expected'), [(False, 127), (True, 128)])
@pytest.mark.parametrize('centered', CENTERED)
def test_what_is_out_of_range_is_cut(nearest_level, expected, centered):
  of = codec(centered=centered, nearest_level=nearest_level)
  x = np.stack([np.full((4, 4, 3), value, np.float32) for value in (-3, 3, of.centre)])
  assert [np.unique(image).tolist() for image in of.to_stored(x)] == [[0], [255], [expected]]


def test_samples_that_are_not_finite_are_told():
  x = np.zeros((4, 4, 4, 3), np.float32)
  x[1, 2, 3] = np.nan
  for of, broken in ((codec(), x), (PointCodec((48,)), x.reshape(4, 48))):
    with pytest.raises(FloatingPointError, match='1 of 4 samples are not finite'):
      of.to_stored(broken)


def test_half_of_the_training_images_are_mirrored_and_no_others():
  of = codec(random_flip=True)
  seen = np.round(255 * of.for_training(KEY, jnp.asarray(IMAGES)))
  as_is = (seen == IMAGES).all((1, 2, 3))
  mirrored = (seen == IMAGES[:, :, ::-1]).all((1, 2, 3))
  assert (as_is ^ mirrored).all() and 150 < mirrored.sum() < 250
  images = jnp.asarray(IMAGES)
  np.testing.assert_array_equal(of.for_evaluation(KEY, images), of.scaled(images))


@pytest.mark.parametrize('centered', CENTERED)
def test_dequantised_images_fill_their_levels(centered):
  """Uniformly: the place within a level has mean 1/2 and variance 1/12."""
  of = codec(centered=centered, uniform_dequantization=True)
  for view in (of.dequantized, of.for_training, of.for_evaluation):
    place = (np.float64(view(KEY, jnp.asarray(IMAGES))) - of.low) / of.level_width - IMAGES
    assert place.min() > -1e-4 and place.max() < 1 + 1e-4
    n = place.size
    assert abs(place.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(place.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)


def test_the_stream_of_training_is_that_of_the_released_settings():
  """Mirrored by the first of two keys and spread by the second, whatever else is chosen."""
  rng_flip, rng_level = jax.random.split(KEY)
  x = jnp.float32(IMAGES)
  x = jnp.where(jax.random.bernoulli(rng_flip, shape=(400, 1, 1, 1)), x[:, :, ::-1], x)
  x = 2 * ((x + jax.random.uniform(rng_level, x.shape)) / 256) - 1
  of = codec(centered=True, random_flip=True, uniform_dequantization=True)
  np.testing.assert_array_equal(of.for_training(KEY, jnp.asarray(IMAGES)), x)


def test_points_are_seen_as_they_are():
  of, x = PointCodec((2,)), np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
  for seen in (of.scaled(x), of.dequantized(KEY, x), of.for_training(KEY, x), of.to_stored(x)):
    assert seen is x
  assert of.dim == 2 and of.level_width == of.unit == 1.0
  np.testing.assert_array_equal(np.clip(1e30 * x, of.low, of.high), 1e30 * x)


@pytest.mark.parametrize('of', [codec(label_dropout=0.1), PointCodec((2,), label_dropout=0.1)])
def test_labels_are_hidden_as_often_as_asked(of: Codec):
  labels = jnp.arange(20_000) % 10
  hidden = np.asarray(of.training_labels(KEY, labels, 10))
  at = hidden == 10
  assert abs(at.mean() - 0.1) < 4 * (0.09 / 20_000) ** 0.5
  np.testing.assert_array_equal(hidden[~at], np.asarray(labels)[~at])


@pytest.mark.parametrize(('share', 'expected'), [(0.0, [0, 1, 2]), (1.0, [9, 9, 9])])
def test_no_labels_or_all_are_hidden(share, expected):
  hidden = codec(label_dropout=share).training_labels(KEY, jnp.arange(3), 9)
  np.testing.assert_array_equal(hidden, expected)


def test_pictures_of_images_and_of_points():
  images, points = codec().pictures, PointCodec((2,)).pictures
  assert images.overview(IMAGES, most=9).size == (3 * 66 + 2, 3 * 66 + 2)
  separate = images.separate(IMAGES[:3])
  assert [np.asarray(x).tolist() for x in separate] == IMAGES[:3].tolist()
  stages = [IMAGES[:2]] * 30
  assert len(images.film(stages)) == 30 and images.strip(stages).size == (10 * 66 + 2, 2 * 66 + 2)
  x = np.random.default_rng(0).normal(size=(500, 2))
  assert points.separate(x) == [] and points.strip([x]) is None
  shades = [np.asarray(frame) for frame in points.film([3 * x, x])]
  assert (shades[0] < 255).mean() < (shades[1] < 255).mean()  # most lie beyond the last one's edge
