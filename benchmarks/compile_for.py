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
from collections.abc import Sequence
import dataclasses
from pathlib import Path
import sys
from typing import Any

from absl import flags
import jax
from ml_collections import ConfigDict

from benchmarks import common, hlo
from benchmarks.programs import compile_program, flop, on_this_machine, PROGRAMS
from benchmarks.targets import chip_of, devices_of, TARGETS
from builders.setup import build
import main as command
from runtime.errors import unknown, UserError
from workdir.artifacts import json_text


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
    'flop': flop(PROGRAMS[what](on_this_machine(config))) / n,
    'bytes': sum(moved for _, moved in kinds.values()),
    'kernels': sum(count for count, _ in kinds.values()),
    'kinds': kinds,
    'collectives': [dataclasses.asdict(row) for row in hlo.collectives_by_kind(parsed)],
  }
  chip = chip_of(target, slice_name)
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
