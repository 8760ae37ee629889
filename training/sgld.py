"""Stochastic gradient Langevin dynamics: from an optimiser to samples of a posterior.

Welling & Teh 2011, https://www.stats.ox.ac.uk/~teh/research/compstats/WelTeh2011a.pdf. Minibatches
make the gradient noisy, but of the order eps, while the noise that is added is of the order
sqrt(eps): as the steps eps shrink, the second wins, and optimisation turns into sampling.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import optax

Schedule = Callable[[Array], Array]


class SGLDState(NamedTuple):
  """How many steps were taken; the noise is a function of it."""

  count: Array  # type: ignore[assignment]  # int32 []; hides the method of tuples


def sgld(step_size: float | Schedule, seed: int = 0) -> optax.GradientTransformation:
  """theta' = theta - eps_t / 2 g + N(0, eps_t I) (Eq. 4).

  Args:
    step_size: eps, or a function of the number of steps taken, such as `polynomial_decay`.
    seed: of the noise, which depends on nothing else but the number of the step.

  Returns:
    A transformation of g, the gradient of the negative log posterior: of
    -log p(theta) - N / n sum_i log p(x_i | theta), with n of the N data in the minibatch.
  """
  schedule = step_size if callable(step_size) else lambda count: jnp.full((), step_size)

  def init(params: optax.Params) -> SGLDState:
    del params
    return SGLDState(jnp.zeros((), jnp.int32))

  def update(
    grads: optax.Updates, state: SGLDState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, SGLDState]:
    del params
    eps = schedule(state.count)
    leaves, tree = jax.tree.flatten(grads)
    rngs = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.count), len(leaves))
    updates = [
      -0.5 * eps * g + jnp.sqrt(eps) * jax.random.normal(rng, g.shape, g.dtype)
      for rng, g in zip(rngs, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, updates), SGLDState(state.count + 1)

  return optax.GradientTransformation(init, update)


def polynomial_decay(first: float, last: float, steps: int, gamma: float = 0.55) -> Schedule:
  """eps_t = a (b + t)^-gamma, from eps_0 = first to eps_steps = last (Sec. 2).

  With gamma in (0.5, 1] the sum of eps is infinite, and that of eps^2 is not, which convergence
  needs (Eq. 2).

  Raises:
    ValueError: if the steps do not shrink, or too slowly for these sums.
  """
  if not (0 < last < first and 0.5 < gamma <= 1):
    raise ValueError(
      f'step sizes must fall, with gamma in (0.5, 1]; got {first} to {last}, gamma = {gamma}'
    )
  b = steps / ((first / last) ** (1 / gamma) - 1)
  a = first * b**gamma
  return lambda t: a * (b + t) ** -gamma


@dataclasses.dataclass(frozen=True)
class TiedMeans:
  """The example of Sec. 5.1: a mixture of two Gaussians whose means share a parameter.

  theta_1 ~ N(0, 10), theta_2 ~ N(0, 1), x_i ~ 1/2 N(theta_1, 2) + 1/2 N(theta_1 + theta_2, 2), all
  given by their variances. Its posterior after data of theta = (0, 1) has a second mode near
  (1, -1), which says the same of the data.
  """

  def draw(self, rng: Array, n: int) -> Array:
    """Data [n] of theta = (0, 1)."""
    rng_mode, rng_z = jax.random.split(rng)
    mode = jax.random.bernoulli(rng_mode, shape=(n,))
    return mode + math.sqrt(2) * jax.random.normal(rng_z, (n,))

  def log_prior(self, theta: Array) -> Array:
    """log p(theta) [] of theta [2]."""
    return jax.scipy.stats.norm.logpdf(theta, 0.0, jnp.sqrt(jnp.array([10.0, 1.0]))).sum()

  def log_likelihood(self, theta: Array, x: Array) -> Array:
    """log p(x_i | theta) [n] of data x [n]."""
    means = jnp.stack([theta[0], theta[0] + theta[1]])
    each = jax.scipy.stats.norm.logpdf(x[:, None], means, math.sqrt(2))
    return jax.nn.logsumexp(each, axis=1) - math.log(2)

  def log_posterior(self, theta: Array, x: Array) -> Array:
    """log p(theta | x) [] but for a constant."""
    return self.log_prior(theta) + self.log_likelihood(theta, x).sum()

  def sample(
    self, seed: int, x: Array, theta: Array, schedule: Schedule, sweeps: int
  ) -> tuple[Array, Array]:
    """SGLD with minibatches of one, from theta [2].

    Returns:
      theta [sweeps, 2] after each sweep through as many data as there are, and the step sizes
      [sweeps] there, which are its weights in an average (Eq. 11).
    """
    tx, n = sgld(schedule, seed), len(x)
    rng = jax.random.key(seed + 1)  # of the minibatches

    def negative(theta: Array, i: Array) -> Array:
      return -self.log_prior(theta) - n * self.log_likelihood(theta, x[i][None])[0]

    def step(carry: tuple[Array, SGLDState], i: Array) -> tuple[tuple[Array, SGLDState], None]:
      theta, state = carry
      updates, state = tx.update(jax.grad(negative)(theta, i), state)
      return (optax.apply_updates(theta, updates), state), None

    def sweep(carry: tuple[Array, SGLDState], k: Array) -> tuple[tuple[Array, SGLDState], Array]:
      chosen = jax.random.randint(jax.random.fold_in(rng, k), (n,), 0, n)
      carry, _ = jax.lax.scan(step, carry, chosen)
      return carry, carry[0]

    _, chain = jax.lax.scan(sweep, (theta, tx.init(theta)), jnp.arange(sweeps))
    return chain, schedule(n * jnp.arange(1, sweeps + 1))
