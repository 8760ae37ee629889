"""What is settled before JAX is imported: XLA's flags, and where compiled programs are kept.

Both are environment variables; what the user has set stays.
"""

import hashlib
import os
from pathlib import Path
import platform

# XLA:CPU may hand operations to the library YNNPACK. Convolutions are slower there, their gradients
# by the weights three to four times; matrix products and reductions are faster.
_CPU_LIBRARY = '--xla_cpu_experimental_ynn_fusion_type'
_CPU_LIBRARY_OPERATIONS = 'LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE'


def prepare() -> None:
  """Sets the environment of JAX; call it before JAX is imported."""
  flags = os.environ.get('XLA_FLAGS', '')
  if _CPU_LIBRARY not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {_CPU_LIBRARY}={_CPU_LIBRARY_OPERATIONS}'.strip()
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_cache()))


def _cache() -> Path:
  """The folder of compiled programs, one for each kind of CPU: a home may be shared by several."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    kind = next(line for line in lines if line.startswith(('flags', 'Features')))
  except (OSError, StopIteration):  # not Linux, or none of these processors
    kind = platform.machine()
  base = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
  return base / 'score_sde' / 'xla' / hashlib.sha256(kind.encode()).hexdigest()[:12]
