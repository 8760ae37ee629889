"""What the documentation shows runs, and does what it says."""

from pathlib import Path
import re

from analytic import check_moments
from analytic import TWO_MODES as DATA
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exponential_integrators import DDIM
from sampler_lib import GridSampler
from sde_lib import SDE

DOCS = Path(__file__).parent.parent / 'docs'
KEY = jax.random.key(0)


@pytest.fixture(scope='module')
def shown() -> dict:
  """What the Python of docs/extending.md defines."""
  names: dict = {}
  for block in re.findall(r'```python\n(.*?)```', (DOCS / 'extending.md').read_text(), re.DOTALL):
    exec(block, names)
  return names


def test_the_new_sde_is_one(shown):
  """Its coefficients solve the moment equations, and lambda has an inverse."""
  sde, t = shown['CosineSDE'](), jnp.linspace(0.05, 1.0, 9)
  assert isinstance(sde, SDE)
  alpha, d_alpha = jax.jvp(sde.alpha, [t], [jnp.ones_like(t)])
  variance, d_variance = jax.jvp(lambda t: sde.sigma(t) ** 2, [t], [jnp.ones_like(t)])
  f, g = sde.drift_coef(t), sde.diffusion_coef(t)
  np.testing.assert_allclose(d_alpha, f * alpha, rtol=1e-4)
  np.testing.assert_allclose(d_variance, 2 * f * variance + g**2, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(sde.time_of_log_snr(sde.log_snr(t)), t, atol=1e-5)


@pytest.mark.parametrize(('name', 'nfe'), [('pc', 200), ('euler', 50)])
def test_the_new_samplers_recover_the_data(shown, name, nfe):
  """First-order steps: 50 have a bias of up to 10 %."""
  sampler = shown[name]
  x, taken = sampler(KEY, DATA.score_fn(sampler.sde), (2000, 2))
  assert taken == nfe
  check_moments(x, DATA, bias=0.1)


def test_the_new_solver_is_ddim(shown):
  ours = shown['euler']
  theirs = GridSampler(ours.sde, DDIM(), ours.grid)
  (x, _), (y, _) = (s(KEY, DATA.score_fn(s.sde), (8, 2)) for s in (ours, theirs))
  np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
