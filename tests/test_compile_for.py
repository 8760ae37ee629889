"""Reading compiled programs, and what the command says of wrong input."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import pytest

from benchmarks import compile_for, hlo, programs, targets
from builders.setup import build
from configs.vp import digits
from runtime.errors import UserError

HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_reduce (p: f32[8,4]) -> f32[] {
  %p = f32[8,4]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %reduce.1 = f32[] reduce(%p, %zero), dimensions={0,1}, to_apply=%add
}

%fused_copy (q: f32[8,4]) -> bf16[8,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %convert.1 = bf16[8,4]{1,0:T(8,128)(2,1)} convert(%q)
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %sine = f32[8,4]{1,0} sine(%x)
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %sine)
}

%condition (state.1: (s32[], f32[8,4])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (x.1: f32[8,4]) -> f32[] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %start = (f32[8,4]{1,0}, f32[8,4]{1,0}) all-reduce-start(%x.1), replica_groups={{0,1}}, to_apply=%add
  %done = f32[8,4]{1,0} all-reduce-done(%start)
  %one = s32[] constant(0)
  %begin = (s32[], f32[8,4]{1,0}) tuple(%one, %done)
  %loop = (s32[], f32[8,4]{1,0}) while(%begin), condition=%condition, body=%body
  %y = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  %low = bf16[8,4]{1,0:T(8,128)(2,1)} fusion(%y), kind=kLoop, calls=%fused_copy
  %conv = (f32[8,4]{1,0}, u8[16]{0}) custom-call(%y, /*index=1*/%low), custom_call_target="__cudnn$convForward", backend_config={"a":"(b"}
  %z = f32[8,4]{1,0} get-tuple-element(%conv), index=0
  ROOT %total = f32[] fusion(%z), kind=kInput, calls=%fused_reduce
}
"""  # noqa: E501


def test_kernels_of_a_text() -> None:
  parsed = hlo.parse(HLO)
  assert parsed.entry == 'main'
  assert hlo.collectives(parsed) == [hlo.Collective('all-reduce', 2, 1, 128, covered=0)]
  assert hlo.by_kind(parsed) == {
    'collective': (1, 3 * 128),  # a pair of arrays of its, and its operand
    'convolution or product': (1, 128 + 16 + 128 + 64),
    'element-wise': (6, 3 * (2 * 128 + 1 + 4 + 4)),  # of three turns the sine and the comparison
    'copy': (1, 128 + 64),
    'reduction': (1, 128 + 4),
  }


SLICES = """HloModule jit_step, is_scheduled=true

%fused_update (p: f32[30,8,4], q: f32[30,8,4], r: f32[8,4], i: s32[]) -> f32[30,8,4] {
  %p = f32[30,8,4]{2,1,0} parameter(0)
  %q = f32[30,8,4]{2,1,0} parameter(1)
  %r = f32[8,4]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %block = f32[1,8,4]{2,1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,8,4}
  %one = f32[8,4]{1,0} bitcast(%block)
  %sum = f32[8,4]{1,0} add(%one, %r)
  %new = f32[1,8,4]{2,1,0} bitcast(%sum)
  ROOT %all = f32[30,8,4]{2,1,0} dynamic-update-slice(%q, %new, %i)
}

ENTRY %main (a: f32[30,8,4], b: f32[30,8,4], c: f32[8,4], j: s32[]) -> f32[30,8,4] {
  %a = f32[30,8,4]{2,1,0} parameter(0)
  %b = f32[30,8,4]{2,1,0} parameter(1)
  %c = f32[8,4]{1,0} parameter(2)
  %j = s32[] parameter(3)
  ROOT %fusion = f32[30,8,4]{2,1,0} fusion(%a, %b, %c, %j), kind=kLoop, calls=%fused_update
}
"""


def test_of_an_array_a_kernel_moves_the_slice_that_it_works_on() -> None:
  """A block of one is read, one of another is written; a whole matrix and a number are read."""
  assert hlo.by_kind(hlo.parse(SLICES)) == {'element-wise': (1, 128 + 128 + 128 + 4)}


HALVES = """HloModule jit_step, is_scheduled=true

%fused_halves (p: f32[8,4]) -> f32[4,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %same = f32[2,4,4]{2,1,0} bitcast(%p)
  %half = f32[1,4,4]{2,1,0} slice(%same), slice={[1:2], [0:4], [0:4]}
  %one = f32[4,4]{1,0} bitcast(%half)
  ROOT %sine = f32[4,4]{1,0} sine(%one)
}

ENTRY %main (a: f32[8,4]) -> f32[4,4] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %fusion = f32[4,4]{1,0} fusion(%a), kind=kLoop, calls=%fused_halves
}
"""


def test_a_slice_at_a_place_that_is_fixed_is_no_more_than_that() -> None:
  assert hlo.by_kind(hlo.parse(HALVES)) == {'element-wise': (1, 64 + 64)}
  whole = HALVES.replace('slice(%same), slice={[1:2], [0:4], [0:4]}', 'sine(%same)')
  assert hlo.by_kind(hlo.parse(whole)) == {'element-wise': (1, 128 + 64)}


def test_bytes_of_shapes() -> None:
  assert hlo.nbytes('bf16[128,32,3]{2,1,0:T(8,128)(2,1)}') == 2 * 128 * 32 * 3
  assert hlo.nbytes('(f32[], /*index=1*/pred[5]{0}, s64[0])') == 4 + 5
  assert hlo.nbytes('token[]') == 0
  assert hlo.nbytes('(f32[8]{0:T(128)S(1)}, f32[2]{0:T(128)})') == 8  # S(1) is on the chip


# As libtpu writes it: S(1) and S(2) are on the chip, and tuples also hold what is copied from.
BROUGHT = """HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[16,8]) -> f32[16,8] {
  %x = f32[16,8]{1,0:T(8,128)} parameter(0)
  %slice-start.1 = ((f32[16,8]{1,0:T(8,128)}), f32[4,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4], [0:8]}
  %slice-done.1 = f32[4,8]{1,0:T(8,128)S(1)} slice-done(%slice-start.1)
  %copy-start.1 = (f32[16,8]{1,0:T(8,128)S(1)}, f32[16,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done.1 = f32[16,8]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  ROOT %y = f32[16,8]{1,0:T(8,128)} negate(%copy-done.1)
}
"""  # noqa: E501


def test_what_a_tpu_brings_to_the_chip_is_read_once() -> None:
  """Of a slice the slice, of a copy the array; what is there already is not read again."""
  whole = 4 * 16 * 8
  assert hlo.by_kind(hlo.parse(BROUGHT)) == {
    'copy': (2, whole // 4 + whole),
    'element-wise': (1, whole),  # written
  }


# As libtpu writes it: begun, carried on by a product, awaited; and a reduction that is scattered.
OVERLAP = """HloModule jit_step, is_scheduled=true

%begin (p: bf16[8,4]) -> (bf16[8,4], bf16[32,4], s32[2]) {
  %p = bf16[8,4]{1,0:S(1)} parameter(0)
  %all-gather.1 = bf16[32,4]{1,0:S(1)} all-gather(%p), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %c = (bf16[8,4]{1,0}, bf16[32,4]{1,0}, s32[2]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q: bf16[8,4], r: f32[4,4]) -> f32[4,4] {
  %q = bf16[8,4]{1,0} parameter(0)
  %r = f32[4,4]{1,0} parameter(1)
  %all-gather.2 = bf16[32,4]{1,0:S(1)} all-gather(%q), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %dot = f32[4,4]{1,0} convolution(%r, %r), dim_labels=bf_io->bf
}

%end (s: bf16[8,4]) -> bf16[32,4] {
  %s = bf16[8,4]{1,0} parameter(0)
  %all-gather.3 = bf16[32,4]{1,0:S(1)} all-gather(%s), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %d = bf16[32,4]{1,0} custom-call(%s, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (t: f32[16,4]) -> f32[4,4] {
  %t = f32[16,4]{1,0} parameter(0)
  %all-reduce.9 = f32[16,4]{1,0} all-reduce(%t), channel_id=8, replica_groups=mesh['data'=4,'fsdp'=4] {'fsdp'}, to_apply=%add
  ROOT %part = f32[4,4]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={4,4}
}

%body (state: (s32[], bf16[8,4], f32[4,4])) -> (s32[], bf16[8,4], f32[4,4]) {
  %state = (s32[], bf16[8,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%state), index=1
  %w = f32[4,4]{1,0} get-tuple-element(%state), index=2
  %async-collective-start = (bf16[8,4]{1,0}, bf16[32,4]{1,0}, s32[2]{0}) fusion(%x), kind=kCustom, calls=%begin
  %y = bf16[8,4]{1,0} get-tuple-element(%async-collective-start), index=0
  %fusion.1 = f32[4,4]{1,0} fusion(%y, %w), kind=kOutput, calls=%async_collective_fusion.1
  %async-collective-done = bf16[32,4]{1,0} fusion(%y), kind=kCustom, calls=%end
  %fusion.2 = f32[4,4]{1,0} fusion(%fusion.1), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], bf16[8,4]{1,0}, f32[4,4]{1,0}) tuple(%x, %y, %fusion.2)
}

%condition (state.1: (s32[], bf16[8,4], f32[4,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  %state.1 = (s32[], bf16[8,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[8,4], f32[4,4])) -> f32[4,4] {
  %a = (s32[], bf16[8,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  %loop = (s32[], bf16[8,4]{1,0}, f32[4,4]{1,0}) while(%a), condition=%condition, body=%body
  %z = f32[4,4]{1,0} get-tuple-element(%loop), index=2
  %all-reduce-start.1 = f32[4,4]{1,0} all-reduce-start(%z), channel_id=9, replica_groups={{0,4,8,12},{1,5,9,13}}, to_apply=%add
  %all-reduce-done.1 = f32[4,4]{1,0} all-reduce-done(%all-reduce-start.1)
  %send.1 = (f32[4,4]{1,0}, u32[]{:S(2)}, token[]) send(%all-reduce-done.1, %after-all.1), channel_id=10, is_host_transfer=true
  ROOT %send-done.1 = token[] send-done(%send.1), channel_id=10
}
"""  # noqa: E501


def test_what_is_told_while_a_device_multiplies() -> None:
  parsed = hlo.parse(OVERLAP)
  assert hlo.collectives(parsed) == [
    hlo.Collective('all-reduce', 4, 1, 64, covered=0),
    hlo.Collective('send', 0, 1, 64, covered=0),
    hlo.Collective('all-gather', 4, 28, 32 * 4 * 2, covered=1),
    hlo.Collective('reduce-scatter', 4, 28, 16 * 4 * 4, covered=None),
  ]
  # Of what is gathered or scattered, a device sends three quarters; of a sum twice as much.
  assert hlo.collectives_by_kind(parsed) == [
    hlo.Told('all-gather', 4, number=28, sent=28 * 192, covered=28 * 192),
    hlo.Told('reduce-scatter', 4, number=28, sent=28 * 192, covered=0),
    hlo.Told('all-reduce', 4, number=1, sent=96, covered=0),
    hlo.Told('send', 0, number=1, sent=64, covered=0),
  ]


@pytest.mark.parametrize('turns', [2, 7])
def test_a_loop_counts_as_often_as_it_runs(turns: int) -> None:
  def function(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, turns, lambda i, y: jnp.sin(y @ w), x)

  x = jnp.ones((16, 16))
  parsed = hlo.parse(jax.jit(function).lower(x, x).compile().as_text())
  kinds = hlo.by_kind(parsed)
  assert kinds['convolution or product'] == (turns, turns * 3 * 4 * 16 * 16)


def test_flop_of_a_scan_are_those_of_all_its_turns() -> None:
  def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    y, _ = jax.lax.scan(lambda y, _: (y @ w, None), x, length=3)
    return y + w, None

  def function(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, _: step(x, w), x, length=5)[0]

  x = jax.ShapeDtypeStruct((64, 64), 'float32')
  found = programs.flop(programs.Program(function, (x, x)))
  assert found == pytest.approx(5 * 3 * 2 * 64**3, rel=0.01)


def test_no_computation_that_is_run_is_lost() -> None:
  def function(x: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.switch(i, [lambda x: x @ x, lambda x: x @ x.T, jnp.sin], x)

  parsed = hlo.parse(jax.jit(function).lower(jnp.ones((8, 8)), 1).compile().as_text())
  assert hlo.by_kind(parsed)['convolution or product'][0] == 2


def _tiny() -> ConfigDict:
  config = digits.get_config()
  config.update_from_flattened_dict({
    'model.nf': 8, 'model.ch_mult': (1,), 'model.num_res_blocks': 1, 'model.attn_resolutions': (),
    'training.batch_size': 4, 'eval.batch_size': 4,
  })  # fmt: skip
  return config


def test_each_program_of_a_config() -> None:
  config = _tiny()
  results = {what: compile_for.measure('cpu', '1', config, what)[0] for what in programs.PROGRAMS}
  for what, result in results.items():
    assert result['kinds']['convolution or product'][0] > 0, what
    assert result['bytes'] > 4 * 4 * 8 * 8 * 8 and result['temporary'] > 0, what
    assert not result['collectives'] and 'floor_bytes' not in result, what
  # Parameters, their average and two moments; parameters alone.
  step, sampler = results['step']['arguments'], results['sampler']['arguments']
  assert 3.9 * sampler < step < 4.2 * sampler
  # A step is a forward and a backward pass: about three evaluations. So is a likelihood's drift.
  assert 2 < results['step']['flop'] / results['likelihood']['flop'] * 1.5 < 4.5
  assert 'GB moved' in compile_for.table(results['step'])


@pytest.mark.parametrize('what', programs.PROGRAMS)
def test_what_is_for_cpus_stays_there(what: str) -> None:
  program = programs.PROGRAMS[what](build(_tiny(), jax.devices()[:1]))
  bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.arguments)
  traced = jax.jit(program.function).trace(*bare)
  barriers = {
    platform: traced.lower(lowering_platforms=(platform,)).as_text().count('optimization_barrier')
    for platform in ('cpu', 'cuda', 'tpu')
  }
  assert barriers['cpu'] and barriers['cuda'] and not barriers['tpu']


def test_floors_are_those_of_the_chip() -> None:
  h100, v5e = targets.CHIPS['h100'], targets.CHIPS['v5e']
  assert h100.bandwidth / v5e.bandwidth == pytest.approx(4.09, abs=0.01)
  assert h100.bfloat16 > h100.float32 and v5e.bfloat16 == v5e.float32


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['cpu', '99', 'configs/vp/digits.py'], 'this machine has'),
    (['cpu', 'all', 'configs/vp/digits.py'], "the slice of cpu is a number of devices, such as 1"),
    (['cpu', '1', 'configs/vp/none.py'], 'is not a file'),
    (['cpu', '1', 'configs/vp/digits.py', '--config.model.nff=3'], "did you mean 'nf'"),
    (['cpu', '1', 'configs/vp/digits.py', '--what=steps'], "did you mean 'step'"),
  ],
)  # fmt: skip
def test_errors_are_one_line(arguments, message, capsys) -> None:
  with pytest.raises(SystemExit) as error:
    compile_for.main(arguments)
  assert error.value.code == 2
  told = capsys.readouterr().err
  assert told.startswith('error: ') and told.count('\n') == 1 and message in told


@pytest.mark.parametrize('target, package', [('tpu', 'jax[tpu]'), ('h100', 'jax[cuda13]')])
def test_a_compiler_that_is_missing_is_named(target, package, monkeypatch) -> None:
  monkeypatch.setattr(targets, '_installed', lambda module: False)
  with pytest.raises(UserError, match='is not installed; pip install') as error:
    targets.devices_of(target, '1')
  assert f'"{package}==' in str(error.value)


def test_a_tpu_that_is_unknown(monkeypatch) -> None:
  monkeypatch.setattr(targets, '_installed', lambda module: True)
  with pytest.raises(UserError, match='allowed: v4, v5e, v5p, v6e'):
    targets.devices_of('tpu', 'v5x:2x2')


def test_a_sampler_that_python_drives_has_no_program() -> None:
  config = digits.get_config()
  config.update_from_flattened_dict({'sampling.method': 'ode', 'eval.batch_size': 4})
  with pytest.raises(UserError, match='Python drives the sampler'):
    compile_for.measure('cpu', '1', config, 'sampler')
