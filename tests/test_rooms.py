"""The house: what stands at the root, and that imports run one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The rooms and the files at the root, from the ground up: each imports from its own floor and from
# those below.
FLOORS = (
  {'runtime', 'sde_lib'},
  {'models', 'samplers', 'workdir', 'configs'},
  {'losses', 'sampling', 'likelihood', 'controllable_generation', 'data'},
  {'training', 'evaluation'},
  {'builders'},
  {'run_lib'},
  {'main'},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in sorted(names)}
# They show and measure the house, and may see all of it.
BESIDE = {'benchmarks', 'docs', 'tutorial', 'tests'}
# Rooms that take typed values, no config; `configs` makes them.
WITHOUT_CONFIG = set.union(*FLOORS[:4]) - {'configs'}


def imported(code: str) -> set[str]:
  """The first names of the modules that code imports, wherever it does."""
  found = set()
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.Import):
      found |= {alias.name.partition('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found.add(node.module.partition('.')[0])
  return found


def upward(place: str, code: str) -> set[str]:
  """What the code of a room, or of a file at the root, imports from floors above its own."""
  return {name for name in imported(code) if FLOOR.get(name, -1) > FLOOR[place]}


def files(place: str) -> list[Path]:
  """Of a room, without its commands, which stand beside the house; or the file at the root."""
  found = [*ROOT.glob(f'{place}.py'), *(ROOT / place).glob('**/*.py')]
  return [path for path in found if path.name != '__main__.py']


@pytest.mark.parametrize('place', FLOOR)
def test_imports_run_one_way(place):
  assert files(place)
  for path in files(place):
    code = path.read_text()
    assert not upward(place, code), path
    assert not imported(code) & BESIDE, path


@pytest.mark.parametrize('place', FLOOR)
def test_rooms_below_builders_take_typed_values(place):
  for path in files(place) if place in WITHOUT_CONFIG else ():
    assert 'ml_collections' not in imported(path.read_text()), path


@pytest.mark.parametrize(
  ('place', 'code'),
  [
    ('models', 'from losses import Objective'),
    ('training', 'def late():\n  import builders.setup'),
    ('sde_lib', 'import numpy, samplers.base as base'),
  ],
)
def test_an_upward_import_is_found(place, code):
  assert upward(place, code) and not upward('main', code)


def test_what_stands_at_the_root_is_on_the_list():
  """A new module has a room; a folder of code is a room with a floor, or beside the house."""
  assert {path.stem for path in ROOT.glob('*.py')} <= set(FLOOR)
  folders = {path.parent.name for path in ROOT.glob('[a-z]*/*.py')} - {'build', 'dist'}
  assert folders <= set(FLOOR) | BESIDE
