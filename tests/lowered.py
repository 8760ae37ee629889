"""Programs as other devices would get them: lowered for GPUs or TPUs on any machine, as text."""

from collections.abc import Callable, Iterator
import contextlib
import re
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import jaxtyping

from builders.setup import build, Setup
from builders.training import score_task
from configs.ve import digits
import likelihood
from models.score import ModelScore
from samplers import adaptive_sde, base, langevin, ode
import sampling

MODULES = (sampling, likelihood, adaptive_sde, base, langevin, ode)
PLATFORMS = ('cuda', 'tpu')
_PRODUCT = re.compile(r'stablehlo\.(dot_general|dot|convolution)\b.*')
_PRECISION = re.compile(r'precision(?:_config)? = \[([^\]]*)\]')


def lower(function: Callable, platform: str, *args: Any) -> str:
  """The StableHLO of a function, jitted or not, for a platform."""
  jitted = function if hasattr(function, 'trace') else jax.jit(function)
  return jitted.trace(*args).lower(lowering_platforms=(platform,)).as_text()


def precisions(text: str) -> list[str]:
  """The precision of each matrix product and convolution: DEFAULT, HIGH or HIGHEST."""
  found = []
  for product in _PRODUCT.finditer(text):
    operands = _PRECISION.search(product[0])
    names = set(re.findall(r'[A-Z]+', operands[1])) if operands else {'DEFAULT'}
    found.append('+'.join(sorted(names)))
  return found


@contextlib.contextmanager
def programs_of(platform: str, *modules: ModuleType) -> Iterator[dict[str, str]]:
  """The texts, by name, of the jitted functions of modules that are called within.

  They are lowered and not run: each returns zeros.
  """
  texts: dict[str, str] = {}

  def note(name: str, jitted: Any) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
      if name not in texts:
        traced = jitted.trace(*args, **kwargs)
        texts[name] = traced.lower(lowering_platforms=(platform,)).as_text()
      shapes = jitted.eval_shape(*args, **kwargs)
      return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return call

  with contextlib.ExitStack() as stack:
    # What is lowered are shapes, which classes that hold arrays are not meant for.
    jaxtyping.config.update('jaxtyping_disable', True)
    stack.callback(jaxtyping.config.update, 'jaxtyping_disable', False)
    for module in modules:
      for name, value in vars(module).copy().items():
        if isinstance(value, jax.stages.Wrapped) and value.__module__ == module.__name__:
          full = f'{module.__name__}.{name}'
          stack.enter_context(mock.patch.object(module, name, note(full, value)))
    yield texts


def tiny(**fields: Any) -> Setup:
  """A tiny U-Net with FIR, attention and Fourier features; fields as section__name."""
  config = digits.get_config()
  wanted = {'model__nf': 8, 'model__ch_mult': (1, 1), 'sampling__num_steps': 5} | fields
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in wanted.items()})
  return build(config)


def training_step(setup: Setup, platform: str) -> str:
  """The program of a training step."""
  task = score_task(setup)
  key = jax.random.key(0)
  state = jax.eval_shape(task.init, key)
  batch = {'data': jax.ShapeDtypeStruct((4, *setup.data_shape), 'uint8')}
  return lower(task.update, platform, state, task.frozen, batch, key)


def sampler(setup: Setup, platform: str) -> dict[str, str]:
  """The programs of the sampler of a setup."""
  with programs_of(platform, *MODULES) as texts:
    setup.sampler(jax.random.key(0), score_of(setup), (2, *setup.data_shape))
  return texts


def score_of(setup: Setup) -> ModelScore:
  """The score at parameters that are all zero."""
  shapes = jax.eval_shape(
    lambda rng: setup.model.init(rng, (1, *setup.data_shape)), jax.random.key(0)
  )
  return setup.model.bind(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
