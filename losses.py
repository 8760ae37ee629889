"""Score matching: what is asked of a score, at which times, with which weight.

The denoising score matching loss of the continuous SDEs (Eq. 7 of
https://arxiv.org/abs/2011.13456), of SMLD (Eq. 1) and of DDPM (Eq. 3) is one formula: they differ
in the times that they draw and in the kernel alpha, std that perturbs the data, not in what they
minimise. Its forerunners, explicit, implicit and sliced score matching, ask for the same score.
"""

from collections.abc import Callable
import dataclasses

import jax
from jax import Array
import jax.numpy as jnp

from sde_lib import expand, ScoreFn, SDE

# (score_fn, x [B, ...], t [B], key) -> loss [B], whose expectation over x ~ p_t is least at the
# score of p_t.
Matching = Callable[[ScoreFn, Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised, and over which data.

  Attributes:
    matching: what is asked of the score at x_t, or None for denoising score matching.
    single_scale: train at time eps alone: one level of noise.
    continuous: train at all times in [eps, T], or only at those of the chain.
    reduce_mean: the mean over dimensions, or half the sum, the released code's scale.
    likelihood_weighting: weigh times by g(t)^2, for likelihood, not by std^2, for samples.
  """

  matching: Matching | None = None
  single_scale: bool = False
  continuous: bool = True
  reduce_mean: bool = False
  likelihood_weighting: bool = False


def sample_times(
  rng: Array, sde: SDE, n: int, continuous: bool, single_scale: bool = False
) -> Array:
  """n training times [n], uniform over [eps, T] or over the chain's times, or all of them eps."""
  if single_scale:
    return jnp.full(n, sde.eps)
  if continuous:
    return jax.random.uniform(rng, (n,), minval=sde.eps, maxval=sde.T)
  return sde.time(jax.random.randint(rng, (n,), 0, sde.N))


# What may be asked of a score at x [B, ...] and times t [B]; each is a loss [B].


def explicit_score_matching(true_score_fn: ScoreFn, score_fn: ScoreFn, x: Array, t: Array) -> Array:
  """1/2 ||s(x) - grad log p(x)||^2, where the true score is known (Hyvarinen 2005, Eq. 2).

  https://jmlr.org/papers/v6/hyvarinen05a.html. The others have this expectation but for a constant.
  """
  return 0.5 * _square(score_fn(x, t) - true_score_fn(x, t))


def implicit_score_matching(score_fn: ScoreFn, x: Array, t: Array) -> Array:
  """tr(ds/dx) + 1/2 ||s(x)||^2, integrated by parts (Hyvarinen 2005, Theorem 1).

  The trace is exact, and costs one derivative for each dimension.
  """
  axes = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, 1, *x.shape[1:])

  def along(axis: Array) -> tuple[Array, Array]:
    v = jnp.broadcast_to(axis, x.shape)
    score, slope = jax.jvp(lambda x: score_fn(x, t), [x], [v])
    return score, _dot(v, slope)

  scores, slopes = jax.vmap(along)(axes)
  return slopes.sum(0) + 0.5 * _square(scores[0])


def sliced_score_matching(score_fn: ScoreFn, x: Array, t: Array, v: Array) -> Array:
  """v^T (ds/dx) v + 1/2 (v^T s)^2 for random directions v like x, E[v v^T] = I.

  SSM of Song et al. 2019, https://arxiv.org/abs/1905.07088.
  """
  score, slope = jax.jvp(lambda x: score_fn(x, t), [x], [v])
  return _dot(v, slope) + 0.5 * jnp.square(_dot(v, score))


def hutchinson_score_matching(score_fn: ScoreFn, x: Array, t: Array, v: Array) -> Array:
  """v^T (ds/dx) v + 1/2 ||s||^2: implicit score matching with Hutchinson's estimate of the trace.

  Of less variance than `sliced_score_matching` (SSM-VR of the same paper).
  """
  score, slope = jax.jvp(lambda x: score_fn(x, t), [x], [v])
  return _dot(v, slope) + 0.5 * _square(score)


MATCHINGS: dict[str, Matching] = {
  'ism': lambda score_fn, x, t, rng: implicit_score_matching(score_fn, x, t),
  'ssm': lambda score_fn, x, t, rng: sliced_score_matching(score_fn, x, t, _signs(rng, x)),
  'ssm_vr': lambda score_fn, x, t, rng: hutchinson_score_matching(score_fn, x, t, _signs(rng, x)),
}


def _signs(rng: Array, x: Array) -> Array:
  return jax.random.rademacher(rng, x.shape, x.dtype)


def _dot(u: Array, v: Array) -> Array:
  return (u * v).reshape(len(u), -1).sum(-1)


def _square(x: Array) -> Array:
  return _dot(x, x)


def score_matching_loss(
  sde: SDE, score_fn: ScoreFn, x0: Array, t: Array, z: Array, rng: Array, objective: Objective
) -> Array:
  """The loss of each example [B] at given times and noise, of any kind.

  What is asked of the score at x_t = alpha x_0 + std z is weighed by std^2, as in `dsm_loss`, which
  so is this loss of `explicit_score_matching`, but for a constant at each time.

  Args:
    rng: the key of random directions.
    sde, score_fn, x0, t, z, objective: as in `dsm_loss`.
  """
  if objective.matching is None:
    return dsm_loss(sde, score_fn, x0, t, z, objective)
  alpha, std = sde.kernel(t, objective.continuous)
  x = expand(alpha, x0) * x0 + expand(std, x0) * z
  weight = sde.diffusion_coef(t) if objective.likelihood_weighting else std
  loss = weight**2 * objective.matching(score_fn, x, t, rng)
  return 2 / x0[0].size * loss if objective.reduce_mean else loss


def dsm_loss(
  sde: SDE, score_fn: ScoreFn, x0: Array, t: Array, z: Array, objective: Objective
) -> Array:
  """The denoising score matching loss of each example [B] at given times and noise (Eq. 7).

  ||std s(x_t, t) + z||^2 with x_t = alpha x_0 + std z, that is the squared error of the score
  times std^2; with likelihood weighting it is multiplied by g(t)^2 / std^2
  (https://arxiv.org/abs/2101.09258).

  Args:
    sde: the forward SDE.
    score_fn: the score that is trained.
    x0: data [B, ...].
    t: times [B].
    z: standard normal noise, like x0.
    objective: which kernel, weighting and reduction over dimensions.
  """
  alpha, std = (expand(v, x0) for v in sde.kernel(t, objective.continuous))
  residual = std * score_fn(alpha * x0 + std * z, t) + z
  if objective.likelihood_weighting:
    residual *= expand(sde.diffusion_coef(t), x0) / std
  squares = jnp.square(residual).reshape(x0.shape[0], -1)
  return squares.mean(-1) if objective.reduce_mean else 0.5 * squares.sum(-1)
