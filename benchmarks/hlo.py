"""What a compiled program does, read off its HLO: kernels by kind, their bytes, collectives.

`Compiled.as_text` prints one instruction a line, in the order in which a device starts them. In the
entry computation, and in the bodies of its loops, each is a kernel of the device, or free. A kernel
reads its operands and writes its result, and where it reads or writes a slice of an array, such as
the parameters of one of many blocks, that slice. The body of a loop counts as often as it runs,
where the compiler knows how often.

A collective either keeps a device waiting, or is begun and awaited by two instructions, between
which the device works. XLA writes the latter as `<op>-start` and `<op>-done`; for TPUs also as
fusions around the custom calls `AsyncCollectiveStart` and `AsyncCollectiveDone`, and those that
carry it on between them hold it once more, under its number of a channel. A reduction that is
scattered is there a fusion `all-reduce-scatter`.
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
  'send',  # to another slice
)  # fmt: skip
_MATMUL, _REDUCTION, _COPY, _ELEMENTWISE = (
  'convolution or product', 'reduction', 'copy', 'element-wise'
)  # fmt: skip
# What is no work of a device, or is counted elsewhere.
_FREE = {
  'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'constant', 'after-all', 'partition-id',
  'replica-id', 'opt-barrier', 'add-dependency', 'while', 'conditional', 'call',
}  # fmt: skip
_MOVES = {'copy', 'transpose', 'convert', 'slice', 'concatenate', 'reshape', 'pad'}
_LINE = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)')
_ARRAY = re.compile(r'\b([a-z]+[0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?')
_CALLED = re.compile(r'(?:calls|body|condition|to_apply|\w+_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r'channel_id=(\d+)')
# Groups of devices: {{0,1},{2,3}}, or [2,2]<=[4], or mesh['data'=2,'fsdp'=2] {'fsdp'}.
_GROUPS = re.compile(
  r'replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})'
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of HLO."""

  name: str
  shape: str
  op: str
  operands: tuple[str, ...]
  called: tuple[str, ...]  # computations
  target: str  # of a custom call
  turns: int  # of a loop, 0 where the compiler does not tell
  channel: str  # of a collective; empty for none
  group: int  # of a collective: the devices that it goes over, 0 where that is not said


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
  listed = re.sub(r'/\*.*?\*/', '', rest[:end])
  operands = tuple(re.findall(r'%?([A-Za-z_][\w.\-]*)', listed))
  if op in ('constant', 'parameter'):
    operands = (listed,)  # its value, or its number
  turns, channel = _TURNS.search(attributes), _CHANNEL.search(attributes)
  return Instruction(
    name,
    shape,
    op,
    operands,
    tuple(called),
    target=target[1] if target else '',
    turns=int(turns[1]) if turns else 0,
    channel=channel[1] if channel else '',
    group=_group(attributes),
  )


def _group(attributes: str) -> int:
  """How many devices a collective goes over."""
  found = _GROUPS.search(attributes)
  if not found:
    return 0
  listed, of_each, axes, over = found.groups()
  if listed is not None:
    return listed.count(',') + 1
  if of_each:
    return int(of_each)
  sizes = {name.strip("' "): int(n) for name, n in (axis.split('=') for axis in axes.split(','))}
  return math.prod(sizes[name.strip("' ")] for name in over.split(','))


def nbytes(shape: str, on_chip: bool = False) -> int:
  """Bytes of an array, or of the arrays of a tuple, as HLO writes them: f32[8,3]{1,0}.

  Only those in the main memory of a device count; with `on_chip`, also what S(1) puts on the chip.
  """
  return sum(
    BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(',') if n)
    for kind, dims, layout in _ARRAY.findall(shape)
    if on_chip or not re.search(r'S\([1-9]', layout)
  )


def running(hlo: Hlo) -> Iterator[tuple[str, int]]:
  """The computations that a device steps through, and how often: the entry, and bodies of loops."""
  seen, waiting = set(), [(hlo.entry, 1)]
  while waiting:
    name, turns = waiting.pop()
    if name in seen:
      continue
    seen.add(name)
    yield name, turns
    for one in hlo.computations[name]:
      if one.op in ('while', 'conditional', 'call'):
        waiting += [(called, turns * (_turns(hlo, one) or 1)) for called in one.called]


def _turns(hlo: Hlo, loop: Instruction) -> int:
  """How often a loop runs; 0 if that cannot be told.

  For TPUs it is read off the condition, i < n, of a loop that counts from 0, as those of
  `jax.lax.scan` do.
  """
  if loop.turns or loop.op != 'while':
    return loop.turns
  for name in loop.called:
    *lines, last = hlo.computations[name]
    limits = [x.operands[0] for x in lines if x.op == 'constant' and x.name in last.operands]
    if last.op == 'compare' and len(limits) == 1 and limits[0].isdecimal():
      return int(limits[0])
  return 0


def kernels(hlo: Hlo) -> Iterator[tuple[str, int, int, Instruction]]:
  """Kind, number of runs, bytes that a run reads and writes, and instruction of each kernel."""
  for name, turns in running(hlo):
    shapes = {one.name: nbytes(_written(one)) for one in hlo.computations[name]}
    for one in hlo.computations[name]:
      if not _is_free(one):
        yield kind_of(hlo, one), turns, _moved(hlo, one, shapes), one


def _moved(hlo: Hlo, one: Instruction, shapes: dict[str, int]) -> int:
  """Bytes that a kernel reads and writes, where the arrays of its computation have so many."""
  inside = [one]
  if one.op == 'fusion':
    inside = [inner for name in one.called for inner in hlo.computations.get(name, [])]
  by_name, written, read = {inner.name: inner for inner in inside}, shapes[one.name], 0
  for last in inside[-1:]:  # the results, of which an updated array keeps all but a slice
    for result in last.operands if last.op == 'tuple' else (last.name,):
      update = _through_bitcasts(by_name, result)
      if update is not None and update.op == 'dynamic-update-slice':
        whole, new = (
          nbytes(by_name[x].shape) if x in by_name else shapes.get(x, 0)
          for x in update.operands[:2]
        )
        written -= min(written, max(whole - new, 0))
  for place, operand in enumerate(one.operands):
    begin = [x.name for x in inside if x.op == 'parameter' and x.operands == (str(place),)]
    parts = list(_parts_read(inside, begin[0] if begin else operand))
    whole = shapes.get(operand, 0)
    read += whole if None in parts or not parts else min(whole, sum(filter(None, parts)))
  return written + read


def _parts_read(inside: list[Instruction], name: str) -> Iterator[int | None]:
  """Bytes of what each instruction reads of an array: of one that takes a slice, that; else None.

  Through a `bitcast` it is the same array.
  """
  for one in inside:
    if name not in one.operands:
      continue
    if one.op == 'bitcast':
      yield from _parts_read(inside, one.name)
    elif one.operands[0] != name or name in one.operands[1:]:
      yield None
    elif one.op in ('slice', 'slice-start', 'dynamic-slice'):
      yield nbytes(_written(one), on_chip=True)
    else:
      yield 0 if one.op == 'dynamic-update-slice' else None


def _through_bitcasts(by_name: dict[str, Instruction], name: str) -> Instruction | None:
  """What made an array, before it was only read in another way."""
  one = by_name.get(name)
  while one is not None and one.op == 'bitcast':
    one = by_name.get(one.operands[0])
  return one


def _is_free(one: Instruction) -> bool:
  allocates = one.target == 'AllocateBuffer'
  return allocates or one.op in _FREE or one.op.endswith(('-done', '-update'))


def _written(one: Instruction) -> str:
  """What an instruction writes; of a copy or a slice that is begun, its tuple holds more."""
  place = {'copy-start': 0, 'slice-start': 1}.get(one.op)  # after a slice's operand
  return one.shape if place is None else list(_ARRAY.finditer(one.shape))[place][0]


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
    yield one.op.removesuffix('-start')
    return
  for name in one.called:
    for inner in hlo.computations.get(name, []):
      yield from _ops(hlo, inner)


@dataclasses.dataclass(frozen=True)
class Collective:
  """What devices tell each other at once.

  Attributes:
    kind: one of `COLLECTIVES`.
    group: of how many devices; 0 for pairs.
    turns: how often it runs.
    nbytes: of its result on a device; of a reduction that is scattered, of what is reduced.
    covered: products and convolutions that run between its beginning and its end; None where the
      device waits for it.
  """

  kind: str
  group: int
  turns: int
  nbytes: int
  covered: int | None

  @property
  def sent(self) -> float:
    """Bytes that a device sends each time, along a ring."""
    share = (self.group - 1) / self.group if self.group else 1.0
    return self.nbytes * share * (2 if self.kind == 'all-reduce' else 1)


def collectives(hlo: Hlo) -> list[Collective]:
  """All of them, in the order in which they begin in each computation."""
  found = []
  for name, turns in running(hlo):
    lines, begun = hlo.computations[name], set[str]()
    for place, one in enumerate(lines):
      inner = _collective_in(hlo, one)
      if inner is None or one.op.endswith(('-done', '-update')):
        continue
      if inner.channel in begun:  # it is carried on, or awaited
        continue
      end = _awaited(hlo, lines[place + 1 :], one, inner)
      if end is not None and inner.channel:
        begun.add(inner.channel)
      between = None if end is None else lines[place + 1 : place + 1 + end]
      found.append(
        Collective(
          _kind(hlo, one, inner),
          inner.group,
          turns,
          _told(inner),
          None if between is None else sum(_multiplies(hlo, other) for other in between),
        )
      )
  return found


@dataclasses.dataclass(frozen=True)
class Told:
  """The collectives of one kind over as many devices: how many run, and what a device sends.

  Attributes:
    kind, group: as of a `Collective`.
    number: of those that run.
    sent: bytes that a device sends.
    covered: those of them that are under way while a device multiplies.
  """

  kind: str
  group: int
  number: int
  sent: float
  covered: float


def collectives_by_kind(hlo: Hlo) -> list[Told]:
  """The collectives by kind and number of devices, those with most bytes first."""
  rows: dict[tuple[str, int], Told] = {}
  for one in collectives(hlo):
    key, sent = (one.kind, one.group), one.turns * one.sent
    row = rows.get(key, Told(*key, 0, 0.0, 0.0))
    covered = row.covered + (sent if one.covered else 0.0)
    rows[key] = Told(*key, row.number + one.turns, row.sent + sent, covered)
  return sorted(rows.values(), key=lambda row: -row.sent)


def _collective_in(hlo: Hlo, one: Instruction) -> Instruction | None:
  """The collective that an instruction is, or that is fused in it."""
  lines = [one]
  if one.op in ('fusion', 'async-start'):
    lines = [inner for name in one.called for inner in hlo.computations.get(name, [])]
  return next((x for x in lines if x.op.removesuffix('-start') in COLLECTIVES), None)


def _awaited(
  hlo: Hlo, after: list[Instruction], one: Instruction, inner: Instruction
) -> int | None:
  """How many instructions after its beginning a collective is awaited; None if it is at once."""
  if one.op.endswith('-start') or one.op == 'send':
    ends = (i for i, x in enumerate(after) if x.op.endswith('-done') and one.name in x.operands)
    return next(ends, None)
  if 'AsyncCollectiveStart' not in _targets(hlo, one):
    return None
  for i, other in enumerate(after):
    carried = _collective_in(hlo, other)
    same = carried is not None and carried.channel == inner.channel
    if same and 'AsyncCollectiveDone' in _targets(hlo, other):
      return i
  return None


def _targets(hlo: Hlo, one: Instruction) -> set[str]:
  """Of the custom calls that are fused in an instruction."""
  return {inner.target for name in one.called for inner in hlo.computations.get(name, [])}


def _kind(hlo: Hlo, one: Instruction, inner: Instruction) -> str:
  scattered = one.op == 'fusion' and any('all-reduce-scatter' in name for name in one.called)
  return 'reduce-scatter' if scattered else inner.op.removesuffix('-start')


def _told(inner: Instruction) -> int:
  """Bytes of the result of a collective, or of all that a reduction which is scattered takes."""
  arrays, n = [shape[0] for shape in _ARRAY.finditer(inner.shape)], len(inner.operands)
  if inner.op == 'send':  # (operand, context, token)
    arrays = arrays[:1]
  elif inner.op.endswith('-start') and len(arrays) >= 2 * n:  # (operands, results, ...)
    arrays = arrays[n : 2 * n]
  whole = inner.group if inner.op.removesuffix('-start') == 'reduce-scatter' else 1
  return whole * sum(nbytes(shape, on_chip=True) for shape in arrays)


def _multiplies(hlo: Hlo, one: Instruction) -> bool:
  return not _is_free(one) and kind_of(hlo, one) == _MATMUL


def by_kind(hlo: Hlo) -> dict[str, tuple[int, int]]:
  """Kernels and bytes of each kind, most bytes first."""
  counts: dict[str, tuple[int, int]] = {}
  for kind, turns, moved, _ in kernels(hlo):
    n, total = counts.get(kind, (0, 0))
    counts[kind] = n + turns, total + turns * moved
  return dict(sorted(counts.items(), key=lambda item: -item[1][1]))
