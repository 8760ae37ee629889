"""What the compiler makes of a program for an H100 or a TPU slice, on a machine that has neither.

XLA compiles ahead of time for a described device. What it answers are facts of the program that
would run there: the memory of a device, the kernels and the bytes that they move, the collectives.

  python -m benchmarks.compile_for h100 1 configs/ve/cifar10.py --config.model.dtype=bfloat16
  python -m benchmarks.compile_for tpu v5e:2x2 configs/ve/cifar10.py:ncsnpp_deep_continuous
  python -m benchmarks.compile_for cpu 1 configs/vp/digits.py --what step,sampler,likelihood

The target is `h100` with the number of cards, `tpu` with a topology, chip:AxB, or with several
slices of it, Nxchip:AxB, or `cpu` with 1, this machine. The state lies on them as
config.training.fsdp says. The programs:

  step        one training step of the whole batch, config.training.batch_size
  sampler     the first segment of config.sampling for config.eval.batch_size samples, with its
              beginning and its end; of a sampler that Python drives (ode, adaptive_sde), there is
              no such program
  likelihood  one evaluation of drift and divergence for config.eval.batch_size images

It needs the compiler of that device: `pip install "jax[cuda13]"` or `pip install "jax[tpu]"`, of
the version of JAX that is here. It needs no driver and no card.

How to read it. The bytes are what each kernel reads and writes, added up: what caches save is not
taken off. FLOP are those of the program before it is optimised, shared by the devices. The floors
are bytes over the bandwidth of the memory and FLOP over the peak of a matrix product, as the vendor
states them; no step is faster than the larger of the two. The body of a loop counts as often as it
runs, where the compiler knows how often, and each branch once. Of collectives, a device sends their
bytes along a ring; those that are covered are under way while products or convolutions run. It
cannot tell how long cuDNN takes, whose algorithms are chosen on the card, nor the gaps between
kernels, nor what waits for the host.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
import dataclasses
from functools import partial
import importlib.util
import os
from pathlib import Path
import re
import sys
import time
from typing import Any
from unittest import mock

from absl import flags
import jax
from jax import Array
from jax.experimental import topologies
from jax.extend.core import Jaxpr, jaxpr_as_fun, jaxprs_in_params
import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from benchmarks import common, hlo
from builders.setup import build, Setup
from builders.training import score_task
import likelihood
import main as command
from runtime.devices import out_of_memory
from runtime.errors import unknown, UserError
from runtime.shapes import Told
from samplers import base
import sampling
from training import loop
from training.step import finite_step
from workdir.artifacts import json_text


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip as its vendor describes it: bytes/s of its memory, dense FLOP/s of a matrix product."""

  bandwidth: float
  bfloat16: float
  float32: float  # at JAX's default precision: TF32 on GPUs, one pass of bfloat16 on TPUs


CHIPS = {
  # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet, H100 SXM; its
  # figures are with sparsity, twice these.
  'h100': Chip(3.35e12, 989e12, 495e12),
  # https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e
  'v4': Chip(1.228e12, 275e12, 275e12),
  'v5e': Chip(0.819e12, 197e12, 197e12),
  'v5p': Chip(2.765e12, 459e12, 459e12),
  'v6e': Chip(1.64e12, 918e12, 918e12),
}
TARGETS = ('h100', 'tpu', 'cpu')
_COMPILERS = {  # of a target: modules, one of which must be there, and what brings it
  'h100': (('jax_plugins.xla_cuda13', 'jax_plugins.xla_cuda12'), 'jax[cuda13]'),
  'tpu': (('libtpu',), 'jax[tpu]'),
  'cpu': (('jax',), 'jax'),
}


def devices_of(target: str, slice_name: str) -> list[jax.Device]:
  """The devices that a target and its slice describe.

  Raises:
    UserError: if the compiler is not installed, or there is no such slice.
  """
  modules, package = _COMPILERS[target]
  if not any(_installed(module) for module in modules):
    raise UserError(
      f'the compiler for {target} is not installed; pip install "{package}=={jax.__version__}"'
    )
  if target != 'tpu' and not re.fullmatch('[1-9][0-9]*', slice_name):
    raise UserError(f'the slice of {target} is a number of devices, such as 1; got {slice_name!r}')
  if target == 'cpu':
    if int(slice_name) > len(jax.devices('cpu')):
      raise UserError(f'this machine has {len(jax.devices("cpu"))} device; got {slice_name}')
    return jax.devices('cpu')[: int(slice_name)]
  if target == 'tpu':
    slices, topology = _slices(slice_name)
    chip = topology.partition(':')[0]
    if chip not in CHIPS:
      raise unknown('the TPU', chip, [name for name in CHIPS if name != 'h100'])
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else it looks for its cloud
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # no chip is taken
    choices: dict[str, Any] = {'topology_name': topology, 'platform': 'tpu'}
    choices |= {'num_slices': slices} if slices > 1 else {}
  else:
    choices = {'topology_name': '', 'platform': 'cuda', 'topology': f'1x1x{slice_name}'}
    choices['target_config'] = Path(__file__).with_name('h100.txtpb').read_text()
  try:
    return list(topologies.get_topology_desc(**choices).devices)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    reason = str(error).partition('\n')[0][:200]
    raise UserError(f'{target} {slice_name!r} is no topology that it knows: {reason}') from error


def _slices(name: str) -> tuple[int, str]:
  """How many slices, and the topology of each: 2 and v5e:16x16 of 2xv5e:16x16."""
  found = re.fullmatch(r'([1-9][0-9]*)x(v.*)', name)
  return (int(found[1]), found[2]) if found else (1, name)


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # of the package that it is in
    return False


# The programs.


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


def _on_this_machine(config: ConfigDict) -> Setup:
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


# The command.


def measure(
  target: str, slice_name: str, config: ConfigDict, what: str
) -> tuple[dict[str, Any], str]:
  """What the compiler says of one program of a config, and the program's text."""
  devices = devices_of(target, slice_name)
  n = len(devices)
  setup = build(config, devices)
  for name in ('training.batch_size', 'eval.batch_size'):
    section, _, field = name.partition('.')
    if setup.config[section][field] % n:
      raise UserError(
        f'config.{name} = {setup.config[section][field]} must be a multiple of the {n} devices'
      )
  program = PROGRAMS[what](setup)
  compiled, result = compile_program(program)
  text = compiled.as_text()
  parsed = hlo.parse(text)
  kinds = hlo.by_kind(parsed)
  result |= {
    'what': what,
    'devices': n,
    'flop': flop(PROGRAMS[what](_on_this_machine(config))) / n,
    'bytes': sum(moved for _, moved in kinds.values()),
    'kernels': sum(count for count, _ in kinds.values()),
    'kinds': kinds,
    'collectives': [dataclasses.asdict(row) for row in hlo.collectives_by_kind(parsed)],
  }
  chip = CHIPS.get('h100' if target == 'h100' else _slices(slice_name)[1].partition(':')[0])
  if chip is not None:
    peak = getattr(chip, setup.config.model.dtype)
    result |= {'floor_bytes': result['bytes'] / chip.bandwidth, 'floor_flop': result['flop'] / peak}
  return result, text


def table(result: dict[str, Any]) -> str:
  """What `measure` found, as text."""
  n = result['devices']
  lines = [
    f'{result["what"]}, {n} device{"s" * (n > 1)}: traced in {result["trace"]:.0f} s, compiled in '
    f'{result["compile"]:.0f} s',
    f'memory of a device   {result["arguments"] / 2**30:.2f} GiB of arguments, '
    f'{result["temporary"] / 2**30:.2f} GiB of temporaries',
    f'work of a device     {result["flop"] / 1e9:.1f} GFLOP, {result["bytes"] / 1e9:.2f} GB moved '
    f'by {result["kernels"]} kernels',
  ]
  if 'floor_bytes' in result:
    lines.append(
      f'floors               {1e3 * result["floor_bytes"]:.1f} ms for the bytes, '
      f'{1e3 * result["floor_flop"]:.1f} ms for the FLOP'
    )
  rows = [[kind, str(count), moved / 1e9] for kind, (count, moved) in result['kinds'].items()]
  lines += ['', common.table(['kernels', 'number', 'GB'], rows), '']
  bytes_ = ('sent', 'covered')
  told = [
    [row['kind'], str(row['group'] or 'pairs'), str(row['number']), *(row[k] / 1e9 for k in bytes_)]
    for row in result['collectives']
  ]
  head = ['collectives', 'devices', 'number', 'GB sent', 'GB covered']
  lines.append(common.table(head, told) if told else 'collectives          none')
  return '\n'.join(lines)


def config_of(path: str, overrides: Sequence[str]) -> ConfigDict:
  """The config that main.py would run with these flags.

  Raises:
    UserError: as `main.parse`.
  """
  command.parse(['compile_for', f'--config={path}', '--mode=train', *overrides])
  return flags.FLAGS.config


def main(argv: Sequence[str] | None = None) -> None:
  parser = common.parser(__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.description = __doc__
  parser.add_argument('target', choices=TARGETS)
  parser.add_argument('slice', help='cards of an H100 machine, such as 1; or v5e:2x2')
  parser.add_argument('config', help='file[:variant]; fields as --config.section.field=value')
  parser.add_argument('--what', default='step', help=f'of {",".join(PROGRAMS)}; by commas (step)')
  parser.add_argument('--hlo', metavar='PATH', help='write the compiled program, as text')
  args, overrides = parser.parse_known_args(argv)
  jax.config.update('jax_platforms', 'cpu')  # nothing runs
  results = []
  try:
    devices_of(args.target, args.slice)
    config = config_of(args.config, overrides)
    wanted = args.what.split(',')
    for what in wanted:
      if what not in PROGRAMS:
        raise unknown('--what', what, PROGRAMS)
    for what in wanted:
      result, text = measure(args.target, args.slice, config, what)
      results.append(result)
      print(f'{table(result)}\n', flush=True)
      if args.hlo:
        Path(args.hlo if len(wanted) == 1 else f'{args.hlo}.{what}').write_text(text)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  if args.json:
    whole = {'machine': common.machine(), 'results': results}
    Path(args.json).write_text(json_text(whole, indent=2) + '\n')


if __name__ == '__main__':
  main()
