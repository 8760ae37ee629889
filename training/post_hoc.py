"""Averages that training never kept, of the snapshots of those that it did.

A snapshot holds an average of the parameters up to its step for each of a few widths. As functions
of the step these are a basis, in which other widths are written down: `averages.combination`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from models.score import Params
from training.averages import combination
from training.checkpoints import Checkpoints
from training.step import TrainState


def averages_of_snapshots(
  checkpoints: Checkpoints, like: TrainState, kept: Sequence[float], wanted: Sequence[float]
) -> list[tuple[Params, float]]:
  """The averages of the widths `wanted`, at the step of the newest snapshot.

  Each snapshot is read once, and of it nothing but the averages of power functions.

  Args:
    checkpoints: of the run; there is a snapshot.
    like: the run's state, shapes alone. Its first average is not a power function; those that
      follow have the widths `kept`.
    kept: sigma_rel of these.
    wanted: sigma_rel of those that are looked for.

  Returns:
    Of each that is wanted, the average, and the share of it that the snapshots cannot tell: the
    error that is left, from 0 to 1.

  Raises:
    UserError, Failure: as `Checkpoints.restore`.
    ValueError: for a width that there is not.
  """
  steps = checkpoints.steps()
  pairs = [(step, sigma_rel) for step in steps for sigma_rel in kept]
  solved = [combination(pairs, sigma_rel, steps[-1]) for sigma_rel in wanted]
  totals = [jax.tree.map(_zeros, like.params) for _ in wanted]
  for i, step in enumerate(steps):
    averages = checkpoints.restore_averages(step, like, range(1, 1 + len(kept)))
    for j, average in enumerate(averages):
      totals = [
        optax.tree.add_scale(total, float(coefficients[i * len(kept) + j]), average)
        for total, (coefficients, _) in zip(totals, solved, strict=True)
      ]
  return [(total, left) for total, (_, left) in zip(totals, solved, strict=True)]


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
  return jnp.zeros(like.shape, like.dtype, device=like.sharding)
