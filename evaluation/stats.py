"""The noise levels that training data ask for."""

from contextlib import closing
import logging
import math

import jax.numpy as jnp
import numpy as np

from data import sources
from data.codec import Codec
from data.noise_scales import NoiseScales, recommend

logger = logging.getLogger('score_sde')

EXAMPLES = 5000  # whose distances are compared, fewer if they are large:
NUMBERS = 2**28  # pixels and channels of all of them, a gigabyte


def noise_scales(
  source: sources.Source,
  codec: Codec,
  *,
  sigma_min: float,
  n_steps_each: int,
  batch_size: int,
  seed: int,
) -> NoiseScales:
  """Prints the noise levels that NCSNv2 recommends for the examples of `source`.

  They are those of at most `EXAMPLES` examples.

  Args:
    source: the training data.
    codec: scales them as a network sees them.
    sigma_min: the smallest noise.
    n_steps_each: Langevin steps at a level.
    batch_size: of the data as they are read.
    seed: by which the examples are drawn.
  """
  n = min(len(source), EXAMPLES, NUMBERS // codec.dim)
  with closing(sources.train_batches(source, min(batch_size, n), seed=seed)) as batches:
    parts = [next(batches)['data'] for _ in range(math.ceil(n / min(batch_size, n)))]
  x = codec.scaled(jnp.asarray(np.concatenate(parts)[:n]))
  chosen = recommend(np.asarray(x), sigma_min, n_steps_each)
  logger.info('%d examples of dimension %d', n, codec.dim)
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
