"""What is set before JAX is imported: each flag for its backend, and only where XLA knows it."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

from runtime import start
from runtime.errors import UserError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
  """Nothing is set, no library for another device is installed, and no answer is kept."""
  for name in ('XLA_FLAGS', 'JAX_PLATFORMS', 'JAX_PLATFORM_NAME', 'TPU_LIBRARY_PATH'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(start.importlib.metadata, 'entry_points', lambda group: ())


def flags() -> str:
  start.prepare()
  return os.environ.get('XLA_FLAGS', '')


@pytest.fixture
def everything_known(monkeypatch):
  monkeypatch.setattr(start, 'knows', lambda flag: True)


def install(name: str, folder: Path, monkeypatch) -> None:
  """Makes it look as if that module or package, with one module, were installed."""
  (folder / name).mkdir(parents=True)
  (folder / name / 'plugin.py').touch()
  monkeypatch.syspath_prepend(str(folder))


def test_flags_of_cpus_are_set_where_nothing_else_is_installed(everything_known):
  assert flags() == start.CPU_LIBRARY
  assert flags() == start.CPU_LIBRARY, 'once'


@pytest.mark.parametrize('package', ['libtpu', 'jax_plugins'])
def test_flags_of_cpus_are_not_set_for_gpus_and_tpus(
  package, everything_known, tmp_path, monkeypatch
):
  install(package, tmp_path / 'site', monkeypatch)
  assert flags() == ''
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')  # asked for, though
  assert flags() == start.CPU_LIBRARY


def test_plugins_are_also_known_by_their_entry_points(everything_known, monkeypatch):
  found = {'jax_plugins': ['xla_cuda13']}
  monkeypatch.setattr(start.importlib.metadata, 'entry_points', lambda group: found[group])
  assert flags() == ''


@pytest.mark.parametrize('name', ['JAX_PLATFORMS', 'JAX_PLATFORM_NAME'])
@pytest.mark.parametrize(
  ('platforms', 'cpu'), [('cpu', True), ('cpu,cuda', True), ('cuda,cpu', False), ('tpu', False)]
)
def test_the_first_platform_decides(name, platforms, cpu, everything_known, monkeypatch):
  monkeypatch.setenv(name, platforms)
  assert start.will_use_cpus() is cpu
  assert bool(flags()) is cpu


def test_what_the_user_has_set_stays(everything_known, monkeypatch):
  name = start.CPU_LIBRARY.partition('=')[0]
  for mine in (f'{name}=', f'--xla_a=1 {name}=LIBRARY_FUSION_TYPE_DOT'):
    monkeypatch.setenv('XLA_FLAGS', mine)
    assert flags() == mine
  monkeypatch.setenv('XLA_FLAGS', f'{name}_other=1')  # whose name only begins as ours
  assert flags() == f'{name}_other=1 {start.CPU_LIBRARY}'
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'mine')
  start.prepare()
  assert os.environ['JAX_COMPILATION_CACHE_DIR'] == 'mine'


def test_what_xla_does_not_know_is_not_set(monkeypatch):
  """XLA is asked: of a name, and of a value, that it cannot know; and of one that all know."""
  name = start.CPU_LIBRARY.partition('=')[0]
  for flag in ('--xla_cpu_no_such_flag=1', f'{name}=LIBRARY_FUSION_TYPE_NONE_SUCH'):
    assert not start.knows(flag)
    start.add_flag(flag)
    assert 'XLA_FLAGS' not in os.environ
  assert start.knows('--xla_force_host_platform_device_count=1')


def test_an_answer_is_kept_for_its_release(monkeypatch):
  asked = []

  def answer(child, *, env, **_):
    asked.append(env['XLA_FLAGS'])
    known = 'new' not in env['XLA_FLAGS'] or start_version() >= '2'
    return subprocess.CompletedProcess(child, int(not known), b'', b'' if known else b'parse_flags')

  def start_version() -> str:
    return sys.modules['jaxlib'].__version__

  monkeypatch.setattr(start.subprocess, 'run', answer)
  for version, knows_new in (('1.0', False), ('2.0', True)):
    monkeypatch.setattr('jaxlib.__version__', version)
    for _ in range(2):
      assert start.knows('--xla_old=1')
      assert start.knows('--xla_new=1') is knows_new
  assert asked == ['--xla_old=1', '--xla_new=1'] * 2


def test_a_process_that_dies_of_something_else_is_no_answer(monkeypatch):
  codes = iter([-9, 0])

  def answer(child, **_):
    return subprocess.CompletedProcess(child, next(codes), b'', b'Killed')

  monkeypatch.setattr(start.subprocess, 'run', answer)
  assert not start.knows('--xla_old=1')
  assert start.knows('--xla_old=1')


def test_jax_uses_what_was_foretold():
  """In a process of its own, where this machine decides."""
  code = (
    'from runtime import start; cpu = start.will_use_cpus(); start.prepare(); import jax;'
    'assert not cpu or jax.default_backend() == "cpu"; print("agree")'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.stdout == 'agree\n', done.stderr


SAY = (
  'import os, sys; from runtime import start; print(os.getpid(), flush=True);'
  'start._LARGE_PAGES = start.Path(sys.argv[1]); start.use_large_pages();'
  "print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), *sys.argv[2:])"
)


@pytest.mark.skipif(
  start.platform.libc_ver()[0] != 'glibc', reason='large pages are asked of glibc'
)
@pytest.mark.parametrize(
  'offered, user, expected',
  [
    ('always [madvise] never', None, 'glibc.malloc.hugetlb=1'),
    ('always [madvise] never', '', ''),
    ('[always] madvise never', None, 'None'),
    ('always madvise [never]', None, 'None'),
  ],
)
def test_a_command_starts_anew_for_large_pages_at_most_once(offered, user, expected, tmp_path):
  (tmp_path / 'enabled').write_text(offered)
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  environment.pop('GLIBC_TUNABLES', None)
  if user is not None:
    environment['GLIBC_TUNABLES'] = user
  command = [sys.executable, '-c', SAY, str(tmp_path / 'enabled'), '--a=b c']
  said = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
  ).stdout.splitlines()
  pids, last = {line.split()[0] for line in said}, said[-1]
  assert len(pids) == 1, 'the same process'
  assert len(said) == 3 if expected.startswith('glibc') else len(said) == 2
  assert last.split(' ', 1)[1] == f'{expected} --a=b c'


@pytest.mark.parametrize('platforms', ['cuda,cpu', 'gpu', 'CUDA'])
def test_gpus_are_deterministic_if_asked_to_be(platforms, everything_known, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  assert flags() == ''
  start.prepare(deterministic=True)
  assert os.environ['XLA_FLAGS'] == start.DETERMINISTIC


def test_gpus_that_are_found_are_deterministic_and_tpus_need_no_flag(
  everything_known, tmp_path, monkeypatch
):
  install('jax_plugins', tmp_path / 'site', monkeypatch)
  start.prepare(deterministic=True)
  assert os.environ['XLA_FLAGS'] == start.DETERMINISTIC
  monkeypatch.delenv('XLA_FLAGS')
  monkeypatch.setenv('TPU_LIBRARY_PATH', 'libtpu.so')
  start.prepare(deterministic=True)
  assert 'XLA_FLAGS' not in os.environ


def test_cpus_need_no_flag_to_be_deterministic(everything_known):
  start.prepare(deterministic=True)
  assert os.environ['XLA_FLAGS'] == start.CPU_LIBRARY


def test_an_xla_that_cannot_be_deterministic_says_so(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setattr(start, 'knows', lambda flag: False)
  with pytest.raises(UserError, match='--deterministic'):
    start.prepare(deterministic=True)


def test_the_users_choice_of_determinism_stays(everything_known, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_deterministic_ops=false')
  start.prepare(deterministic=True)
  assert os.environ['XLA_FLAGS'] == '--xla_gpu_deterministic_ops=false'


def test_this_xla_knows_the_flag():
  assert start.knows(start.DETERMINISTIC)
