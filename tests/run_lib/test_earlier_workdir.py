"""A workdir that earlier code made, of version 39131b5, goes on as it would have gone on there.

tests/earlier has it, after 40 steps on two moons, and the losses of the 40 steps that followed in
a run of that code which was not stopped.
"""

import json
import os
from pathlib import Path
import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest
from whole_runs import losses_in

import run_lib
from runtime import start

ROOT = Path(__file__).parent.parent.parent
EARLIER = ROOT / 'tests' / 'earlier'


@pytest.fixture
def workdir(tmp_path) -> Path:
  with tarfile.open(EARLIER / 'two_moons_vp.tar.xz') as archive:
    archive.extractall(tmp_path, filter='data')
  return tmp_path


GO_ON = """
import json, pathlib, sys
from configs.base import saved
import run_lib

workdir = pathlib.Path(sys.argv[1])
config = saved(json.loads((workdir / 'config.json').read_text()), workdir)
config.training.n_iters = 80
config.training.snapshot_sampling = False
run_lib.train(config, str(workdir))
"""


def test_its_run_goes_on(workdir):
  """Another kind of CPU adds up in another order; on the kind that made it, all bits agree.

  So do other options of the compiler: its programs were compiled in many parts.
  """
  flags = [
    f for f in os.environ['XLA_FLAGS'].split() if not f.startswith('--xla_cpu_parallel_codegen')
  ]
  env = os.environ | {'XLA_FLAGS': ' '.join(flags)}
  subprocess.run([sys.executable, '-c', GO_ON, workdir], env=env, cwd=ROOT, check=True)
  expected = json.loads((EARLIER / 'two_moons_vp.json').read_text())
  found = losses_in(workdir)
  found = [found[step] for step in range(41, 81)]
  np.testing.assert_allclose(found, expected['losses'], rtol=1e-3)
  if expected['cpu'] == start._cache().name and jax.default_backend() == 'cpu':
    assert found == expected['losses']


def test_its_average_is_what_is_loaded(workdir):
  setup, params = run_lib.load(str(workdir))
  score = jax.jit(setup.model.bind(params).__call__)(np.ones((3, 2), np.float32), np.full(3, 0.5))
  assert score.shape == (3, 2) and np.isfinite(score).all()
