"""What all tests share: they compile much and compute little, so nothing is optimised."""

import os

import agreement

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'


def pytest_addoption(parser) -> None:
  help = 'print how closely the golden numbers are reproduced'
  parser.addoption('--differences', action='store_true', help=help)


def pytest_terminal_summary(terminalreporter) -> None:
  if terminalreporter.config.option.differences:
    for row in agreement.table():
      terminalreporter.write_line(row)
