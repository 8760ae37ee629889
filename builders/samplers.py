"""From the section `sampling` of a config to a sampler."""

from collections.abc import Callable
from typing import Any

from ml_collections import FrozenConfigDict

from builders.data import make_codec
from runtime.errors import UserError
from samplers import multistep as fast
from samplers.adaptive_sde import AdaptiveSDESampler
from samplers.base import GridSampler, Sampler, Solver
from samplers.consistency import ConsistencySampler
from samplers.edm import EDM, FlowSolver
from samplers.langevin import LangevinSampler
from samplers.time_grids import SPACINGS, TimeGrid, uniform
import sampling
from sde_lib import Chain, SDE
from training.progressive import Halving

# Methods that take the steps of a time grid: what makes them, and the grid that they take unless
# the config names one.
_SOLVERS: dict[str, tuple[Callable[[Any], Solver], str]] = {
  'ddim': (lambda choice: fast.DDIM(choice.eta), 'log_snr'),
  'dpm_solver++': (lambda choice: fast.DPMSolver(choice.order, choice.eta), 'log_snr'),
  'dpm_solver++_3m': (lambda choice: fast.DPMSolver3M(choice.eta), 'log_snr'),
  'unip': (lambda choice: fast.DPMSolver(choice.order), 'log_snr'),
  'dpm_solver++_2s': (lambda choice: fast.DPMSolver2S(), 'log_snr'),
  'deis': (lambda choice: fast.DEIS(choice.order), 'quadratic'),
  'unipc': (lambda choice: fast.UniPC(choice.order), 'log_snr'),
  'euler': (lambda choice: _edm(choice, 1), 'edm'),
  'heun': (lambda choice: _edm(choice, 2), 'edm'),
  'flow_euler': (lambda choice: FlowSolver(1), 'uniform'),
  'flow_heun': (lambda choice: FlowSolver(2), 'uniform'),
}

METHODS = ('pc', 'ode', 'adaptive_sde', 'langevin', 'mala', *_SOLVERS, 'consistency')


def make_sampler(config: FrozenConfigDict, chain: Chain) -> Sampler:
  """The sampler of a config, for a model that was trained with the SDE of a chain, or with that.

  Raises:
    UserError: for too few steps.
    ValueError: if the SDE does not suit it.
  """
  choice, sde = config.sampling, chain.sde
  if choice.method == 'consistency':
    return _consistency(config, sde)
  n = choice.num_steps or chain.N
  # Where the steps are those that published samples were drawn with, they are taken as they were.
  released = n == chain.N and chain.is_released and chain.can_be_taken
  own_chain = chain if released else None
  if choice.method == 'ode':
    return sampling.ODESampler(
      sde, choice.eps, choice.rtol, choice.atol, choice.noise_removal, choice.ode_solver, own_chain
    )
  if choice.method == 'adaptive_sde':
    return AdaptiveSDESampler(
      sde, choice.eps, choice.sde_rtol, choice.sde_atol, choice.noise_removal
    )
  if choice.method in ('langevin', 'mala'):
    return _langevin(config, sde, n)
  if choice.method == 'pc':
    return _pc_sampler(choice, sde, n, own_chain)
  if choice.method == 'ddim' and config.distill.method == 'progressive' and not choice.num_steps:
    return make_halving(config, sde).sampler(choice.eta)
  make, usual_spacing = _SOLVERS[choice.method]
  grid = _grid(choice, n, usual_spacing)
  return GridSampler(sde, make(choice), grid, choice.noise_removal)


def make_halving(config: FrozenConfigDict, sde: SDE) -> Halving:
  """The stage of progressive distillation whose student takes `distill.end_steps` steps.

  Raises:
    UserError: if the times are not on the SDE.
  """
  distill, training = config.distill, config.training
  spacing = SPACINGS[distill.grid](distill.rho)
  try:
    return Halving(sde, distill.end_steps, training.eps, spacing, training.reduce_mean)
  except ValueError as error:
    raise UserError(f'config.training.eps = {training.eps}, the last time: {error}') from None


def _grid(choice: FrozenConfigDict, n: int, usual_spacing: str) -> TimeGrid:
  if n < 2:
    raise UserError(
      f'config.sampling.num_steps = {n} must be at least 2, or 0 for config.model.num_scales'
    )
  return TimeGrid(n, choice.eps, SPACINGS[choice.grid or usual_spacing](choice.rho))


def _consistency(config: FrozenConfigDict, sde: SDE) -> ConsistencySampler:
  """Jumps from T, and from the times that are chosen or from those of a grid that ends at eps."""
  choice, eps, codec = config.sampling, config.training.eps, make_codec(config)
  times = tuple(choice.consistency_times)
  if not times and choice.num_steps > 1:
    spacing = SPACINGS[choice.grid or 'edm'](choice.rho)
    times = tuple(TimeGrid(choice.num_steps + 1, eps, spacing).times(sde)[1:-1].tolist())
  try:
    return ConsistencySampler(sde, eps, times, codec.low, codec.high)
  except ValueError as error:
    raise UserError(f'config.sampling.consistency_times: {error}') from None


def _pc_sampler(
  choice: FrozenConfigDict, sde: SDE, n: int, own_chain: Chain | None
) -> sampling.PCSampler:
  grid = _grid(choice, n, 'uniform')
  return sampling.PCSampler(
    sde,
    sampling.PREDICTORS[choice.predictor](),
    sampling.CORRECTORS[choice.corrector](choice.snr, choice.n_steps_each),
    grid,
    choice.probability_flow,
    choice.noise_removal,
    own_chain if grid.spacing is uniform else None,
  )


def _langevin(config: FrozenConfigDict, sde: SDE, n: int) -> LangevinSampler:
  choice = config.sampling
  return LangevinSampler(sde, choice.eps, choice.step_size, n, choice.method == 'mala')


def _edm(choice: FrozenConfigDict, order: int) -> Solver:
  return EDM(order, choice.s_churn, choice.s_tmin, choice.s_tmax, choice.s_noise)
