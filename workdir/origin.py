"""Of which checkpoint results are: its checksum stands beside them, those of another are set aside.

A step alone does not tell: a run can be begun anew in its workdir. So every folder of results has
a `checkpoint.json`, and every report a field `checkpoint`. What is of another checkpoint moves to
`former/`, beside it, and is made anew.
"""

from collections.abc import Iterable
import dataclasses
import itertools
import logging

from etils import epath
import jax

from runtime import processes
from runtime.errors import cannot_write
from workdir import artifacts, reports
from workdir.reports import Report

logger = logging.getLogger('score_sde')

_MARK = 'checkpoint.json'
_FORMER = 'former'


@dataclasses.dataclass(frozen=True)
class Origin:
  """A checkpoint that results are made of.

  Attributes:
    step: of training.
    identity: the checksum of the parameters that are used, in hexadecimal.
    since: when it was written, in seconds since 1970: what is older, and does not say of which
      checkpoint it is, as earlier results do not, is of another.
  """

  step: int
  identity: str
  since: float

  def claim(self, folder: epath.Path) -> None:
    """Makes a folder the place of results of this checkpoint; moves away those of another.

    Raises:
      UserError: if it may not be written.
      Failure: if there is no room.
    """
    try:
      self._claim(folder)
    except OSError as error:
      raise cannot_write(folder, error, 'choose another') from error

  def _claim(self, folder: epath.Path) -> None:
    if processes.from_first(_any_file(folder) and not self._is_of(folder)):
      _set_aside(folder.parent, [folder], self._name_of_other(folder))
    mark = folder / _MARK
    if not processes.from_first(mark.exists()):
      artifacts.write_json(mark, {'step': self.step, 'checkpoint': self.identity})

  def claim_report(self, out: epath.Path) -> Report:
    """The report of this checkpoint in the folder of an evaluation, as far as it has come.

    A report of another checkpoint moves away, with the samples and rounds of it.
    """
    path = reports.path_of(out, self.step)
    report = reports.read(out, self.step)
    there = report.get('checkpoint')
    if processes.from_first(path.exists()):
      ours = there == self.identity if there else _changed(path) >= self.since
      if processes.from_first(not ours):
        _set_aside(out, [path], there or 'earlier')
        report = {'step': self.step}
      elif not there:  # of an earlier version; from here on it says so
        artifacts.write_json(path, report | {'checkpoint': self.identity})
    return report | {'checkpoint': self.identity}

  def _is_of(self, folder: epath.Path) -> bool:
    mark = folder / _MARK
    if mark.exists():
      return artifacts.read_json(mark).get('checkpoint') == self.identity
    return min(map(_changed, folder.iterdir())) >= self.since

  def _name_of_other(self, folder: epath.Path) -> str:
    mark = folder / _MARK
    return artifacts.read_json(mark).get('checkpoint', 'earlier') if mark.exists() else 'earlier'


def has_results(out: epath.Path) -> bool:
  """Whether a folder holds reports, or samples or rounds of checkpoints."""
  if not out.exists():
    return False
  rounds = (path for path in out.glob('step_*/*') if path.name != _MARK)
  return any(out.glob('report_*.json')) or any(rounds)


def set_aside_former(root: epath.Path) -> None:
  """Moves away what an earlier run left in a workdir in which there are no checkpoints any more.

  A run that broke off before its first checkpoint has left nothing that would not come again.
  """
  folders = [path for path in root.iterdir() if path.is_dir() and path.name != _FORMER]
  results = [f for f in folders if any(_results(f))]
  if not processes.from_first(bool(results)):
    return
  names = (
    'config.json', 'configs', 'machine.json', 'metrics.jsonl', 'tensorboard', 'index.html',
    'best.json',
  )  # fmt: skip
  others = [root / name for name in names if (root / name).exists()]
  _set_aside(root, [*others, *results], 'run')


def _results(folder: epath.Path) -> Iterable[epath.Path]:
  """What in a folder was made of checkpoints: reports, samples, pictures."""
  patterns = ('report_*.json', 'step_*', 'iter_*', '*/sweep.json')
  return itertools.chain.from_iterable(folder.glob(pattern) for pattern in patterns)


def _set_aside(beside: epath.Path, paths: list[epath.Path], name: str) -> None:
  """Moves files and folders to `former/<name>/`, beside them; says so."""
  names = (f'{name}{f"-{i}" if i > 1 else ""}' for i in itertools.count(1))
  places = (beside / _FORMER / name for name in names)
  to = next(place for place in places if not any((place / p.name).exists() for p in paths))
  processes.wait_for_all('results of another checkpoint found')
  if jax.process_index() == 0:
    to.mkdir(parents=True, exist_ok=True)
    for path in paths:
      path.rename(to / path.name)
    what = ', '.join(str(path.relative_to(beside)) for path in paths)
    logger.info('of another checkpoint, now in %s: %s', to, what)
  processes.wait_for_all('results of another checkpoint set aside')


def _any_file(folder: epath.Path) -> bool:
  return folder.exists() and any(folder.iterdir())


def _changed(path: epath.Path) -> float:
  """When a file, or what a folder holds, was changed last, in seconds since 1970."""
  return path.stat().mtime
