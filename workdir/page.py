"""A workdir that explains itself: `index.html`, to be opened in any browser, without a network.

What it shows it finds in the folder: curves of `metrics.jsonl`, grids of samples over time, reports
of evaluations and of the classifier, drawn samples, checkpoints, the config.
"""

from collections.abc import Iterable, Sequence
from html import escape
import json
import os
import re
from typing import Any
from urllib.parse import quote

from etils import epath
import jax
import numpy as np

from workdir import artifacts, reports, same_config

WIDTH, HEIGHT = 460, 150  # pixels of a curve
POINTS = 300  # of a curve at most; means of what lies between
MOST_PICTURES = 24  # of samples over time

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
  color: #222 }
h1, h2 { font-weight: 600 } h2 { margin-top: 2em; border-bottom: 1px solid #ddd }
.row { display: flex; flex-wrap: wrap; gap: 1.5em } figure { margin: 0 }
figcaption { font-size: 13px; color: #555 } img { max-width: 100%; max-height: 480px }
.row img { max-height: 240px } svg { background: #fafafa }
table { border-collapse: collapse; font-size: 13px } td, th { padding: 2px 10px; text-align: left;
  border-bottom: 1px solid #eee } .wide { overflow-x: auto } code { background: #f4f4f4 }
"""


def write(root: epath.Path) -> None:
  """Writes `index.html` in a workdir, from what is there now; on process 0 only."""
  if jax.process_index() > 0:
    return
  lines, config = _lines(root / 'metrics.jsonl'), _json(root / 'config.json')
  step = max([*(line['step'] for line in lines), *_steps(root / 'checkpoints')], default=0)
  total = config.get('training', {}).get('n_iters', 0)
  sections = [
    _section('Training', _curves(lines)),
    _section('Samples of the snapshots', _pictures(root)),
    *(_evaluation(root, folder) for folder in _folders(root, 'report_*.json')),
    _section('Classifier of noisy images', _classifier(_json(root / 'classifier' / 'report.json'))),
    *(_drawn(root, folder) for folder in _folders(root, 'step_*/samples.npz')),
    _section('Config', _config(config)),
  ]
  name = escape(root.name)
  done = f'At step {step:,} of {total:,}.' if total else ''
  kept = ', '.join(str(s) for s in sorted(_steps(root / 'checkpoints')))
  page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style></head>
<body><h1>{name}</h1>
<p>{done} A run of score-based generative modelling through SDEs, {escape(_what(config))}.
Snapshots are kept of the steps {kept or '(none yet)'}, in <code>checkpoints/</code>. The command
that began it goes on from the newest; with <code>--mode eval</code> or <code>--mode sample</code>
it evaluates, or draws. Numbers: <code>metrics.jsonl</code>, <code>tensorboard/</code>.</p>
{''.join(sections)}</body></html>
"""
  # Names of folders need not be UTF-8.
  artifacts.write(root / 'index.html', page.encode(errors='replace'))


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


def _section(title: str, body: str) -> str:
  return f'<h2>{escape(title)}</h2>\n{body}\n' if body else ''


def _figure(root: epath.Path, path: epath.Path, caption: str) -> str:
  where = quote(os.fsencode(path.relative_to(root).as_posix()))
  return (
    f'<figure><a href="{where}"><img src="{where}" alt="{escape(caption)}"></a>'
    f'<figcaption>{escape(caption)}</figcaption></figure>'
  )


def _row(parts: Iterable[str]) -> str:
  text = ''.join(parts)
  return f'<div class="row">{text}</div>' if text else ''


def _pictures(root: epath.Path) -> str:
  """Grids of samples, of evenly spaced snapshots if there are many."""
  paths = sorted(root.glob('samples/iter_*/sample.png'), key=lambda path: _number(path.parent))
  chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MOST_PICTURES)).astype(int))
  return _row(_figure(root, paths[i], f'step {_number(paths[i].parent):,}') for i in chosen)


def _evaluation(root: epath.Path, folder: epath.Path) -> str:
  """The reports of an evaluation, and samples of its last step."""
  read = (_json(path) for path in sorted(folder.glob('report_*.json'), key=_number))
  found = [report for report in read if report]
  body = _table([{'step': r.get('step'), **reports.scalars(r)} for r in found])
  for note in dict.fromkeys(note for report in found for note in reports.notes(report)):
    body += f'<p>{escape(note)}.</p>'
  if chosen := reports.best(found):
    body += f'<p>Best by {chosen[1]}: the checkpoint of step {chosen[0]:,}.</p>'
  grids = sorted(folder.glob('step_*/samples.png'), key=lambda path: _number(path.parent))
  return _section(
    f'Evaluation: {folder.name}/',
    body + _row(_figure(root, path, f'step {_number(path.parent):,}') for path in grids[-3:]),
  )


def _classifier(report: dict[str, Any]) -> str:
  """Its report: in all, and by level of noise."""
  levels = (
    {**level, 't': '{:.3g} to {:.3g}'.format(*level['t'])} for level in report.get('levels', [])
  )
  return _table([reports.scalars(report)]) + _table(list(levels))


def _drawn(root: epath.Path, folder: epath.Path) -> str:
  """What `--mode sample` left."""
  found = []
  for step in sorted(folder.glob('step_*'), key=_number):
    pictures = [step / name for name in ('samples.png', 'trajectory.gif')]
    found += [
      _figure(root, path, f'{step.name}, {path.name}') for path in pictures if path.exists()
    ]
  return _section(f'Samples: {folder.name}/', _row(found))


def _table(rows: Sequence[dict[str, Any]]) -> str:
  """Rows of values, a column for each name."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  if not names:
    return ''
  body = [
    ''.join(f'<td>{escape(_shown(row.get(name, "")))}</td>' for name in names) for row in rows
  ]
  head = ''.join(f'<th>{escape(name)}</th>' for name in names)
  lines = ''.join(f'<tr>{cells}</tr>' for cells in body)
  return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


def _shown(value: Any) -> str:
  if value is None:
    return ''
  return f'{value:.6g}' if isinstance(value, float) else str(value)


def _config(config: dict[str, Any]) -> str:
  fields = same_config.flatten(config)
  rows = ''.join(
    f'<tr><td>config.{escape(name)}</td><td>{escape(json.dumps(value))}</td></tr>'
    for name, value in fields
  )
  return f'<details><summary>all fields</summary><table>{rows}</table></details>' if rows else ''


def _curves(lines: Sequence[dict[str, float]]) -> str:
  """A curve for each scalar; training loss and that of held-out images share one."""
  hidden = ('step', 'steps_per_s')  # the latter says what images_per_s does
  names = list(dict.fromkeys(name for line in lines for name in line if name not in hidden))
  shared = [n for n in names if f'eval_{n}' in names]
  groups: list[tuple[str, ...]] = [(n, f'eval_{n}') for n in shared]
  groups += [(n,) for n in names if n not in shared and n.removeprefix('eval_') not in shared]
  return _row(_curve(lines, group) for group in groups)


def _curve(lines: Sequence[dict[str, float]], names: Sequence[str]) -> str:
  """An SVG of scalars over steps; what lies beyond the highest percent is cut off."""
  series = []
  for name in names:
    values = [(line['step'], line[name]) for line in lines if name in line]
    parts = np.array_split(np.array(values, float), min(len(values), POINTS))
    series.append(np.array([part.mean(0) for part in parts]))
  whole = np.concatenate(series)
  (x0, low), x1 = whole.min(0), whole[:, 0].max()
  high = max(np.quantile(whole[:, 1], 0.99), low + 1e-9 * max(1, abs(low)))
  drawn = []
  for points, color in zip(series, ('#1f77b4', '#d95f02'), strict=False):
    x = WIDTH * (points[:, 0] - x0) / max(x1 - x0, 1)
    y = HEIGHT - HEIGHT * (np.minimum(points[:, 1], high) - low) / (high - low)
    path = ' '.join(f'{a:.1f},{b:.1f}' for a, b in zip(x, y, strict=True))
    drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    drawn.append(f'<circle cx="{x[-1]:.1f}" cy="{y[-1]:.1f}" r="2.5" fill="{color}"/>')
  last = ', '.join(f'{n} {s[-1, 1]:.4g}' for n, s in zip(names, series, strict=True))
  caption = f'{last} at the end; {low:.4g} to {high:.4g}, steps {x0:,.0f} to {x1:,.0f}'
  return (
    f'<figure><svg width="{WIDTH}" height="{HEIGHT + 8}" viewBox="0 -4 {WIDTH} {HEIGHT + 8}">'
    f'{"".join(drawn)}</svg><figcaption>{escape(caption)}</figcaption></figure>'
  )
