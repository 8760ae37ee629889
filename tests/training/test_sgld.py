"""SGLD against posteriors that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from training.sgld import polynomial_decay, sgld, SGLDState, TiedMeans

KEY = jax.random.key(0)


def test_an_update_is_half_a_gradient_step_and_noise():
  """Eq. 4: updates less the drift are N(0, eps), independent of each other and of the gradient."""
  eps = 0.04
  grads = {'a': jnp.arange(30_000.0) / 3000, 'b': -jnp.ones((100, 300))}
  tx = sgld(eps, seed=3)
  updates, state = tx.update(grads, tx.init(grads))
  noise = jax.tree.map(lambda u, g: np.asarray(u + 0.5 * eps * g), updates, grads)
  for z in jax.tree.leaves(noise):
    # Standard errors of mean and variance of 30 000 normal numbers are 0.6 % and 0.8 %.
    assert abs(z.mean()) < 4 * np.sqrt(eps / z.size)
    assert abs(z.var() / eps - 1) < 4 * np.sqrt(2 / z.size)
  assert abs(np.corrcoef(noise['a'], noise['b'].ravel())[0, 1]) < 4 / np.sqrt(30_000)
  again, _ = tx.update(grads, state)
  assert abs(np.corrcoef(again['a'] - updates['a'], noise['a'])[0, 1] + np.sqrt(0.5)) < 0.02


def test_steps_fall_polynomially_between_their_ends():
  schedule = polynomial_decay(0.01, 0.0001, 10_000, gamma=0.55)
  np.testing.assert_allclose([schedule(0), schedule(10_000)], [0.01, 0.0001], rtol=1e-6)
  # d log eps / d log (b + t) = -gamma, with b = 10 000 / (100^(1 / 0.55) - 1).
  b = 10_000 / (100 ** (1 / 0.55) - 1)
  slope = np.log(schedule(9 * b) / schedule(0)) / np.log(10)
  np.testing.assert_allclose(slope, -0.55, rtol=1e-5)
  for choice in ((0.01, 0.01, 10), (0.01, 0.001, 10, 0.5), (0.01, 0.001, 10, 1.1)):
    with pytest.raises(ValueError, match='must fall'):
      polynomial_decay(*choice)


def test_a_run_can_be_resumed():
  """The state is the number of steps; the noise is a function of it."""
  tx, theta = sgld(polynomial_decay(0.1, 0.01, 20)), jnp.ones(3)

  def run(theta, state, n):
    for _ in range(n):
      updates, state = tx.update(theta, state)
      theta = optax.apply_updates(theta, updates)
    return theta, state

  whole, _ = run(theta, tx.init(theta), 6)
  half, state = run(theta, tx.init(theta), 3)
  rest, _ = run(half, SGLDState(jnp.asarray(int(state.count))), 3)
  np.testing.assert_array_equal(whole, rest)


def test_a_conjugate_posterior():
  """x_i ~ N(theta, I), theta ~ N(0, 4 I): the posterior is N(sum x / (n + 1/4), 1 / (n + 1/4) I).

  The gradient of a minibatch of 10 of 100 has a variance of 90 n / 10 = 900, of which a step takes
  eps^2 / 4, beside the eps of the noise: 225 eps, that is 4.5 % to 11 % more in the second half.
  """
  n, size, chains, steps = 100, 10, 32, 4000
  x = 1.0 + jax.random.normal(KEY, (n, 3))
  precision = n + 0.25
  schedule = polynomial_decay(1e-3, 2e-4, steps)

  def chain(seed):
    tx = optax.chain(optax.scale(1.0), sgld(schedule, seed))  # among other transformations
    start = jnp.asarray(x.mean(0))
    rngs = jax.random.split(jax.random.fold_in(KEY, seed), steps)

    def step(carry, rng):
      theta, state = carry
      chosen = jax.random.choice(rng, n, (size,), replace=False)
      grad = theta / 4 + n / size * (theta - x[chosen]).sum(0)
      updates, state = tx.update(grad, state)
      theta = optax.apply_updates(theta, updates)
      return (theta, state), theta

    return jax.lax.scan(step, (start, tx.init(start)), rngs)[1]

  theta = np.float64(jax.jit(jax.vmap(chain))(jnp.arange(chains)))[:, steps // 2 :]
  weights = np.float64(schedule(jnp.arange(steps // 2, steps)))
  weights = weights / weights.sum()
  exact = np.asarray(x.sum(0)) / precision
  means = np.einsum('t,ctd->cd', weights, theta)  # weighted as in Eq. 11
  assert (np.abs(means.mean(0) - exact) < 4 * means.std(0, ddof=1) / np.sqrt(chains)).all()
  variances = precision * np.einsum('t,ctd->cd', weights, (theta - exact) ** 2)
  error = 4 * variances.std(0, ddof=1) / np.sqrt(chains)
  assert (np.abs(variances.mean(0) - 1.08) < 0.04 + error).all()


def test_the_mixture_of_welling_and_teh():
  """Both modes, with moments near those of the posterior on a grid."""
  example = TiedMeans()
  x = example.draw(jax.random.key(1), 100)
  line = jnp.stack(jnp.meshgrid(jnp.linspace(-2, 3, 151), jnp.linspace(-4, 4, 151)), -1)
  grid = line.reshape(-1, 2)
  p = np.asarray(jax.nn.softmax(jax.vmap(lambda theta: example.log_posterior(theta, x))(grid)))
  mean = p @ grid
  std = np.sqrt(p @ (grid - mean) ** 2)

  sweeps, seeds = 2500, jnp.arange(16)
  schedule = polynomial_decay(0.01, 1e-4, 100 * sweeps)
  run = jax.jit(jax.vmap(lambda seed: example.sample(seed, x, jnp.zeros(2), schedule, sweeps)))
  theta, weights = (np.asarray(v, np.float64) for v in run(seeds))
  assert theta.shape == (16, sweeps, 2) and weights.shape == (16, sweeps)
  weights = weights[0] / weights[0].sum()
  of_chains = np.einsum('t,ctd->cd', weights, theta)
  error = of_chains.std(0, ddof=1) / 4
  assert (np.abs(of_chains.mean(0) - mean) < 4 * error).all() and (error < 0.2 * std).all()
  spread = np.sqrt(np.einsum('t,ctd->d', weights, (theta - mean) ** 2) / 16)
  np.testing.assert_allclose(spread, std, rtol=0.15)  # minibatches of 1 widen it by some percent
  share = np.einsum('t,ct->c', weights, (theta[..., 1] > 0).astype(float))
  assert abs(share.mean() - p[grid[:, 1] > 0].sum()) < 4 * share.std(ddof=1) / 4
