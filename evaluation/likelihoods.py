"""Bits/dim of a user's images: a table, the least likely ones, and those of the data beside."""

from collections.abc import Sequence
import csv
import dataclasses
import io
import logging
import math

from etils import epath
import jax
import numpy as np

from data.images import Batch, Source
from evaluation.bits_per_dim import BitsPerDim
from models.score import Params
from workdir import artifacts
from workdir.pictures import grid, histogram
from workdir.reports import Report

logger = logging.getLogger('score_sde')

SHOWN = 10  # of the least likely images, in the table that is printed
PICTURED = 64  # in the contact sheet
AT_LEAST = 64  # of the data's own, which are otherwise as many as the user's


def measure(
  bits: BitsPerDim,
  names: Sequence[str],
  held_out: Source,
  params: Params,
  folder: epath.Path,
) -> Report:
  """Measures images and as many of the data that the model was trained for.

  Writes `images.csv`, the least likely first, `least_likely.png`, these in the same order, and
  `histogram.png`, the bits/dim of both.

  Args:
    bits: how, of the user's images.
    names: of these images, in their order.
    held_out: the data's own.
    params: of the model.
    folder: where all this goes, and the rounds of the work.

  Returns:
    The means of both, and the share of the data that is less likely than the mean image.
  """
  n = min(len(held_out), max(len(names), AT_LEAST))
  chosen = np.linspace(0, len(held_out) - 1, n).round().astype(int)
  of_data = dataclasses.replace(
    bits, source=_Part(held_out, chosen), split='data', batch_size=_batch_size(bits, n)
  )
  bits = dataclasses.replace(bits, batch_size=_batch_size(bits, len(names)))
  values, nfe, seconds = bits.of_images(params, folder)
  data_values, _, data_seconds = of_data.of_images(params, folder)
  each, of_data_each = values.mean((0, 1)), data_values.mean((0, 1))
  order = np.argsort(-each, kind='stable')
  artifacts.write(folder / 'images.csv', table(names, values, order).encode())
  pictures = bits.source.batch(order[:PICTURED])['data']
  artifacts.write_png(folder / 'least_likely.png', grid(pictures))
  what = 'bits/dim' if bits.estimator.name == 'bpd' else 'bound on bits/dim'
  picture = histogram({'your images': each, 'held-out data': of_data_each}, what)
  artifacts.write_png(folder / 'histogram.png', picture)
  logger.info('the least likely of %d images, in bits/dim:', len(names))
  for i in order[:SHOWN]:
    logger.info('  %8.3f  %s', each[i], names[i])
  return {
    f'{bits.estimator.name}_images': float(each.mean()),
    f'{bits.estimator.name}_data': float(of_data_each.mean()),
    'images': len(names),
    'data': n,
    'importance_samples': bits.samples,
    'share_of_data_less_likely': float((of_data_each > each.mean()).mean()),
    'nfe': nfe,
    'seconds': seconds + data_seconds,
  }


def _batch_size(bits: BitsPerDim, n: int) -> int:
  """As many as there are, if that is less than a batch, in a number that the devices share."""
  devices = jax.device_count()
  return min(bits.batch_size, devices * math.ceil(n / devices))


def table(names: Sequence[str], values: np.ndarray, order: np.ndarray) -> str:
  """Comma-separated: image, bits/dim and its error by the repeats, if there are several."""
  text = io.StringIO()
  lines = csv.writer(text, lineterminator='\n')
  lines.writerow(['image', 'bits_per_dim', 'std_error'])
  of_repeats = values.mean(1)
  for i in order:
    error = ''
    if len(values) > 1:
      error = f'{of_repeats[:, i].std(ddof=1) / math.sqrt(len(values)):.6f}'
    lines.writerow([names[i], f'{of_repeats[:, i].mean():.6f}', error])
  return text.getvalue()


@dataclasses.dataclass(frozen=True)
class _Part(Source):
  """Some of the examples of a source."""

  whole: Source
  chosen: np.ndarray

  def __len__(self) -> int:
    return len(self.chosen)

  def batch(self, indices: np.ndarray) -> Batch:
    return self.whole.batch(self.chosen[indices])
