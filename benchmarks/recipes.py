"""VE, VP, sub-VP, EDM and flow matching, each by its recipe, with one network and as many images.

A recipe is an SDE with its preconditioning, law of times, weight, average and samplers, as
published; the network, batches, learning rate and number of images seen are the same for all. What
is trained and measured stays under runs/recipes, and is not done again: the command can be stopped
at any moment. It writes docs/results.md, whose tables grow as it goes on.

  python -m benchmarks.recipes [--dataset NAME] [--path FOLDER] [--quick]

Fashion-MNIST: `--path /usr/share/datasets/fashion-mnist`, where Debian's dataset-fashion-mnist puts
it; without it, it is downloaded.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict

from benchmarks import common, results_page, runs, small_classifier
from benchmarks.yardstick import Yardstick
from builders.evaluation import make_bits_per_dim, make_drawing
from builders.setup import build, Setup
from builders.training import make_schedule, score_task
from configs import own
from configs.base import Changes
from evaluation.evaluate import Measurement
from evaluation.sample_quality import SampleQuality
from models.score import Params
import run_lib
from training import loop
from workdir import artifacts
from workdir.reports import Report

EVALUATIONS = (20, 35, 200)
TURNS = 20  # steps of each recipe that are timed
OUTCOME = 'outcome.json'  # in the folder of a trial
_FAST = {'sampling.method': 'dpm_solver++', 'sampling.corrector': 'none'}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """An SDE as its authors train and sample it.

  Attributes:
    name: in a table.
    sde: of `configs.base.SDES`, with preconditioning, law of times, weight.
    average: fields of the moving average.
    samplers: for each number of evaluations what the sampler is called, and its fields.
  """

  name: str
  sde: str
  average: Changes
  samplers: dict[int, tuple[str, Changes]]


def _released(name: str, full: Changes) -> dict[int, tuple[str, Changes]]:
  """The sampler of the paper for many evaluations; for few, where it fails, DPM-Solver++ 2M."""
  few = {n: ('DPM-Solver++ 2M', {**_FAST, 'sampling.num_steps': n}) for n in EVALUATIONS[:2]}
  return few | {EVALUATIONS[2]: (name, {'sampling.method': 'pc', **full})}


def _two_a_step(name: str, method: str) -> dict[int, tuple[str, Changes]]:
  """Two evaluations for each step but the last, which takes one."""
  steps = {n: (n + 1) // 2 for n in EVALUATIONS}
  fields = {'sampling.method': method}
  return {n: (name, {**fields, 'sampling.num_steps': steps[n]}) for n in EVALUATIONS}


# The rates that the papers average with, 0.999 to 0.9999 a step, are for runs a thousand times as
# long: here they warm up, as (1 + n) / (10 + n). EDM's own rule, 5 % of the images seen, stands.
_WARMING: Changes = {'model.ema_warmup': True}
_PC = ('reverse diffusion + Langevin', 'reverse_diffusion', 'langevin', 100)
_EM = ('Euler-Maruyama', 'euler_maruyama', 'none', 200)


def _pc(name: str, predictor: str, corrector: str, steps: int) -> dict[int, tuple[str, Changes]]:
  fields = {'predictor': predictor, 'corrector': corrector, 'num_steps': steps}
  return _released(name, {f'sampling.{field}': value for field, value in fields.items()})


RECIPES = (
  Recipe('VE', 've', _WARMING, _pc(*_PC)),
  Recipe('VP', 'vp', _WARMING, _pc(*_EM)),
  Recipe('sub-VP', 'subvp', _WARMING, _pc(*_EM)),
  Recipe(
    'EDM', 'edm', {'ema.half_life': 500_000.0, 'ema.ramp_up': 0.05}, _two_a_step('Heun', 'heun')
  ),
  Recipe('flow', 'flow', _WARMING, _two_a_step('Heun', 'flow_heun')),
)


_NAMES = [recipe.name for recipe in RECIPES]
_OF_EDM = next(recipe for recipe in RECIPES if recipe.sde == 'edm')


@dataclasses.dataclass(frozen=True)
class Trial:
  """What the recipes are compared on.

  Attributes:
    name: of the data, and of the mark in the page.
    config: the data, network and training of an SDE, by its name.
    n_iters: steps of training.
    seeds: of runs, one after another.
    samples: that are drawn for each number of evaluations.
    likelihoods: held-out images, the first ones, whose bits/dim are measured.
    batch_size: in which both are measured.
    classifier: how that is trained whose features tell samples from data.
    recipes: that are compared.
    needs_path: the images do not come with the code.
  """

  name: str
  config: Callable[[str], ConfigDict]
  n_iters: int
  seeds: tuple[int, ...]
  samples: int
  likelihoods: int
  batch_size: int
  classifier: small_classifier.Training
  recipes: tuple[Recipe, ...] = RECIPES
  needs_path: bool = False


def _digits(sde: str) -> ConfigDict:
  return own.few_steps(own.digits(own.small_ddpmpp(sde)), 0)


def _fashion_mnist(sde: str) -> ConfigDict:
  return own.few_steps(own.fashion_mnist(own.small_ddpmpp(sde), '16'), 0)


def _fashion_mnist_28(sde: str) -> ConfigDict:
  return own.few_steps(own.fashion_mnist(own.small_ddpmpp(sde), '28'), 0)


def _tiny(sde: str) -> ConfigDict:
  config = _digits(sde)
  config.model.nf = 8
  config.model.ch_mult = (1,)
  config.model.attn_resolutions = ()
  config.training.n_jitted_steps = 1
  return config


TRIALS = (
  Trial(
    name='digits',
    config=_digits,
    n_iters=2000,
    seeds=(1,),
    samples=600,
    likelihoods=297,
    batch_size=300,
    classifier=small_classifier.Training(images=30_000),
  ),
  Trial(
    name='Fashion-MNIST',
    config=_fashion_mnist,
    n_iters=500,
    seeds=(1,),
    samples=256,
    likelihoods=96,
    batch_size=256,
    classifier=small_classifier.Training(images=120_000),
    needs_path=True,
  ),
  # All pixels, for hours: one recipe, by `configs/edm/fashion_mnist.py:28` as it is.
  Trial(
    name='Fashion-MNIST-28',
    config=_fashion_mnist_28,
    n_iters=own.FASHION_MNIST['28']['training.n_iters'],
    seeds=(42,),
    samples=512,
    likelihoods=96,
    batch_size=256,
    classifier=small_classifier.Training(images=120_000),
    recipes=(dataclasses.replace(_OF_EDM, average={}),),
    needs_path=True,
  ),
)
_SHOWN = {results_page.SHOWN: _OF_EDM.samplers[results_page.SHOWN]}
QUICK = Trial(
  name='digits',
  config=_tiny,
  n_iters=10,
  seeds=(1,),
  samples=16,
  likelihoods=8,
  batch_size=16,
  classifier=small_classifier.Training(images=1280),
  recipes=(dataclasses.replace(_OF_EDM, samplers=_SHOWN),),
)


def config_of(trial: Trial, recipe: Recipe, seed: int, data: Changes) -> ConfigDict:
  """What is trained."""
  config = trial.config(recipe.sde)
  config.update_from_flattened_dict(recipe.average | data)
  config.seed = seed
  config.training.n_iters = config.training.snapshot_freq = trial.n_iters
  config.training.snapshot_sampling = False
  return config


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

  def row(self, recipe: Recipe, seed: int) -> Report:
    """Trains and measures a run, as far as that was not done."""
    workdir = self.folder / f'{recipe.sde}_{seed}'
    runs.train(config_of(self.trial, recipe, seed, self.data), workdir)
    setup, params = run_lib.load(str(workdir))
    run, (images, seconds) = Run(self, setup, params, workdir / 'measured'), runs.spent(workdir)
    distances = {
      str(n): run.distances(n, fields) | {'sampler': name}
      for n, (name, fields) in recipe.samplers.items()
    }
    return {
      'recipe': recipe.name,
      'seed': seed,
      'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
      'images': images,
      'seconds': seconds,
      'bits': run.bits_per_dim(),
      'distances': distances,
    }

  def outcome(self, rows: Sequence[Report]) -> Report:
    """What the page is made of; times of steps once they are taken."""
    return {
      'name': self.trial.name,
      'size': self.yardstick.train_source.shape[0],
      'train_images': len(self.yardstick.train_source),
      'accuracy': self.yardstick.classifier[1],
      'step_ms': artifacts.read_json(self._times) if self._times.exists() else {},
      'rows': sorted(rows, key=lambda row: (row['seed'], _NAMES.index(row['recipe']))),
    }

  @cached_property
  def yardstick(self) -> Yardstick:
    """The images, whichever recipe sees them, and how samples are compared with them."""
    config = config_of(self.trial, RECIPES[0], 0, self.data)
    return Yardstick(config, self.folder, self.trial.classifier)

  @property
  def _times(self) -> epath.Path:
    return self.folder / 'steps.json'

  def time_steps(self) -> None:
    """Milliseconds of a step of each recipe, in turns, so that a busy machine is so for all."""
    if not self._times.exists():
      setups = {r.name: build(config_of(self.trial, r, 0, self.data)) for r in self.trial.recipes}
      runs = {name: _one_step(setup) for name, setup in setups.items()}
      timed = common.timed(runs, TURNS)
      times = {name: 1e3 * seconds for name, (seconds, _) in timed.items()}
      artifacts.write_json(self._times, times)


def _one_step(setup: Setup) -> Callable[[], Any]:
  """Runs a step of training at each call, on random images."""
  task, config = score_task(setup), setup.config
  states = [jax.jit(task.init)(setup.keys.key('init'))]
  step, _ = loop.compile_steps(task, make_schedule(config), setup.devices, states[0])
  batch = setup.devices.put({'data': common.images(setup, config.training.batch_size)})

  def run() -> Any:
    state, measured = step(states.pop(), task.frozen, batch, setup.keys.key('train'))
    states.append(state)
    return measured

  return run


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, and what is measured of it.

  Attributes:
    bench: the trial that it is of.
    setup: its parts.
    params: the average that is evaluated.
    folder: what was measured.
  """

  bench: Bench
  setup: Setup
  params: Params
  folder: epath.Path

  def bits_per_dim(self) -> Report:
    """Of the first held-out images, each dequantised once."""
    whole, trial = make_bits_per_dim(self.setup), self.bench.trial
    source = runs.FirstImages(whole.source, trial.likelihoods)
    size = min(trial.batch_size, len(source))  # what fills a batch up would cost as much
    measurement = dataclasses.replace(whole, source=source, repeats=1, batch_size=size)
    return self._kept('bits', {'images': len(source)}, [measurement])

  def distances(self, n: int, sampler: Changes) -> Report:
    """From the training images, of samples that take about n evaluations each."""
    config = ConfigDict(self.setup.config.to_dict())
    config.update_from_flattened_dict(sampler)
    drawing, trial, bench = make_drawing(build(config)), self.bench.trial, self.bench
    settings = {'sampler': sampler, 'samples': trial.samples, 'batch_size': trial.batch_size}
    settings |= {'features': [network.version for network in bench.yardstick.networks]}

    def measurements() -> Iterator[Measurement]:
      for comparison in bench.yardstick.comparisons:
        yield SampleQuality(
          drawing, trial.samples, trial.batch_size, self.setup.keys, comparison=comparison
        )

    return self._kept(str(n), settings, measurements())

  def _kept(self, name: str, settings: Report, measurements: Iterable[Measurement]) -> Report:
    """What was measured of this checkpoint with these settings, or is now."""
    step = self.bench.trial.n_iters
    return runs.measured(self.folder, name, settings, measurements, self.params, step)


def write(bench: Bench, rows: Sequence[Report], docs: Path) -> None:
  """The page and its pictures, with what was measured until now."""
  root, outcome = bench.folder.parent, bench.outcome(rows)
  artifacts.write_json(bench.folder / OUTCOME, outcome)
  paths = [root / t.name.lower() / OUTCOME for t in TRIALS if t.name != bench.trial.name]
  others = [artifacts.read_json(path) for path in paths if path.exists()]
  results_page.write(outcome, others, docs)


def main(argv: Sequence[str] | None = None) -> None:
  args = runs.parser(__doc__, 'runs/recipes', TRIALS).parse_args(argv)
  for job in runs.jobs(args, TRIALS, QUICK):
    bench, rows = Bench(job.trial, job.folder, job.data), list[Report]()
    for seed in job.trial.seeds:
      for recipe in sorted(job.trial.recipes, key=lambda recipe: recipe.sde != 'edm'):
        rows.append(bench.row(recipe, seed))
        write(bench, rows, job.docs)
    bench.time_steps()
    write(bench, rows, job.docs)


if __name__ == '__main__':
  runs.run(main)
