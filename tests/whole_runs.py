"""Runs of main.py in processes of their own, with a tiny network, for the tests of whole runs."""

from collections.abc import Callable
import json
import os
from pathlib import Path
import pickle
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs.vp import digits
import run_lib
from runtime.errors import UserError

ROOT = Path(__file__).parent.parent
# A network of a few thousand parameters, and a checkpoint every other step.
TINY = {
  'model.nf': 8,
  'model.ch_mult': (1,),
  'model.num_res_blocks': 1,
  'model.attn_resolutions': (),
  'training.batch_size': 8,
  'training.n_iters': 12,
  'training.log_freq': 1,
  'training.eval_freq': 4,
  'training.snapshot_freq': 6,
  'training.snapshot_freq_for_preemption': 2,
  'training.snapshot_samples': 8,
  'sampling.num_steps': 25,
  'sampling.corrector': 'langevin',
  'eval.begin_ckpt': 1,
  'eval.batch_size': 16,
  'eval.num_samples': 24,
  'eval.features': '',
}
UNSEEN = {'training__snapshot_sampling': False}


def values_of(fields: dict) -> dict:
  """The fields of a tiny run by name, section.name; one is given as section__name."""
  return TINY | {name.replace('__', '.'): value for name, value in fields.items()}


def command(
  mode: str,
  workdir: Path,
  config: str = 'configs/vp/digits.py',
  eval_folder: str = 'eval',
  **fields,
) -> list[str]:
  """The command line of a tiny run."""
  overrides = [f'--config.{name}={value}' for name, value in values_of(fields).items()]
  return [
    sys.executable, str(ROOT / 'main.py'), '--config', str(ROOT / config), '--mode', mode,
    '--workdir', str(workdir), '--eval_folder', eval_folder, *overrides,
  ]  # fmt: skip


def run(mode: str, workdir: Path, devices: int = 1, **fields) -> subprocess.CompletedProcess:
  """Runs main.py to its end on so many host devices."""
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
  return subprocess.run(
    command(mode, workdir, **fields),
    env=os.environ | {'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
  )


def two_processes(mode: str, workdir: Path, late: float = 0.0, **fields) -> list[subprocess.Popen]:
  """Starts main.py in two processes that work together, the second one so many seconds late."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  together = ['--distributed', f'--coordinator={address}', '--num_processes=2']
  pair = []
  for i in range(2):
    time.sleep(i * late)
    own = [*command(mode, workdir, **fields), *together, f'--process_id={i}']
    pair.append(subprocess.Popen(own, stderr=subprocess.PIPE, text=True))
  return pair


# (mode, workdir, fields by name) of what one start of processes does, one after another.
Calls = list[tuple[str, Path, dict[str, Any]]]

_ONE_AFTER_ANOTHER = """
import pickle, sys
from runtime import start
start.prepare()
import jax
n, calls = sys.argv[1:]
if int(n) > 1:
  from runtime import processes
  processes.join(None, None, None, seconds=100)  # the variables of SLURM tell
import run_lib
from configs.vp import digits
for mode, workdir, fields in pickle.loads(bytes.fromhex(calls)):
  config = digits.get_config()
  config.update_from_flattened_dict(fields)
  {'train': lambda: run_lib.train(config, workdir), 'stats': lambda: run_lib.stats(config),
   'eval': lambda: run_lib.evaluate(config, workdir)}[mode]()
"""


def one_after_another(processes: int, devices: int, calls: Calls) -> None:
  """Runs what `calls` says in so many processes that work together, of so many host devices each.

  To start a process, and to compile what is compiled already, costs more than these runs. They find
  each other as those of a SLURM job do.
  """
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
  told = [(mode, str(workdir), values_of(fields)) for mode, workdir, fields in calls]
  env = os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
  env |= {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_STEP_NODELIST': 'localhost'}
  # Threads of XLA's: devices of a program that wait for others must leave some for these.
  env |= {'SLURM_NTASKS': str(processes), 'NPROC': '32'}
  started = [
    subprocess.Popen(
      [sys.executable, '-c', _ONE_AFTER_ANOTHER, str(processes), pickle.dumps(told).hex()],
      env=env | {'SLURM_PROCID': str(number), 'SLURM_LOCALID': str(number)},
      stderr=subprocess.PIPE, text=True,
    )
    for number in range(processes)
  ]  # fmt: skip
  said = [process.communicate(timeout=600)[1] for process in started]
  assert not any(process.returncode for process in started), '\n'.join(said)


def succeed(*args, **kwargs) -> subprocess.CompletedProcess:
  done = run(*args, **kwargs)
  assert done.returncode == 0, done.stderr
  return done


def in_process(mode: str, workdir: Path, eval_folder: str = 'eval', **fields) -> None:
  """What `succeed` does, in this process, which has imported all of it: for what is not stopped."""
  values = {k: str(v) if isinstance(v, Path) else v for k, v in values_of(fields).items()}
  config = digits.get_config()
  config.update_from_flattened_dict(values)
  if mode == 'train':
    run_lib.train(config, str(workdir))
  else:
    run_lib.evaluate(config, str(workdir), eval_folder)


def state_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
  """The arrays of a kept checkpoint, by name."""
  checkpointer = ocp.StandardCheckpointer()
  path = workdir / 'checkpoints' / str(step) / 'default'
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
    dict(checkpointer.metadata(path).item_metadata),
  )
  leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path, like)['state'])
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def losses_in(workdir: Path) -> dict[int, float]:
  """What metrics.jsonl says of the training loss, by step."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {line['step']: line['loss'] for line in lines if 'loss' in line}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name], err_msg=name)


def refusal(what: Callable[..., Any], workdir: Path, **fields) -> str:
  """What a function of run_lib says of a mistake, which is the line that main.py prints."""
  config = digits.get_config()
  config.update_from_flattened_dict(values_of(fields))
  with pytest.raises(UserError) as caught:
    what(config, str(workdir))
  (line,) = str(caught.value).splitlines()
  return line


def refused(done: subprocess.CompletedProcess) -> str:
  """The one line that a mistake gets."""
  assert done.returncode == 2, done.stderr
  *said, error = done.stderr.splitlines()
  assert error.startswith('error: ')
  assert not [line for line in said if 'Traceback' in line or 'Error' in line]
  return error
