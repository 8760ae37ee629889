"""The loss of training, on held-out data; where the true score is known, the error of the score."""

from collections.abc import Callable, Sequence
import dataclasses
from functools import cached_property
import time

from etils import epath
import jax
from jax import Array

from data.batches import eval_batches
from data.images import Source
from evaluation.evaluate import Measurement
from models.score import Params
from runtime import processes
from runtime.devices import Devices, Keys
from runtime.precision import full_precision
from runtime.shapes import Key, PerRow
from training.step import Batch
from workdir.progress import Bar
from workdir.reports import Report

Loss = Callable[[Params, Batch, Key], PerRow]  # of each example of a batch


@dataclasses.dataclass(frozen=True)
class HeldOutLoss(Measurement):
  """The means of losses over held-out data, of which each example counts once.

  Attributes:
    losses: by the names that a report gives them.
    held_out: the data.
    batch_size: of all devices together.
    devices: which share a batch.
    keys: of the run.
  """

  losses: dict[str, Loss]
  held_out: Source
  batch_size: int
  devices: Devices
  keys: Keys

  @cached_property
  def sums(self) -> Callable[[Params, Batch, Array], dict[str, Array]]:
    """(params, batch, key) -> the sums [] of the losses of the examples that its 'mask' marks."""

    @full_precision
    def loss_sums(params: Params, batch: Batch, rng: Array) -> dict[str, Array]:
      def total(loss: Loss) -> Array:
        return (loss(params, batch, rng) * batch['mask']).sum()

      return {name: total(loss) for name, loss in self.losses.items()}

    return jax.jit(loss_sums, out_shardings=self.devices.replicated)

  @property
  def class_names(self) -> Sequence[str]:
    return self.held_out.class_names

  def is_in(self, report: Report) -> bool:
    return all(name in report for name in self.losses)

  def measure(self, params: Params, step: int, folder: epath.Path) -> Report:
    sums, size, n, began = [], self.batch_size, len(self.held_out), time.monotonic()
    with Bar('loss', n, unit='examples') as bar:
      for i, batch in enumerate(eval_batches(self.held_out, size, **processes.share())):
        of_batch = self.sums(params, self.devices.put(batch), self.keys.key('eval', i))
        sums.append(jax.device_get(of_batch))
        bar.update(min((i + 1) * size, n))
    means = {name: sum(float(part[name]) for part in sums) / n for name in sums[0]}
    return means | {'loss_images': n, 'loss_seconds': time.monotonic() - began}
