"""A workdir that explains itself: `index.html`, to be opened in any browser, without a network.

What it shows it finds in the folder: curves of `metrics.jsonl`, grids of samples over time, reports
of evaluations and of the classifier, drawn samples, checkpoints, the config. Pictures are in the
file itself, so that it can be sent. `page.html.jinja` is how it looks.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from functools import cache
import io
import json
import os
from pathlib import Path
import re
from typing import Any
from urllib.parse import quote

from etils import epath
import jax
import jinja2
import numpy as np
from PIL import Image

from workdir import artifacts, best, reports, same_config

POINTS = 300  # of a curve at most; means of what lies between
MOST_PICTURES = 24  # of samples over time
MOST_PIXELS = 1024  # of a picture's longer side; the file that it links to has all
MOST_BYTES = 4_000_000  # of a film; a longer one is only linked to

# Of the tables of an evaluation: their titles, and how the names that they hold look.
_TABLES = (
  ('Made of snapshots', re.compile('unknown_share')),
  ('Likelihood', re.compile(r'(bpd|bound|nll)_?\w*(?<!_seconds)')),
  ('Loss', re.compile(r'\w*(loss|score_error)\w*(?<!_seconds)')),
  ('Distance of two halves of the data', re.compile(r'\w+_floor\w*(?<!_seconds)')),
  ('Distance from the data', re.compile(r'\w+(?<!_seconds)')),
  ('Seconds', re.compile(r'\w+_seconds')),
)
_WIDTH, _HEIGHT = 460, 182  # of a curve, in units of its own
_BOX = (54, 8, 434, 158)  # where it is drawn there: left, top, right, bottom

Row = dict[str, str]  # of a table: name of the column -> what stands there


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image of the page.

  Attributes:
    where: the file, as a link.
    source: the image itself, or the link where it is too large.
    caption: what it is.
    small: has so few pixels that they are shown as squares.
  """

  where: str
  source: str
  caption: str
  small: bool


@dataclasses.dataclass(frozen=True)
class Part:
  """What lies in one folder of the workdir: tables, notes, pictures."""

  name: str
  pictures: list[Picture]
  tables: list[tuple[str, list[Row]]] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Tick:
  """A mark of an axis."""

  at: float
  label: str


@dataclasses.dataclass(frozen=True)
class Line:
  """One scalar of a curve: its name, and its points in the picture."""

  name: str
  points: str


@dataclasses.dataclass(frozen=True)
class Curve:
  """Scalars over steps, drawn in one picture.

  Attributes:
    title: what it shows.
    lines: a line for each scalar.
    data: the values, as JSON, for the pointer to read off.
    range: first and last step.
    x_ticks, y_ticks: marks of the axes.
    last: the values at the end, in words.
    cut: what is not shown, in words; or empty.
  """

  title: str
  lines: list[Line]
  data: str
  range: tuple[float, float]
  x_ticks: list[Tick]
  y_ticks: list[Tick]
  last: str
  cut: str
  width: int = _WIDTH
  height: int = _HEIGHT
  box: tuple[int, ...] = _BOX


def write(root: epath.Path) -> None:
  """Writes `index.html` in a workdir, from what is there now; on process 0 only."""
  if jax.process_index() > 0:
    return
  lines, config = _lines(root / 'metrics.jsonl'), _json(root / 'config.json')
  kept = sorted(_steps(root / 'checkpoints'))
  total = config.get('training', {}).get('n_iters', 0)
  page = _template().render(
    name=root.name,
    step=f'{max([*(line["step"] for line in lines), *kept], default=0):,}',
    total=f'{total:,}' if total else '',
    what=_what(config),
    kept=', '.join(map(str, kept)),
    snapshots=_snapshots(root),
    evaluations=[
      *(_evaluation(root, folder) for folder in _folders(root, 'report_*.json')),
      *(_sweep(root, path) for path in sorted(root.glob('ema/*/sweep.json'))),
    ],
    drawn=[_drawn(root, folder) for folder in _folders(root, 'step_*/samples.npz')],
    curves=_curves(lines),
    quality=_quality(root),
    classifier=_classifier(_json(root / 'classifier' / 'report.json')),
    fields=[(name, json.dumps(value)) for name, value in same_config.flatten(config)],
  )
  # Names of folders need not be UTF-8.
  artifacts.write(root / 'index.html', page.encode(errors='replace'))


@cache
def _template() -> jinja2.Template:
  environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
  return environment.from_string((Path(__file__).parent / 'page.html.jinja').read_text())


def _what(config: dict[str, Any]) -> str:
  if not config:
    return 'without a config'
  data, model = config.get('data', {}), config.get('model', {})
  size = data.get('image_size')
  shape = f'{data["dim"]} dimensions' if data.get('dim') else f'{size}x{size}'
  sde = config.get('training', {}).get('sde')
  return f'{model.get("name")} with {sde} on {data.get("dataset")} ({shape})'


def _json(path: epath.Path) -> dict[str, Any]:
  """What a file holds, or nothing if there is none, or it is damaged."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return {}


def _lines(path: epath.Path) -> list[dict[str, float]]:
  """The lines of metrics.jsonl that are whole."""
  lines = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      lines.append(json.loads(line))
    except ValueError:  # cut off
      continue
  return lines


def _steps(folder: epath.Path) -> list[int]:
  return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []


def _folders(root: epath.Path, pattern: str) -> list[epath.Path]:
  """The folders of a workdir in which something like the pattern lies, by name."""
  folders = [path for path in root.iterdir() if path.is_dir()]
  return sorted((f for f in folders if any(f.glob(pattern))), key=lambda f: f.name)


def _number(path: epath.Path) -> int:
  """The last number in a name, by which such names are in order."""
  return int((re.findall(r'\d+', path.name) or ['0'])[-1])


# Pictures.


def _picture(root: epath.Path, path: epath.Path, caption: str) -> Picture:
  where = quote(os.fsencode(path.relative_to(root).as_posix()))
  try:
    source, small = _embedded(path.read_bytes())
  except OSError:  # cut off, or gone
    source, small = '', False
  return Picture(where, source or where, caption, small)


def _embedded(data: bytes) -> tuple[str, bool]:
  """An image as an address that holds it, empty if it is too large, and whether it is small."""
  with Image.open(io.BytesIO(data)) as image:
    kind, longest = image.format or '', max(image.size)
    if kind == 'GIF':  # a film
      if len(data) > MOST_BYTES:
        return '', False
    elif longest > MOST_PIXELS:
      image.thumbnail((MOST_PIXELS, MOST_PIXELS))
      kind, reduced = 'JPEG', io.BytesIO()
      image.convert('RGB').save(reduced, kind, quality=90)
      data = reduced.getvalue()
  return f'data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}', longest <= 300


def _snapshots(root: epath.Path) -> list[Picture]:
  """Grids of samples, of evenly spaced snapshots if there are many."""
  paths = sorted(root.glob('samples/iter_*/sample.png'), key=lambda path: _number(path.parent))
  chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MOST_PICTURES)).astype(int))
  return [_picture(root, paths[i], f'step {_number(paths[i].parent):,}') for i in chosen]


def _drawn(root: epath.Path, folder: epath.Path) -> Part:
  """What `--mode sample` left."""
  found = []
  for step in sorted(folder.glob('step_*'), key=_number):
    pictures = [step / name for name in ('samples.png', 'trajectory.gif')]
    found += [
      _picture(root, path, f'{step.name}, {path.name}') for path in pictures if path.exists()
    ]
  return Part(folder.name, found)


# Tables.


def _evaluation(root: epath.Path, folder: epath.Path) -> Part:
  """The reports of an evaluation, and samples of its last steps."""
  read = (_json(path) for path in sorted(folder.glob('report_*.json'), key=_number))
  found = [report for report in read if report]
  grids = sorted(folder.glob('step_*/samples.png'), key=lambda path: _number(path.parent))
  pictures = [_picture(root, path, f'step {_number(path.parent):,}') for path in grids[-3:]]
  return Part(folder.name, pictures, _tables(found), _notes(found))


def _sweep(root: epath.Path, path: epath.Path) -> Part:
  """A comparison of averages of several widths, and samples of each."""
  found, pictures = _json(path).get('reports', []), list[Picture]()
  for report in found:
    grid = path.parent / str(report['sigma_rel']) / f'step_{report["step"]}' / 'samples.png'
    if grid.exists():
      pictures.append(_picture(root, grid, f'sigma_rel = {report["sigma_rel"]}'))
  name, key = path.parent.relative_to(root).as_posix(), 'sigma_rel'
  return Part(name, pictures, _tables(found, key), _notes(found, key))


def _notes(found: list[reports.Report], key: str = 'step') -> list[str]:
  """Which is the best, and what the distances are worth."""
  best = reports.what_is_best(found, key)
  notes = dict.fromkeys(note for report in found for note in reports.notes(report))
  return [best, *notes] if best else list(notes)


def _tables(found: Sequence[Mapping[str, Any]], key: str = 'step') -> list[tuple[str, list[Row]]]:
  """The numbers of reports, a row for each checkpoint or other key, in tables by what they are."""
  numbers = [reports.scalars(dict(report)) for report in found]
  names, tables = list(dict.fromkeys(name for row in numbers for name in row)), []
  for title, pattern in _TABLES:
    here = [name for name in names if pattern.fullmatch(name)]
    names = [name for name in names if name not in here]
    rows = [
      {key: report.get(key), **{name: row.get(name) for name in here}}
      for report, row in zip(found, numbers, strict=True)
    ]
    if here:
      tables.append((title, _rows(rows)))
  return tables


def _rows(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
  return [{name: _shown(value) for name, value in row.items()} for row in rows]


def _shown(value: Any) -> str:
  if value is None:
    return ''
  if isinstance(value, float):
    return f'{value:.6g}'
  return f'{value:,}' if isinstance(value, int) else str(value)


def _classifier(report: dict[str, Any]) -> list[list[Row]]:
  """Its report: in all, and by level of noise."""
  levels = [
    {**level, 't': '{:.3g} to {:.3g}'.format(*level['t'])} for level in report.get('levels', [])
  ]
  return [rows for rows in (_rows([reports.scalars(report)]), _rows(levels)) if rows and rows[0]]


# Curves.


def _curves(lines: Sequence[dict[str, float]]) -> list[Curve]:
  """A curve for each scalar, where it is finite; training and held-out loss share one."""
  hidden = ('step', 'steps_per_s')  # the latter says what images_per_s does
  lines = [{k: v for k, v in line.items() if _is_finite(v)} for line in lines]
  names = list(dict.fromkeys(name for line in lines for name in line if name not in hidden))
  shared = [n for n in names if f'eval_{n}' in names]
  groups: list[tuple[str, ...]] = [(n, f'eval_{n}') for n in shared]
  groups += [(n,) for n in names if n not in shared and n.removeprefix('eval_') not in shared]
  return [_curve(lines, group) for group in groups]


def _quality(root: epath.Path) -> list[Curve]:
  """Distances of snapshots' samples from the data, with those of data from data if known."""
  found = [_json(path) for path in root.glob(f'{best.FOLDER}/report_*.json')]
  lines = sorted((reports.scalars(one) | {'step': one['step']} for one in found if one), key=_step)
  names = list(dict.fromkeys(name for line in lines for name in line))
  shown = [name for name in names if name in reports.RANKING or f'{name}_floor' in names]
  return [_curve(lines, [n for n in (name, f'{name}_floor') if n in names]) for name in shown]


def _step(line: Mapping[str, float]) -> float:
  return line['step']


def _is_finite(value: Any) -> bool:
  return isinstance(value, int | float) and bool(np.isfinite(value))


def _curve(lines: Sequence[dict[str, float]], names: Sequence[str]) -> Curve:
  """Scalars over steps; what lies beyond the highest percent is cut off."""
  series = []
  for name in names:
    values = [(line['step'], line[name]) for line in lines if name in line]
    parts = np.array_split(np.array(values, float), min(len(values), POINTS))
    series.append(np.array([part.mean(0) for part in parts]))
  whole = np.concatenate(series)
  (first, low), last = whole.min(0), whole[:, 0].max()
  high = max(np.quantile(whole[:, 1], 0.99), low + 1e-9 * max(1, abs(low)))
  left, top, right, bottom = _BOX

  def x_of(step: float) -> float:
    return left + (right - left) * (step - first) / max(last - first, 1)

  def y_of(value: float) -> float:
    return bottom - (bottom - top) * (min(value, high) - low) / (high - low)

  drawn = [
    Line(name, ' '.join(f'{x_of(s):.1f},{y_of(v):.1f}' for s, v in points))
    for name, points in zip(names, series, strict=True)
  ]
  data = [
    {'name': name, 'points': [[float(f'{s:.6g}'), float(f'{v:.5g}')] for s, v in points]}
    for name, points in zip(names, series, strict=True)
  ]
  ends = (f'{n} {s[-1, 1]:.4g}' for n, s in zip(names, series, strict=True))
  above = int((whole[:, 1] > high).sum())
  return Curve(
    title=names[0].replace('_', ' '),
    lines=drawn,
    data=json.dumps(data),
    range=(float(first), float(last)),
    x_ticks=[Tick(round(x_of(t), 1), f'{t:,.0f}') for t in _ticks(first, last, 4)],
    y_ticks=[Tick(round(y_of(t), 1), f'{t:.4g}') for t in _ticks(low, high, 4)],
    last=f'{", ".join(ends)} at step {last:,.0f}',
    cut=f'{above} of {len(whole)} points lie above {high:.4g}' if above else '',
  )


def _ticks(low: float, high: float, about: int) -> list[float]:
  """Round numbers from low to high, about so many."""
  span = high - low
  if span <= 0:
    return [low]
  unit = 10.0 ** np.floor(np.log10(span / about))
  step = next(m * unit for m in (1, 2, 5, 10) if span / (m * unit) <= about + 1)
  return [float(k * step) for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]
