"""Draws the figures of docs/tutorial.md, and puts the numbers that it prints there.

  python -m tutorial [CHAPTER ...]

A chapter is a module here with a function `draw() -> (figure, lines)`. What it trains stays under
runs/, so that a second time is quick.
"""

import argparse
import importlib
import logging
from pathlib import Path
import re
import time

import matplotlib

matplotlib.use('agg')

CHAPTERS = (
  'score_matching', 'denoising', 'langevin_dynamics', 'energies', 'noise_levels', 'sdes',
  'likelihoods', 'after_2021', 'consistency',
)  # fmt: skip
DOCS = Path(__file__).parent.parent / 'docs'


def put(page: str, chapter: str, lines: list[str]) -> str:
  """The page with `lines` between the marks of a chapter.

  Raises:
    ValueError: if the page has no such marks.
  """
  begin, end = f'<!-- printed by {chapter} -->', '<!-- end -->'
  block = '\n'.join([begin, '```text', *lines, '```', end])
  page, n = re.subn(f'{begin}.*?{end}', lambda _: block, page, flags=re.DOTALL)
  if n != 1:
    raise ValueError(f'the tutorial has {n} places for the chapter {chapter}')
  return page


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('chapters', nargs='*', metavar='CHAPTER', help=', '.join(CHAPTERS))
  chapters = parser.parse_args().chapters or CHAPTERS
  if unknown := set(chapters) - set(CHAPTERS):
    parser.error(f'no chapter {", ".join(unknown)}; there are {", ".join(CHAPTERS)}')
  logging.basicConfig(format='%(message)s', level=logging.WARNING)
  path = DOCS / 'tutorial.md'
  for chapter in chapters:
    began = time.monotonic()
    figure, lines = importlib.import_module(f'tutorial.{chapter}').draw()
    picture = DOCS / 'tutorial' / f'{chapter}.png'
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=100, metadata={'Software': None})  # which would change with it
    path.write_text(put(path.read_text(), chapter, lines))
    print('\n'.join([f'{chapter} ({time.monotonic() - began:.0f} s)', *lines, '']), flush=True)


if __name__ == '__main__':
  main()
