"""What an evaluation measures of a checkpoint: loss, bits per dimension, samples.

Each function returns its part of the report. What takes long is done in rounds, each of which is a
file, so that an evaluation that is stopped and started again repeats at most one.
"""

from collections.abc import Callable
import dataclasses
from functools import partial
import math
import time
from typing import Any

from etils import epath
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

import artifacts
from build_lib import explicit_matching, Setup
import datasets
from draw_lib import classes_in_turn, draw, gather
from errors import UserError
from likelihood import bits_per_dim, Likelihood
import losses
from progress import Bar

Report = dict[str, Any]
LossSums = Callable[[Any, losses.Batch, Array], dict[str, Array]]


def processes() -> dict[str, int]:
  return {'process_index': jax.process_index(), 'process_count': jax.process_count()}


def compile_loss_sums(setup: Setup) -> LossSums:
  """(params, batch, key) -> the sums [] of the losses of the examples that its 'mask' marks.

  Where the true score is known, 'score_error' is the explicit score matching loss beside the
  'loss' of training.
  """
  objectives = {'loss': setup.objective}
  if setup.true_score_fn is not None:
    matching = explicit_matching(setup.true_score_fn)
    objectives['score_error'] = dataclasses.replace(setup.objective, matching=matching)

  def loss_sums(params: Any, batch: losses.Batch, rng: Array) -> dict[str, Array]:
    def total(objective: losses.Objective) -> Array:
      each = losses.eval_step(params, batch, rng, model=setup.model, objective=objective)
      return (each * batch['mask']).sum()

    return {name: total(objective) for name, objective in objectives.items()}

  return jax.jit(loss_sums, out_shardings=setup.replicated)


def evaluate_loss(
  setup: Setup, loss_sums: LossSums, held_out: datasets.Source, params: Any
) -> Report:
  sums, began = [], time.monotonic()
  size, n = setup.config.eval.batch_size, len(held_out)
  with Bar('loss', n, unit='examples') as bar:
    for i, batch in enumerate(datasets.eval_batches(held_out, size, **processes())):
      sums.append(jax.device_get(loss_sums(params, setup.put(batch), setup.key('eval', i))))
      bar.update(min((i + 1) * size, n))
  means = {name: sum(float(part[name]) for part in sums) / n for name in sums[0]}
  return means | {'loss_images': n, 'loss_seconds': time.monotonic() - began}


def has_bpd(setup: Setup, report: Report) -> bool:
  """Whether a report holds the bits per dimension that the config asks for."""
  wanted = setup.config.eval
  return report.get(f'bpd_{wanted.bpd_dataset}_repeats') == wanted.bpd_repeats


def evaluate_bpd(setup: Setup, source: datasets.Source, params: Any, folder: epath.Path) -> Report:
  """Bits per dimension of uniformly dequantised images (Sec. 4.3), each counted once per repeat.

  The noise and the probe of an image are a function of the seed, the repeat and the image's number,
  so that the size of the batches matters only within the tolerance of the solver. The standard
  error is that of the mean over images of what the repeats give on average.
  """
  wanted, began, n_images = setup.config.eval, time.monotonic(), len(source)
  size, repeats = wanted.batch_size, wanted.bpd_repeats
  rounds = math.ceil(n_images / size)
  likelihood, values, nfes = Likelihood(setup.model.sde), np.zeros((repeats, n_images)), []
  dequantize = jax.jit(_dequantize, static_argnums=3, out_shardings=setup.batch)
  with Bar('bits/dim', repeats * n_images, unit='images') as bar:
    for repeat in range(repeats):
      batches = datasets.eval_batches(source, size, **processes())
      for i, batch in enumerate(batches):
        k, done = repeat * rounds + i, i * size
        n = min(size, n_images - done)
        path = folder / f'bpd_{wanted.bpd_dataset}_{k}.npz'
        kept = _read_round(path, 'bpd', n)
        if kept is None:
          images, rng = setup.put(batch['data']), setup.key('bpd', repeat)
          x0, rngs = dequantize(rng, done, images, setup.model.centered)
          labels = setup.put(batch['label']) if setup.model.num_classes else None
          score_fn = setup.model.bind(params, labels=labels)
          logp, _, nfe = likelihood(rngs, score_fn, x0)
          bits = bits_per_dim(logp, math.prod(setup.data_shape), setup.model.centered)
          kept = gather(bits)[:n], nfe
          artifacts.write_npz(path, bpd=kept[0], nfe=np.int64(nfe))
        values[repeat, done : done + n] = kept[0]
        nfes.append(kept[1])
        bar.update(repeat * n_images + done + n)
  of_images, name = values.mean(0), f'bpd_{wanted.bpd_dataset}'
  return {
    name: float(of_images.mean()),
    f'{name}_std_error': float(of_images.std(ddof=1) / math.sqrt(n_images)),
    f'{name}_images': n_images,
    f'{name}_repeats': repeats,
    f'{name}_nfe': float(np.mean(nfes)),
    f'{name}_seconds': time.monotonic() - began,
  }


def _dequantize(rng: Array, first: Array, images: Array, centered: bool) -> tuple[Array, Array]:
  """Images as the network sees them [B, H, W, C], and keys [B], by the number of each image."""
  numbers = first + jnp.arange(len(images))
  rngs = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(rng, number)))(numbers)

  def one(rng: Array, image: Array) -> Array:
    return losses.preprocess(rng, image, centered, False, True)

  return jax.vmap(one)(rngs[:, 0], images), rngs[:, 1]


def step_folder(out: epath.Path, step: int) -> epath.Path:
  return out / f'step_{step}'


def evaluate_samples(setup: Setup, params: Any, step: int, folder: epath.Path) -> Report:
  """Samples in rounds of one batch, each a file; a round that is there is not drawn again."""
  wanted, began, nfes = setup.config.eval, time.monotonic(), []
  # The last round is as large as the others, so that samples do not depend on their number.
  size = min(wanted.batch_size, wanted.num_samples)
  rounds = math.ceil(wanted.num_samples / size)
  first = None
  with Bar('sample', wanted.num_samples, unit='samples') as bar:
    for i in range(rounds):
      done, path = i * size, folder / f'samples_{i}.npz'
      n = min(size, wanted.num_samples - done)
      kept = _read_round(path, 'samples', n)
      if kept is None:
        rng = jax.random.fold_in(setup.key('sample', step), i)
        labels = classes_in_turn(setup, done, size)
        progress = partial(_show, bar, done, n)
        images, nfe = draw(setup, params, rng, size, progress, labels)
        kept = images[:n], nfe
        extra = {} if labels is None else {'labels': labels[:n]}
        artifacts.write_npz(path, samples=images[:n], nfe=np.int64(nfe), **extra)
      nfes.append(kept[1])
      first = kept[0] if first is None else first
      bar.update(done + n)
  artifacts.write_samples(folder / 'samples.png', first, most=100)
  seconds = time.monotonic() - began
  return {'samples': wanted.num_samples, 'nfe': float(np.mean(nfes)), 'sample_seconds': seconds}


def _show(bar: Bar, done: int, n: int, fraction: float) -> None:
  """Moves a bar to `done` and a fraction of the next n."""
  bar.update(done + fraction * n)


def _read_round(path: epath.Path, name: str, n: int) -> tuple[np.ndarray, int] | None:
  """The array `name` [n, ...] and nfe of a round that is there already, or None."""
  if not path.exists():
    return None
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      values, nfe = arrays[name], int(arrays['nfe'])
  except Exception as error:  # zipfile, zlib and NumPy raise many kinds
    raise UserError(f'{path} is damaged ({error}); move it away, and it is made again') from None
  return (values, nfe) if len(values) == n else None
