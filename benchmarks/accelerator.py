"""What to run first on a new GPU or TPU: is it right, is it fast, and where does it wait?

One table, a line for each measurement, printed as it is made; rows that have the same figures stand
under one head. docs/accelerators.md says what they mean and what to make of them.

  python -m benchmarks.accelerator [--quick] [--only ROW,ROW] [--minutes M] [--json PATH]

The rows that say most come first. What would begin after --minutes is left out, and named. An
error, such as a lack of memory, is a line of the table. The exit code is 1 if a number is wrong, or
could not be compared.
"""

import gc
from pathlib import Path
import shutil
import subprocess
import sys
import time
from typing import Any

import jax

from benchmarks import common, device_rows
from benchmarks.device_rows import Found, Row, WRONG
from benchmarks.forms import NotHere
from workdir.artifacts import json_text

MINUTES = 4.0
CELL = 8  # characters of a figure, at least


def driver() -> str:
  """Of NVIDIA's cards, as nvidia-smi names it; of others, what JAX's runtime says of itself."""
  if shutil.which('nvidia-smi'):
    command = [
      'nvidia-smi',
      '--query-gpu=name,driver_version,memory.total',
      '--format=csv,noheader',
    ]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode == 0:
      return '; '.join(asked.stdout.splitlines())
  return ' '.join(jax.devices()[0].client.platform_version.split())


def chosen(rows: list[Row], only: str) -> list[Row]:
  """Those whose name is, or begins with the words of, one of the names in `only`; all for ''.

  Raises:
    ValueError: for a name that none has.
  """
  wanted = [' '.join(name.split()) for name in only.split(',') if name.strip()]
  for name in wanted:
    if not any(_is(row, name) for row in rows):
      kinds = ', '.join(dict.fromkeys(row.name.split()[0] for row in rows))
      raise ValueError(f'no row is named {name!r}; rows begin with {kinds}')
  return [row for row in rows if not wanted or any(_is(row, name) for name in wanted)]


def _is(row: Row, name: str) -> bool:
  words = name.split()
  return row.name.replace(',', '').split()[: len(words)] == words


def run(row: Row, found: Found) -> dict[str, Any]:
  """The figures of a row, or {'error': what was raised}."""
  try:
    return row.measure(found)
  except NotHere as reason:
    return {'not here': str(reason)}
  except Exception as error:  # whatever it is, the other rows go on
    return {'error': f'{type(error).__name__}: {error}'}
  finally:
    gc.collect()  # what the row, or its traceback, held on the device


class Table:
  """Prints rows as they come, a head wherever they have other figures than those before."""

  def __init__(self, rows: list[Row]):
    self._width = max(len(row.name) for row in rows)
    self._head: list[str] = []

  def add(self, name: str, figures: dict[str, Any]) -> None:
    for problem in ('error', 'not here'):
      if problem in figures:
        text = ' '.join(figures[problem].split())
        print(f'{name:{self._width}}  {problem}: {text[:100]}', flush=True)
        return
    if not set(figures) <= set(self._head):
      self._head = list(figures)
      heads = (f'{what:>{CELL}}' for what in self._head)
      print(f'\n{"":{self._width}}  {"  ".join(heads)}')
    cells = []
    for what in self._head:
      value = figures.get(what, '-')
      cells.append(f'{common.three_figures(value):>{max(CELL, len(what))}}')
    print(f'{name:{self._width}}  {"  ".join(cells)}', flush=True)


def measure(
  rows: list[Row], minutes: float, here: dict[str, Any], path: str | None
) -> dict[str, dict[str, Any]]:
  """Runs the rows in order, and prints and writes each; those that would begin late are left out.

  Returns:
    The figures of each row that was run.
  """
  table, found, began = Table(rows), {}, time.monotonic()
  for i, row in enumerate(rows):
    if time.monotonic() - began >= 60 * minutes:
      break
    found[row.name] = run(row, found)
    table.add(row.name, found[row.name])
    left_out = [row.name for row in rows[i + 1 :]]
    if path:
      written = {'machine': here, 'results': found, 'left out': left_out}
      Path(path).write_text(json_text(written, indent=2) + '\n')
  names = [row.name for row in rows if row.name not in found]
  if names:
    print(f'\nleft out, as {minutes:g} minutes were over (--minutes): {"; ".join(names)}')
  return found


def wrong(found: Found) -> list[str]:
  """The rows whose numbers are not right, or could not be compared."""
  checked = ('golden', 'resume')
  return [
    name
    for name, figures in found.items()
    if figures.get('check') == WRONG or ('error' in figures and name.split()[0] in checked)
  ]


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument(
    '--quick', action='store_true', help='the same rows of tiny networks, for CPUs'
  )
  parser.add_argument('--only', default='', metavar='ROW,ROW', help='names of rows, or their first '
                      'words: --only golden,"step ncsnpp"')  # fmt: skip
  parser.add_argument('--minutes', type=float, default=MINUTES, help='after which no row begins '
                      f'({MINUTES:g})')  # fmt: skip
  args = parser.parse_args()
  sizes = device_rows.QUICK if args.quick else device_rows.FULL
  if args.quick and jax.default_backend() == 'cpu':
    jax.config.update('jax_disable_most_optimizations', True)  # there compiling takes longest
  try:
    rows = chosen(device_rows.rows(sizes), args.only)
  except ValueError as error:
    parser.error(str(error))
  here = common.machine() | {'driver': driver(), 'quick': args.quick}
  width = max(map(len, here))
  print('\n'.join(f'{name:{width}}  {value}' for name, value in here.items()), flush=True)
  found = measure(rows, args.minutes, here, args.json)
  names = wrong(found)
  if names:
    sys.exit(f'\nwrong, or not compared: {"; ".join(names)}')


if __name__ == '__main__':
  main()
