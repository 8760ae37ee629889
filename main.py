# PYTHON_ARGCOMPLETE_OK: completed by the shell, see configs/completion.py
"""Score-based generative modelling through SDEs: what --mode says, of a config, in a workdir.

  train             train, or go on with, a score model
  distill           a score model becomes one that samples in a few steps
  eval              loss, bits/dim, samples and their FID, of checkpoints
  sample            draw samples: of a class, or of what an image leaves open
  likelihood        bits/dim of your own images, --images FOLDER, and the least likely of them
  check_data        what is in a folder of images, and which of them cannot be read
  pack              a dataset, decoded once, in shards for training, --packed FOLDER
  stats             what samples are compared with, and the noise levels that the data ask for
  train_classifier  a classifier of noisy images, for sampling by class
  import            a checkpoint of the released code, or exported weights, become a workdir
  ema               moving averages of widths that were not kept, of a run's snapshots
  export            the weights of a workdir as safetensors, with a card that says what they are

  python main.py --config configs/vp/digits.py --mode train --config.training.n_iters=4000
  python main.py --config configs/vp/digits.py --mode sample --config.sampling.num_samples=64
  python main.py --config configs/vp/digits.py --mode train_classifier
  python main.py --config configs/toy/two_moons.py:cd --mode train
  python main.py --config configs/ve/cifar10.py:ncsnpp_deep_continuous --mode train
  python main.py --config configs/ve/cifar10.py --mode stats
  python main.py --config configs/ve/cifar10.py --mode eval --config.eval.enable_sampling
  python main.py --config configs/ve/cifar10.py --mode import --checkpoint checkpoint_8
  python main.py --config configs/vp/photos.py --mode train --init_from runs/a --workdir runs/b
  python main.py --config configs/distill/digits.py:progressive --mode distill --teacher runs/a

Any field of a config can be set as --config.section.field=value. The index.html of a workdir shows
what is in it. Ends with 0 when done, 1 if the machine failed (a full disk, a lost process), 2 for
wrong input, 128 + n after signal n; repeated, a command goes on.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
import contextlib
from functools import reduce
import inspect
import logging
import math
import operator
import os
from pathlib import Path
import re
import runpy
import sys
import threading
from typing import Any
import zlib

from absl import flags
from ml_collections import config_flags, ConfigDict
from tqdm.contrib.logging import logging_redirect_tqdm

from runtime import start
from runtime.errors import Failure, unknown, UserError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, [:variant] of it.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder; by default runs/<config>[-<variant>][-<field>=<value>].'
)
_EVAL_FOLDER = flags.DEFINE_string('eval_folder', 'eval', 'Folder of an evaluation in workdir.')
_SAMPLE_FOLDER = flags.DEFINE_string('sample_folder', 'sample', 'Folder of samples in workdir.')
_EXPORT_FOLDER = flags.DEFINE_string('export_folder', 'export', 'Folder of weights in workdir.')
_LICENCE = flags.DEFINE_string('licence', '', 'Under which others may use exported weights.')
_IMAGES = flags.DEFINE_string('images', None, 'Image, or folder of them, for --mode likelihood.')
_PACKED = flags.DEFINE_string('packed', None, 'Folder that --mode pack writes shards of images to.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'One of the processes of a pod or job.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0; pods know it.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many there are; likewise.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this one, from 0; likewise.')
_START_TIMEOUT = flags.DEFINE_integer(
  'start_timeout', 300, 'Seconds that the other processes have to start.', lower_bound=1
)
_DETERMINISTIC = flags.DEFINE_bool('deterministic', False, 'GPUs compute the same bits each time.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Released checkpoint, or exported folder.')
_INIT_FROM = flags.DEFINE_string('init_from', None, 'Workdir whose parameters a new run takes.')
_TEACHER = flags.DEFINE_string('teacher', None, 'Workdir of the model that a student learns from.')
# By name: what a mode does, given run_lib, which is imported late.
_MODES: dict[str, Callable[[Any, ConfigDict, str], object]] = {
  'train': lambda lib, config, root: lib.train(config, root, _INIT_FROM.value or ''),
  'distill': lambda lib, config, root: lib.distill(config, root, _TEACHER.value or ''),
  'train_classifier': lambda lib, config, root: lib.train_classifier(config, root),
  'eval': lambda lib, config, root: lib.evaluate(config, root, _EVAL_FOLDER.value),
  'sample': lambda lib, config, root: lib.sample(config, root, _SAMPLE_FOLDER.value),
  'likelihood': lambda lib, config, root: lib.likelihood(config, root, _IMAGES.value or ''),
  'check_data': lambda lib, config, root: lib.check_data(config),
  'pack': lambda lib, config, root: lib.pack(config, _PACKED.value),
  'stats': lambda lib, config, root: lib.stats(config),
  'import': lambda lib, config, root: lib.import_released(config, root, _CHECKPOINT.value),
  'export': lambda lib, config, root: lib.export(
    config, root, _EXPORT_FOLDER.value, _LICENCE.value
  ),
  'ema': lambda lib, config, root: (
    lib.sweep_averages(config, root, _EVAL_FOLDER.value)
    if config.ema.sweep
    else lib.post_hoc_average(config, root)
  ),
}
_MODE = flags.DEFINE_enum('mode', None, list(_MODES), 'What to do.')
_FLAGS = (
  _CONFIG, _MODE, _WORKDIR, _EVAL_FOLDER, _SAMPLE_FOLDER, _IMAGES, _EXPORT_FOLDER, _LICENCE,
  _CHECKPOINT, _INIT_FROM, _TEACHER, _PACKED, _DETERMINISTIC, _DISTRIBUTED, _COORDINATOR,
  _NUM_PROCESSES, _PROCESS_ID, _START_TIMEOUT,
)  # fmt: skip


def default_workdir(path: str, variant: str) -> str:
  """runs/ve/cifar10-variant for configs/ve/cifar10.py:variant."""
  parts = Path(path).with_suffix('').parts
  inside = parts[parts.index('configs') + 1 :] if 'configs' in parts else parts[-1:]
  return str(Path('runs', *inside)) + (f'-{variant}' if variant else '')


def workdir_of(usual: str, as_in_file: ConfigDict, config: ConfigDict, begins: bool) -> str:
  """The workdir of a config that is `usual` but for fields that the command line sets.

  Where these change what is learned, it is another: runs/ve/cifar10-seed=1. If they only concern
  how a run is used, or the usual one was made with the same values, it is the usual one.

  Args:
    usual: the workdir of the config as it stands in its file.
    as_in_file: that config.
    config: the config with all that was set.
    begins: whether a new run may begin there; otherwise the usual one is used as it is, if there
      is no other.
  """
  from etils import epath

  from workdir import same_config

  learned, there = {*same_config.LEARNED}, epath.Path(usual) / 'config.json'
  different = same_config.differences(as_in_file.to_dict(), config.to_dict())
  set_here = {k: now for k, (_, now) in different.items() if k in learned}
  if 'data.condition' in set_here:  # a folder that may move
    set_here['data.condition'] = same_config.condition_kind(set_here['data.condition'])
  if not set_here:
    return usual
  if there.exists() and not learned & same_config.changes(there, config.to_dict()).keys():
    return usual  # of a run that began when there was no other name for it
  name = ''.join(f'-{k.rpartition(".")[2]}={_in_a_name(v)}' for k, v in set_here.items())
  if len(name) > 100:
    name = f'{name[:90]}-{zlib.crc32(name.encode()):08x}'
  other = usual + name
  return other if begins or Path(other).is_dir() else usual


def _in_a_name(value: object) -> str:
  """A value as part of the name of a folder."""
  text = ','.join(map(str, value)) if isinstance(value, tuple | list) else str(value)
  return re.sub(r'[^\w.,+-]', '-', text)


def parse(argv: Sequence[str]) -> tuple[str, str, ConfigDict]:
  """Parses the flags; returns the path of the config file, the variant, and the config as it is.

  Raises:
    UserError: if a flag, a field of the config or a value of either is wrong.
  """
  given = {}
  for argument, following in zip(argv, [*argv[1:], ''], strict=True):
    name, equals, value = argument.partition('=')
    if name.startswith('-'):
      given[name.lstrip('-')] = value if equals else following
  path, _, variant = given.get('config', '').partition(':')
  if not path:
    raise UserError(
      '--config is missing, for example --config configs/vp/digits.py; without any flag, main.py '
      'says how to begin'
    )
  if not Path(path).is_file():
    here = sorted(str(p) for p in Path('configs').glob('*/*.py'))
    raise UserError(f'--config {path!r} is not a file; configs here: {", ".join(here) or "none"}')
  try:
    get_config = runpy.run_path(path).get('get_config')
  except Exception as error:  # whatever Python says of it
    raise UserError(f'{path} is not a config file: {type(error).__name__}: {error}') from error
  if get_config is None:
    raise UserError(f'{path} is not a config file: it has no function get_config')
  if variant and not inspect.signature(get_config).parameters:
    raise UserError(f'{path} has no variants; got {variant!r}')
  config = get_config(*([variant] if variant else []))
  for name in given:
    if name.startswith(('config.', 'noconfig.')):  # --noconfig.x.y is --config.x.y=False
      _check_field(config, name.removeprefix('no'))
  try:
    rest = flags.FLAGS(_as_flags(argv, config))
  except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
    raise UserError(' '.join(str(error).split())) from None
  if rest[1:]:
    raise UserError(f'{rest[1]!r} is not a flag; fields are set as --config.section.field=value')
  if _MODE.value is None:
    raise UserError(f'--mode is missing; allowed: {", ".join(_MODES)}')
  if (_MODE.value == 'import') != bool(_CHECKPOINT.value):
    raise UserError('--mode import and --checkpoint PATH go together')
  if (_MODE.value == 'likelihood') != bool(_IMAGES.value):
    raise UserError('--mode likelihood and --images FOLDER go together')
  if (_MODE.value == 'pack') != bool(_PACKED.value):
    raise UserError('--mode pack and --packed FOLDER, which it writes, go together')
  if _MODE.value == 'pack' and _DISTRIBUTED.value:
    raise UserError('--mode pack is for one process; leave out --distributed')
  if _INIT_FROM.value is not None and (_MODE.value != 'train' or not _INIT_FROM.value):
    raise UserError('--init_from WORKDIR goes with --mode train, for a new run')
  if _TEACHER.value is not None and (_MODE.value != 'distill' or not _TEACHER.value):
    raise UserError('--teacher WORKDIR goes with --mode distill')
  return path, variant, config


def _check_field(config: ConfigDict, name: str) -> None:
  """Raises UserError unless `name`, config.a.b, is a field of the config."""
  where = config
  for part in name.split('.')[1:]:
    if not isinstance(where, ConfigDict) or part not in where:
      raise unknown(f'{name}: field', part, where if isinstance(where, ConfigDict) else [])
    where = where[part]


def _as_flags(argv: Sequence[str], config: ConfigDict) -> list[str]:
  """The arguments, with values of fields as the library of flags reads them."""
  plain = list(argv)
  for i, argument in enumerate(argv):
    name, equals, value = argument.partition('=')
    path = name.lstrip('-')
    if not path.startswith('config.'):
      continue
    default = reduce(operator.getitem, path.split('.')[1:], config)
    if equals:
      plain[i] = f'{name}={_literal(path, value, default)}'
    elif i + 1 < len(argv):
      plain[i + 1] = _literal(path, argv[i + 1], default)
  return plain


def _literal(name: str, value: str, default: object) -> str:
  """1e5 as a whole number, where one is wanted; nothing, and None, as a field of no values."""
  if isinstance(default, tuple) and value in ('', 'None'):
    return '()'
  if name == 'config.sampling.labels':
    return _labels(value)
  if not isinstance(default, int) or isinstance(default, bool):
    return value
  try:
    number = float(value)
  except ValueError:
    number = math.nan
  if not number.is_integer():
    raise UserError(f'{name} must be a whole number; got {value!r}')
  return value if value.lstrip('+-').isdecimal() else str(int(number))


def _labels(value: str) -> str:
  """Classes, numbers or names with or without quotation marks, as Python writes them: cat,3."""
  try:
    parsed = ast.literal_eval(value)
  except (SyntaxError, ValueError):
    words = (word.strip() for word in value.split(','))
    parsed = tuple(int(word) if word.isdecimal() else word for word in words if word)
  return repr(tuple(parsed) if isinstance(parsed, tuple | list) else (parsed,))


def main(argv: Sequence[str]) -> None:
  path, variant, as_in_file = parse(argv)
  start.use_large_pages()
  start.prepare(_DETERMINISTIC.value)
  # Now, not above: the libraries take seconds, which --help and a wrong flag should not cost.
  import jax

  if _DISTRIBUTED.value:
    from runtime import processes

    known = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    try:
      processes.join(*known, seconds=_START_TIMEOUT.value)
    except ValueError as error:  # it found no cluster, or the three don't go together
      raise UserError(
        f'--distributed: {error} Outside a pod or SLURM job give --coordinator=HOST:PORT, '
        '--num_processes and --process_id'
      ) from None
    if jax.process_index() > 0:
      logging.getLogger('score_sde').setLevel(logging.WARNING)
  with logging_redirect_tqdm(), _told_in_one_line():
    import run_lib

    workdir = _WORKDIR.value
    if not workdir:
      usual, begins = default_workdir(path, variant), _MODE.value in ('train', 'distill', 'import')
      workdir = workdir_of(usual, as_in_file, _CONFIG.value, begins)
    _MODES[str(_MODE.value)](run_lib, _CONFIG.value, workdir)


def _quiet_libraries() -> None:
  """Leaves out traces of errors in the libraries' threads: what matters of them is raised as well.

  Those are the threads of Orbax, TensorStore and tensorboardX where a disk is full, and the tasks
  of Orbax, of which asyncio tells, where several arrays of a checkpoint are damaged.
  """
  for library in ('absl', 'asyncio'):
    logging.getLogger(library).setLevel(logging.CRITICAL)

  def note(what: object) -> None:
    logging.debug('%s', what)

  sys.unraisablehook = threading.excepthook = note


@contextlib.contextmanager
def _told_in_one_line() -> Iterator[None]:
  """Turns what devices raise, where a run is not to blame, into a `Failure`."""
  import jax

  from runtime import devices

  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).partition('\n')[0][:200]
    if devices.out_of_memory(error):
      batch = {
        'train': 'config.training.batch_size, more config.training.grad_accum',
        'distill': 'config.training.batch_size, more config.training.grad_accum',
        'train_classifier': 'config.classifier.batch_size',
      }.get(_MODE.value or '', 'config.eval.batch_size')
      raise Failure(
        f'out of memory ({reason}); try a smaller {batch}, config.model.remat or '
        'config.model.dtype = bfloat16'
      ) from error
    if jax.process_count() > 1:
      raise Failure(
        f'another process is lost, or out of reach ({reason}); start all of them again: they go on '
        'from the newest checkpoint'
      ) from error
    raise


BEGIN = """Begin with handwritten digits; each of these takes a few minutes on two CPU cores:

  python main.py --config configs/vp/digits.py --mode train
  python main.py --config configs/vp/digits.py --mode sample

A small model of them comes with the code; this draws from it, without any training:

  python main.py --config configs/edm/digits.py --mode import --checkpoint assets/edm/digits
  python main.py --config configs/edm/digits.py --mode sample

What else there is:

  python main.py --help     modes and flags, with examples
  python -m configs         configs, with their networks
  docs/your_data.md         images of your own
  notebooks/                the same from Python, step by step
"""

if __name__ == '__main__':
  if '_ARGCOMPLETE' in os.environ:  # the shell asks what may come next
    from configs import completion

    completion.complete({flag.name: _MODES if flag is _MODE else None for flag in _FLAGS})
  if not sys.argv[1:]:
    print(BEGIN, end='')
    sys.exit(2)
  if {'-h', '--help', '-help'} & set(sys.argv[1:]):
    print(__doc__)
    for flag in _FLAGS:
      print(f'  --{flag.name:<13} {flags.FLAGS[flag.name].help}')
    sys.exit(0)
  logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', level=logging.WARNING)
  logging.getLogger('score_sde').setLevel(logging.INFO)
  _quiet_libraries()
  try:
    main(sys.argv)
  except (UserError, FloatingPointError) as error:  # the latter from a solver that got stuck
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except (Failure, OSError) as error:
    reason = str(error)
    if isinstance(error, OSError):
      where = f' {error.filename}' if error.filename else ''
      reason = (
        f'{error.strerror or error}{where}; repeat the command once that is mended: it goes on'
      )
    print(f'error: {reason}', file=sys.stderr, flush=True)
    os._exit(1)  # what other threads cannot write either would bury this line
  except KeyboardInterrupt:
    print('interrupted; the same command goes on from there', file=sys.stderr)
    sys.exit(130)
