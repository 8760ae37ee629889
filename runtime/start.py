"""What is settled before JAX is imported: XLA's flags, and where compiled programs are kept.

Both are environment variables; what the user has set stays. XLA aborts the process over a flag, or
a value of it, that it does not know, and releases differ: so each is tried before it is set, once
for a release, by a process that may abort. One backend's flags are set where JAX will use it.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path
import pkgutil
import platform
import subprocess
import sys
import tempfile

from runtime.errors import UserError

# XLA:CPU may hand operations to the library YNNPACK. Convolutions are slower there, their gradients
# by the weights three to four times; matrix products and reductions are faster.
CPU_LIBRARY = (
  '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE'
)

# Takes only kernels that give the same bits each time, and does not choose kernels by measuring.
DETERMINISTIC = '--xla_gpu_deterministic_ops=true'

_LARGE_PAGES = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def prepare(deterministic: bool = False) -> None:
  """Sets the environment of JAX; call it before JAX is imported.

  Args:
    deterministic: have GPUs compute the same bits each time; CPUs do so anyway.

  Raises:
    UserError: if that is asked for, and this XLA cannot.
  """
  if will_use_cpus():
    add_flag(CPU_LIBRARY)
  elif deterministic and will_use_gpus():
    add_flag(DETERMINISTIC)
    if DETERMINISTIC.partition('=')[0] not in os.environ.get('XLA_FLAGS', ''):
      raise UserError(f'--deterministic: this XLA does not know {DETERMINISTIC}; leave it out')
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_compiled()))


def use_large_pages() -> None:
  """Starts this command anew, under its process id, with large pages, where computing asks for it.

  XLA:CPU takes the memory of a training step from the system and gives it back, each time, and
  Linux clears it page by page, of 4 KiB: docs/performance.md says what that costs. The C library
  asks for pages of 2 MiB if GLIBC_TUNABLES, which it reads as a process starts, says so.
  Call it where a command begins. Does nothing if the user has set that variable (it may be empty),
  without glibc or CPUs to compute on, or where Linux gives such pages to all or to none.
  """
  if 'GLIBC_TUNABLES' in os.environ or not sys.orig_argv[1:] or not will_use_cpus():
    return
  library, release = platform.libc_ver()
  if library != 'glibc' or tuple(map(int, release.split('.')[:2])) < (2, 35):
    return
  try:
    pages = _LARGE_PAGES.read_text()
  except OSError:
    return
  if '[madvise]' in pages:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def will_use_cpus() -> bool:
  """Whether JAX will compute on CPUs. Importing JAX, which takes half a second, would tell too.

  It will where JAX_PLATFORMS names them first, or names nothing and no library for a GPU or TPU is
  installed.
  """
  platforms = os.environ.get('JAX_PLATFORMS') or os.environ.get('JAX_PLATFORM_NAME')
  if platforms:
    return platforms.split(',')[0].strip().lower() == 'cpu'
  if os.environ.get('TPU_LIBRARY_PATH') or importlib.util.find_spec('libtpu'):
    return False
  plugins = importlib.util.find_spec('jax_plugins')
  if plugins and any(pkgutil.iter_modules(plugins.submodule_search_locations)):
    return False
  return not importlib.metadata.entry_points(group='jax_plugins')


def will_use_gpus() -> bool:
  """Whether JAX will compute on GPUs, as far as can be told before it is imported."""
  platforms = os.environ.get('JAX_PLATFORMS') or os.environ.get('JAX_PLATFORM_NAME')
  if platforms:
    return platforms.split(',')[0].strip().lower() in ('cuda', 'rocm', 'gpu')
  tpu = os.environ.get('TPU_LIBRARY_PATH') or importlib.util.find_spec('libtpu')
  return not tpu and not will_use_cpus()


def add_flag(flag: str) -> None:
  """Adds `--name=value` to XLA_FLAGS, unless the user has set that name or XLA does not know it."""
  flags, name = os.environ.get('XLA_FLAGS', ''), flag.partition('=')[0]
  if name not in (one.partition('=')[0] for one in flags.split()) and knows(flag):
    os.environ['XLA_FLAGS'] = f'{flags} {flag}'.strip()


def knows(flag: str) -> bool:
  """Whether the installed XLA takes this flag with this value.

  Another process tries, which takes half a second. The answer is kept for this release.
  """
  import jaxlib

  name = hashlib.sha256(flag.encode()).hexdigest()[:12]
  kept = _cache() / 'xla_flags' / jaxlib.__version__ / name
  with contextlib.suppress(OSError):
    return kept.read_text() == 'known'
  environment = os.environ | {'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'}
  child = [sys.executable, '-c', 'import jax; jax.devices()']
  done = subprocess.run(child, env=environment, capture_output=True, check=False)
  known = done.returncode == 0
  if known or b'parse_flags' in done.stderr:  # it may have ended of something else
    with contextlib.suppress(OSError):  # then it is asked again the next time
      kept.parent.mkdir(parents=True, exist_ok=True)
      with tempfile.NamedTemporaryFile('w', dir=kept.parent, delete=False) as file:
        file.write('known' if known else 'unknown')
      os.replace(file.name, kept)
  return known


def _compiled() -> Path:
  """The folder of compiled programs, one for each kind of CPU: a home may be shared by several."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    kind = next(line for line in lines if line.startswith(('flags', 'Features')))
  except (OSError, StopIteration):  # not Linux, or none of these processors
    kind = platform.machine()
  return _cache() / 'xla' / hashlib.sha256(kind.encode()).hexdigest()[:12]


def _cache() -> Path:
  return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'score_sde'
