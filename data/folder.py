"""A folder of the user's images: the files of each split, and their classes.

    cat/ dog/                             two classes; tests are on the training images
    train/cat train/dog test/cat ...      splits, whatever they are called, and classes
    images/cat images/dog                 a folder around all is looked through
    preview.png cat/ dog/                 a stray image is left out, where classes are wanted

What is left out is said.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
import dataclasses
import functools
import hashlib
from itertools import chain
import logging
import math
import os
from pathlib import Path
import re
import unicodedata

from PIL import Image

from runtime.errors import unknown, UserError

logger = logging.getLogger('score_sde')

TRAIN = ('train', 'training')  # names of folders, in any case
HELD_OUT = ('test', 'testing', 'valid', 'validation', 'val', 'dev', 'eval')
_MEASURED = 1000  # files, at most, whose sizes are part of a fingerprint
# Of formats that Pillow names but does not decode by itself, or that are no pictures.
_NO_PICTURES = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'WMF')
# Files that lie beside images, and are no loss.
_BESIDE = (
  '.txt', '.md', '.rst', '.json', '.jsonl', '.csv', '.tsv', '.xml', '.yaml', '.yml', '.toml',
  '.html', '.htm', '.pdf', '.py', '.ini', '.db', '.log', '.zip', '.tar', '.gz', '.tgz', '.sh',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Split:
  """The images of a split.

  Attributes:
    files: in the same order on every machine.
    labels: of each, 0 without classes.
  """

  files: list[Path]
  labels: list[int]


@dataclasses.dataclass(frozen=True)
class Folder:
  """What is in a folder of images.

  Attributes:
    train: the images to train on.
    test: those held out; None if there are none.
    class_names: the same for both splits; empty without classes.
    said: what a user should know of it, a line each.
  """

  train: Split
  test: Split | None
  class_names: tuple[str, ...]
  said: tuple[str, ...]

  def told(self, split: str, path: str) -> tuple[list[Path], list[int]]:
    """The files and labels of a split, train or test; what is to be known of it is logged."""
    if split == 'train':
      for line in self.said:
        logger.warning('%s: %s', shown(path), line)
      return self.train.files, self.train.labels
    if self.test is None:
      logger.warning(
        '%s has no train/ and test/ subfolders: testing on the training images.', shown(path)
      )
    chosen = self.test or self.train
    return chosen.files, chosen.labels


@dataclasses.dataclass(frozen=True)
class _Found:
  """All that lies below a folder, of files without what is hidden."""

  images: list[Path]
  others: list[Path]  # files that are no images
  broken: list[Path]  # links that lead nowhere
  folders: list[Path]


@dataclasses.dataclass(frozen=True)
class _Level:
  """Images below a folder, by its subfolders."""

  base: Path
  groups: dict[str, list[Path]]
  loose: list[Path]  # outside of the subfolders

  @classmethod
  def of(cls, base: Path, images: list[Path]) -> '_Level':
    depth, groups = len(base.parts), dict[str, list[Path]]()
    for file in images:
      groups.setdefault(file.parts[depth] if len(file.parts) > depth + 1 else '', []).append(file)
    loose = groups.pop('', [])
    return cls(base, groups, loose)

  @property
  def grouped(self) -> int:
    """How many images lie in subfolders."""
    return sum(map(len, self.groups.values()))

  @property
  def inside(self) -> '_Level | None':
    """That of the one subfolder with all images, or all but a few stray ones; None without."""
    if len(self.groups) != 1 or 2 * len(self.loose) > self.grouped:
      return None
    [(name, images)] = self.groups.items()
    return _Level.of(self.base / name, images)


def read_folder(path: str, held_out: str = '', labelled: bool = True) -> Folder:
  """What is in a folder of images.

  Args:
    path: of the folder.
    held_out: the subfolder with the images of the test split; empty for the one named so.
    labelled: classes are wanted: images outside of the folders of classes are left out. Else all
      images count, and there are no classes where some lie outside.

  Raises:
    UserError: if there is no such folder, or no image in it, or it can be read in two ways.
  """
  root = Path(path).expanduser()
  if not path or not os.path.isdir(root):
    raise UserError(f'--config.data.path={path!r} is not a folder; name the one with the images')
  found = _scan(root)
  said = _what_is_left_out(found, root)
  if not found.images:
    raise UserError('; '.join([f'no images in {shown(root)}', *said]))
  _check_named_splits(root, found.images)
  splits, outside = _splits(_Level.of(root, found.images), held_out)
  if outside:
    chosen = ' and '.join(f'{shown(split.base.name)}/' for split in splits)
    said.append(_stray(outside, root, chosen))
  levels = _classes(splits)
  loose = [file for level in levels for file in level.loose]
  if not levels or (loose and not labelled):
    whole = [_sorted([*split.loose, *chain(*split.groups.values())]) for split in splits]
    return _folder([Split(files, [0] * len(files)) for files in whole], (), said)
  for split, level in zip(splits, levels, strict=True):
    if level.base != split.base:
      said.append(f'the folders of classes are in {shown(level.base.relative_to(root))}/')
  if loose:
    said.append(_stray(loose, root, 'the folders of classes'))
  _check_classes(levels, found, said)
  names = _in_order({_class_name(folder) for level in levels for folder in level.groups})
  numbers = {name: i for i, name in enumerate(names)}
  parts = []
  for level in levels:
    label = {f: numbers[_class_name(name)] for name, files in level.groups.items() for f in files}
    files = _sorted(label)
    parts.append(Split(files, [label[file] for file in files]))
    if missing := sorted(set(range(len(names))) - set(label.values())):
      where = shown(level.base.relative_to(root)) if len(levels) > 1 else shown(root)
      said.append(f'{where}/ has no images of {", ".join(names[i] for i in missing)}')
  return _folder(parts, names, said)


def _check_named_splits(root: Path, images: Sequence[Path]) -> None:
  """Raises UserError if, of the folders of two splits, one has no images at all."""
  folders = [entry.name for entry in os.scandir(root) if entry.is_dir()]
  splits = [[f for f in folders if f.casefold() in names] for names in (TRAIN, HELD_OUT)]
  filled = {image.relative_to(root).parts[0] for image in images}
  if all(splits):
    for split in splits:
      if not filled & {*split}:
        raise UserError(f'no images in {shown(root / split[0])}; put some there, or remove it')


def _folder(parts: list[Split], names: Sequence[str], said: list[str]) -> Folder:
  return Folder(parts[0], parts[1] if len(parts) > 1 else None, tuple(names), tuple(said))


def _splits(level: _Level, held_out: str) -> tuple[list[_Level], list[Path]]:
  """The images to train on and, if there are any, those held out; and those outside of both."""
  training = [name for name in level.groups if name.casefold() in TRAIN]
  held = [name for name in level.groups if name.casefold() in HELD_OUT]
  if held_out and training:
    if held_out not in level.groups:
      raise unknown('config.data.held_out: folder', held_out, map(shown, level.groups))
    held = [held_out]
  if training and held:
    for names, what, way_out in (
      (training, 'training', 'rename one'),
      (held, 'testing', 'name one with --config.data.held_out; the other is then left out'),
    ):
      if len(names) > 1:
        folders = ' and '.join(f'{shown(name)}/' for name in sorted(names))
        raise UserError(f'{shown(level.base)} has {folders}, all for {what}; {way_out}')
    chosen = (training[0], held[0])
    outside = [f for name, files in level.groups.items() if name not in chosen for f in files]
    splits = [_Level.of(level.base / name, level.groups[name]) for name in chosen]
    return splits, _sorted([*level.loose, *outside])
  if inside := level.inside:
    splits, outside = _splits(inside, held_out)
    if len(splits) == 2:
      return splits, [*level.loose, *outside]
  elif held:
    raise UserError(
      f'{shown(level.base)} has {shown(held[0])}/, whose images seem to be held out, and no train/'
      '; put the images to train on in train/, or give the folder another name if it is a class'
    )
  return [level], []


def _classes(splits: list[_Level]) -> list[_Level]:
  """The levels of the splits at which the folders of classes are; none if there are no classes."""
  first = next((found for split in splits if (found := _level_of_classes(split, set()))), None)
  if first is None:
    return []
  levels = []
  for split in splits:
    names = {_class_name(folder) for folder in first.groups}
    found = _level_of_classes(split, names) or _level_of_classes(split, set())
    if found is None:
      return []
    levels.append(found)
  return levels


def _level_of_classes(level: _Level | None, names: set[str]) -> _Level | None:
  """The level with folders of these names or, if there are no names, with several folders."""
  loose: list[Path] = []
  while level is not None:
    folders = {_class_name(folder) for folder in level.groups}
    here = names & folders if names else len(folders) > 1
    loose = [*loose, *level.loose]
    if here and 2 * len(loose) <= level.grouped:
      return dataclasses.replace(level, loose=loose)
    level = level.inside
  return None


def _check_classes(levels: list[_Level], found: _Found, said: list[str]) -> None:
  """Says which folders beside those of classes are empty.

  Raises:
    UserError: if nothing of what is in one can be read, or splits lie within classes.
  """
  for level in levels:
    for folder in found.folders:
      if folder.parent == level.base and folder.name not in level.groups:
        lost = [f for f in found.others if folder in f.parents and not _lies_beside(f)]
        if lost:
          raise UserError(
            f'of class {shown(folder.name)} nothing can be read: {shown(folder)} has '
            f'{_kinds(lost)}, which Pillow does not open; convert them, or move the folder away'
          )
        said.append(f'{shown(folder.name)}/ has no images, and is no class')
    depth = len(level.base.parts) + 1
    below = {
      file.parts[depth].casefold()
      for files in level.groups.values()
      for file in files
      if len(file.parts) > depth + 1
    }
    if below & set(TRAIN) and below & set(HELD_OUT):
      raise UserError(
        f'the folders of classes in {shown(level.base)} have folders for training and testing; put '
        'these outside: train/CLASS and test/CLASS'
      )


def _class_name(folder: str) -> str:
  """Of a folder: text, and the same whichever system it comes from."""
  return unicodedata.normalize('NFC', shown(folder))


def _in_order(names: set[str]) -> list[str]:
  """Numbers by their value, others by their letters."""
  if all(re.fullmatch('[0-9]+', name) for name in names):
    return sorted(names, key=lambda name: (int(name), name))
  return sorted(names)


def _sorted(files: Iterable[Path]) -> list[Path]:
  return sorted(files, key=lambda file: file.as_posix())


def _stray(files: list[Path], root: Path, where: str) -> str:
  named = shown(files[0].relative_to(root))
  return f'left out: {_images(len(files))} outside of {where}, such as {named}'


def _what_is_left_out(found: _Found, root: Path) -> list[str]:
  said = []
  if lost := [file for file in found.others if not _lies_beside(file)]:
    named = shown(lost[0].relative_to(root))
    said.append(f'left out, as Pillow does not open them: {_kinds(lost)}, such as {named}')
  if found.broken:
    named = shown(found.broken[0].relative_to(root))
    said.append(f'left out: {len(found.broken)} links that lead nowhere, such as {named}')
  return said


def _kinds(files: list[Path]) -> str:
  """Files, counted by how their names end."""
  kinds = Counter(shown(file.suffix.lower()) or 'no ending' for file in files)
  return f'{len(files)} files ({", ".join(f"{kind} {n}" for kind, n in kinds.most_common(8))})'


def _images(n: int) -> str:
  return f'{n} images' if n != 1 else '1 image'


def _lies_beside(file: Path) -> bool:
  return file.suffix.lower() in _BESIDE


def shown(path: object) -> str:
  """A path, or a part of one, in one line of text, whatever bytes it is made of."""
  text = os.fsencode(str(path)).decode('utf-8', 'backslashreplace')
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


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
  return _scan(root).images


def _scan(root: Path) -> _Found:
  """All files in a folder and below it, through links; each list in the same order everywhere.

  Raises:
    UserError: if a folder cannot be listed.
  """
  found = _Found([], [], [], [])
  below: list[tuple[Path, frozenset[str]]] = [(root, frozenset())]
  while below:
    folder, around = below.pop()
    real = os.path.realpath(folder)
    if real in around:  # a link back to a folder above
      continue
    if folder != root:
      found.folders.append(folder)
    try:
      with os.scandir(folder) as entries:
        for entry in entries:
          if entry.name.startswith('.'):
            continue
          file = folder / entry.name
          if entry.is_dir():
            below.append((file, around | {real}))
          elif entry.is_symlink() and not os.path.exists(file):
            found.broken.append(file)
          elif _is_image(file):
            found.images.append(file)
          else:
            found.others.append(file)
    except OSError as error:
      where = shown(error.filename or folder)
      raise UserError(f'cannot list {where} ({error.strerror})') from error
  return _Found(*map(_sorted, (found.images, found.others, found.broken, found.folders)))


def _is_image(file: Path) -> bool:
  """By the ending of its name or, without any, by its first bytes."""
  ending = os.path.splitext(file.name)[1]
  if ending:
    return is_image_name(ending)
  try:
    with Image.open(file):
      return True
  except Exception:  # Pillow has a dozen
    return False


def is_image_name(ending: str) -> bool:
  """Whether the name of an image may end so, as in .jpg."""
  return ending.lower() in _endings()


@functools.cache
def _endings() -> frozenset[str]:
  """How the names of files end that Pillow, with its plugins, decodes."""
  Image.init()
  formats = Image.registered_extensions().items()
  return frozenset(e for e, kind in formats if kind in Image.OPEN and kind not in _NO_PICTURES)
