"""What made a result: the code, its libraries, the devices."""

import importlib.metadata
from pathlib import Path
import platform
import shlex
import subprocess
import sys

import jax

_LIBRARIES = ('jax', 'jaxlib', 'flax', 'numpy')


def here() -> dict[str, str | int]:
  """The commit of this code, versions of the libraries, and what it runs on."""
  return {
    'commit': _commit(),
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in _LIBRARIES},
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'processes': jax.process_count(),
  }


def command() -> str:
  """The command line that runs here; empty where it is not main.py, but Python of a user's own."""
  program, *arguments = sys.argv
  if Path(program).name != 'main.py':
    return ''
  return shlex.join(['python', 'main.py', *arguments])


def _commit() -> str:
  """As git describes it, '-dirty' where files differ from it; 'unknown' without git."""
  command = ['git', 'describe', '--always', '--dirty', '--abbrev=12']
  try:
    found = subprocess.run(
      command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
  except OSError:
    return 'unknown'
  return found.stdout.strip() or 'unknown'
