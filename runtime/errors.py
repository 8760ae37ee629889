"""Errors told in one line: what came, what is allowed, what to do."""

from collections.abc import Iterable
import difflib
import errno

# Of a path that is not, or may not be, one to write to: another would do.
_OF_THE_PATH = (
  errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
  errno.ENOENT, errno.ENAMETOOLONG,
)  # fmt: skip


class UserError(Exception):
  """A mistake in a config, a flag, a file or an image. `main.py` prints it without a traceback."""


class Failure(Exception):
  """What stops a run that was right: a full disk, a lost process. `main.py` prints it likewise."""


def cannot_write(path: object, error: OSError, do: str) -> UserError | Failure:
  """The error for a path that cannot be written: the user's, told what to do, or the machine's."""
  reason = f'cannot write to {path} ({error.strerror or error})'
  if error.errno in _OF_THE_PATH:
    return UserError(f'{reason}; {do}')
  return Failure(f'{reason}; see to that, for example make room, and repeat the command')


def unknown(what: str, name: str, allowed: Iterable[str]) -> UserError:
  """The error for a `name` that is not among those `allowed`, with the nearest one suggested."""
  allowed = sorted(allowed)
  near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
  hint = f'; did you mean {near[0]!r}?' if near else ''
  return UserError(f'{what} {name!r} does not exist; allowed: {", ".join(allowed)}{hint}')
