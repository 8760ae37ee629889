"""A network that is trained and measured for likelihood gives the numbers of score_flow.

What the arrays are stands in tests/golden/README.md.
"""

from functools import partial

import agreement
import jax.numpy as jnp
import numpy as np
import pytest
from released_networks import setup_of

from benchmarks.golden import load, parameters, score_of
from likelihood import LikelihoodBound
import losses


@pytest.mark.parametrize('case', ['score_flow_network'])
def test_scores_losses_and_integrands_of_the_bound(case):
  """Its score, weighted losses at importance-sampled times, and integrands of the bound."""
  arrays = load(case)
  setup = setup_of(arrays)
  sde, eps = setup.model.sde, setup.config.training.eps
  score_fn = partial(score_of, setup.model.bind(parameters(arrays, setup)))
  x0, z, t = (jnp.asarray(arrays[f'loss/{name}']) for name in ('data', 'z', 't'))
  score = score_fn(jnp.asarray(arrays['loss/x_t']), t)
  assert agreement.error(score, arrays['loss/score'], quantity='score') < 1e-3
  law = losses.LikelihoodTimes(sde, eps)
  u = jnp.asarray(arrays['loss/u'])
  np.testing.assert_allclose(law.quantile(u), t, rtol=5e-4)
  for mean in (False, True):
    objective = losses.Objective(sde, reduce_mean=mean)
    each = losses.dsm_loss(objective, score_fn, x0, t, z)
    expected = arrays[f'loss/rm{int(mean)}__lw1__iw1/mean']
    assert agreement.error(each.mean(), expected, quantity='loss') < 1e-3
  bound, x0 = LikelihoodBound(sde, eps, sigma_data=1e6), jnp.asarray(arrays['bound/data'])
  theirs = arrays['bound/vp__eps1e-05__dsm__iw1__offset1__Rademacher__centered1/integrand']
  for u, z, expected in zip(arrays['bound/u'], arrays['bound/noise'], theirs, strict=True):
    t, noise = law.quantile(jnp.asarray(u)), jnp.asarray(z)
    ours = law.total * bound.bracket(score_fn, x0, t, noise, noise)
    ours -= 2 * z[0].size * sde.drift_coef(t) / law.density(t)
    np.testing.assert_allclose(ours, expected, rtol=2e-3)
