"""docs/results.md and its pictures, from what `benchmarks.recipes` measured.

An outcome, as JSON, is of one set of data: its `name`, the `size` of its images, how many
`train_images` there are, the `accuracy` of the classifier, `step_ms`, the milliseconds of a step by
the names of recipes, and a list of `rows`, one for each run.
"""

from collections.abc import Sequence
from pathlib import Path
import re
from typing import Any

from etils import epath
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
import numpy as np
from PIL import Image

from benchmarks.common import three_figures
from workdir import artifacts

DOCS = Path(__file__).parent.parent / 'docs'
PAGE = 'results.md'
COLUMNS = 16  # of a grid of images
WIDTH = 768  # pixels of a grid, about
SHOWN = 35  # evaluations of the samples in pictures
_FRECHET = {'classifier': 'frechet_classifier', 'pixels': 'frechet_pixels'}

Outcome = dict[str, Any]
Row = dict[str, Any]


def distance_table(outcome: Outcome) -> list[str]:
  """Bits/dim with their standard error, and distances for each number of evaluations."""
  rows = outcome['rows']
  counts = list(rows[0]['distances'])
  heads = [f'{name}, {n}' for name in _FRECHET for n in counts]
  lines = []
  for row in rows:
    bits, distances = row['bits'], row['distances']
    values = [distances[n][key] for key in _FRECHET.values() for n in counts]
    error = f'{bits["bpd_test"]:.3f} ± {bits["bpd_test_std_error"]:.3f}'
    lines.append([row['recipe'], row['seed'], error, *map(three_figures, values)])
  last = rows[-1]['distances'][counts[-1]]
  floors = [last[f'{key}_floor'] for key in _FRECHET.values() for _ in counts]
  lines.append(['data', '', '', *map(three_figures, floors)])
  return table(['recipe', 'seed', 'bits/dim', *heads], lines)


def cost_table(outcome: Outcome) -> list[str]:
  """What training took, and which sampler drew."""
  lines = []
  for row in outcome['rows']:
    drawn = [f'{d["sampler"]} ({d["nfe"]:.0f})' for d in row['distances'].values()]
    size, seconds = f'{row["parameters"]:,}', f'{row["seconds"]:.0f}'
    step_ms, nfe = outcome['step_ms'].get(row['recipe'], ''), f'{row["bits"]["bpd_test_nfe"]:.0f}'
    lines.append([row['recipe'], size, three_figures(step_ms), seconds, nfe, *drawn])
  counts = outcome['rows'][0]['distances']
  heads = ['recipe', 'parameters', 'ms a step', 'seconds', 'evaluations of bits/dim']
  return table([*heads, *(f'sampler, {n}' for n in counts)], lines)


def caption(outcome: Outcome) -> str:
  """How much the numbers are of."""
  row, size, accuracy = outcome['rows'][-1], outcome['size'], 100 * outcome['accuracy']
  bits, drawn = row['bits'], next(iter(row['distances'].values()))
  return (
    f'{outcome["name"]}, {size}x{size}. {row["images"]:,} images seen, of '
    f'{outcome["train_images"]:,} different ones. Bits/dim of {bits["bpd_test_images"]} held-out '
    f'images. Frechet distances of {drawn["samples"]} samples from all training images, by '
    f'features of the classifier ({accuracy:.1f} % right on held-out images) and by pixels. The '
    f'row "data" is the floor: {drawn["frechet_pixels_floor_images"]} training images from as many '
    'others, so a little above what as many images are from all.'
  )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
  lines = [head, ['---'] * len(head), *rows]
  return [f'| {" | ".join(map(str, cells))} |' for cells in lines]


def put(page: str, mark: str, lines: Sequence[str]) -> str:
  """The page with lines between the marks of that name.

  Raises:
    ValueError: if the page has no such marks, or several.
  """
  begin, end = f'<!-- printed for {mark} -->', '<!-- end -->'
  block = '\n'.join([begin, *lines, end])
  page, n = re.subn(f'{re.escape(begin)}.*?{end}', lambda _: block, page, flags=re.DOTALL)
  if n != 1:
    raise ValueError(f'the page has {n} places for {mark}')
  return page


def plot(outcomes: Sequence[Outcome]) -> Figure:
  """Distances over evaluations, and bits/dim; a row for each set of data."""
  n = len(outcomes)
  figure, axes = pyplot.subplots(n, 2, figsize=(9, 3.4 * n), squeeze=False, layout='constrained')
  for outcome, (left, right) in zip(outcomes, axes, strict=True):
    name, rows = outcome['name'], outcome['rows']
    colors = {recipe: f'C{i}' for i, recipe in enumerate(dict.fromkeys(r['recipe'] for r in rows))}
    _plot_distances(left, rows, colors)
    left.set_title(f'{name}: Frechet distance, classifier', fontsize=9)
    for row in rows:
      bits, recipe = row['bits'], row['recipe']
      right.errorbar(
        recipe, bits['bpd_test'], bits['bpd_test_std_error'], fmt='o', color=colors[recipe]
      )
    right.set_title(f'{name}: bits/dim of held-out images', fontsize=9)
  return figure


def _plot_distances(ax: Axes, rows: Sequence[Row], colors: dict[str, str]) -> None:
  key = _FRECHET['classifier']
  for row in rows:
    points = [(drawn['nfe'], drawn[key]) for drawn in row['distances'].values()]
    ax.loglog(*zip(*points, strict=True), 'o-', ms=4, color=colors[row['recipe']])
  for recipe, color in colors.items():  # once in the legend, however many seeds
    ax.plot([], [], 'o-', ms=4, color=color, label=recipe)
  first = next(iter(rows[0]['distances'].values()))
  ax.axhline(first[f'{key}_floor'], color='k', lw=0.8, label='data')
  for axis in (ax.xaxis, ax.yaxis):  # plain numbers, not powers of ten
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(ScalarFormatter())
  ax.set_xticks([int(n) for n in rows[0]['distances']])
  ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  ax.set_xlabel('evaluations of the network')
  ax.legend(fontsize=8)


def grid(images: np.ndarray, columns: int = COLUMNS, width: int = WIDTH) -> Image.Image:
  """Grey images [N, H, W, 1] row by row, as many as fill rows, enlarged, with lines between."""
  n, h, w, _ = images.shape
  times = max(1, round(width / (columns * w)))
  size, shown = (times * w, times * h), images[: n // columns * columns, ..., 0]
  large = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in shown]
  framed = np.pad(np.stack(large), ((0, 0), (0, 1), (0, 1)), constant_values=128)
  _, high, wide = framed.shape
  rows = framed.reshape(-1, columns, high, wide).swapaxes(1, 2)
  return Image.fromarray(rows.reshape(-1, columns * wide)[:-1, :-1])


def samples_of(row: Row, n: int) -> np.ndarray:
  """The first samples that the distance for `SHOWN` evaluations was measured of."""
  folder = epath.Path(row['distances'][str(SHOWN)]['folder'])
  return artifacts.read_npz(folder / 'samples_0.npz')['samples'][:n]


def write(outcome: Outcome, others: Sequence[Outcome], docs: Path) -> None:
  """The tables into docs/results.md, and into docs/results/ a plot of all and pictures of samples.

  `<name>.png` has samples of the best recipe by the classifier's features. Where there are several,
  `<name>_recipes.png` has a row of each one's, and `recipes.png` compares them.
  """
  page, folder, name = docs / PAGE, docs / 'results', outcome['name'].lower()
  lines = [caption(outcome), '', *distance_table(outcome), '', *cost_table(outcome)]
  page.write_text(put(page.read_text(), outcome['name'], lines))
  folder.mkdir(exist_ok=True)
  seed = outcome['rows'][0]['seed']
  first = [row for row in outcome['rows'] if row['seed'] == seed]
  if len(first) > 1:
    figure = plot([*(other for other in others if len(other['rows']) > 1), outcome])
    figure.savefig(folder / 'recipes.png', dpi=100, metadata={'Software': None})
    pyplot.close(figure)
    of_each = np.concatenate([samples_of(row, COLUMNS) for row in first])
    grid(of_each).save(folder / f'{name}_recipes.png', optimize=True)
  best = min(first, key=lambda row: row['distances'][str(SHOWN)][_FRECHET['classifier']])
  grid(samples_of(best, 8 * COLUMNS)).save(folder / f'{name}.png', optimize=True)
  print('\n'.join(['', *lines, '', f'best at {SHOWN} evaluations: {best["recipe"]}']), flush=True)
