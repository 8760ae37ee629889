"""What evaluations leave: a report for each checkpoint, a table of them, TensorBoard scalars."""

import math
from typing import Any

from etils import epath
import jax

from workdir import artifacts, versions

Report = dict[str, Any]

FEW = 10_000  # samples, below which a distance is not one to publish
KEYS = ('step', 'sigma_rel')  # what a report is of, which is no measure
_FLOOR = '_floor'  # what the floor of a distance is called, after its name
# What checkpoints are compared by, the first that they all have: less is better.
RANKING = (
  'fid', 'frechet_pixels', 'bpd_test', 'bpd_train', 'bound_test', 'bound_train', 'score_error',
  'loss',
)  # fmt: skip


def path_of(out: epath.Path, step: int) -> epath.Path:
  return out / f'report_{step}.json'


def read(out: epath.Path, step: int) -> Report:
  """The report of a step as far as it has come, in the folder of an evaluation."""
  path = path_of(out, step)
  return artifacts.read_json(path) if path.exists() else {'step': step}


def write(out: epath.Path, report: Report) -> None:
  """Writes a report to which something was added, with what that was computed by."""
  report['versions'] = versions.here()
  artifacts.write_json(path_of(out, report['step']), report)


def scalars(report: Report) -> dict[str, float]:
  """The numbers of a report that are known, without those that say what it is of."""
  numbers = {
    name: value
    for name, value in report.items()
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
  }
  return {name: value for name, value in numbers.items() if name not in KEYS}


def summary(report: Report) -> str:
  """The measures of a report in a line, without what they cost and how many images they are of."""
  details = (
    '_seconds', '_images', '_repeats', '_std', '_std_error', '_dequantization', '_probes', '_draws',
    '_times', '_eps', '_rtol', '_atol', _FLOOR,
  )  # fmt: skip
  numbers, told = scalars(report), []
  for name, value in numbers.items():
    if not name.endswith(details):
      floor = numbers.get(name + _FLOOR)
      told.append(f'{name} {value:.6g}' + ('' if floor is None else f' (floor {floor:.6g})'))
  return '. '.join([', '.join(told), *notes(report)])


def notes(report: Report) -> list[str]:
  """What the distances of a report are worth: sentences, without their full stops."""
  numbers = scalars(report)
  floors = [name for name in numbers if name.endswith(_FLOOR)]
  samples, told = int(numbers.get('samples', 0)), []
  if not any(name in numbers for name in ('fid', 'frechet_pixels')):
    return []
  if samples < FEW:
    told.append(
      f'{samples:,} samples are fewer than {FEW:,}: the fewer, the larger is the distance, so that '
      'it can be compared with that of as many only'
    )
  if floors:
    there = next(int(v) for name, v in numbers.items() if name.endswith(f'{_FLOOR}_images'))
    too_few = f', as there are too few for {samples:,}' if there < samples else ''
    told.append(
      f'The floor is the distance between two halves of the data, of {there:,} images each{too_few}'
    )
  return told


def best(reports: list[Report], key: str = 'step') -> tuple[Any, str] | None:
  """The step, or another key, of the best, and what it is best in, if all have a measure of it."""
  for name in RANKING:
    if reports and all(name in scalars(report) for report in reports):
      return min(reports, key=lambda report: report[name])[key], name
  return None


def what_is_best(reports: list[Report], key: str = 'step') -> str:
  """A sentence, without its full stop; empty if they have no measure in common."""
  if not (chosen := best(reports, key)):
    return ''
  what = 'the checkpoint of step {:,}' if key == 'step' else 'the average of sigma_rel = {}'
  return f'Best by {chosen[1]}: {what.format(chosen[0])}'


def table(reports: list[Report], key: str = 'step') -> str:
  """Markdown: a row for each checkpoint, or for each of another key; numbers; which is the best."""
  names = list(dict.fromkeys(name for report in reports for name in scalars(report)))
  rows = [[key, *names], ['---'] * (1 + len(names))]
  for report in reports:
    numbers = scalars(report)
    values = (f'{numbers[name]:.6g}' if name in numbers else '' for name in names)
    rows.append([str(report[key]), *values])
  lines = [f'| {" | ".join(row)} |' for row in rows]
  for note in dict.fromkeys(note for report in reports for note in notes(report)):
    lines += ['', f'{note}.']
  if told := what_is_best(reports, key):
    lines += ['', f'{told}.']
  return '\n'.join(lines) + '\n'


def publish(out: epath.Path, reports: list[Report]) -> None:
  """Writes `table.md` and, in `tensorboard/`, scalars that replace those of an earlier run."""
  artifacts.write(out / 'table.md', table(reports).encode())
  if jax.process_index() > 0:
    return
  with artifacts.events_writer(out / 'tensorboard', purge_step=0) as events:
    for report in reports:
      for name, value in scalars(report).items():
        events.add_scalar(f'eval/{name}', value, report['step'])


def publish_sweep(out: epath.Path, reports: list[Report]) -> None:
  """Writes `sweep.json` and `table.md`, of averages of several widths."""
  chosen = best(reports, 'sigma_rel')
  named = {'best': chosen[0], 'by': chosen[1]} if chosen else {}
  artifacts.write_json(out / 'sweep.json', {**named, 'reports': reports})
  artifacts.write(out / 'table.md', table(reports, 'sigma_rel').encode())
