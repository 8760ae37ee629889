"""What TAB offers on the command line of main.py: flags, modes, configs, and fields of the config.

It is argcomplete's, which takes hold of `python main.py` once `activate-global-python-argcomplete`
has been run; see docs/training.md. The shell then runs main.py itself at each TAB, which says here
what may come next.
"""

import argparse
from collections.abc import Iterable, Mapping
import importlib
import inspect
import os
from pathlib import Path
import re
from typing import Any

from ml_collections import ConfigDict


def names(prefix: str = '', **given: object) -> list[str]:
  """Configs as --config takes them, from the root of the code; after a colon, their variants."""
  files = sorted(str(path) for path in Path('configs').glob('*/*.py'))
  del given
  path, colon, _ = prefix.partition(':')
  if not colon or path not in files:
    return files
  return [f'{path}:{variant}' for variant in getattr(_module(path), 'VARIANTS', ())]


def fields(line: str) -> list[str]:
  """The fields of the config that a command line names, config.data.dataset; none without one."""
  named = re.search(r'--config[ =](\S+)', line)
  path, _, variant = named[1].partition(':') if named else ('', '', '')
  if path not in names():
    return []
  make: Any = _module(path).get_config
  try:
    config = make(variant) if variant and inspect.signature(make).parameters else make()
  except Exception:  # a variant that is not, or not yet, one: TAB has nothing to say of that
    return []
  return [f'config.{name}' for name in _names_of(config)]


def _names_of(config: ConfigDict, before: str = '') -> Iterable[str]:
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _names_of(value, f'{before}{name}.')
    else:
      yield before + name


def _module(path: str) -> Any:
  """The module of a config file of this code."""
  return importlib.import_module('.'.join(Path(path).with_suffix('').parts))


def complete(flags: Mapping[str, Iterable[str] | None]) -> None:
  """Tells the shell what may come next on the line that it gives, and ends the process.

  Args:
    flags: the names of all flags, with the values of those that have but a few.
  """
  import argcomplete

  parser = argparse.ArgumentParser(add_help=False)
  for name, values in flags.items():
    flag: Any = parser.add_argument(f'--{name}', choices=values)
    if name == 'config':
      flag.completer = names
  for name in fields(os.environ.get('COMP_LINE', '')):
    parser.add_argument(f'--{name}')
  argcomplete.autocomplete(parser)
