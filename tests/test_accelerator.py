"""`benchmarks.accelerator`: the table, what it writes, errors and the limit of time."""

import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator, common, device_rows, forms, golden
from benchmarks.device_rows import OK, QUICK, Row, WRONG
from configs.toy import two_moons


def call(*flags: str) -> None:
  with mock.patch.object(sys, 'argv', ['accelerator', *flags]):
    accelerator.main()


@pytest.fixture(autouse=True)
def optimisation_as_it_was():
  """--quick takes it away for the whole process."""
  before = jax.config.read('jax_disable_most_optimizations')
  yield
  jax.config.update('jax_disable_most_optimizations', before)


def test_table_and_json(tmp_path, capsys):
  """Two cheap rows: their heads, aligned; the same figures in the file, and what they run on."""
  path = tmp_path / 'figures.json'
  call('--quick', '--only', 'golden steps vp,peak matmul bfloat16', '--json', str(path))
  written = json.loads(path.read_text())
  assert written['machine']['devices'] == jax.device_count()
  assert written['machine']['driver']
  assert written['left out'] == []
  steps, peak = written['results'].values()
  assert steps['check'] == OK and steps['steps'] < 1e-4 and steps['ODE'] < 1e-4
  assert peak['TFLOP/s'] > 0
  lines = capsys.readouterr().out.splitlines()
  head = next(i for i, line in enumerate(lines) if line.split()[-1:] == ['check'])
  row = lines[head + 1]
  assert row.startswith('golden steps vp') and row.endswith('ok')
  assert len(row) == len(lines[head])
  assert lines[head + 3].split() == ['TFLOP/s']


def rows(*measures) -> list[Row]:
  return [Row(f'row {i}', measure) for i, measure in enumerate(measures)]


def test_an_error_is_a_line(tmp_path, capsys):
  """Others go on, and see what those before them found."""

  def out_of_memory(found):
    raise RuntimeError('RESOURCE_EXHAUSTED:\nout of memory')

  def not_here(found):
    raise forms.NotHere('no such library')

  path = tmp_path / 'figures.json'
  table = rows(
    lambda f: {'ms': 1.5}, out_of_memory, not_here, lambda f: {'ms': 2 * f['row 0']['ms']}
  )
  found = accelerator.measure(table, 1.0, {}, str(path))
  assert found['row 3'] == {'ms': 3.0}
  assert 'RESOURCE_EXHAUSTED' in found['row 1']['error']
  assert json.loads(path.read_text())['results'] == found
  lines = capsys.readouterr().out.splitlines()
  assert lines[3] == 'row 1  error: RuntimeError: RESOURCE_EXHAUSTED: out of memory'
  assert lines[4] == 'row 2  not here: no such library'
  assert lines[5].split() == ['row', '3', '3.00']  # under the head of row 0
  assert accelerator.wrong(found) == []


def test_what_was_measured_is_written_before_the_next_row(tmp_path):
  """An interruption keeps it."""
  path = tmp_path / 'figures.json'

  def interrupted(found):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    accelerator.measure(rows(lambda f: {'ms': 1.0}, interrupted), 1.0, {}, str(path))
  written = json.loads(path.read_text())
  assert written['results'] == {'row 0': {'ms': 1.0}}
  assert written['left out'] == ['row 1']


def test_rows_that_would_begin_late_are_left_out(capsys):
  with mock.patch('time.monotonic', side_effect=[0.0, 10.0, 130.0]):
    found = accelerator.measure(rows(*[lambda f: {'ms': 1.0}] * 3), 2.0, {}, None)
  assert list(found) == ['row 0']
  assert capsys.readouterr().out.splitlines()[-1].endswith('row 1; row 2')


def test_a_wrong_number_ends_with_code_1(capsys):
  def measure(found):
    return device_rows.at_both_precisions(lambda: {'score': 2e-4})

  assert measure({})['check'] == WRONG
  table = [Row('golden a', measure), Row('golden b', lambda f: 1 / 0), Row('step', lambda f: 1 / 0)]
  with (
    mock.patch.object(device_rows, 'rows', return_value=table),
    pytest.raises(SystemExit, match=r'golden a; golden b$'),
  ):
    call('--quick')
  assert 'WRONG' in capsys.readouterr().out


@pytest.mark.parametrize('only', ['step', 'step ncsnpp', 'layer FIR down shifts', 'loop,input'])
def test_names_of_rows(only):
  named = [row.name for row in accelerator.chosen(device_rows.rows(QUICK), only)]
  assert {'step': 8, 'step ncsnpp': 4, 'loop,input': 2}.get(only, 1) == len(named)


def test_a_name_that_no_row_has(capsys):
  with pytest.raises(SystemExit) as stopped:
    call('--quick', '--only', 'steep')
  assert stopped.value.code == 2
  assert "no row is named 'steep'; rows begin with golden" in capsys.readouterr().err


def test_both_sizes_have_the_same_rows():
  quick, full = (
    [row.name.rsplit(' ', 1)[0] if row.name.startswith('evaluate') else row.name for row in table]
    for table in map(device_rows.rows, (QUICK, device_rows.FULL))
  )
  assert quick == full
  assert len(set(row.name for row in device_rows.rows(QUICK))) == len(quick)


def test_a_run_that_is_stopped_goes_on_as_if_it_were_not():
  """Of points, whose network is quickly compiled."""
  config = two_moons.get_config()
  config.training.update(n_iters=40, n_jitted_steps=1, batch_size=16, snapshot_samples=8)
  figures = device_rows.stop_and_resume(config, {})
  assert figures['check'] == OK and figures['difference'] == 0
  assert 0 < figures['stopped at'] < 40
  assert figures['s to stop'] > 0


@pytest.mark.parametrize('layer', forms.LAYERS)
def test_all_forms_of_a_layer_are_the_same(layer):
  """Values, and gradients, which may differ where borders do."""
  choices, _ = forms.LAYERS[layer]
  x = jax.random.normal(jax.random.key(0), (2, 8, 12, 16))
  first, *others = (form for name, form in choices.items() if name != 'cudnn')
  for form in others:
    np.testing.assert_allclose(form(x), first(x), rtol=1e-4, atol=1e-4)
    gradients = (jax.jit(forms.gradient, static_argnums=0)(f, x) for f in (form, first))
    np.testing.assert_allclose(*gradients, rtol=1e-3, atol=1e-3)


def test_cudnn_is_not_here():
  with pytest.raises(forms.NotHere):
    forms.measure('attention', 'cudnn', (2, 8, 8, 8), 'float32', 0.0)


def test_queued_calls_are_counted():
  calls = []
  seconds = common.queued(lambda: calls.append(0) or jnp.zeros(()), 0.001)
  assert 0 < seconds < 0.1
  assert len(calls) >= 1 + 1 + 3 * 2


def test_golden_errors_see_an_error():
  """Of a network whose parameters are off by 1 %."""
  case = golden.NETWORKS[3]

  def off(arrays, setup, right=golden.parameters):
    return jax.tree.map(lambda v: 1.01 * v, right(arrays, setup))

  with mock.patch.object(golden, 'parameters', off):
    assert golden.network_errors(case)['score'] > 1e-3


def test_the_documentation_tells_of_every_row():
  page = (golden.FOLDER.parent.parent / 'docs' / 'accelerators.md').read_text()
  for kind in {row.name.split()[0] for row in device_rows.rows(device_rows.FULL)}:
    assert f'**`{kind}' in page, kind
