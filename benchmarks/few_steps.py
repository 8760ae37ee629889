"""Models of few steps beside their teachers: distance from the data, steps, and time of training.

  python -m benchmarks.few_steps WORKDIR ... [--samples N] [--page docs/results.md]
  python -m benchmarks.few_steps --memory

Each workdir is one of a score model, which is sampled with 200, 35 and 18 evaluations, or of a
student, which `--mode distill` made of it: a consistency model draws in 1, 2 and 4 steps, and
progressive distillation in the steps of its stage. The distance is Frechet's between pixels of
samples and of all training images. With --page the table goes to that page, and there lies a
picture beside it: a row of samples of each row of the table.

--memory prints what XLA plans for a step of digits, of each method and of plain training.
"""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import json
from pathlib import Path

import jax
from ml_collections import ConfigDict
import numpy as np

from benchmarks import common, results_page
from builders.data import load_source
from builders.evaluation import make_drawing
from builders.setup import build, Setup
from builders.training import make_schedule, task_of
from configs.base import Changes
from configs.distill import digits
from configs.edm import digits as edm_digits
from configs.vp import digits as vp_digits
from data.images import ImageSource
from evaluation import features
from evaluation.metrics import Floor, frechet_distance, Moments
import run_lib
from runtime import start
from training import loop
from workdir.artifacts import json_text

BATCH = 200  # samples that are drawn at a time
SHOWN = 16  # samples of each row, in the picture
MARK = 'few steps'
_FAST: Changes = {'sampling.method': 'dpm_solver++', 'sampling.corrector': 'none'}
# Of score models, by SDE, and of consistency models: what a sampler is called, and its fields.
_HEUN = {'Heun': ({'sampling.method': 'heun'}, (100, 18))}
_MULTISTEP = {'DPM-Solver++ 2M': (_FAST, (200, 35, 18))}
SCORES: dict[str, dict[str, tuple[Changes, tuple[int, ...]]]] = {
  'edm': _HEUN | {'DPM-Solver++ 2M': (_FAST, (18,))}
}
JUMPS = (1, 2, 4)


def samplers(config: ConfigDict) -> Iterator[tuple[str, Changes]]:
  """What a model is sampled by: the name of a sampler, and fields of the config."""
  if config.distill.method == 'progressive':
    yield 'DDIM', {}
  elif config.distill.method:
    yield from (('jumps', {'sampling.num_steps': n}) for n in JUMPS)
  else:
    for name, (fields, counts) in SCORES.get(config.training.sde, _MULTISTEP).items():
      yield from ((name, fields | {'sampling.num_steps': n}) for n in counts)


def drawn(setup: Setup, params, n: int) -> tuple[np.ndarray, int]:
  """n samples as a dataset has them, and the evaluations that each took."""
  drawing, parts, key = make_drawing(setup), [], setup.keys.key('sample')
  for i in range(-(-n // BATCH)):
    rng = jax.random.fold_in(key, i)
    labels = drawing.classes_in_turn(BATCH)
    samples, nfe = drawing.samples_of(params, rng, BATCH, labels, lambda fraction: None)
    parts.append(samples)
  return np.concatenate(parts)[:n], nfe


def pixels_of(images: np.ndarray) -> np.ndarray:
  """The features of images: their pixels."""
  network = features.load('pixels')
  assert network is not None
  return network.compile(build(vp_digits.get_config()).devices.mesh)(images)


def training_seconds(workdir: Path) -> float:
  """What the steps of a run took, and of the stages before it, by its metrics."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  seconds, before = 0.0, 0
  for line in sorted((line for line in lines if 'steps_per_s' in line), key=lambda v: v['step']):
    seconds += (line['step'] - before) / line['steps_per_s']
    before = line['step']
  stages = workdir / 'stages' if (workdir / 'stages').exists() else workdir.parent
  own = json.loads((workdir / 'config.json').read_text())['distill']
  if own['method'] == 'progressive' and stages.name == 'stages':
    earlier = (s for s in stages.iterdir() if int(s.name) == 2 * own['end_steps'])
    seconds += sum(map(training_seconds, earlier))
  return seconds


@dataclasses.dataclass(frozen=True)
class Row:
  """A model, drawn from in one way.

  Attributes:
    model: how it was made.
    sampler: and its evaluations for a sample.
    evaluations: of the network.
    distance: of the samples from the training images.
    seconds: of training, without its teacher's.
    samples: the first ones.
  """

  model: str
  sampler: str
  evaluations: int
  distance: float
  seconds: float
  samples: np.ndarray

  def cells(self) -> list[str]:
    numbers = map(common.three_figures, (self.distance, self.seconds))
    return [self.model, self.sampler, str(self.evaluations), *numbers]


def rows(workdir: Path, n: int, data: Moments, most: int) -> Iterator[Row]:
  """Of a run: one for each of its samplers, of at most so many steps."""
  setup, params = run_lib.load(str(workdir))
  config, seconds = ConfigDict(setup.config.to_dict()), training_seconds(workdir)
  model = config.distill.method or f'teacher, {config.training.sde}'
  for name, fields in samplers(config):
    if fields.get('sampling.num_steps', 0) > most:
      continue
    changed = ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(fields)
    images, nfe = drawn(build(changed), params, n)
    found = Moments.of(pixels_of(images))
    distance = frechet_distance(found.mean, found.cov, data.mean, data.cov)
    yield Row(model, name, nfe, distance, seconds, images[:SHOWN])


def table(found: Sequence[Row], n: int, floor: Floor) -> list[str]:
  """The caption and the table, in Markdown."""
  head = ['model', 'sampler', 'evaluations', 'Frechet distance', 'seconds of training']
  lines = [head, ['---'] * len(head), *(row.cells() for row in found)]
  lines.append(['data', '', '', common.three_figures(floor.frechet), ''])
  caption = (
    f'Frechet distances, by pixels, of {n} samples from all training images. The row "data" is the '
    f'floor: {floor.n} training images from as many others. Seconds are of steps alone, on a '
    "machine with other work; those of a student come after its teacher's."
  )
  return [caption, '', *(f'| {" | ".join(cells)} |' for cells in lines)]


def memory() -> Iterator[str]:
  """What XLA plans for a step of digits: bytes of all arrays, and those of the frozen teacher."""
  configs = {'plain (EDM)': edm_digits.get_config()}
  configs |= {name: digits.get_config(name) for name in ('cd', 'ect', 'progressive_edm')}
  yield '| step | teacher MB | state MB | temporary MB | all MB | beside plain |'
  yield '|---' * 6 + '|'
  plain = None
  for name, config in configs.items():
    setup = build(config)
    average = jax.eval_shape(
      lambda setup=setup: setup.model.init(jax.random.key(0), (1, *setup.data_shape))
    )
    task = task_of(setup, average)
    state = jax.eval_shape(task.init, setup.keys.key('init'))
    one_step, _ = loop.compile_steps(task, make_schedule(setup.config), setup.devices, state)
    batch = {'data': common.images(setup, setup.config.training.batch_size)}
    compiled = one_step.lower(state, task.frozen, batch, setup.keys.key('train')).compile()
    planned = compiled.memory_analysis()
    whole = planned.argument_size_in_bytes + planned.temp_size_in_bytes
    plain = plain or whole
    parts = (_bytes(task.frozen), _bytes(state), planned.temp_size_in_bytes, whole)
    cells = [name, *(f'{part / 1e6:.2f}' for part in parts), f'{whole / plain:.2f}']
    yield f'| {" | ".join(cells)} |'


def _bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('workdirs', nargs='*', type=Path, metavar='WORKDIR')
  parser.add_argument('--samples', type=int, default=1000, help='of each row (1000)')
  parser.add_argument('--most', type=int, default=200, help='steps of a sampler (200)')
  parser.add_argument('--page', type=Path, help='whose marks the table goes between')
  parser.add_argument('--json', type=Path, help='also write the numbers here')
  parser.add_argument('--memory', action='store_true', help='of a step, in place of all else')
  args = parser.parse_args()
  if args.memory:
    for line in memory():
      print(line, flush=True)
    return
  source = load_source(run_lib.load(str(args.workdirs[0]))[0].config, 'train')
  assert isinstance(source, ImageSource)
  of_data = pixels_of(source.gather(np.arange(len(source))))
  floor, moments = Floor.of(of_data, args.samples), Moments.of(of_data)
  found = list[Row]()
  for workdir in args.workdirs:
    for row in rows(workdir, args.samples, moments, args.most):
      print(*row.cells(), flush=True)
      found.append(row)
  lines = table(found, args.samples, floor)
  print('\n'.join(['', *lines]))
  if args.json:
    numbers = [{k: v for k, v in dataclasses.asdict(r).items() if k != 'samples'} for r in found]
    args.json.write_text(json_text(numbers, indent=2) + '\n')
  if args.page:
    args.page.write_text(results_page.put(args.page.read_text(), MARK, lines))
    folder = args.page.parent / args.page.stem
    folder.mkdir(exist_ok=True)
    picture = results_page.grid(np.concatenate([row.samples for row in found]), SHOWN)
    picture.save(folder / 'few_steps.png', optimize=True)


if __name__ == '__main__':
  start.use_large_pages()
  main()
