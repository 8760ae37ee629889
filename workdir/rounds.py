"""Long work in rounds, each a file: what is stopped and started again repeats at most one."""

from collections.abc import Callable
import time

from etils import epath
import numpy as np

from runtime import processes
from workdir import artifacts

Arrays = dict[str, np.ndarray]


def kept_or_made(
  path: epath.Path, name: str, n: int, make: Callable[[], Arrays], version: str = ''
) -> Arrays:
  """The arrays of a round: those of its file, if `name` has n rows there, else made and written.

  What a file of another `version` holds is made again.

  Returns:
    The arrays, and 'seconds', float [], that it took to make them.

  Raises:
    UserError: if the file is damaged.
  """
  if processes.from_first(path.exists()):
    kept = {'seconds': np.array(0.0), 'version': np.array('')} | artifacts.read_npz(path)
    if len(kept.get(name, ())) == n and str(kept['version']) == version:
      return kept
  began = time.monotonic()
  made = make()
  made['seconds'] = np.array(time.monotonic() - began)
  if version:
    made['version'] = np.array(version)
  artifacts.write_npz(path, **made)
  return made
