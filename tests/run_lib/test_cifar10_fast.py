"""scripts/cifar10_fast.sh: from a folder of packed images to numbers and samples, with --quick."""

import io
import json
import os
from pathlib import Path
import subprocess
import sys
import tarfile
import time

import numpy as np
from PIL import Image
import pytest
from whole_runs import ROOT

from configs.edm import cifar10

SCRIPT = ROOT / 'scripts' / 'cifar10_fast.sh'


def start(*args: str | Path, workdir: Path, python: str = sys.executable) -> subprocess.Popen:
  """The script, in a process group of its own."""
  return subprocess.Popen(
    [SCRIPT, *args],
    env=os.environ | {'PYTHON': python, 'WORKDIR': str(workdir)},
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
  )  # fmt: skip


def pack(folder: Path, **images: int) -> None:
  """Tar files of so many images of noise in a split, as WebP: <split>.tar, of two classes."""
  rng = np.random.default_rng(0)
  folder.mkdir()
  for split, n in images.items():
    with tarfile.open(folder / f'{split}.tar', 'w') as tar:
      for i in range(n):
        image, data = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)), io.BytesIO()
        image.save(data, 'WEBP', lossless=True)
        info = tarfile.TarInfo(f'{split}/{("cat", "dog")[i % 2]}/{i:05d}.webp')
        info.size = data.tell()
        tar.addfile(info, io.BytesIO(data.getvalue()))


@pytest.mark.slow
def test_it_goes_from_packed_images_to_numbers_and_goes_on_after_a_kill(tmp_path):
  pack(tmp_path / 'packed', train=40, test=8)
  run = tmp_path / 'run'
  killed = start(tmp_path / 'packed', '--quick', workdir=run)
  while not (run / 'checkpoints-meta' / '10').exists():  # whole, in the middle of training
    assert killed.poll() is None
    time.sleep(0.02)
  os.killpg(killed.pid, 9)
  killed.wait()
  again = start(tmp_path / 'packed', '--quick', workdir=run)
  said = again.communicate(timeout=600)
  assert again.returncode == 0, said
  assert 'resuming' in said[1] and f'{run}/index.html' in said[0]
  report = json.loads((run / 'eval' / 'report_40.json').read_text())
  assert report['bpd_test_images'] == 8 and np.isfinite(report['bpd_test'])
  assert report['samples'] == 32 and report['frechet_pixels'] > 0
  assert Image.open(run / 'eval' / 'step_40' / 'samples.png').size[0] > 100
  assert not (run / 'images.part').exists()


def test_it_stops_where_a_command_fails_and_repeats_all_that_go_on_by_themselves(tmp_path):
  """With an interpreter that notes the modes, and fails in one of them once."""
  pack(tmp_path / 'packed', train=4, test=2)
  noted, python, run = tmp_path / 'noted', tmp_path / 'python', tmp_path / 'run'
  python.write_text(
    f'#!/usr/bin/env bash\necho "$@" >> {noted}\n'
    f'case "$*" in *"--mode stats") ! mkdir {tmp_path}/failed 2>/dev/null || exit 3 ;; esac\n'
  )
  python.chmod(0o755)
  (run / 'images.part' / 'train' / 'fish').mkdir(parents=True)  # unpacking was stopped
  for expected in (3, 0):
    process = start(tmp_path / 'packed', '--quick', workdir=run, python=str(python))
    process.communicate(timeout=60)
    assert process.returncode == expected
  calls = noted.read_text().splitlines()
  modes = [call.partition('--mode ')[2].split()[0] for call in calls]
  assert modes == ['train', 'stats', 'train', 'stats', 'eval']
  assert all(f'--workdir {run} ' in call and '--config.model.nf=8' in call for call in calls)
  assert sorted(p.name for p in (run / 'images' / 'train').iterdir()) == ['cat', 'dog']
  assert len(list((run / 'images').glob('*/*/*.webp'))) == 6


@pytest.mark.parametrize(
  ('args', 'said'),
  [([], 'FOLDER'), (['nowhere'], 'nowhere is not a folder'), (['.', '--fast'], 'FOLDER --quick')],
)
def test_a_wrong_command_line_says_how(tmp_path, args, said):
  process = start(*args, workdir=tmp_path / 'run')
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 2 and said in errors
  assert not (tmp_path / 'run').exists()


def test_a_folder_without_images_is_refused(tmp_path):
  process = start(tmp_path, workdir=tmp_path / 'run')
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 2
  assert errors.count('\n') == 1 and 'holds neither train/ and test/, nor tar files' in errors


def test_what_the_script_sets_are_fields():
  config = cifar10.get_config('fast').to_dict()
  for word in SCRIPT.read_text().replace('"', ' ').replace("'", ' ').split():
    if word.startswith('--config.'):
      section, field = word.removeprefix('--config.').partition('=')[0].split('.')
      assert field in config[section], word
