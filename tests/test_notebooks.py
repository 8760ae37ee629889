"""The notebooks run, and what GitHub shows of them is of a whole run."""

import json
import logging
from pathlib import Path
import sys

import matplotlib
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


def code_cells(path: Path) -> list[dict]:
  """But for the one that is Colab's."""
  cells = [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == 'code']
  of_colab = [cell for cell in cells if 'colab' in cell['metadata'].get('tags', [])]
  assert len(of_colab) == 1 and '!git clone' in ''.join(of_colab[0]['source'])
  return [cell for cell in cells if cell not in of_colab]


@pytest.mark.slow  # make test-notebooks
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
  """With few steps of everything, from its own folder, as Jupyter does."""
  monkeypatch.setenv('SCORE_SDE_QUICK', str(tmp_path / 'run'))
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.setattr(logging.getLogger('score_sde'), 'level', logging.WARNING)
  monkeypatch.chdir(path.parent)
  matplotlib.use('Agg')
  names: dict = {}
  for cell in code_cells(path):
    exec(''.join(cell['source']), names)
  assert Path.cwd() == ROOT


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_a_whole_run(path):
  cells = code_cells(path)
  numbers = [cell['execution_count'] for cell in cells]
  assert all(numbers) and numbers == sorted(numbers)
  outputs = [output for cell in cells for output in cell['outputs']]
  assert not [output for output in outputs if output['output_type'] == 'error']
  assert any('image/png' in output.get('data', {}) for output in outputs)
  assert path.stat().st_size < 500_000
