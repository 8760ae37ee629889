"""What a compiled program does, read off its HLO: kernels by kind, their bytes, collectives.

`Compiled.as_text` prints one instruction a line. In the entry computation, and in the bodies of its
loops, each is a kernel of the device, or free. A kernel reads its operands and writes its result.
"""

from collections.abc import Iterator
import dataclasses
import math
import re

BYTES = {
  'pred': 1, 's4': 1, 'u4': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2,
  's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16,
}  # fmt: skip
COLLECTIVES = (
  'all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all',
  'collective-broadcast',
)  # fmt: skip
_MATMUL, _REDUCTION, _COPY, _ELEMENTWISE = (
  'convolution or product', 'reduction', 'copy', 'element-wise'
)  # fmt: skip
# What is no work of a device, or is counted elsewhere.
_FREE = {
  'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'constant', 'after-all', 'partition-id',
  'replica-id', 'opt-barrier', 'add-dependency', 'while', 'conditional', 'call',
}  # fmt: skip
_MOVES = {'copy', 'copy-start', 'transpose', 'convert', 'slice', 'concatenate', 'reshape', 'pad'}
_LINE = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)')
_ARRAY = re.compile(r'\b([a-z]+[0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?')
_CALLED = re.compile(r'(?:calls|body|condition|to_apply|\w+_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of HLO."""

  name: str
  shape: str
  op: str
  operands: tuple[str, ...]
  called: tuple[str, ...]  # computations
  target: str  # of a custom call


@dataclasses.dataclass(frozen=True)
class Hlo:
  """Computations of a compiled module by name, and the name of the one that is run."""

  computations: dict[str, list[Instruction]]
  entry: str


def parse(text: str) -> Hlo:
  """Reads what `Compiled.as_text` prints."""
  computations: dict[str, list[Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith((' ', 'HloModule')):
      name = line.removeprefix('ENTRY ').split()[0].lstrip('%')
      current = computations.setdefault(name, [])
      entry = name if line.startswith('ENTRY ') else entry
    elif current is not None and (found := _LINE.match(line)):
      current.append(_instruction(*found.groups()))
  return Hlo(computations, entry)


def _instruction(name: str, shape: str, op: str, rest: str) -> Instruction:
  depth, end = 1, len(rest)
  for i, letter in enumerate(rest):
    depth += {'(': 1, ')': -1}.get(letter, 0)
    if not depth:
      end = i
      break
  attributes = rest[end:]
  branches = ','.join(_BRANCHES.findall(attributes)).replace('%', '')
  called = _CALLED.findall(attributes) + [one.strip() for one in branches.split(',') if one]
  target = re.search(r'custom_call_target="([^"]+)"', attributes)
  operands = tuple(re.findall(r'%?([A-Za-z_][\w.\-]*)', rest[:end]))
  return Instruction(name, shape, op, operands, tuple(called), target[1] if target else '')


def nbytes(shape: str) -> int:
  """Bytes of an array, or of the arrays of a tuple, as HLO writes them: f32[8,3]{1,0}.

  Only those in the main memory of a device count, not those that S(1) puts on the chip.
  """
  return sum(
    BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(',') if n)
    for kind, dims, layout in _ARRAY.findall(shape)
    if not re.search(r'S\([1-9]', layout)
  )


def kernels(hlo: Hlo) -> Iterator[tuple[str, int, Instruction]]:
  """Kind, bytes read and written, and instruction of each kernel of a turn of each loop."""
  seen, waiting = set(), [hlo.entry]
  while waiting:
    name = waiting.pop()
    if name in seen:
      continue
    seen.add(name)
    shapes = {one.name: nbytes(_written(one)) for one in hlo.computations[name]}
    for one in hlo.computations[name]:
      if one.op in ('while', 'conditional', 'call'):
        waiting += one.called
      if one.op in _FREE or one.op.endswith(('-done', '-update')):
        continue
      moved = shapes[one.name] + sum(shapes.get(operand, 0) for operand in one.operands)
      yield kind_of(hlo, one), moved, one


def _written(one: Instruction) -> str:
  """What an instruction writes: of a copy that is begun, the first of its tuple."""
  return _ARRAY.search(one.shape)[0] if one.op == 'copy-start' else one.shape


def kind_of(hlo: Hlo, one: Instruction) -> str:
  """What an instruction is, and a fusion by what is in it."""
  if one.op.removesuffix('-start') in COLLECTIVES:
    return 'collective'
  if one.op == 'custom-call':
    target = one.target.lower()
    library = 'conv' in target or 'gemm' in target or 'matmul' in target
    return _MATMUL if library else f'custom call {one.target}'
  ops = set(_ops(hlo, one))
  if ops & {'convolution', 'dot'}:
    return _MATMUL
  if ops & {'reduce', 'reduce-window'}:
    return _REDUCTION
  if ops - _FREE <= _MOVES:
    return _COPY
  return one.op if one.op in ('sort', 'scatter', 'rng-bit-generator') else _ELEMENTWISE


def _ops(hlo: Hlo, one: Instruction) -> Iterator[str]:
  """The operations of an instruction: its own, or those that are fused in it."""
  if one.op != 'fusion':
    yield one.op
    return
  for name in one.called:
    for inner in hlo.computations.get(name, []):
      yield from _ops(hlo, inner)


def collectives(hlo: Hlo) -> dict[str, int]:
  """How many there are, by kind, in all computations."""
  ops = [one.op.removesuffix('-start') for lines in hlo.computations.values() for one in lines]
  return {kind: ops.count(kind) for kind in COLLECTIVES if kind in ops}


def by_kind(hlo: Hlo) -> dict[str, tuple[int, int]]:
  """Kernels and bytes of each kind, most bytes first."""
  counts: dict[str, tuple[int, int]] = {}
  for kind, moved, _ in kernels(hlo):
    n, total = counts.get(kind, (0, 0))
    counts[kind] = n + 1, total + moved
  return dict(sorted(counts.items(), key=lambda item: -item[1][1]))
