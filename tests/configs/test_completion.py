"""What the shell is offered at TAB."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parent.parent.parent
EDM = 'python main.py --config configs/edm/digits.py'


@pytest.mark.parametrize(
  ('line', 'offered'),
  [
    ('python main.py --mo', ['--mode ']),
    ('python main.py --mode s', ['sample', 'stats']),
    ('python main.py --config configs/edm/d', ['configs/edm/digits.py ']),
    ('python main.py --config configs/flow/digits.py:di', ['configs/flow/digits.py:dit ']),
    (f'{EDM} --config.eval.num_', ['--config.eval.num_probes', '--config.eval.num_samples']),
    (f'{EDM} --mode sample --config.sampling.snr', ['--config.sampling.snr ']),
    ('python main.py --config=configs/edm/digits.py --config.seed', ['--config.seed ']),
    ('python main.py --config configs/edm/digit --config.see', []),  # no such config
    ('python main.py --config configs/ve/cifar10.py:nothing --config.see', []),  # no such variant
  ],
)
def test_tab_offers_what_may_come_next(line, offered, tmp_path):
  answer = tmp_path / 'answer'
  asked = {
    '_ARGCOMPLETE': '2',  # what comes before main.py: python
    '_ARGCOMPLETE_SHELL': 'bash',
    '_ARGCOMPLETE_IFS': '\n',
    '_ARGCOMPLETE_STDOUT_FILENAME': str(answer),
    'COMP_LINE': line,
    'COMP_POINT': str(len(line)),
    'COMP_TYPE': '9',
  }
  command = [sys.executable, 'main.py']
  subprocess.run(command, cwd=ROOT, env=os.environ | asked, check=True, capture_output=True)
  assert [name for name in answer.read_text().split('\n') if name] == offered


def test_the_shell_knows_main_as_one_to_ask():
  """It reads the first 1024 characters of a script, and runs what has the mark."""
  assert 'PYTHON_ARGCOMPLETE_OK' in (ROOT / 'main.py').read_text()[:1024]
