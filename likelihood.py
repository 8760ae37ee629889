"""Exact likelihoods and encodings through the probability flow ODE (Sec. 4.3, Appendix D).

The ODE carries data at time eps to the prior at time T, one to one; how it changes volume on its
way gives the density of the data. Drift and divergence share one evaluation of the network and
its pullback.
"""

import dataclasses
from functools import partial
import math

import flax
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Shaped
import numpy as np

from runtime.errors import unknown
from runtime.shapes import Data, Key, PerRow, Time
from samplers import ode
from samplers.base import as_pytree
from samplers.ode import Observer
from sampling import ProbabilityFlow
from sde_lib import check_eps, expand, ScoreFn, SDE

KeyOrKeys = Key | Shaped[Array, ' b']
Probes = Float[Array, 'n b *d']
Logp = Float[Array | np.ndarray, ' b']  # also after it was fetched, in float64

_DRAW = {'rademacher': jax.random.rademacher, 'gaussian': jax.random.normal}
PROBES = (*_DRAW, 'exact')


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """log p(x_0), from the instantaneous change of variables (Eq. 39, Chen et al. 2018).

  log p_0(x(0)) = log p_T(x(T)) + int_0^T div f(x(t), t) dt along dx/dt = f(x, t), the probability
  flow, begun at eps. The divergence is the Skilling-Hutchinson estimate (Eq. 40), the mean of
  v^T (df/dx) v over probes v with E[v v^T] = I, which stay what they are along the way; or the
  exact trace, one pullback for each dimension.

  The whole batch takes the same adaptive steps, whose error is bounded in the root mean square;
  so a value depends on the rest of its batch, within the tolerance. Steps of its own for each image
  would mostly make that smaller, but in float32 not zero, and the slowest image may take half as
  many evaluations again as the batch does.

  Attributes:
    sde: the forward SDE.
    eps: the time that the data are taken to be at; 1e-5 in the released code.
    rtol, atol: relative and absolute tolerance of the solver.
    probe: one of `PROBES`.
    n_probes: how many probes are averaged; not read for the exact trace.

  Raises:
    UserError: for a probe that there is not.
    ValueError: unless 0 <= eps < T.
  """

  sde: SDE
  eps: float = 1e-5
  rtol: float = 1e-5
  atol: float = 1e-5
  probe: str = 'rademacher'
  n_probes: int = 1

  def __post_init__(self) -> None:
    if self.probe not in PROBES:
      raise unknown('probe', self.probe, PROBES)
    check_eps(self.sde, self.eps)

  def __call__(
    self, rng: KeyOrKeys, score_fn: ScoreFn, x0: Data, observe: Observer | None = None
  ) -> tuple[PerRow, Data, int]:
    """Evaluates the log-density of x0.

    Args:
      rng: the key of the probes; or keys, one for each of x0, whose probes are then the same
        in any batch.
      score_fn: the score; compiled code is reused if it is a pytree, as `ScoreModel.bind` gives.
      x0: the data, scaled as the network sees them.
      observe: told the fraction that is done, and (x, log-density so far) there.

    Returns:
      log p(x0) in nats, the latent x(T), and the number of evaluations of score and pullback.
    """
    flow = ProbabilityFlow(as_pytree(score_fn), self.sde)
    state, probes = _begin(rng, x0, self.probe, self.n_probes)
    (z, change), nfe = ode.integrate(
      VolumeChange(flow, probes), state, self.eps, self.sde.T,
      rtol=self.rtol, atol=self.atol, observe=observe,
    )  # fmt: skip
    return self.sde.prior_logp(z) + change, z, nfe


@flax.struct.dataclass
class VolumeChange:
  """The drift of (x, int div f dt), as a pytree of its arrays."""

  flow: ProbabilityFlow
  probes: Probes

  def __call__(self, state: tuple[Data, PerRow], t: Time) -> tuple[Data, PerRow]:
    drift, pullback = jax.vjp(lambda x: self.flow(x, t), state[0])
    (products,) = jax.vmap(pullback)(self.probes)
    traces = (products * self.probes).reshape(*self.probes.shape[:2], -1).sum(-1)
    return drift, traces.mean(0)


@partial(jax.jit, static_argnums=(2, 3))  # makes arrays that reach all processes
def _begin(rng, x0, probe, n):
  change = 0 * x0.reshape(len(x0), -1)[:, 0]  # on the devices that x0 is on
  return (x0, change), draw_probes(rng, x0, probe, n)


def draw_probes(rng: KeyOrKeys, x: Data, probe: str, n: int) -> Probes:
  """n probes for x; for the exact trace the D axes, each sqrt(D) long.

  The key is split in one for each row, unless they are given.
  """
  if probe == 'exact':
    dim = math.prod(x.shape[1:])
    axes = math.sqrt(dim) * jnp.eye(dim, dtype=x.dtype).reshape(dim, 1, *x.shape[1:])
    return jnp.broadcast_to(axes, (dim, *x.shape))
  rngs = rng if rng.ndim else jax.random.split(rng, len(x))
  return jax.vmap(lambda rng: _DRAW[probe](rng, (n, *x.shape[1:]), x.dtype), out_axes=1)(rngs)


def bits_per_dim(logp: Logp, dim: int, level_width: float) -> Logp:
  """Negative log-likelihood in bits per dimension of data that have levels.

  The density per level is smaller than that of the scaled data by the width of a level, in each of
  the `dim` dimensions, which adds -log2 of it. The 256 levels of a pixel are 1/256 wide in [0, 1],
  which makes 8 bits, and 2/256 in [-1, 1], which makes 7; see `Codec.level_width`.
  """
  return -logp / (dim * math.log(2)) - math.log2(level_width)


def encode(
  sde: SDE,
  score_fn: ScoreFn,
  x0: Data,
  eps: float = 1e-5,
  rtol: float = 1e-5,
  atol: float = 1e-5,
) -> tuple[Data, int]:
  """The latent x(T) of data x0, taken to be x(eps), and the score evaluations.

  It is unique to them (Sec. 4.3).
  """
  flow = ProbabilityFlow(as_pytree(score_fn), sde)
  return ode.integrate(flow, x0, eps, sde.T, rtol=rtol, atol=atol)


def decode(
  sde: SDE,
  score_fn: ScoreFn,
  z: Data,
  eps: float = 1e-5,
  rtol: float = 1e-5,
  atol: float = 1e-5,
) -> tuple[Data, int]:
  """The data x(eps) of latents z, and the number of score evaluations."""
  flow = ProbabilityFlow(as_pytree(score_fn), sde)
  return ode.integrate(flow, z, sde.T, eps, rtol=rtol, atol=atol)


def interpolate(z0: Data, z1: Data, weight: PerRow) -> Data:
  """Spherical interpolation between latents z0 and z1, with a weight of z1.

  Latents are almost Gaussian, of almost the same norm; between them on a straight line there are
  none. Scaling latents by less than one lowers the paper's temperature (Appendix D.4, Fig. 6).
  """
  flat0, flat1 = (z.reshape(z.shape[0], -1) for z in (z0, z1))
  norms = jnp.linalg.norm(flat0, axis=-1) * jnp.linalg.norm(flat1, axis=-1)
  angle = jnp.arccos(jnp.clip((flat0 * flat1).sum(-1) / norms, -1.0, 1.0))
  # sin(w a) / sin(a), which is w for latents in the same direction.
  share0, share1 = (
    w * jnp.sinc(w * angle / jnp.pi) / jnp.sinc(angle / jnp.pi) for w in (1 - weight, weight)
  )
  return expand(share0, z0) * z0 + expand(share1, z1) * z1
