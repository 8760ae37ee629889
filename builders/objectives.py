"""From a config to what is asked of a score: which SDE, at which times, with which weight."""

from collections.abc import Callable
from typing import Any

from ml_collections import FrozenConfigDict

from data.points import Diffused
import losses
from losses import (
  ChainTimes,
  Coupling,
  ImportanceSampled,
  LikelihoodTimes,
  LogNormalTimes,
  Matching,
  Objective,
  OneTime,
  Stratified,
  TimeLaw,
  UniformTimes,
  Weight,
)
from models.score import ScoreModel
from runtime.errors import UserError
from sde_lib import EDMSDE, RectifiedFlow, ScoreFn, SDE, subVPSDE, VESDE, VPSDE

SDES: dict[str, Callable[[Any], SDE]] = {
  'vesde': lambda model: VESDE(model.sigma_min, model.sigma_max),
  'vpsde': lambda model: VPSDE(model.beta_min, model.beta_max),
  'subvpsde': lambda model: subVPSDE(model.beta_min, model.beta_max),
  'edm': lambda model: EDMSDE(model.sigma_max),
  'flow': lambda model: RectifiedFlow(),
}

# The laws that training times are drawn from, and how a time is weighed, where the config says so.
TIME_LAWS: dict[str, Callable[[Any, SDE], TimeLaw]] = {
  'uniform': lambda training, sde: UniformTimes(training.eps, sde.T),
  'log_normal': lambda training, sde: LogNormalTimes(
    sde, training.time_mean, training.time_std, training.eps
  ),
  'likelihood': lambda training, sde: LikelihoodTimes(sde, training.eps),
}
WEIGHTS: dict[str, Callable[[FrozenConfigDict], Weight]] = {
  'variance': lambda config: losses.by_variance,
  'likelihood': lambda config: losses.by_likelihood,
  'edm': lambda config: losses.ByUnitLoss(config.model.sigma_data),
  'flow': lambda config: losses.by_velocity,
  'min_snr': lambda config: losses.ByMinSNR(config.training.weight_gamma),
  'soft_min_snr': lambda config: losses.BySoftMinSNR(config.training.weight_gamma),
  'sigmoid': lambda config: losses.BySigmoid(config.training.weight_bias),
}
# Those that are rates: of a loss that is an integral over time, however its times are drawn.
_RATES = ('likelihood', 'sigmoid')

# Which noise goes with which data.
COUPLINGS: dict[str, Callable[[Any], Coupling]] = {
  'independent': lambda training: losses.independent,
  'optimal_transport': lambda training: losses.OptimalTransport(
    training.coupling_batch or training.batch_size
  ),
}


def make_objective(
  config: FrozenConfigDict, model: ScoreModel, true_score_fn: Diffused | None
) -> Objective:
  """What is minimised.

  Raises:
    UserError: if a true score is asked for, and there is none.
  """
  training = config.training
  times: TimeLaw = ChainTimes(model.chain, 0.0 if model.chain.has_kernels else training.eps)
  if training.single_scale:
    times = OneTime(training.eps)
  elif training.continuous:
    times = TIME_LAWS[training.time_law or 'uniform'](training, model.sde)
  name = training.weight or ('likelihood' if training.likelihood_weighting else 'variance')
  weight = WEIGHTS[name](config)
  if training.time_law == 'likelihood' and name in _RATES:
    weight = ImportanceSampled(weight, LikelihoodTimes(model.sde, training.eps))
  return Objective(
    kernels=model.trained_with,
    times=Stratified(times) if training.stratified else times,
    weight=weight,
    matching=_matching(training.objective, true_score_fn),
    coupling=COUPLINGS[training.coupling](training),
    reduce_mean=training.reduce_mean,
  )


def _matching(name: str, true_score_fn: Diffused | None) -> Matching | None:
  if name != 'esm':
    return losses.MATCHINGS.get(name)
  if true_score_fn is None:
    raise UserError(
      'config.training.objective = esm needs a true score: that of points, all classes together'
    )
  return explicit_matching(true_score_fn)


def explicit_matching(true_score_fn: ScoreFn) -> Matching:
  """Explicit score matching, as an `Objective` takes it."""
  return lambda score_fn, x, t, rng: losses.explicit_score_matching(true_score_fn, score_fn, x, t)
