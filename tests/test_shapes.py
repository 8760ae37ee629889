"""Shapes are types: what public signatures say of arrays is checked in tests, and costs no user."""

from pathlib import Path
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

from losses import dsm_loss, Objective
from models.preconditioning import PRECONDITIONINGS
from sde_lib import VESDE, VPSDE

X, T = jnp.zeros((3, 2, 2, 1)), jnp.ones(3)
ONES = jnp.ones((3, 1, 1, 1))


@pytest.mark.parametrize(
  'call',
  [
    lambda: VPSDE().marginal_prob(X, T[:2]),  # two times of three images
    lambda: VPSDE().marginal_prob(X, T[:, None]),
    lambda: VPSDE().alpha(jnp.arange(3)),  # whole numbers
    lambda: VESDE().chain(10).time(T),  # times, not steps
    lambda: VESDE().reverse(lambda x, t: x).denoise(X, T[0]),  # one time of three
    lambda: dsm_loss(Objective(VPSDE()), lambda x, t: x, X, T, X[..., 0]),
    lambda: PRECONDITIONINGS['noise'].score(lambda x: (x[..., 0], x), X, ONES, ONES),
  ],
)  # fmt: skip
def test_a_wrong_shape_raises(call):
  with pytest.raises(jaxtyping.TypeCheckError):
    call()


def test_a_command_checks_no_shapes():
  """jaxtyping's annotations stay; what checks them is of the tests alone."""
  code = (
    'import sys, main, run_lib; assert "jaxtyping" in sys.modules\n'
    'assert "beartype" not in sys.modules\n'
    'import jax.numpy as jnp; from sde_lib import VPSDE\n'
    'VPSDE().marginal_prob(jnp.zeros((3, 2)), jnp.ones(1))'
  )
  root = Path(__file__).parent.parent
  subprocess.run([sys.executable, '-c', code], cwd=root, check=True)
