"""What all tests share: they compile much and compute little, so nothing is optimised.

The older of XLA:CPU's two ways to emit fused loops compiles in half the time.
"""

import os

import agreement
import pytest

QUICK = ' --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + QUICK


@pytest.fixture(scope='session')
def compiled_once(tmp_path_factory) -> None:
  """What one process has compiled, those that come after it need not."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path_factory.mktemp('cache')))
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
    yield


def pytest_addoption(parser) -> None:
  help = 'print how closely the golden numbers are reproduced'
  parser.addoption('--differences', action='store_true', help=help)


def pytest_terminal_summary(terminalreporter) -> None:
  if terminalreporter.config.option.differences:
    for row in agreement.table():
      terminalreporter.write_line(row)
