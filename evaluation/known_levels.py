"""Whole levels of pixels that agree with what is known of an image to the last one.

A sampler puts what is known into x_0 up to the noise of its last time, and rounding every pixel by
itself moves means. So the stored sample is made to agree.
"""

import numpy as np

HIGHEST = 255


def with_block_means(
  levels: np.ndarray, means: np.ndarray, block: tuple[int, int, int]
) -> np.ndarray:
  """The whole levels nearest to given ones, of which every block has a given mean.

  In each block all levels that do not reach 0 or 255 are moved by the same amount; then they are
  rounded so that their sum stays.

  Args:
    levels: [N, H, W, C], of 0 to 255 and beyond.
    means: like `levels`, of the block where a pixel is; times the size of a block a whole number.
    block: height, width and channels of a block; they divide H, W and C.

  Returns:
    uint8 [N, H, W, C].
  """
  pairs = zip(levels, means, strict=True)  # one after another, for less memory
  return np.stack([_one_with_block_means(*pair, block) for pair in pairs])


def _one_with_block_means(
  levels: np.ndarray, means: np.ndarray, block: tuple[int, int, int]
) -> np.ndarray:
  """`with_block_means` of one image [H, W, C]."""
  moved = _of_blocks(levels.astype(np.float64), block)
  sums = np.rint(moved.shape[1] * _of_blocks(means.astype(np.float64), block)[:, :1])
  low, high = -moved.max(1, keepdims=True), HIGHEST - moved.min(1, keepdims=True)
  for _ in range(40):  # by bisection: the sum grows with the shift
    shift = (low + high) / 2
    below = np.clip(moved + shift, 0, HIGHEST).sum(1, keepdims=True) < sums
    low, high = np.where(below, shift, low), np.where(below, high, shift)
  moved = np.clip(moved + high, 0, HIGHEST)
  whole = np.floor(moved)
  missing = sums - whole.sum(1, keepdims=True)  # at most as many as levels with a fraction
  rank = np.argsort(np.argsort(whole - moved, axis=1, kind='stable'), axis=1)
  whole += rank < missing
  return _to_image(whole.astype(np.uint8), levels.shape, block)


def _of_blocks(x: np.ndarray, block: tuple[int, int, int]) -> np.ndarray:
  """An image [H, W, C] as rows [blocks, size of a block]."""
  height, width, channels = x.shape
  h, w, c = block
  parts = x.reshape(height // h, h, width // w, w, channels // c, c)
  return parts.transpose(0, 2, 4, 1, 3, 5).reshape(-1, h * w * c)


def _to_image(rows: np.ndarray, shape: tuple[int, ...], block: tuple[int, int, int]) -> np.ndarray:
  """The inverse of `_of_blocks`."""
  height, width, channels = shape
  h, w, c = block
  parts = rows.reshape(height // h, width // w, channels // c, h, w, c)
  return parts.transpose(0, 3, 1, 4, 2, 5).reshape(shape)
