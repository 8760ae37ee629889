"""Results are of the checkpoint that is there, not of another of the same step."""

import json
import os
from pathlib import Path
import shutil

import numpy as np
import pytest
from test_toy import tiny

import run_lib

FIELDS = {'training__n_iters': 6, 'eval__features': '', 'eval__enable_bpd': False}
STEP = 'step_6'


def train(workdir: Path, **fields) -> None:
  run_lib.train(tiny('vp', **FIELDS, **fields), workdir)


def evaluate(workdir: Path) -> dict:
  (report,) = run_lib.evaluate(tiny('vp', **FIELDS), workdir)
  return report


def numbers(report: dict) -> dict:
  return {k: v for k, v in report.items() if not k.endswith('seconds') and k != 'versions'}


def samples(folder: Path) -> np.ndarray:
  with np.load(folder / 'samples_0.npz') as arrays:
    return arrays['samples']


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> tuple[Path, Path]:
  """Workdirs of two runs that were evaluated, of which the second learned nothing."""
  root = tmp_path_factory.mktemp('runs')
  for name, lr in (('first', 5e-3), ('second', 1e-7)):
    train(root / name, optim__lr=lr)
    evaluate(root / name)
    run_lib.sample(tiny('vp', **FIELDS), root / name)
  return root / 'first', root / 'second'


@pytest.fixture
def first(runs, tmp_path) -> Path:
  """A copy of the first run, which keeps the times of its files."""
  shutil.copytree(runs[0], tmp_path / 'run')
  return tmp_path / 'run'


def take_checkpoints_of(workdir: Path, other: Path) -> None:
  for name in ('checkpoints', 'checkpoints-meta'):
    shutil.rmtree(workdir / name)
    shutil.copytree(other / name, workdir / name)


def test_a_run_begun_anew_is_evaluated_anew(runs, first, caplog):
  """What was of the former run, its pictures too, is kept aside."""
  caplog.set_level('INFO')
  before = json.loads((first / 'eval/report_6.json').read_text())
  for name in ('checkpoints', 'checkpoints-meta'):
    shutil.move(first / name, first.parent / name)
  train(first, optim__lr=1e-7)
  assert sum('of another checkpoint' in line for line in caplog.messages) == 1
  report, true = evaluate(first), json.loads((runs[1] / 'eval/report_6.json').read_text())
  assert numbers(report) == numbers(true) and report['loss'] != before['loss']
  np.testing.assert_array_equal(samples(first / 'eval' / STEP), samples(runs[1] / 'eval' / STEP))
  pictures = [(w / 'samples/iter_6/sample.png').read_bytes() for w in (first, *runs)]
  assert pictures[0] == pictures[2] != pictures[1]
  aside = first / 'former' / 'run'
  assert json.loads((aside / 'eval/report_6.json').read_text()) == before
  assert (aside / 'samples/iter_6/sample.png').read_bytes() == pictures[1]
  assert (aside / 'metrics.jsonl').read_bytes() == (runs[0] / 'metrics.jsonl').read_bytes()
  assert json.loads((aside / 'config.json').read_text())['optim']['lr'] == 5e-3
  assert 'former' not in (first / 'index.html').read_text()


def test_results_of_another_checkpoint_of_the_step_are_set_aside(runs, first, caplog):
  caplog.set_level('INFO')
  before = json.loads((first / 'eval/report_6.json').read_text())
  picture = (first / 'samples/iter_6/sample.png').read_bytes()
  take_checkpoints_of(first, runs[1])
  report, true = evaluate(first), json.loads((runs[1] / 'eval/report_6.json').read_text())
  assert numbers(report) == numbers(true)
  np.testing.assert_array_equal(samples(first / 'eval' / STEP), samples(runs[1] / 'eval' / STEP))
  aside = first / 'eval' / 'former' / before['checkpoint']
  assert json.loads((aside / 'report_6.json').read_text()) == before
  np.testing.assert_array_equal(samples(aside / STEP), samples(runs[0] / 'eval' / STEP))
  run_lib.sample(tiny('vp', **FIELDS), first)
  assert (first / 'sample' / 'former' / before['checkpoint'] / STEP / 'samples.npz').exists()
  train(first)  # which goes on with nothing, and draws the picture that is missing
  assert (first / 'samples/former' / before['checkpoint'] / 'iter_6/sample.png').exists()
  assert (first / 'samples/iter_6/sample.png').read_bytes() != picture
  marks = [json.loads(path.read_text()) for path in first.glob('*/*_6/checkpoint.json')]
  assert len(marks) == 3 and {m['checkpoint'] for m in marks} == {report['checkpoint']}


def test_what_is_there_is_not_made_again(runs, first):
  stamps = {p: os.stat(p).st_mtime_ns for p in first.glob('*/*_6/*') if p.suffix != '.json'}
  assert evaluate(first) == json.loads((runs[0] / 'eval/report_6.json').read_text())
  train(first)
  assert {p: os.stat(p).st_mtime_ns for p in stamps} == stamps
  assert not list(first.rglob('former'))


@pytest.mark.parametrize('older', [False, True])
def test_earlier_results_that_do_not_say_of_what_they_are(runs, first, older):
  """Those made after the checkpoint are of it; older ones are of another."""
  path = first / 'eval/report_6.json'
  before = json.loads(path.read_text())
  del before['checkpoint']
  path.write_text(json.dumps(before | {'loss': 7.0}))
  for mark in first.glob('*/*_6/checkpoint.json'):
    mark.unlink()
  if older:
    for file in [path, *first.glob('eval/step_6/*')]:
      os.utime(file, (1e9, 1e9))
  report = evaluate(first)
  assert report['loss'] == (json.loads((runs[0] / path.relative_to(first)).read_text())['loss']
                            if older else 7.0)  # fmt: skip
  assert json.loads(path.read_text()) == report and 'checkpoint' in report
  aside = first / 'eval/former/earlier'
  assert sorted(p.name for p in aside.glob('*')) == (['report_6.json', STEP] if older else [])
