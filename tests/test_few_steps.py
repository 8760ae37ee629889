"""`benchmarks.few_steps`: that students fit their teachers, its page, and what training cost."""

import dataclasses
import itertools
import json
from pathlib import Path

from etils import epath
import jax
from ml_collections import FrozenConfigDict
import numpy as np
import pytest

from benchmarks import few_steps, results_page, runs
from builders.distillation import check_distillation
from builders.setup import build
import run_lib
from workdir import same_config
from workdir.artifacts import write_json, write_npz

DOCS = Path(__file__).parent.parent / 'docs'
ALL = (*few_steps.TRIALS, few_steps.QUICK)
MODELS = [
  pytest.param(trial, m, id=f'{trial.name}-{m.name}') for trial in ALL for m in trial.models
]


def bench_of(trial: few_steps.Trial, folder: Path) -> few_steps.Bench:
  return few_steps.Bench(trial, epath.Path(folder), {})


@pytest.mark.parametrize(('trial', 'model'), MODELS)
def test_a_student_has_the_network_of_the_teacher_that_it_is_compared_with(trial, model, tmp_path):
  """So that a distance beside the teacher's says what few steps cost, and --teacher takes it."""
  bench, names = bench_of(trial, tmp_path), [m.folder for m in trial.models]
  config = bench.config_of(model)
  if not config.distill.method:
    assert not model.teacher and not model.beside
    return
  check_distillation(FrozenConfigDict(config), model.teacher)
  assert model.teacher in ('', model.beside) and model.beside in names[: names.index(model.folder)]
  teacher = next(m for m in trial.models if m.folder == model.beside)
  different = same_config.differences(bench.config_of(teacher).to_dict(), config.to_dict())
  assert not set(different) & set(same_config.MODEL) - {'distill.method'}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Free:
  """A score and a consistency function that cost nothing."""

  def __call__(self, x, t):
    return -x

  def consistency(self, x, t, eps):
    return x


def evaluations(bench: few_steps.Bench, model: few_steps.Model, sampler: few_steps.Sampler) -> int:
  """Those that a sample takes, by a score that costs nothing."""
  config = bench.config_of(model)
  config.update_from_flattened_dict(sampler.fields)
  return build(config).sampler(jax.random.key(0), Free(), (2, 1))[1]


def test_a_teacher_takes_the_evaluations_that_students_are_compared_with(tmp_path):
  bench, edm, cd = bench_of(few_steps.DIGITS, tmp_path), *few_steps.DIGITS.models[:2]
  assert [evaluations(bench, edm, sampler) for sampler in edm.samplers] == [
    199,
    few_steps.COMPARED,
    18,
  ]
  assert [evaluations(bench, cd, jumps) for jumps in cd.samplers] == [1, 2, 4]


def run_of(folder: Path, steps: int, method: str, end_steps: int) -> None:
  """What a run of so many steps leaves, 2 steps a second and then 4, by halves."""
  folder.mkdir(parents=True)
  config = {'training': {'n_iters': steps, 'batch_size': 8}}
  write_json(
    epath.Path(folder / 'config.json'),
    config | {'distill': {'method': method, 'end_steps': end_steps}},
  )
  lines = [{'step': steps // 2, 'steps_per_s': 2.0}, {'step': steps, 'steps_per_s': 4.0}]
  text = '\n'.join(map(json.dumps, [{'step': 3, 'loss_eval': 1.0}, *lines]))
  (folder / 'metrics.jsonl').write_text(text + '\n')


def test_a_stage_cost_what_the_stages_before_it_did_as_well(tmp_path):
  run_of(tmp_path / 'ect', 100, 'ect', 4)
  assert runs.spent(epath.Path(tmp_path / 'ect')) == (800, 37.5)
  root = tmp_path / 'progressive'
  run_of(root, 10, 'progressive', 1)
  for steps in (2, 4):
    run_of(root / 'stages' / str(steps), 10, 'progressive', steps)
  found = [runs.spent(epath.Path(f)) for f in (root, root / 'stages/2', root / 'stages/4')]
  assert found == [(240, 11.25), (160, 7.5), (80, 3.75)]


def test_a_trained_model_is_not_trained_again(tmp_path, monkeypatch):
  """One that is not is, by the mode that its config is for, with its teacher."""
  bench, asked = bench_of(few_steps.QUICK, tmp_path), []
  monkeypatch.setattr(run_lib, 'train', lambda config, workdir: asked.append((workdir,)))
  monkeypatch.setattr(run_lib, 'distill', lambda config, *where: asked.append(where))
  for model in few_steps.QUICK.models:
    bench.train(model)
  assert asked == [(f'{tmp_path}/edm',), (f'{tmp_path}/ect', f'{tmp_path}/edm')]
  for folder, step in itertools.product(('edm', 'ect'), (5, 10)):
    (tmp_path / folder / 'checkpoints' / str(step)).mkdir(parents=True)
  for model in few_steps.QUICK.models:
    bench.train(model)
  assert len(asked) == 2


def test_the_page_has_a_row_of_each_and_ratios_to_the_teacher(tmp_path, monkeypatch):
  bench = bench_of(few_steps.QUICK, tmp_path)
  rows = []
  for name, nfe, distance in (('edm', 35.0, 2.0), ('ect', 1.0, 5.0), ('ect', 2.0, 3.0)):
    folder = epath.Path(tmp_path / f'{name}_{nfe:.0f}')
    write_npz(folder / 'samples_0.npz', samples=np.full((20, 8, 8, 1), int(nfe), np.uint8))
    rows.append({
      'model': name, 'run': name, 'beside': 'edm', 'name': 'S', 'nfe': nfe, 'images': 640,
      'seconds': 12.3, 'folder': str(folder),
      'frechet': {'classifier': distance, 'pixels': distance / 10},
    })  # fmt: skip
  (tmp_path / 'results.md').write_text(
    '\n'.join(['<!-- printed for few steps of digits -->', 'old', '<!-- end -->'])
  )
  monkeypatch.setattr(few_steps.small_classifier, '_train', few_steps_untrained)
  bench.write(rows, tmp_path)
  table = [line for line in (tmp_path / 'results.md').read_text().splitlines() if line[:1] == '|']
  assert table[2] == '| edm | S | 35 | 2.00 | 0.200 | 1.00, 1.00 | 640 | 12 |'
  assert table[4] == '| ect | S | 2 | 3.00 | 0.300 | 1.50, 1.50 | 640 | 12 |'
  assert table[5].startswith('| data |')
  assert (tmp_path / 'results' / 'few_steps_digits.png').exists()


def few_steps_untrained(net, source, training):
  """The classifier as it begins: the page needs no good one."""
  return few_steps.small_classifier._init(net, source.shape, training.seed)


def test_the_page_of_results_has_a_place_for_each_trial():
  for trial in few_steps.TRIALS:
    results_page.put((DOCS / 'results.md').read_text(), f'few steps of {trial.name}', [])


def test_samples_are_read_in_the_order_of_their_rounds(tmp_path):
  for i in range(11):
    write_npz(epath.Path(tmp_path / f'samples_{i}.npz'), samples=np.array([2 * i, 2 * i + 1]))
  np.testing.assert_array_equal(few_steps.drawn(epath.Path(tmp_path), 21), np.arange(21))
