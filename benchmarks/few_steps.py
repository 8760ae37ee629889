"""Models of few steps beside their teachers: distance from the data, steps, and cost of training.

  python -m benchmarks.few_steps [--dataset NAME] [--path FOLDER] [--quick]

trains score models and, by `--mode distill`, students of each method, on digits and on
Fashion-MNIST at 16x16, and compares samples with all training images. What is trained and measured
stays under runs/few_steps, and is not done again: the command can be stopped at any moment. It
writes tables into docs/results.md, and pictures beside it: a row of samples for each row of each.

Fashion-MNIST: `--path /usr/share/datasets/fashion-mnist`, where Debian's dataset-fashion-mnist puts
it; without it, it is downloaded.
"""

from collections.abc import Callable, Sequence
import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from benchmarks import common, results_page, runs, small_classifier
from benchmarks.yardstick import Yardstick
from builders.evaluation import make_drawing
from builders.setup import build
from configs.base import Changes
from configs.distill import digits, fashion_mnist
from configs.edm import digits as edm_digits
from configs.edm import fashion_mnist as edm_fashion_mnist
from configs.vp import digits as vp_digits
from evaluation.evaluate import Measurement
from evaluation.metrics import frechet_distance, Moments
from evaluation.sample_quality import SampleQuality
from models.score import Params
import run_lib
from runtime.devices import all_devices
from workdir import artifacts
from workdir.reports import Report

SHOWN = 16  # samples of each row, in the picture
COMPARED = 35  # evaluations of the teacher's that students are compared with


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A way to draw from a model.

  Attributes:
    name: in the table.
    fields: of the config.
    stage: of progressive distillation, the folder of its run within that of the model.
  """

  name: str
  fields: Changes
  stage: str = ''


_FAST: Changes = {'sampling.method': 'dpm_solver++', 'sampling.corrector': 'none'}


def _heun(steps: int) -> Sampler:
  return Sampler('Heun', {'sampling.method': 'heun', 'sampling.num_steps': steps})


def _multistep(steps: int) -> Sampler:
  return Sampler('DPM-Solver++ 2M', {**_FAST, 'sampling.num_steps': steps})


# 200 evaluations, or as many as Heun's method can take below that, 35 and 18.
OF_EDM = (_heun(100), _heun(18), _multistep(18))
OF_V = (_multistep(200), _multistep(35), _multistep(18))
STAGES = (*(Sampler('DDIM', {}, f'stages/{n}') for n in (4, 2)), Sampler('DDIM', {}))


@dataclasses.dataclass(frozen=True)
class Model:
  """A model that is trained and drawn from.

  Attributes:
    name: in the table.
    folder: of its run.
    config: what trains it.
    samplers: how it is drawn from.
    teacher: the folder of the run that it learns from, or begins with; a student has a teacher
      whose samples its own are compared with, `beside`, also if it learns from data alone.
    beside: the folder of that teacher's run.
  """

  name: str
  folder: str
  config: Callable[[], ConfigDict]
  samplers: tuple[Sampler, ...]
  teacher: str = ''
  beside: str = ''


def jumps(config: ConfigDict) -> tuple[Sampler, ...]:
  """One jump, two at the time that the config says, and four of a grid."""
  choice = config.sampling
  two = {name: choice[name] for name in ('num_steps', 'consistency_times')}
  counts: tuple[dict[str, Any], ...] = ({'num_steps': 1}, two, {'num_steps': 4})
  return tuple(
    Sampler(
      'jumps',
      {f'sampling.{name}': value for name, value in ({'consistency_times': ()} | count).items()},
    )
    for count in counts
  )


def _student(method: str, config: Callable[[str], ConfigDict]) -> Model:
  teacher = '' if method in ('ct', 'ict') else 'edm'
  return Model(method, method, lambda: config(method), jumps(config(method)), teacher, 'edm')


def _v_of_digits() -> ConfigDict:
  config = vp_digits.get_config()
  config.model.output = 'v'
  return config


def _one_step_of_digits() -> ConfigDict:
  config = digits.get_config('progressive')
  config.distill.end_steps = 1
  return config


@dataclasses.dataclass(frozen=True)
class Trial:
  """Models of a dataset.

  Attributes:
    name: of the data, and of the mark in the page.
    models: teachers before their students.
    samples: that are drawn in each way.
    batch_size: in which they are.
    classifier: how that is trained whose features tell samples from data.
    needs_path: the images do not come with the code.
  """

  name: str
  models: tuple[Model, ...]
  samples: int
  batch_size: int
  classifier: small_classifier.Training
  needs_path: bool = False


DIGITS = Trial(
  name='digits',
  models=(
    Model('teacher, EDM', 'edm', edm_digits.get_config, OF_EDM),
    *(_student(method, digits.get_config) for method in ('cd', 'ect')),
    Model('teacher, VP with v', 'v', _v_of_digits, OF_V),
    Model('progressive', 'progressive', _one_step_of_digits, STAGES, 'v', 'v'),
    *(_student(method, digits.get_config) for method in ('ict', 'ct')),
  ),
  samples=2000,
  batch_size=500,
  classifier=small_classifier.Training(images=30_000),
)
FASHION_MNIST = Trial(
  name='Fashion-MNIST',
  models=(
    Model('teacher, EDM', 'edm', edm_fashion_mnist.get_config, OF_EDM),
    *(_student(method, fashion_mnist.get_config) for method in ('ect', 'cd')),
  ),
  samples=1000,
  batch_size=250,
  classifier=small_classifier.Training(images=120_000),
  needs_path=True,
)
TRIALS = (DIGITS, FASHION_MNIST)


def _tiny(config: ConfigDict) -> ConfigDict:
  config.model.nf, config.model.ch_mult = 8, (1,)
  config.training.n_iters = config.training.snapshot_freq = 10
  return config


QUICK = Trial(
  name='digits',
  models=(
    Model('teacher, EDM', 'edm', lambda: _tiny(edm_digits.get_config()), OF_EDM[1:2]),
    _student('ect', lambda method: _tiny(digits.get_config(method))),
  ),
  samples=16,
  batch_size=16,
  classifier=small_classifier.Training(images=1280),
)


@dataclasses.dataclass(frozen=True)
class Distances(Measurement):
  """Frechet distances of the samples that `SampleQuality` left, from all training images.

  Attributes:
    yardstick: by whose features.
    n: how many samples.
  """

  yardstick: Yardstick
  n: int

  def is_in(self, report: Report) -> bool:
    return 'frechet' in report

  def measure(self, params: Params, step: int, folder: epath.Path) -> Report:
    del params, step
    images, distances, mesh = drawn(folder, self.n), {}, all_devices().mesh
    for comparison in self.yardstick.comparisons:
      network, data = comparison.network, comparison.reference
      found = Moments.of(network.compile(mesh)(images))
      distances[network.name] = frechet_distance(found.mean, found.cov, data.mean, data.cov)
    return {'frechet': distances}


@dataclasses.dataclass(frozen=True)
class Bench:
  """A trial, and where it lies.

  Attributes:
    trial: what is compared.
    folder: of its runs, and of what was measured.
    data: fields of the config that say where the images are.
  """

  trial: Trial
  folder: epath.Path
  data: Changes

  def config_of(self, model: Model) -> ConfigDict:
    """What trains a model."""
    config = model.config()
    config.update_from_flattened_dict(self.data)
    config.training.snapshot_sampling = False
    return config

  @cached_property
  def yardstick(self) -> Yardstick:
    """The images, and how samples are compared with them."""
    config = self.config_of(self.trial.models[0])
    return Yardstick(config, self.folder, self.trial.classifier)

  def train(self, model: Model) -> None:
    """Trains a model, as far as that was not done."""
    teacher = str(self.folder / model.teacher) if model.teacher else ''
    runs.train(self.config_of(model), self.folder / model.folder, teacher)

  def row(self, model: Model, sampler: Sampler) -> Report:
    """What is said of samples, as far as it was not measured."""
    workdir = self.folder / model.folder / sampler.stage
    setup, params = run_lib.load(str(workdir))
    config, trial = ConfigDict(setup.config.to_dict()), self.trial
    config.update_from_flattened_dict(sampler.fields)
    settings: Report = {
      'sampler': sampler.fields,
      'samples': trial.samples,
      'batch_size': trial.batch_size,
      'features': [network.version for network in self.yardstick.networks],
    }
    drawing, n = make_drawing(build(config)), trial.samples
    measurements = (
      SampleQuality(drawing, n, trial.batch_size, setup.keys), Distances(self.yardstick, n)
    )  # fmt: skip
    report = runs.measured(
      self.folder / 'measured', workdir.name, settings, measurements, params,
      config.training.n_iters,
    )  # fmt: skip
    images, seconds = runs.spent(workdir)
    of_model = {'model': model.name, 'run': model.folder, 'beside': model.beside or model.folder}
    return report | of_model | {'name': sampler.name, 'images': images, 'seconds': seconds}

  def lines(self, rows: Sequence[Report]) -> list[str]:
    """The caption and the table, in Markdown."""
    n, yardstick = self.trial.samples, self.yardstick
    floors = {c.network.name: c.floor(n) for c in yardstick.comparisons}
    names = list(floors)
    best = {row['run']: row['frechet'] for row in rows if round(row['nfe']) == COMPARED}
    head = ['model', 'sampler', 'evaluations', *names, "of its teacher's", 'images seen', 'seconds']
    cells = list[list[str]]()
    for row in rows:
      teacher, found = best.get(row['beside']), row['frechet']
      ratios = [f'{found[k] / teacher[k]:.2f}' for k in names] if teacher else []
      numbers = [common.three_figures(found[name]) for name in names]
      cost = [f'{row["images"]:,}', f'{row["seconds"]:.0f}']
      cells.append(
        [row['model'], row['name'], f'{row["nfe"]:.0f}', *numbers, ', '.join(ratios), *cost]
      )
    of_data = [common.three_figures(floor.frechet) for floor in floors.values()]
    cells.append(['data', '', '', *of_data, '', '', ''])
    size, taken = yardstick.train_source.shape[0], next(iter(floors.values())).n
    caption = (
      f'{self.trial.name}, {size}x{size}. Frechet distances of {n:,} samples from all '
      f'{len(yardstick.train_source):,} training images, by features of the classifier '
      f'({100 * yardstick.classifier[1]:.1f} % right on held-out images) and by pixels. "Of its '
      f'teacher\'s" are both distances divided by those of the teacher at {COMPARED} evaluations. '
      f'The row "data" is {taken:,} training images from as many others. Images seen and seconds '
      "of steps are the model's own, without those of its teacher."
    )
    return [caption, '', *results_page.table(head, cells)]

  def write(self, rows: Sequence[Report], docs: Path) -> None:
    """The table into the page and the picture beside it, with what was measured until now."""
    page, name = docs / results_page.PAGE, self.trial.name
    lines, picture = self.lines(rows), docs / page.stem / f'few_steps_{name.lower()}.png'
    page.write_text(results_page.put(page.read_text(), f'few steps of {name}', lines))
    picture.parent.mkdir(exist_ok=True)
    shown = np.concatenate([drawn(epath.Path(row['folder']), SHOWN) for row in rows])
    results_page.grid(shown, SHOWN).save(picture, optimize=True)
    print('\n'.join(['', *lines]), flush=True)


def drawn(folder: epath.Path, n: int) -> np.ndarray:
  """The first n samples that `SampleQuality` left in a folder."""
  rounds, parts, found = sorted(folder.glob('samples_*.npz'), key=_number), [], 0
  for path in rounds:
    if found < n:
      parts.append(artifacts.read_npz(path)['samples'])
      found += len(parts[-1])
  return np.concatenate(parts)[:n]


def _number(path: epath.Path) -> int:
  return int(path.stem.rpartition('_')[2])


def main(argv: Sequence[str] | None = None) -> None:
  args = runs.parser(__doc__, 'runs/few_steps', TRIALS).parse_args(argv)
  for job in runs.jobs(args, TRIALS, QUICK):
    bench, rows = Bench(job.trial, job.folder, job.data), list[Report]()
    for model in job.trial.models:
      bench.train(model)
      rows += [bench.row(model, sampler) for sampler in model.samplers]
      bench.write(rows, job.docs)


if __name__ == '__main__':
  runs.run(main)
