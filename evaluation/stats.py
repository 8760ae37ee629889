"""The noise levels that training data ask for."""

from contextlib import closing
import logging
import math

import jax.numpy as jnp
import numpy as np

from data.batches import train_batches
from data.codec import Codec
from data.images import Source
from data.noise_scales import NoiseScales, recommend

logger = logging.getLogger('score_sde')

EXAMPLES = 5000  # whose distances are compared, fewer if they are large:
NUMBERS = 2**28  # pixels and channels of all of them, a gigabyte


def examples(source: Source, codec: Codec, *, batch_size: int, seed: int) -> np.ndarray:
  """At most `EXAMPLES` examples of `source` as a network sees them, float32 [n, ...].

  Args:
    source: the training data.
    codec: scales them.
    batch_size: of the data as they are read.
    seed: by which the examples are drawn.
  """
  n = min(len(source), EXAMPLES, NUMBERS // codec.dim)
  with closing(train_batches(source, min(batch_size, n), seed=seed)) as batches:
    parts = [next(batches)['data'] for _ in range(math.ceil(n / min(batch_size, n)))]
  return np.asarray(codec.scaled(jnp.asarray(np.concatenate(parts)[:n])))


def noise_scales(x: np.ndarray, sigma_min: float, n_steps_each: int) -> NoiseScales:
  """Prints the noise levels that NCSNv2 recommends for examples x [n, ...].

  Args:
    x: the examples.
    sigma_min: the smallest noise.
    n_steps_each: Langevin steps at a level.

  Raises:
    UserError: if no two of the examples are further apart than sigma_min, so that there are none.
  """
  chosen = recommend(x, sigma_min, n_steps_each)
  logger.info('%d examples of dimension %d', len(x), x[0].size)
  logger.info('largest distance between two of them: %.4g', chosen.sigma_max)
  logger.info(
    'NCSNv2 recommends --config.model.sigma_max=%.4g --config.model.num_scales=%d (a ratio of %.4f '
    'down to sigma_min = %g)',
    chosen.sigma_max, chosen.num_scales, chosen.ratio, chosen.sigma_min,
  )  # fmt: skip
  logger.info(
    'and, for annealed Langevin dynamics with sampling.n_steps_each = %d, '
    '--config.sampling.snr=%.4g (epsilon %.3g)',
    n_steps_each, chosen.snr, chosen.epsilon,
  )  # fmt: skip
  return chosen
