"""What the parts of bits/dim are worth, in closed form: no network, and no training.

The data are pixels that are normal and independent, of mean 0.45 and standard deviation 0.25 in
[0, 1]; so their density at every time is known, and what each choice adds to it.

  python -m benchmarks.bits_per_dim_terms [--json PATH]
"""

import math

import jax.numpy as jnp
import numpy as np
from scipy import integrate, stats

from benchmarks import common
from data.codec import ImageCodec
from sde_lib import SDE, subVPSDE, VESDE, VPSDE

MEAN, STD = 0.45, 0.25  # of a pixel in [0, 1]
# By name: an SDE, the smallest time, and whether images are centred, as the configs have them.
CASES: dict[str, tuple[SDE, float, bool]] = {
  'VE, sigma_min 0.01': (VESDE(), 1e-5, False),
  'VE, sigma_min 0.001': (VESDE(sigma_min=0.001), 1e-5, False),
  'VP, eps 1e-5': (VPSDE(), 1e-5, True),
  'VP, eps 1e-3': (VPSDE(), 1e-3, True),
  'sub-VP, eps 1e-5': (subVPSDE(), 1e-5, True),
  'sub-VP, eps 1e-2': (subVPSDE(), 1e-2, True),
}


def terms(sde: SDE, eps: float, centred: bool) -> dict[str, float]:
  """In bits for each dimension; what is called noise is in levels of a pixel."""
  codec = ImageCodec((1, 1, 1), centered=centred)
  mean, std = codec.unit * MEAN + codec.low, codec.unit * STD
  (alpha, sigma), (alpha_T, sigma_T) = (
    [float(v) for v in sde.kernel(jnp.float32(t))] for t in (eps, sde.T)
  )
  width, spread_T = codec.level_width, math.hypot(alpha_T * std, sigma_T)
  clean = math.log(std * math.sqrt(2 * math.pi * math.e))
  # KL(p_T || prior): what the prior would add, were the model right at all times.
  square_T = spread_T**2 + (alpha_T * mean) ** 2
  kl = math.log(sde.prior_std / spread_T) + square_T / (2 * sde.prior_std**2) - 0.5
  noise = sigma / alpha / width
  return {
    'noise at eps, in levels': noise,
    'scaling': -math.log2(width),
    'bits/dim of the data': clean / math.log(2) - math.log2(width),
    'the prior adds': kl / math.log(2),
    **{f'eps adds at {std:g} levels': blur(std, noise) for std in (1, 4, 64)},
    'least possible': math.log2(noise * math.sqrt(2 * math.pi)),
  }


def blur(std: float, noise: float) -> float:
  """Bits that it costs to take clean data for noisy ones: the KL of N(0, std^2) to them."""
  spread = math.hypot(std, noise)
  return (math.log(spread / std) + std**2 / (2 * spread**2) - 0.5) / math.log(2)


def dequantisation(std_in_levels: float) -> float:
  """Bits that uniform dequantisation adds to those of levels, of a normal density of that width.

  The mean of log p over a level is below the log of the mean.
  """
  law, levels = (
    stats.norm(scale=std_in_levels),
    np.arange(-8 * std_in_levels - 2, 8 * std_in_levels + 3),
  )
  levels = np.floor(levels)
  mass = np.diff(law.cdf([*levels, levels[-1] + 1]))
  kept = mass > 1e-15
  means = [integrate.quad(law.logpdf, k, k + 1)[0] for k in levels[kept]]
  return float((mass[kept] * (np.log(mass[kept]) - means)).sum() / math.log(2))


def main() -> None:
  choices = common.parser(__doc__).parse_args()
  results = {name: terms(*case) for name, case in CASES.items()}
  names = list(next(iter(results.values())))
  rows = [f'| | {" | ".join(names)} |', '|---' * (len(names) + 1) + '|']
  rows += [
    f'| {n} | {" | ".join(f"{v:.4f}" for v in row.values())} |' for n, row in results.items()
  ]
  spread = {f'{std:g} levels': dequantisation(std) for std in (0.3, 1, 4, 64)}
  rows += [
    '',
    '| standard deviation of a pixel given the rest | uniform dequantisation adds |',
    '|---|---|',
  ]
  rows += [f'| {name} | {value:.5f} |' for name, value in spread.items()]
  common.report('\n'.join(rows), results | {'dequantisation': spread}, choices.json)


if __name__ == '__main__':
  main()
