"""What processes of a run do until all of them are there."""

import socket
import subprocess
import sys


def test_processes_that_do_not_come_are_told_of_in_one_line():
  with socket.socket() as nobody:
    nobody.bind(('localhost', 0))
    address = f'localhost:{nobody.getsockname()[1]}'
  code = f'from runtime import processes; processes.join({address!r}, 2, 1, seconds=1)'
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False, timeout=60
  )
  assert done.returncode == 1, done.stderr
  *_, line = done.stderr.splitlines()
  assert (
    line.startswith('error: not all 2 processes are there after 1 s') and 'Traceback' not in line
  )
