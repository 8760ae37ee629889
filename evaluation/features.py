"""Networks that turn images into features, by which `evaluation` compares samples with data."""

from collections.abc import Callable
import dataclasses
from functools import partial
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from evaluation import inception, inception_weights
from runtime import processes
from runtime.devices import rows_over
from runtime.precision import full_precision

PIXELS = 16  # rows and columns, at most, that the feature network 'pixels' keeps
_IMAGES = 64  # on each device at once: what Inception needs for them is a gigabyte


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
  """What features are, and what the distances between them are called.

  Attributes:
    name: its name in a config and in the names of files.
    version: what tells its features from those of another of the same name.
    params: arrays that `apply` takes.
    apply: (params, uint8 [B, H, W, C]) -> float32 [B, d].
    logits: features [N, d] -> logits of p(y | x) [N, K], where the network classifies.
    frechet: name of the Frechet distance in a report.
    kernel: name of the kernel distance.
    suffix: of the names of precision and recall.
  """

  name: str
  version: str
  params: Any
  apply: Callable[[Any, Array], Array]
  logits: Callable[[np.ndarray], np.ndarray] | None
  frechet: str
  kernel: str
  suffix: str

  def compile(self, mesh: Mesh) -> Callable[[np.ndarray], np.ndarray]:
    """(images [N, H, W, C], this process's rows of a batch) -> their features, and the others'.

    The devices of the mesh share the work, `_IMAGES` at a time on each. The result, float32, has
    the rows of process 0, then those of process 1, and so on; all processes have as many.
    """
    by_rows = NamedSharding(mesh, rows_over(mesh))
    params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
    apply = jax.jit(full_precision(self.apply), out_shardings=by_rows)
    return partial(_in_parts, partial(apply, params), by_rows)


def _in_parts(
  apply: Callable[[Array], Array], by_rows: NamedSharding, images: np.ndarray
) -> np.ndarray:
  devices = jax.local_device_count()
  size, parts = min(_IMAGES * devices, math.ceil(len(images) / devices) * devices), []
  for start in range(0, len(images), size):
    rows = images[np.arange(start, start + size).clip(max=len(images) - 1)]
    x = jax.make_array_from_process_local_data(by_rows, rows)
    parts.append(processes.local(apply(x)))
  return processes.gather(np.concatenate(parts)[: len(images)])


def load(name: str, inception_path: str = '') -> FeatureNetwork | None:
  """The feature network of a name in `NETWORKS`, or None for an empty name.

  Args:
    name: of the network.
    inception_path: the file of the weights of Inception, see `inception_weights.load`.

  Raises:
    UserError: if its weights cannot be had.
  """
  return NETWORKS[name](inception_path) if name else None


def _inception(inception_path: str) -> FeatureNetwork:
  params = inception_weights.load(inception_path)
  net: Any = inception.InceptionV3()  # whose `apply` might return a tuple
  return FeatureNetwork(
    name='inception',
    version=inception_weights.SHA256,
    params=params,
    apply=lambda params, images: net.apply({'params': params}, images),
    logits=partial(inception.logits, params),
    frechet='fid',
    kernel='kid',
    suffix='',
  )


def _pixels(_: str) -> FeatureNetwork:
  """The pixels themselves, from 0 to 1; of large images, means over blocks of them.

  No trained network: what distances between these say depends on no download, and is not FID.
  """
  return FeatureNetwork(
    name='pixels',
    version=f'at most {PIXELS}x{PIXELS} pixels from 0 to 1',
    params=(),
    apply=lambda params, images: _shrink(images).reshape(len(images), -1) / 255,
    logits=None,
    frechet='frechet_pixels',
    kernel='kernel_pixels',
    suffix='_pixels',
  )


def _shrink(images: Array) -> Array:
  n, h, w, c = images.shape
  shape = (n, min(h, PIXELS), min(w, PIXELS), c)
  return jax.image.resize(images.astype(jnp.float32), shape, 'linear')  # which is antialiased


NETWORKS = {'inception': _inception, 'pixels': _pixels}
