"""Progressive distillation: what a student is asked for, on normal data, whose flow is known."""

import dataclasses
from functools import partial
import itertools

from analytic import gaussian, moments
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samplers.base import GridSampler
from samplers.multistep import DDIM
from samplers.time_grids import cosine, Karras, TimeGrid, uniform
from sde_lib import EDMSDE, expand, RectifiedFlow, VESDE, VPSDE
from training.progressive import Halving

MEAN, STD, KEY = 0.4, 0.5, jax.random.key(0)
STAGES = {
  'vp': Halving(VPSDE(), 4, 1e-5, cosine),
  'edm': Halving(EDMSDE(80.0), 3, 0.002, Karras(7.0)),
  'flow': Halving(RectifiedFlow(), 2, 1e-3, uniform),
  've': Halving(VESDE(0.01, 20.0), 5, 1e-5, uniform),
  'many': Halving(VPSDE(), 512, 1e-5, cosine),  # neighbouring times are almost the same
}


def denoised(sde, x, t):
  """E[x_0 | x_t = x] of N(MEAN, STD^2)."""
  alpha, _ = sde.kernel(t)
  mean, variance = (expand(v, x) for v in moments(sde, MEAN, STD, t))
  return MEAN + expand(alpha, x) * STD**2 / variance * (x - mean)


def ddim(sde, times, denoise, x):
  """Steps of DDIM for rows x, each down its own times [steps + 1, B], by Eq. 12 of its paper."""
  for t, s in itertools.pairwise(times):
    data = denoise(x, t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([expand(v, x) for v in sde.kernel(u)] for u in (t, s))
    x = alpha_s * data + sigma_s * (x - alpha_t * data) / sigma_t
  return x


def started(stage):
  """Noisy data where steps of the student begin, the first and the last among them; which ones."""
  i = jnp.asarray(np.linspace(0, stage.num_steps - 1, 16).astype(np.int32))
  rng = np.random.default_rng(0)
  x0, z = jnp.float32(MEAN + STD * rng.standard_normal((2, 16, 3)))
  return i, x0, z, stage.noised(x0, i, z)


@pytest.mark.parametrize('name', STAGES)
def test_one_step_with_the_target_goes_where_two_of_the_teacher_do(name):
  stage = STAGES[name]
  i, _, _, x = started(stage)
  teacher, times = partial(denoised, stage.sde), jnp.asarray(stage.times, jnp.float32)
  t, u, s = times[2 * i], times[2 * i + 1], times[2 * i + 2]
  target = stage.target(teacher, x, i)
  one = ddim(stage.sde, jnp.stack([t, s]), lambda x, t: target, x)
  two = ddim(stage.sde, jnp.stack([t, u, s]), teacher, x)
  np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-5)


def test_the_target_is_that_of_the_paper():
  """Algorithm 2 as it is written, with its differences, in float64."""
  stage = STAGES['vp']
  i, _, _, x = started(stage)
  got = np.asarray(stage.target(partial(denoised, stage.sde), x, i))
  with jax.enable_x64(True):
    x = jnp.asarray(np.float64(x))
    t, u, s = (jnp.asarray(stage.times[2 * np.asarray(i) + k]) for k in range(3))
    z_s = ddim(stage.sde, jnp.stack([t, u, s]), partial(denoised, stage.sde), x)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
      [expand(v, x) for v in stage.sde.kernel(v)] for v in (t, s)
    )
    ratio = sigma_s / sigma_t
    expected = (z_s - ratio * x) / (alpha_s - ratio * alpha_t)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', STAGES)
def test_the_perfect_student_has_no_loss_and_others_have(name):
  stage = STAGES[name]
  i, x0, z, x = started(stage)
  teacher, target = partial(denoised, stage.sde), stage.target(partial(denoised, stage.sde), x, i)
  loss = stage.loss(lambda x, t: target, teacher, x0, i, z)
  np.testing.assert_array_equal(loss, 0)
  off = stage.loss(lambda x, t: target + 0.1, teacher, x0, i, z)
  snr = np.exp(2 * np.asarray(stage.sde.log_snr(jnp.asarray(stage.steps['t'])[i])))
  np.testing.assert_allclose(off, np.maximum(snr, 1) * 0.01, rtol=1e-3)


@pytest.mark.parametrize('name', ['vp', 'edm'])
def test_a_perfect_student_draws_what_its_teacher_draws_in_half_the_steps(name):
  """From the same noise to the same samples, through the samplers that a config makes."""
  stage, data = STAGES[name], gaussian(jnp.full(2, MEAN), STD)
  finer = TimeGrid(2 * stage.num_steps + 1, stage.eps, stage.spacing)
  np.testing.assert_allclose(finer.times(stage.sde)[::2], stage.grid.times(stage.sde), rtol=1e-12)
  teacher = GridSampler(stage.sde, DDIM(), finer, noise_removal=False)
  score_fn = data.score_fn(stage.sde)

  def student(x, t):
    i = jnp.argmin(jnp.abs(jnp.asarray(stage.steps['t']) - t[:, None]), -1)
    alpha, sigma = (expand(v, x) for v in stage.sde.kernel(t))
    return (alpha * stage.target(partial(denoised, stage.sde), x, i) - x) / sigma**2

  (of_teacher, nfe), (of_student, half) = (
    sampler(KEY, score, (64, 2))
    for sampler, score in ((teacher, score_fn), (stage.sampler(), student))
  )
  assert (nfe, half) == (2 * stage.num_steps, stage.num_steps)
  np.testing.assert_allclose(of_student, of_teacher, atol=2e-3)
  assert abs(float(of_teacher.mean()) - MEAN) < 0.3 and float(of_teacher.std()) > 0.1


def test_the_loss_is_the_mean_over_dimensions_or_half_the_sum():
  stage = STAGES['vp']
  i, x = jnp.zeros(16, jnp.int32), jnp.ones((16, 3))  # at time T, of weight 1
  mean = stage.loss(lambda x, t: 0 * x + 1, lambda x, t: 0 * x, x, i, x)
  half = dataclasses.replace(stage, reduce_mean=False)
  of_sum = half.loss(lambda x, t: 0 * x + 1, lambda x, t: 0 * x, x, i, x)
  np.testing.assert_allclose(mean, np.ones(16), rtol=1e-6)
  np.testing.assert_allclose(of_sum, np.full(16, 1.5), rtol=1e-6)


def test_equal_angles():
  sde = VPSDE()
  times = cosine(sde, 9, 1e-3)
  with jax.enable_x64(True):
    alpha, sigma = sde.kernel(jnp.asarray(times))
  steps = np.diff(np.arctan2(sigma, alpha))
  np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
  assert (times[0], times[-1]) == (sde.T, 1e-3)
