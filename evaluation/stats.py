"""The noise levels that the training data of a config ask for."""

from contextlib import closing
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np

from builders.setup import Setup
from data import sources
from data.codec import preprocess
from data.noise_scales import NoiseScales, recommend

logger = logging.getLogger('score_sde')

EXAMPLES = 5000  # whose distances are compared, fewer if they are large:
NUMBERS = 2**28  # pixels and channels of all of them, a gigabyte


def noise_scales(setup: Setup, source: sources.Source) -> NoiseScales:
  """Prints the noise levels that NCSNv2 recommends for the examples of `source`.

  They are those of at most `EXAMPLES` examples, drawn by the seed; sigma_min and the number of
  Langevin steps at a level are the config's.
  """
  size = setup.config.eval.batch_size
  n = min(len(source), EXAMPLES, NUMBERS // math.prod(setup.data_shape))
  with closing(sources.train_batches(source, min(size, n), seed=setup.config.seed)) as batches:
    parts = [next(batches)['data'] for _ in range(math.ceil(n / min(size, n)))]
  data, rng = np.concatenate(parts)[:n], jax.random.key(0)  # of nothing: there are no flips
  x = preprocess(rng, jnp.asarray(data), setup.model.centered, False, False)
  n_steps = setup.config.sampling.n_steps_each
  chosen = recommend(np.asarray(x), setup.config.model.sigma_min, n_steps)
  logger.info('%d examples of dimension %d', n, math.prod(setup.data_shape))
  logger.info('largest distance between two of them: %.4g', chosen.sigma_max)
  logger.info(
    'NCSNv2 recommends --config.model.sigma_max=%.4g --config.model.num_scales=%d (a ratio of %.4f '
    'down to sigma_min = %g)',
    chosen.sigma_max, chosen.num_scales, chosen.ratio, chosen.sigma_min,
  )  # fmt: skip
  logger.info(
    'and, for annealed Langevin dynamics with sampling.n_steps_each = %d, '
    '--config.sampling.snr=%.4g (epsilon %.3g)',
    n_steps, chosen.snr, chosen.epsilon,
  )  # fmt: skip
  return chosen
