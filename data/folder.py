"""A folder of the user's images: the files of each split, and their classes."""

from collections.abc import Sequence
import hashlib
import logging
import math
import os
from pathlib import Path

from runtime.errors import UserError

logger = logging.getLogger('score_sde')

_MEASURED = 1000  # files, at most, whose sizes are part of a fingerprint
_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm')


def find(path: str, split: str) -> tuple[list[Path], list[int], Sequence[str]]:
  """Images below `path`; where it has train/ and test/ (or validation/, val/), of the split.

  If all images of both splits lie in subfolders of these, the subfolders are the classes, by name.

  Returns:
    The files, in the same order on every machine; their labels, 0 without classes; the names of
    the classes, the same for both splits.

  Raises:
    UserError: if there is no such folder, or no image in it.
  """
  root = Path(path).expanduser()
  if not path or not os.path.isdir(root):
    raise UserError(f'--config.data.path={path!r} is not a folder; name the one with the images')
  held_out = [root / n for n in ('test', 'validation', 'val') if os.path.isdir(root / n)]
  splits = {'train': root, 'test': root}
  if os.path.isdir(root / 'train') and held_out:
    splits = {'train': root / 'train', 'test': held_out[0]}
  elif split == 'test':
    logger.warning('%s has no train/ and test/ subfolders: testing on the training images.', path)
  files = {root: image_files(root) for root in splits.values()}
  folders = {root: [_subfolder(file, root) for file in files[root]] for root in files}
  own = splits[split]
  if not files[own]:
    raise UserError(f'no images in {own}; files that end in {" ".join(_SUFFIXES)} are looked for')
  names = sorted(set().union(*folders.values()))
  if '' in names or len(names) < 2:
    return files[own], [0] * len(files[own]), ()
  number = {name: i for i, name in enumerate(names)}
  return files[own], [number[name] for name in folders[own]], names


def shown(path: object) -> str:
  """A path, or a part of one, in one line of text, whatever bytes it is made of."""
  text = os.fsencode(str(path)).decode('utf-8', 'backslashreplace')
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def _subfolder(file: Path, root: Path) -> str:
  """The folder in `root` that a file lies in or below; empty for `root` itself."""
  first, *below = file.relative_to(root).parts
  return first if below else ''


def fingerprint(path: str, files: Sequence[Path]) -> str:
  """What tells files below `path` from others: their names there, and the sizes of some.

  It is the same wherever the folder lies; empty without files.
  """
  if not files:
    return ''
  root, sha = Path(path).expanduser(), hashlib.sha256()
  inside = os.path.join(root if os.path.isdir(root) else root.parent, '')
  for file in files:
    sha.update(os.fsencode(str(file).removeprefix(inside)) + b'\0')
  for i in range(0, len(files), math.ceil(len(files) / _MEASURED)):
    sha.update(f'{os.stat(files[i]).st_size} '.encode())
  return sha.hexdigest()[:16]


def image_files(root: Path) -> list[Path]:
  """All images in a folder and below it, in the same order on every machine."""

  def fail(error: OSError) -> None:
    raise UserError(f'cannot list {error.filename} ({error.strerror})') from error

  files, visited = [], set()
  for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
    if (real := os.path.realpath(folder)) in visited:  # a link back to a folder above
      folders.clear()
    else:
      visited.add(real)
      folders[:] = [name for name in folders if not name.startswith('.')]
      shown = (n for n in names if n.lower().endswith(_SUFFIXES) and not n.startswith('.'))
      files += [Path(folder, name) for name in shown]
  return sorted(files, key=lambda file: file.as_posix())
