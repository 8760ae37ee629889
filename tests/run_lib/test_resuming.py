"""A run that goes on: what may change in it, and what a refusal leaves behind."""

import json
from pathlib import Path

from etils import epath
import pytest
from test_toy import tiny, UNSEEN

import run_lib
from runtime.errors import UserError


@pytest.fixture
def half(tmp_path) -> Path:
  """The workdir of a run to step 6."""
  run_lib.train(tiny('vp', **UNSEEN, training__n_iters=6), tmp_path)
  return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def refusal(workdir: Path, **fields) -> str:
  """What training says of a mistake; it leaves the workdir as it is."""
  before = contents(workdir)
  with pytest.raises(UserError) as caught:
    run_lib.train(tiny('vp', **UNSEEN, **fields), workdir)
  assert contents(workdir) == before
  (line,) = str(caught.value).splitlines()
  return line


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'data__dataset': 'ring'}, "config.data.dataset: 'two_moons' there, 'ring' now"),
    ({'seed': 1}, 'config.seed: 42 there, 1 now'),
    ({'training__eps': 1e-3}, 'config.training.eps: 1e-05 there, 0.001 now'),
    ({'training__reduce_mean': False}, 'config.training.reduce_mean: True there, False now'),
    ({'training__likelihood_weighting': True}, 'likelihood_weighting: False there, True now'),
  ],
)
def test_what_changes_what_is_learned_is_refused_with_the_way_out(half, fields, said):
  line = refusal(half, **fields)
  assert said in line and '--workdir' in line
  run_lib.train(tiny('vp', **UNSEEN), half)  # as it was, it goes on


def test_what_may_change_is_said_in_a_line_and_kept(half, caplog):
  caplog.set_level('INFO')
  run_lib.train(tiny('vp', **UNSEEN, optim__lr=1e-4), half)
  (said,) = [line for line in caplog.messages if 'another config' in line]
  assert 'config.optim.lr: 0.005 there, 0.0001 now' in said
  assert 'config.training.n_iters: 6 there, 12 now' in said
  kept = {p.name: json.loads(p.read_text()) for p in half.glob('configs/*')}
  assert {name: config['optim']['lr'] for name, config in kept.items()} == {
    'step_0.json': 0.005,
    'step_6.json': 0.0001,
  }
  caplog.clear()
  run_lib.train(tiny('vp', **UNSEEN, optim__lr=1e-4), half)
  assert not [line for line in caplog.messages if 'another config' in line]


def test_a_restore_that_fails_writes_nothing(half):
  """Nor does it refuse, later, the config that fits."""
  files = [p for p in half.glob('checkpoints*/**/*') if p.is_file()]
  whole = {path: path.read_bytes() for path in files}
  for path in files:
    path.write_bytes(whole[path][:7])
  assert 'can be restored; move' in refusal(half, optim__lr=1e-4, training__n_iters=20)
  for path, data in whole.items():
    path.write_bytes(data)
  run_lib.train(tiny('vp', **UNSEEN), half)
  assert json.loads((half / 'config.json').read_text())['optim']['lr'] == 0.005


def test_an_evaluation_that_fails_writes_no_config(half):
  """A damaged checkpoint, then another config in the same folder."""
  fields = {'eval__enable_sampling': False}
  files = [p for p in half.glob('checkpoints/**/*') if p.is_file()]
  whole = {path: path.read_bytes() for path in files}
  for path in files:
    path.write_bytes(whole[path][:7])
  with pytest.raises(UserError, match='damaged'):
    run_lib.evaluate(tiny('vp', **fields), half)
  assert not (half / 'eval' / 'config.json').exists()
  for path, data in whole.items():
    path.write_bytes(data)
  (report,) = run_lib.evaluate(tiny('vp', **fields, seed=3), half)
  assert report['step'] == 6
  with pytest.raises(UserError, match=r'config.seed: 3 there, 42 now.*\(--eval_folder'):
    run_lib.evaluate(tiny('vp', **fields), half)


def test_samples_that_were_refused_do_not_hold_their_folder(half):
  wrong, right = (tiny('vp', sampling__method=m) for m in ('pc', 'ddim'))

  def fail(*_, **__):
    raise UserError('no such mask')

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib, 'draw_samples', fail)
    with pytest.raises(UserError, match='no such mask'):
      run_lib.sample(wrong, half)
  run_lib.sample(right, half)
  assert epath.Path(half / 'sample' / 'step_6' / 'samples.npz').exists()
  with pytest.raises(UserError, match=r'--sample_folder'):
    run_lib.sample(wrong, half)
