"""How closely golden numbers are reproduced: `pytest tests -k golden --differences`."""

import os
from pathlib import Path
import re

GOLDEN = Path(__file__).parent / 'golden'

# By golden case and quantity: the largest absolute difference, and the largest relative one.
largest: dict[tuple[str, str], tuple[float, float]] = {}


def error(ours, theirs, *terms, quantity: str = '') -> float:
  """The largest error, relative to the largest entry of each example or of the terms of a
  difference. It is noted if the running test's first parameter is a golden case.
  """
  from benchmarks.golden import errors  # imports JAX, which conftest.py first sets flags for

  absolute, relative = errors(ours, theirs, *terms)
  case = re.search(r'\[(\w+)', os.environ['PYTEST_CURRENT_TEST'])[1]
  if (GOLDEN / f'{case}.npz').exists():
    worst = largest.get((case, quantity), (0.0, 0.0))
    largest[case, quantity] = max(worst[0], absolute.max()), max(worst[1], relative.max())
  return relative.max()


def table() -> list[str]:
  """The rows of a Markdown table."""
  rows = [
    '| golden case | quantity | largest absolute difference | relative |',
    '|---|---|---|---|',
  ]
  for (case, quantity), (absolute, relative) in sorted(largest.items()):
    rows.append(f'| {case} | {quantity} | {absolute:.1e} | {relative:.1e} |')
  return rows
