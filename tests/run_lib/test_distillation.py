"""A student of a few steps: its stages, what it keeps of its teacher, and what is refused."""

import json
from pathlib import Path
import shutil

from etils import epath
import jax
import numpy as np
import pytest
from test_toy import TINY, UNSEEN
from whole_runs import assert_same_bits, losses_in, state_of

from builders.distillation import stages
from configs.toy import two_moons
import run_lib
from runtime.errors import UserError
from training import checkpoints as checkpoints_lib
from training import loop

# One program for each stage: what is held out is looked at once, in the shortest run.
POINTS = TINY | {
  'model.output': 'v',
  'training.n_iters': 8,
  'training.n_jitted_steps': 1,
  'training.eval_freq': 100,
  'training.snapshot_freq': 4,
  'training.snapshot_freq_for_preemption': 2,
}
PROGRESSIVE = {
  'distill.method': 'progressive',
  'distill.start_steps': 16,
  'distill.end_steps': 2,
  'distill.grid': 'cosine',
  'sampling.method': 'ddim',
  'sampling.num_steps': 0,
  'training.n_iters': 4,
  'eval.enable_loss': False,
  'model.ema_rate': 0.0,
  'model.ema_warmup': False,
}


def config(*more: dict, **fields):
  found = two_moons.get_config('vp')
  for changes in (POINTS, *more, {k.replace('__', '.'): v for k, v in fields.items()}):
    found.update_from_flattened_dict(changes)
  return found


def student(**fields):
  return config(PROGRESSIVE, **{k: v for k, v in UNSEEN.items() if k not in fields}, **fields)


def contents(folder: Path) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> Path:
  """A teacher, of step 8, in teacher/; its student in student/."""
  root = tmp_path_factory.mktemp('distillation')
  run_lib.train(config(**UNSEEN), str(root / 'teacher'))
  run_lib.distill(student(), str(root / 'student'), str(root / 'teacher'))
  return root


def refusal(
  runs: Path, tmp_path: Path, teacher: str = 'teacher', workdir: str = '', **fields
) -> str:
  """What --mode distill says of a mistake; it writes nothing."""
  place = runs / workdir if workdir else tmp_path / 'new'
  before = contents(place)
  with pytest.raises(UserError) as caught:
    run_lib.distill(student(**fields), str(place), teacher and str(runs / teacher))
  assert contents(place) == before
  (line,) = str(caught.value).splitlines()
  return line


def test_each_stage_halves_the_steps_and_teaches_the_next(runs):
  root = runs / 'student'
  stages = [root / 'stages' / '8', root / 'stages' / '4', root]
  assert [json.loads((s / 'config.json').read_text())['distill']['end_steps'] for s in stages] == [
    8,
    4,
    2,
  ]
  for before, stage in zip([runs / 'teacher', *stages], stages, strict=False):
    noted = checkpoints_lib.notes(epath.Path(stage)).teacher
    _, average = run_lib.load(str(before))
    assert noted['workdir'] == str(before) and noted['checkpoint'] == checkpoints_lib.identity(
      average
    )
    assert losses_in(stage).keys() == {2, 4}
    begun = np.concatenate([x.ravel() for x in jax.tree.leaves(average)])
    ended = np.concatenate([x.ravel() for x in jax.tree.leaves(run_lib.load(str(stage))[1])])
    assert 0 < np.abs(ended - begun).max() < 0.1  # it began there, and learned


def test_stages_of_few_steps_may_be_longer():
  """The last one too, whose config a run that goes on is given without its own length."""
  plain, late = stages(student()), stages(student(distill__late_iters=6))
  assert [stage.training.n_iters for stage in plain] == [4, 4, 4]
  lengths = [(stage.distill.end_steps, stage.training.n_iters) for stage in late]
  assert lengths == [(8, 4), (4, 6), (2, 6)]
  assert stages(late[-1])[-1].to_dict() == late[-1].to_dict()


def test_samples_take_the_steps_of_the_stage(runs):
  for workdir, steps in (('student', 2), ('student/stages/8', 8)):
    fields = {'distill__end_steps': steps, 'sampling__num_samples': 8}
    report = run_lib.sample(student(**fields), str(runs / workdir))
    assert report['nfe'] == steps


def test_the_teacher_stays_what_it_is_and_is_in_no_checkpoint_of_the_student(runs, tmp_path):
  before = contents(runs / 'teacher')
  root = tmp_path / 'one'
  seen = {'training__eval_freq': 4, 'training__snapshot_sampling': True}
  run_lib.distill(student(distill__start_steps=4, **seen), str(root), str(runs / 'teacher'))
  assert (root / 'samples' / 'iter_4' / 'sample.png').exists()
  assert 0 < json.loads((root / 'metrics.jsonl').read_text().splitlines()[-1])['eval_loss'] < 1
  assert contents(runs / 'teacher') == before
  _, taught_by = run_lib.load(str(runs / 'teacher'))
  teachers = {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(taught_by)}
  state = state_of(root, 4)
  parts = {name.split("'")[1] for name in state}
  assert parts == {'step', 'params', 'ema_params', 'opt_state'}
  moved = {name for name, leaf in state.items() if leaf.tobytes() not in teachers}
  fixed = {name for name in state.keys() - moved}
  # Fourier frequencies alone are never learned.
  assert {name.rpartition("['")[2] for name in fixed} == {"W']"}


def test_killed_in_the_third_stage_and_repeated_it_ends_with_the_same_bits(
  runs, tmp_path, monkeypatch
):
  updates, started = loop.updates, []

  def killed(task, schedule, devices, keys, source, state):
    started.append(int(state.step))
    for value in updates(task, schedule, devices, keys, source, state):
      yield value
      if len(started) == 3 and value[1] == 3:
        raise RuntimeError('killed')

  root = tmp_path / 'killed'
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'updates', killed)
    with pytest.raises(RuntimeError, match='killed'):
      run_lib.distill(student(), str(root), str(runs / 'teacher'))
  shutil.move(root, tmp_path / 'moved')  # with its stages, which teach
  run_lib.distill(student(), str(tmp_path / 'moved'), str(runs / 'teacher'))
  assert started == [0, 0, 0]
  assert_same_bits(state_of(tmp_path / 'moved', 4), state_of(runs / 'student', 4))


def test_a_teacher_that_moved_is_told_and_another_refused(runs, tmp_path, caplog):
  caplog.set_level('INFO')
  root, moved, stages = tmp_path / 'one', tmp_path / 'elsewhere', runs / 'student' / 'stages'
  shutil.copytree(stages / '8', moved)
  shutil.copytree(stages / '4', root)
  further = student(distill__end_steps=8, training__n_iters=6)
  run_lib.distill(further, str(moved), str(runs / 'teacher'))  # trains on; its step 4 stays
  fields = {'distill__start_steps': 8, 'distill__end_steps': 4}
  caplog.clear()
  run_lib.distill(student(**fields), str(root), str(moved))
  (said,) = [line for line in caplog.messages if 'has moved' in line]
  assert str(stages / '8') in said and str(moved) in said
  line = refusal(runs, tmp_path, str(moved / 'checkpoints' / '6'), str(root), **fields)
  assert '6 has changed, or is another' in line and 'step 4' in line
  shutil.rmtree(moved / 'checkpoints' / '4')
  shutil.rmtree(moved / 'checkpoints-meta')
  assert 'holds no checkpoint of step 4' in refusal(runs, tmp_path, str(moved), str(root), **fields)


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'model__nf': 8}, 'config.model.nf: 16 there, 8 now. A student has'),
    ({'model__output': 'edm'}, "config.model.output: 'v' there, 'edm' now"),
    ({'training__sde': 'subvpsde'}, "config.training.sde: 'vpsde' there, 'subvpsde' now"),
    ({'model__beta_max': 10.0}, 'config.model.beta_max: 20.0 there, 10.0 now'),
    ({'data__dim': 10, 'data__dataset': 'gaussian'}, 'config.data.dim: 2 there, 10 now'),
    ({'teacher': ''}, 'progressive needs --teacher WORKDIR'),
    ({'teacher': 'nothing'}, 'nothing holds no checkpoints'),
    ({'teacher': 'student/stages/8'}, 'takes 8 steps, and is to teach one of 8'),
    ({'distill__start_steps': 12}, 'must be config.distill.end_steps = 2 times 2, 4, 8'),
    ({'distill__start_steps': 2}, 'must be config.distill.end_steps = 2 times 2, 4, 8'),
    ({'model__output': 'noise'}, 'the output noise of a network says nothing of the data'),
    ({'eval__enable_bpd': True}, 'config.eval.enable_bpd'),
    ({'training__objective': 'ssm'}, 'config.training.objective = ssm does not go with'),
    ({'training__single_scale': True}, 'config.training.single_scale'),
    ({'distill__method': ''}, 'config.distill.method is empty'),
    ({'distill__grid': 'cosin'}, "did you mean 'cosine'"),
    ({'workdir': 'student', 'distill__end_steps': 4}, 'config.distill.end_steps: 2 there, 4 now'),
    ({'workdir': 'teacher'}, "config.distill.method: '' there, 'progressive' now"),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_line(runs, tmp_path, fields, said):
  assert said in refusal(runs, tmp_path, **fields)


def test_other_modes_know_a_student_from_a_score(runs):
  with pytest.raises(UserError, match='is for --mode distill'):
    run_lib.train(student(), str(runs / 'student'))
  with pytest.raises(UserError, match=r"config.distill.method: 'progressive' there, '' now"):
    run_lib.sample(config(), str(runs / 'student'))
