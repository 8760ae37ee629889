"""What is in a dataset, in one pass over its images: --mode check_data."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import logging
import os

from data import classes, geometry
from data.decoding import Decoder
from data.folder import shown
from data.records import Reader, Records
from runtime.errors import UserError
from workdir.progress import Bar

logger = logging.getLogger('score_sde')


@dataclasses.dataclass(frozen=True)
class Seen:
  """What one image is.

  Attributes:
    size: width and height, as it is stored.
    mode: Pillow's name of its channels, and its format.
    label: its class.
    digest: of what a network sees of it.
    value: that of all its pixels, if there is one.
  """

  size: tuple[int, int]
  mode: str
  label: int
  digest: bytes
  value: int | None


@dataclasses.dataclass(frozen=True)
class SplitReport:
  """What the images of a split are.

  Attributes:
    split: train or test.
    seen: by the number of the image, of those that can be read.
    damaged: what is said of each of the others.
    lines: what is told of all.
  """

  split: str
  seen: dict[int, Seen]
  damaged: list[str]
  lines: list[str]


def check_split(split: str, records: Records, decoder: Decoder, size: int) -> SplitReport:
  """Reads all images of a split, and says what they are, in `lines`.

  Raises:
    Failure: if the images are out of reach.
  """
  read = Reader.of(records, decoder, size, split)

  def look(i: int) -> Seen | str:
    try:
      (pixels, label), image = read.decoded(i)
    except UserError as error:
      return str(error)
    kind = f'{image.mode} {image.format or ""}'.strip()
    low, high = int(pixels.min()), int(pixels.max())
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
    return Seen(image.size, kind, label, digest, low if low == high else None)

  seen, damaged = dict[int, Seen](), []
  threads = min(16, os.cpu_count() or 1)
  with (
    Bar(f'check {split}', records.length, unit='images') as bar,
    ThreadPoolExecutor(threads) as p,
  ):
    for i, one in enumerate(p.map(look, range(records.length))):
      if isinstance(one, Seen):
        seen[i] = one
      else:
        damaged.append(one)
      bar.update(i + 1)
  lines = [f'{records.length} images' + (f', {len(damaged)} cannot be read' if damaged else '')]
  if seen:
    lines += _of_images(seen, records, decoder, size)
  return SplitReport(split, seen, damaged, lines)


def _of_images(
  seen: dict[int, Seen], records: Records, decoder: Decoder, size: int
) -> Iterator[str]:
  all_seen = list(seen.values())
  sizes = Counter(one.size for one in all_seen)
  small, large = (pick(sizes, key=lambda s: s[0] * s[1]) for pick in (min, max))
  usual, n = sizes.most_common(1)[0]
  yield f'sizes from {_by(small)} to {_by(large)}; most often {_by(usual)} ({n} images)'
  modes = Counter(one.mode for one in all_seen).most_common()
  yield 'modes: ' + ', '.join(f'{mode} {count}' for mode, count in modes)
  if records.class_names:
    counts = Counter(one.label for one in all_seen)
    names = records.class_names
    yield classes.describe(names, [counts[i] for i in range(len(names))])
  if records.fit is None:
    yield from _of_fit(seen, records, decoder, size)
  if tiny := sum(min(one.size) < size for one in all_seen):
    yield f'{tiny} images are smaller than {size} pixels, and are enlarged'
  if one_value := [i for i, one in seen.items() if one.value is not None]:
    where = records.where(one_value[0])
    yield f'{len(one_value)} images are of one value all over, such as {where}'
  first = dict[bytes, int]()
  again = [
    (first[one.digest], i) for i, one in seen.items() if first.setdefault(one.digest, i) != i
  ]
  if again:
    a, b = again[0]
    yield (
      f'{len(again)} images are seen before at {size}x{size} pixels, such as {records.where(b)}, '
      f'which is {records.where(a)}'
    )


def _of_fit(seen: dict[int, Seen], records: Records, decoder: Decoder, size: int) -> Iterator[str]:
  """What becomes of images that are not square."""
  odd = {i: max(one.size) / min(one.size) for i, one in seen.items() if len(set(one.size)) > 1}
  if not odd:
    yield 'all images are square'
    return
  longest = max(odd, key=lambda i: odd[i])
  beyond = [1 - 1 / ratio for ratio in odd.values()]
  mean, most = 100 * sum(beyond) / len(beyond), 100 * max(beyond)
  done = {
    'crop': f'crop cuts away {mean:.0f} % of their pixels on average, {most:.0f} % at most',
    'pad': f'pad fills {mean:.0f} % of their square on average, {most:.0f} % at most',
    'stretch': f'stretch makes them up to {max(odd.values()):.1f} times as wide or as high',
  }[decoder.fit]
  others = ', '.join(fit for fit in geometry.FITS if fit != decoder.fit)
  yield (
    f'{len(odd)} images are not square: {done} ({records.where(longest)}); '
    f'config.data.fit has {others} as well'
  )


def _by(size: tuple[int, int]) -> str:
  return f'{size[0]}x{size[1]}'


def tell(reports: list[SplitReport], where: str, skip_damaged: bool = False) -> None:
  """Logs what is in all splits.

  Raises:
    UserError: if images cannot be read that are not left out, or all of them show nothing.
  """
  for report in reports:
    for line in report.lines:
      logger.info('%s: %s', report.split, line)
    for line in report.damaged:
      logger.warning('%s: %s', report.split, line.partition('; replace')[0])
  if len(reports) == 2:
    train, test = ({one.digest for one in report.seen.values()} for report in reports)
    if both := len(train & test):
      logger.warning('%d images of test are in train as well', both)
  values = {one.value for report in reports for one in report.seen.values()}
  if len(values) == 1 and None not in values:
    raise UserError(f'every pixel of all images in {shown(where)} is {values.pop()} of 255')
  damaged = sum(len(report.damaged) for report in reports)
  if damaged and not skip_damaged:
    raise UserError(
      f'{damaged} images in {shown(where)} cannot be read, which are named above; replace or '
      'remove them, or leave them out with --config.data.skip_damaged'
    )
