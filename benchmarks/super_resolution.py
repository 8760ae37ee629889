"""Super-resolution by a model that is told low resolutions, beside a model of images alone.

  python -m benchmarks.super_resolution TOLD ALONE [--images N] [--page docs/conditioning.md]

TOLD is the workdir of a model with `data.condition = lowres:N`, ALONE that of one without, of the
same images. The first draws from p(x | c) by its training; the second is held to the means of
blocks, which are what a low resolution is: by the constraint of `controllable_generation`, or by
its posterior guidance. Each draws several samples of each held-out image, with its own sampler.

PSNR is of a sample, and of the mean of the samples of an image, to the truth, in dB, averaged over
images. The error of the low resolution is the root of the mean square, in levels of 255. The spread
is the standard deviation of the samples of an image.
"""

from collections.abc import Iterator
import dataclasses
from functools import partial
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, results_page
from builders.data import load_source, make_conditions
from builders.evaluation import make_drawing
from controllable_generation import BlockMean
from data.conditions import LowResolution
from data.decoding import Decoder
from data.images import spread
from evaluation.tasks import ByConstraint, ByPosterior, Conditioning, InverseProblem, SuperResolve
import run_lib
from runtime import processes
from runtime.errors import UserError

MARK = 'super-resolution'
NOISE_STD = 0.01  # of posterior guidance, which needs some; black to white is 1
SHOWN = 8  # images, in the picture
HEAD = ['way', 'evaluations', 'PSNR', 'PSNR of the mean', 'error of the low resolution', 'spread']


@dataclasses.dataclass(frozen=True)
class Way:
  """Samples of one way to enlarge: uint8 [images, samples, H, W, C], of so many evaluations."""

  name: str
  samples: np.ndarray
  evaluations: int

  def numbers(self, truth: np.ndarray, factor: int) -> list[float]:
    """What `HEAD` says, of the true images uint8 [images, H, W, C]."""
    samples, truth = self.samples.astype(np.float64), truth.astype(np.float64)
    each = psnr(samples, truth[:, None]).mean()
    error = means(samples, factor) - means(truth, factor)[:, None]
    spread = math.sqrt(samples.var(1, ddof=1).mean()) if samples.shape[1] > 1 else 0.0
    return [each, psnr(samples.mean(1), truth).mean(), math.sqrt(np.square(error).mean()), spread]


def psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """10 log10(255^2 / mean square error) of each image [..., H, W, C]."""
  return 10 * np.log10(255**2 / np.maximum(np.square(images - truth).mean((-3, -2, -1)), 1e-9))


def means(images: np.ndarray, factor: int) -> np.ndarray:
  """Of squares of `factor` pixels of images [..., H, W, C]."""
  *rest, height, width, channels = images.shape
  blocks = images.reshape(*rest, height // factor, factor, width // factor, factor, channels)
  return blocks.mean((-4, -2))


def by_condition(workdir: str, conditions: np.ndarray, k: int) -> Way:
  """k samples of each of the conditions, by a model that is told them."""
  setup, params = run_lib.load(workdir)
  drawn, nfe = make_drawing(setup).samples_of(
    params, setup.keys.key('draw'), k * len(conditions),
    {'condition': conditions.repeat(k, axis=0)}, lambda fraction: None,
  )  # fmt: skip
  return Way('told the low resolution', drawn.reshape(-1, k, *drawn.shape[1:]), nfe)


def by_task(workdir: str, truth: np.ndarray, factor: int, k: int) -> Iterator[Way]:
  """k samples of what the means of blocks leave open, by a model of images alone."""
  setup, params = run_lib.load(workdir)
  drawing, codec, operator = make_drawing(setup), setup.codec, BlockMean(factor)
  y = np.asarray(operator(jnp.asarray(codec.scaled(truth.repeat(k, axis=0)))))
  conditionings: dict[str, Conditioning] = {
    'images alone, constraint': ByConstraint(),
    'images alone, posterior': ByPosterior(NOISE_STD),
  }
  for name, conditioning in conditionings.items():
    problem = InverseProblem(SuperResolve(factor), '', conditioning, Decoder())
    score_fn, constraint = conditioning.condition(
      drawing.score_fn(params, {}), operator, processes.shard(y, setup.devices.batch),
      setup.model.sde, codec,
    )  # fmt: skip
    to_stored = partial(problem.to_stored, y=y, operator=operator, codec=codec)
    rng = jax.random.fold_in(setup.keys.key('draw'), 1)
    drawn, nfe = drawing.samples(rng, score_fn, len(y), constraint, None, to_stored)
    yield Way(name, drawn.reshape(-1, k, *drawn.shape[1:]), nfe)


def picture(conditions: np.ndarray, ways: list[Way], truth: np.ndarray) -> np.ndarray:
  """A row for each image: its condition, two samples of each way, the truth."""
  columns = [conditions, *(way.samples[:, j] for way in ways for j in range(2)), truth]
  rows = np.stack([column[:SHOWN] for column in columns], axis=1)
  return rows.reshape(-1, *truth.shape[1:])


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument('told', metavar='TOLD')
  parser.add_argument('alone', metavar='ALONE')
  parser.add_argument('--images', type=int, default=64, help='held-out ones (64)')
  parser.add_argument('--samples', type=int, default=4, help='of each (4)')
  parser.add_argument('--page', type=Path, help='whose marks the table goes between')
  args = parser.parse_args()
  setup, _ = run_lib.load(args.told)
  low = make_conditions(setup.config)
  if not isinstance(low, LowResolution):
    raise UserError(f'{args.told} is of no model with config.data.condition = lowres:N')
  source = load_source(setup.config, 'test')
  batch = source.batch(spread(len(source), args.images))
  truth, conditions = batch['data'], batch['condition']
  enlarged = Way('enlarged, no model', conditions[:, None], 0)
  drawn = [by_condition(args.told, conditions, args.samples)]
  drawn += by_task(args.alone, truth, low.factor, args.samples)
  rows = [
    [way.name, way.evaluations, *way.numbers(truth, low.factor)] for way in (enlarged, *drawn)
  ]
  common.report(common.table(HEAD, rows), rows, args.json)
  if args.page:
    cells = [HEAD, ['---'] * len(HEAD), *(map(common.three_figures, row) for row in rows)]
    size, small = truth.shape[1], truth.shape[1] // low.factor
    caption = (
      f'{len(truth)} held-out images of {size}x{size}, from {small}x{small}; {args.samples} samples'
      ' of each. PSNR in dB, the rest in levels of 255.'
    )
    lines = [caption, '', *(f'| {" | ".join(row)} |' for row in cells)]
    args.page.write_text(results_page.put(args.page.read_text(), MARK, lines))
    folder = args.page.parent / args.page.stem
    folder.mkdir(exist_ok=True)
    shown = picture(conditions, drawn, truth)
    results_page.grid(shown, 2 + 2 * len(drawn)).save(
      folder / 'super_resolution.png', optimize=True
    )


if __name__ == '__main__':
  main()
