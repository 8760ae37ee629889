"""From the section `sampling` of a config to a sampler."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from models import score
from runtime.errors import UserError
from samplers import multistep as fast
from samplers.adaptive_sde import AdaptiveSDESampler
from samplers.base import GridSampler, Sampler, Solver
from samplers.langevin import LangevinSampler
from samplers.time_grids import GRIDS
import sampling
from sde_lib import SDE

# Methods that take the steps of a time grid: what makes them, and the grid that they take unless
# the config names one.
_SOLVERS: dict[str, tuple[Callable[[Any], Solver], str]] = {
  'ddim': (lambda choice: fast.DDIM(choice.eta), 'log_snr'),
  'dpm_solver++': (lambda choice: fast.DPMSolver(choice.order, choice.eta), 'log_snr'),
  'dpm_solver++_2s': (lambda choice: fast.DPMSolver2S(), 'log_snr'),
  'deis': (lambda choice: fast.DEIS(choice.order), 'quadratic'),
  'unipc': (lambda choice: fast.UniPC(choice.order), 'log_snr'),
  'euler': (lambda choice: _edm(choice, 1), 'edm'),
  'heun': (lambda choice: _edm(choice, 2), 'edm'),
}

METHODS = ('pc', 'ode', 'adaptive_sde', 'langevin', 'mala', *_SOLVERS)


def make_sampler(config: FrozenConfigDict, sde: SDE) -> Sampler:
  """The sampler of a config, for a model that was trained with `sde`.

  Raises:
    UserError: if its fields do not go together.
    ValueError: if the SDE does not suit it.
  """
  choice = config.sampling
  sde = dataclasses.replace(sde, eps=choice.eps)
  if choice.method == 'ode':
    return sampling.ODESampler(
      sde, choice.rtol, choice.atol, choice.noise_removal, choice.ode_solver
    )
  if choice.method == 'adaptive_sde':
    return AdaptiveSDESampler(sde, choice.sde_rtol, choice.sde_atol, choice.noise_removal)
  n = choice.num_steps or sde.N
  sde = dataclasses.replace(sde, N=n)  # type: ignore[call-arg]  # a field of each subclass
  if choice.method in ('langevin', 'mala'):
    return _langevin(config, sde)
  if choice.method == 'pc':
    return _pc_sampler(config, sde)
  make, usual_grid = _SOLVERS[choice.method]
  grid = GRIDS[choice.grid or usual_grid](choice.rho)
  return GridSampler(sde, make(choice), grid, choice.noise_removal)


def _pc_sampler(config: FrozenConfigDict, sde: SDE) -> sampling.PCSampler:
  choice = config.sampling
  if choice.predictor == 'ancestral_sampling' and choice.probability_flow:
    raise UserError('config.sampling.probability_flow does not go with ancestral_sampling')
  predictor = sampling.PREDICTORS[choice.predictor]()
  if predictor.own_steps or choice.corrector != 'none':
    sde.langevin_alpha(jnp.ones(1))  # says so if the chain has too few steps
  return sampling.PCSampler(
    sde,
    predictor,
    sampling.CORRECTORS[choice.corrector](choice.snr, choice.n_steps_each),
    choice.probability_flow,
    choice.noise_removal,
    GRIDS[choice.grid or 'uniform'](choice.rho),
  )


def _langevin(config: FrozenConfigDict, sde: SDE) -> LangevinSampler:
  choice = config.sampling
  if choice.method == 'mala' and config.model.output != score.ENERGY:
    raise UserError('config.sampling.method = mala needs config.model.output = energy')
  return LangevinSampler(sde, choice.step_size, sde.N, choice.method == 'mala')


def _edm(choice: FrozenConfigDict, order: int) -> Solver:
  return fast.EDM(order, choice.s_churn, choice.s_tmin, choice.s_tmax, choice.s_noise)
