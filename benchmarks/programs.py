"""Programs of a config whose compiling is looked at: a step, a sampler's segment, a likelihood."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import dataclasses
from functools import partial
import time
from typing import Any
from unittest import mock

import jax
from jax import Array
from jax.extend.core import Jaxpr, jaxpr_as_fun, jaxprs_in_params
import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from benchmarks import common
from builders.setup import build, Setup
from builders.training import score_task
import likelihood
from runtime.devices import out_of_memory
from runtime.errors import UserError
from runtime.shapes import Told
from samplers import base
import sampling
from training import loop
from training.step import finite_step


@dataclasses.dataclass(frozen=True)
class Program:
  """A function, and the shapes and shardings of its arguments."""

  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  donated: tuple[int, ...] = ()
  results: Any = None  # their shardings, where they are prescribed


def _shapes(tree: Any, where: NamedSharding) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def _key(setup: Setup) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=setup.devices.replicated)


def training_step(setup: Setup) -> Program:
  """One step, as the training loop compiles it."""
  task, config, devices = score_task(setup), setup.config, setup.devices
  n, points = config.training.batch_size, bool(config.data.dim)
  batch = {'data': jax.ShapeDtypeStruct((n, *setup.data_shape), 'float32' if points else 'uint8')}
  if setup.model.num_classes:
    batch['label'] = jax.ShapeDtypeStruct((n,), 'int32')
  if channels := setup.model.condition_channels:
    batch['condition'] = jax.ShapeDtypeStruct((n, *setup.data_shape[:-1], channels), 'uint8')
  initial = jax.eval_shape(task.init, _key(setup))
  state = jax.eval_shape(partial(loop.as_trained, devices=devices), initial)
  shardings = devices.state_shardings(state)
  state = jax.tree.map(_shapes, state, shardings)
  update = partial(finite_step, task.update) if config.training.skip_nonfinite else task.update
  arguments = (state, None, _shapes(batch, devices.batch), _key(setup))
  return Program(update, arguments, (0,), (shardings, devices.replicated))


def sampler_segment(setup: Setup) -> Program:
  """The sampler, stopped after the first of the segments that it is cut into."""

  def first(advance: Callable, state: Any, n: int, observe: Any) -> Any:
    return advance(state, 0, -(-n // base.SEGMENTS))

  def draw(params: Any, rng: Array) -> Array:
    score_fn = _score(setup, params, shape[0])
    with mock.patch.object(base, 'in_segments', first):
      return setup.sampler(rng, score_fn, shape, sharding=setup.devices.batch)[0]

  shape = (setup.config.eval.batch_size, *setup.data_shape)
  return Program(draw, (_params(setup), _key(setup)), (), setup.devices.batch)


def likelihood_step(setup: Setup) -> Program:
  """Drift and divergence of the probability flow, as a solver of the likelihood asks for them."""
  n, devices = setup.config.eval.batch_size, setup.devices

  def drift(params: Any, x: Array, v: Array, t: Array) -> tuple[Array, Array]:
    flow = sampling.ProbabilityFlow(_score(setup, params, n), setup.model.sde)
    return likelihood.VolumeChange(flow, v)((x, jnp.zeros((1, len(x)))), t)

  x = jax.ShapeDtypeStruct((n, *setup.data_shape), 'float32')
  v = jax.ShapeDtypeStruct((1, *x.shape), 'float32')  # one probe
  t = jax.ShapeDtypeStruct((), 'float32', sharding=devices.replicated)
  return Program(drift, (_params(setup), _shapes(x, devices.batch), _shapes(v, devices.batches), t))


def _score(setup: Setup, params: Any, n: int) -> Any:
  """The score of n rows, of one condition where the model is told any."""
  told = Told()
  if channels := setup.model.condition_channels:
    told['condition'] = jnp.zeros((n, *setup.data_shape[:-1], channels))
  return setup.model.bind(params, **told)


def _params(setup: Setup) -> Any:
  """The average, as evaluation restores it."""
  init = partial(setup.model.init, shape=(1, *setup.data_shape))
  params = jax.eval_shape(init, _key(setup))
  return jax.tree.map(_shapes, params, setup.devices.state_shardings(params))


PROGRAMS: dict[str, Callable[[Setup], Program]] = {
  'step': training_step,
  'sampler': sampler_segment,
  'likelihood': likelihood_step,
}


def compile_program(program: Program) -> tuple[Any, dict[str, Any]]:
  """The compiled program and the numbers of it that need no reading of its text."""
  began = time.perf_counter()
  jitted = jax.jit(program.function, donate_argnums=program.donated, out_shardings=program.results)
  try:
    lowered = jitted.lower(*program.arguments)
  except jax.errors.ConcretizationTypeError:
    raise UserError(
      'Python drives the sampler of this config step by step, so that there is no one program of '
      'it; --config.sampling.method=pc has one'
    ) from None
  traced = time.perf_counter()
  with common.no_cache(), _what_does_not_fit():
    compiled = lowered.compile()
  memory, took = compiled.memory_analysis(), time.perf_counter() - traced
  return compiled, {
    'trace': traced - began,
    'compile': took,
    'arguments': memory.argument_size_in_bytes,
    'temporary': memory.temp_size_in_bytes,
  }


@contextmanager
def _what_does_not_fit() -> Iterator[None]:
  """Says in one line what XLA says of a program that is too large for a device."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not out_of_memory(error):
      raise
    reason = str(error).partition('\n')[0].rpartition('CompileTimeHbmOom: ')[2]
    raise UserError(f'the program does not fit a device: {reason}') from error


def on_this_machine(config: ConfigDict) -> Setup:
  """A config's parts for one device of this machine, where XLA can count FLOP."""
  whole = config.copy_and_resolve_references()
  whole.training.fsdp = 1
  return build(whole, jax.devices('cpu')[:1])


def flop(program: Program) -> float:
  """FLOP of a program on a device of this machine, before it is optimised."""
  bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.arguments)
  traced = jax.jit(program.function).trace(*bare)
  return float(traced.lower().cost_analysis()['flops']) + _further_turns(traced.jaxpr.jaxpr)


def _further_turns(jaxpr: Jaxpr) -> float:
  """FLOP of all turns but the first of the scans in a program, which XLA counts once."""
  total = 0.0
  for equation in jaxpr.eqns:
    for inner in jaxprs_in_params(equation.params):
      total += _further_turns(inner)
    if equation.primitive.name == 'scan':
      body = equation.params['jaxpr']
      shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in body.in_avals]
      lowered = jax.jit(jaxpr_as_fun(body)).lower(*shapes)
      turn = float(lowered.cost_analysis()['flops']) + _further_turns(body.jaxpr)
      total += (equation.params['length'] - 1) * turn
  return total
