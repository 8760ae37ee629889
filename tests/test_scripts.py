"""scripts/: what they would give to gcloud, srun and kubectl, none of which is here."""

import os
from pathlib import Path
import shlex
import subprocess

import pytest
import yaml

SCRIPTS = Path(__file__).parent.parent / 'scripts'
GIVEN = [
  '--config',
  'configs/vp/digits.py',
  '--mode=train',
  '--workdir',
  'gs://a/b \\ \'c\' "d" $e',
]


def run(tmp_path: Path, stand_in: str, script: str, *arguments: str) -> tuple[int, str, str]:
  """Exit status, output and errors, where a command of that name tells what it was given."""
  command = tmp_path / stand_in
  command.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n[ "$1" != apply ] || cat\n')
  command.chmod(0o755)
  env = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
  done = subprocess.run(
    [SCRIPTS / script, *arguments], env=env, capture_output=True, text=True, check=False
  )
  return done.returncode, done.stdout, done.stderr


def test_a_job_of_slurm_starts_all_processes(tmp_path):
  _, told, _ = run(tmp_path, 'srun', 'slurm.sh', *GIVEN)
  assert told.split('\0')[:-1] == ['.venv/bin/python', 'main.py', '--distributed', *GIVEN]


def test_a_pod_gets_the_arguments_as_they_were_given(tmp_path):
  _, told, _ = run(tmp_path, 'gcloud', 'tpu_pod.sh', 'run', 'pod', 'zone', *GIVEN)
  *where, command = told.split('\0')[:-1]
  assert where[:5] == ['compute', 'tpus', 'tpu-vm', 'ssh', 'pod'] and '--worker=all' in where
  assert shlex.split(command)[-len(GIVEN) :] == GIVEN and 'main.py --distributed' in command


@pytest.mark.parametrize(
  ('slices', 'n', 'hosts', 'topology', 'accelerator'),
  [
    ('v5e:16x16', 1, 64, '16x16', 'tpu-v5-lite-podslice'),
    ('3xv5p:4x4x8', 3, 32, '4x4x8', 'tpu-v5p-slice'),
  ],
)
def test_a_cluster_gets_a_job_for_each_slice(tmp_path, slices, n, hosts, topology, accelerator):
  asked = ('my-run', 'registry/image:1', slices, *GIVEN)
  _, printed, _ = run(tmp_path, 'kubectl', 'gke.sh', 'print', *asked)
  _, given, _ = run(tmp_path, 'kubectl', 'gke.sh', 'run', *asked)
  assert given == 'apply\0-f\0-\0' + printed
  jobset = yaml.safe_load(printed)
  assert jobset['kind'] == 'JobSet' and jobset['metadata']['name'] == 'my-run'
  (of_slice,) = jobset['spec']['replicatedJobs']
  job = of_slice['template']['spec']
  assert of_slice['replicas'] == n and job['parallelism'] == job['completions'] == hosts
  pod = job['template']['spec']
  assert list(pod['nodeSelector'].values()) == [accelerator, topology]
  (container,) = pod['containers']
  assert container['command'] == ['python', 'main.py', '--distributed', *GIVEN]
  assert container['resources']['limits'] == {'google.com/tpu': 4}


@pytest.mark.parametrize(
  ('name', 'slices', 'said'),
  [
    ('my-run', 'h100', 'such as v5e:16x16 or 2xv5e:16x16; got h100'),
    ('my-run', '0xv5e:4x4', 'got 0xv5e:4x4'),
    ('my-run', 'v5e:3x3', '3x3 are 9'),
    ('My_run', 'v5e:4x4', 'got My_run'),
  ],
)
def test_what_no_cluster_has_is_refused(tmp_path, name, slices, said):
  code, told, error = run(tmp_path, 'kubectl', 'gke.sh', 'run', name, 'image', slices, '--x')
  assert code == 2 and not told and error.startswith('error: ') and said in error
  assert error.count('\n') == 1
