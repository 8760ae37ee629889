"""Pictures of samples with one to four channels."""

import numpy as np
import pytest

from workdir.pictures import ImageGrids


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_overviews_show_transparency_as_white_and_single_pictures_keep_it(channels):
  samples = np.full((2, 64, 64, channels), 100, np.uint8)
  if channels % 2 == 0:
    samples[..., -1] = 255
    samples[1, ..., -1] = 0
  shown = np.asarray(ImageGrids().overview(samples))
  assert shown[10, 10].tolist() == [100] * 3
  assert shown[10, 80].tolist() == ([255] * 3 if channels % 2 == 0 else [100] * 3)
  for picture, sample in zip(ImageGrids().separate(samples), samples, strict=True):
    np.testing.assert_array_equal(np.asarray(picture).reshape(sample.shape), sample)
