"""How samples are shown: images side by side, points by their density."""

import abc
from collections.abc import Mapping
import math

import numpy as np
from PIL import Image, ImageDraw

MIN_TILE = 64  # pixels
POINT_BINS = 100  # of a picture of points, along each side
COLOURS = ('#d1495b', '#00798c', '#edae49')  # of a histogram
STRIP = 10  # times, at most, in a strip


class Pictures(abc.ABC):
  """What pictures there are of one kind of samples, as a dataset has them.

  Attributes:
    filmed: how many samples, at most, a film shows; None for all.
  """

  filmed: int | None

  @abc.abstractmethod
  def overview(self, samples: np.ndarray, most: int | None = None) -> Image.Image:
    """Samples [N, ...] in one picture; of what is shown one by one, the first `most`."""

  @abc.abstractmethod
  def separate(self, samples: np.ndarray) -> list[Image.Image]:
    """Each of the samples [N, ...] in a picture of its own; empty where one alone shows nothing."""

  @abc.abstractmethod
  def film(self, stages: list[np.ndarray]) -> list[Image.Image]:
    """Overviews of the same samples at several times, as frames of one film."""

  @abc.abstractmethod
  def strip(self, stages: list[np.ndarray]) -> Image.Image | None:
    """The same samples at some of these times in one picture, if there is such a one."""


class ImageGrids(Pictures):
  """Of uint8 images [N, H, W, C]."""

  filmed = 16

  def overview(self, samples: np.ndarray, most: int | None = None) -> Image.Image:
    return grid(samples[:most])

  def separate(self, samples: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(x.squeeze(-1) if x.shape[-1] == 1 else x) for x in samples]

  def film(self, stages: list[np.ndarray]) -> list[Image.Image]:
    return [grid(samples) for samples in stages]

  def strip(self, stages: list[np.ndarray]) -> Image.Image:
    """A row for each image, from left to right as time goes on."""
    shown = np.linspace(0, len(stages) - 1, min(STRIP, len(stages))).round().astype(int)
    rows = np.stack([stages[i] for i in shown], axis=1)
    return grid(rows.reshape(-1, *rows.shape[2:]), columns=len(shown))


class PointDensities(Pictures):
  """Of points [N, d], of which the first two coordinates are shown."""

  filmed = None

  def overview(self, samples: np.ndarray, most: int | None = None) -> Image.Image:
    return density(samples, extent(samples))

  def separate(self, samples: np.ndarray) -> list[Image.Image]:
    return []

  def film(self, stages: list[np.ndarray]) -> list[Image.Image]:
    of_all = extent(stages[-1])
    return [density(samples, of_all) for samples in stages]

  def strip(self, stages: list[np.ndarray]) -> None:
    return None


def extent(points: np.ndarray) -> float:
  """How far from zero almost all of them are."""
  return 1.1 * float(np.quantile(np.abs(points), 0.999))


def density(points: np.ndarray, extent: float) -> Image.Image:
  """A histogram of the first two coordinates of points [N, d], the darker the more."""
  x, y = points[:, 0], points[:, 1] if points.shape[1] > 1 else np.zeros(len(points))
  counts, _, _ = np.histogram2d(-y, x, bins=POINT_BINS, range=[[-extent, extent]] * 2)
  shade = 255 * (1 - np.sqrt(counts / max(1, counts.max())))
  return Image.fromarray(shade.astype(np.uint8)).resize([4 * POINT_BINS] * 2, 0)


def histogram(values: Mapping[str, np.ndarray], what: str) -> Image.Image:
  """Shares of values [n] of several kinds, one curve each in steps, over a common axis."""
  width, height, left, top = 480, 240, 10, 20
  bins = int(np.clip(2 * math.sqrt(min(map(len, values.values()))), 8, 40))
  every = np.concatenate(list(values.values()))
  low, high = float(every.min()), float(every.max())
  high = high if high > low else low + 1e-3
  shares = {name: np.histogram(v, bins, (low, high))[0] / len(v) for name, v in values.items()}
  tallest = max(share.max() for share in shares.values())
  canvas = Image.new('RGB', (width + 2 * left, height + 3 * top), 'white')
  draw = ImageDraw.Draw(canvas)
  for i, (name, share) in enumerate(shares.items()):
    colour = COLOURS[i % len(COLOURS)]
    points = [(float(left), float(top + height))]
    for k, part in enumerate(share):
      y = top + height * (1 - part / tallest)
      points += [(left + width * k / bins, y), (left + width * (k + 1) / bins, y)]
    draw.line([*points, (left + width, top + height)], fill=colour, width=2)
    draw.text((left + width - 160, top + 14 * i), f'{name} ({len(values[name])})', fill=colour)
  draw.text((left, top + height + 6), f'{low:.3f}', fill='black')
  draw.text((left + width - 40, top + height + 6), f'{high:.3f}', fill='black')
  draw.text((left + width / 2 - 30, top + height + 6), what, fill='black')
  return canvas


def in_pairs(conditions: np.ndarray, samples: np.ndarray, columns: int = 10) -> Image.Image:
  """Conditions, uint8 [N, H, W, C], each with its sample to the right of it, row by row."""
  n, channels = len(conditions), samples.shape[-1]
  pairs = np.stack([with_channels(conditions, channels), samples[:n]], axis=1)
  return grid(pairs.reshape(-1, *samples.shape[1:]), min(columns, 2 * n))


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
  """Images [N, H, W, C] with another number of channels, to be shown beside others."""
  if images.shape[-1] == channels:
    return images
  mode = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}[channels]
  made = [
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert(mode)
    for image in images
  ]
  return np.stack([np.asarray(image) for image in made]).reshape(*images.shape[:3], channels)


def grid(images: np.ndarray, columns: int | None = None) -> Image.Image:
  """uint8 images [N, H, W, C], row by row, by default nearly square.

  Images below `MIN_TILE` pixels are enlarged by a whole factor, with bicubic interpolation.
  """
  n, h, w, _ = images.shape
  columns = columns or math.ceil(math.sqrt(n))
  factor, gap = math.ceil(MIN_TILE / h), 2
  height, width = h * factor, w * factor
  size = (columns * (width + gap) + gap, math.ceil(n / columns) * (height + gap) + gap)
  canvas = Image.new('RGB', size, 'white')
  for i, image in enumerate(images):
    tile = Image.fromarray(image.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
    shape = tile.getchannel('A') if 'A' in tile.getbands() else None  # what is transparent is white
    where = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
    canvas.paste(tile, where, shape)
  return canvas
