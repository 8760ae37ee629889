"""What all tests share: they compile much and compute little, so nothing is optimised."""

import atexit
import gc
import os
import shutil
import tempfile

import agreement
import jaxtyping
import pytest

from runtime import start

# The older of two ways to emit fused loops compiles in half the time; releases from 0.11 lack it.
# In one part instead of 32, which two busy cores would not compile at the same time, a program
# takes a quarter less.
QUICK = (
  '--xla_backend_optimization_level=0',
  '--xla_cpu_use_fusion_emitters=false',
  '--xla_cpu_parallel_codegen_split_count=1',
)
if 'PYTEST_XDIST_WORKER' not in os.environ:  # the workers inherit it
  for flag in QUICK:
    start.add_flag(flag)
  # Not the user's; what one test has compiled, those that come after it need not.
  os.environ['JAX_COMPILATION_CACHE_DIR'] = cache = tempfile.mkdtemp()
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
  os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
  os.environ.setdefault('GLIBC_TUNABLES', '')  # no command that a test calls starts itself anew
  start.prepare()

# Shapes are checked where they are said. Before any of these is imported.
CHECKED = (
  'sde_lib', 'losses', 'sampling', 'likelihood', 'controllable_generation', 'samplers', 'models',
  'training.step',
)  # fmt: skip
jaxtyping.install_import_hook(CHECKED, 'typechecker.check')


def pytest_addoption(parser) -> None:
  help = 'print how closely the golden numbers are reproduced'
  parser.addoption('--differences', action='store_true', help=help)
  help = 'how often the tests of faults stop training, and evaluation, at random moments (2)'
  parser.addoption('--kills', type=int, default=2, help=help)


def pytest_terminal_summary(terminalreporter) -> None:
  if terminalreporter.config.option.differences:
    for row in agreement.table():
      terminalreporter.write_line(row)


@pytest.fixture(scope='module', autouse=True)
def quick_garbage_collection() -> None:
  """What earlier files have compiled stays, some millions of objects: it is not looked at again."""
  gc.collect()
  gc.freeze()
