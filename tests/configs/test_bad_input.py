"""Wrong values, flags, files: each gets one line that names what is wrong, and nothing is accepted.

They are generated: from the tables of what is allowed, or from whole files that are cut or changed.
"""

import io
import itertools
import math
from pathlib import Path
import subprocess
import sys

from hypothesis import given, HealthCheck, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest
from released_networks import shapes_once
from whole_runs import command, refused, ROOT

from builders.setup import build
from builders.values import CHOICES
from configs import ranges
from configs.toy import two_moons
from configs.ve import cifar10 as ve_cifar10
from configs.vp import digits
from data import sources
import run_lib
from runtime.errors import UserError
from training import released_checkpoints
from workdir import same_config

CONFIGS = (digits.get_config, ve_cifar10.get_config, lambda: ve_cifar10.get_config('ncsnv2'),
           lambda: two_moons.get_config('cd'))  # fmt: skip
NON_FINITE = (math.nan, math.inf, -math.inf)
FEW = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def wrong_values(config: ConfigDict) -> list[tuple[str, object]]:
  """Fields of a config, each with a value that it must not have."""
  flat = dict(same_config.flatten(config.to_dict()))
  wrong = [
    (name, value)
    for name, default in flat.items()
    if isinstance(default, float) and name not in ranges._MAY_BE_INFINITE
    for value in NON_FINITE
  ]
  candidates = (-1e9, -1, 0, 1, 2, 1e9, 2**32)
  for names, holds, _ in ranges._RANGES:
    for name, value in itertools.product(names, candidates):
      kind = type(flat.get(name))
      if name in flat and kind(value) == value and not holds(value):
        wrong.append((name, kind(value)))
  for name in CHOICES:
    if name in flat:
      wrong += [(name, value) for value in ('nonsense', str(flat[name]).upper() + '_')]
  wrong += [(n, ()) for n in ('model.ch_mult', 'model.fir_kernel') if n in flat]
  return wrong


@pytest.mark.parametrize('get_config', CONFIGS)
def test_every_value_out_of_its_range_is_refused(get_config):
  mishandled, tried = [], wrong_values(get_config())
  assert len(tried) > 150
  for name, value in tried:
    config = get_config()
    config.update_from_flattened_dict({name: value})
    try:
      build(config)
    except UserError as error:
      if len(str(error).splitlines()) != 1 or name not in str(error):
        mishandled.append((name, value, str(error)))
    else:
      mishandled.append((name, value, 'accepted'))
  assert not mishandled
  print(f'{len(tried)} wrong values, 0 mishandled')


@settings(FEW, max_examples=300)
@given(word=st.text(max_size=12), name=st.sampled_from(sorted(CHOICES)))
def test_words_that_are_no_choice_are_refused(word, name):
  config = digits.get_config()
  if ranges.field(config, name) is not None and word not in CHOICES[name]:
    config.update_from_flattened_dict({name: word})
    with pytest.raises(UserError):
      build(config)


WRONG_FLAGS = [
  ['--config.training.n_iters=1.5'],
  ['--config.training.n_iters='],
  ['--config.optim.lr=fast'],
  ['--config.sampling.labels=3,x'],
  ['--config.model.ch_mult=1,b'],
  ['--config.seed=-1'],
  ['--config.training.batch_size=0'],
  ['--config.model'],
  ['--config.nothing.at.all=1'],
  ['--config.data.image_size=-8'],
  ['--mode=trian'],
  ['--mode=import'],
  ['--checkpoint=here'],
  ['--workdir'],
  ['--num_processes=two'],
  ['--distributed=perhaps'],
  ['--distributed'],
  ['--eval_folder'],
  ['-x'],
  ['--=3'],
  ['train', 'eval'],
  ['--config='],
  ['--config=/dev/null'],
  ['--config=configs'],
  ['--config=README.md'],
  ['--config=CITATION.cff'],
  ['--config=configs/vp/digits.py:'],
  ['--config=configs/ve/cifar10.py:NCSNPP'],
]


@pytest.mark.parametrize('arguments', WRONG_FLAGS, ids=' '.join)
def test_a_wrong_command_line_is_refused(tmp_path, arguments):
  done = subprocess.run(
    [*command('train', tmp_path / 'run'), *arguments], capture_output=True, text=True, check=False
  )
  refused(done)
  assert not (tmp_path / 'run').exists()


READ = """
import main, sys
main.parse(['main.py', '--config=configs/vp/digits.py', '--mode=train', *sys.argv[1:]])
config = main._CONFIG.value
print(config.model.attn_resolutions, config.training.n_iters, config.sampling.labels, config.seed,
      config.eval.enable_sampling, config.optim.lr)
"""


@pytest.mark.parametrize(
  'arguments, read',
  [
    ('--config.training.n_iters=1e5 --config.model.attn_resolutions=',
     '() 100000 () 42 True 0.002'),
    ('--config.training.n_iters 2e3 --config.model.attn_resolutions None --config.seed 7.0',
     '() 2000 () 7 True 0.002'),
    ('--config.model.attn_resolutions=None --noconfig.eval.enable_sampling --config.optim.lr=1e-5',
     '() 2000 () 42 False 1e-05'),
    ('--config.eval.enable_sampling --config.sampling.labels= --config.model.attn_resolutions=4,8',
     '(4, 8) 2000 () 42 True 0.002'),
  ],
)  # fmt: skip
def test_whole_numbers_and_nothing_are_read_as_they_are_meant(arguments, read):
  words = [sys.executable, '-c', READ, *arguments.split()]
  done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
  assert done.stdout.strip() == read


@pytest.mark.parametrize(
  'arguments',
  [['--mode=train'], ['--config=configs/vp/digits.py'], ['--confg=x', '--mode=eval']],
)
def test_an_unfinished_command_line_is_refused(arguments):
  start = [sys.executable, str(ROOT / 'main.py'), *arguments]
  refused(subprocess.run(start, capture_output=True, text=True, check=False, cwd=ROOT))


# Files.


def encoded(format: str) -> bytes:
  """A picture in a format."""
  pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, format=format)
  return buffer.getvalue()


PICTURES = {format: encoded(format) for format in ('PNG', 'JPEG', 'BMP', 'WEBP', 'TIFF', 'GIF')}


def read_picture(folder: Path, format: str, data: bytes) -> np.ndarray:
  path = folder / f'picture.{format.lower()}'
  path.write_bytes(data)
  source = sources.load('folder', 'train', image_size=8, num_channels=3, path=str(folder))
  return source.batch(np.arange(1))['data']


@FEW
@given(format=st.sampled_from(sorted(PICTURES)), share=st.floats(0, 0.7))
def test_a_picture_that_is_cut_off_is_refused_by_name(tmp_path_factory, format, share):
  data, folder = PICTURES[format], tmp_path_factory.mktemp('cut')
  with pytest.raises(UserError, match=r'picture\.\w+ cannot be read'):
    read_picture(folder, format, data[: int(share * len(data))])


@FEW
@given(format=st.sampled_from(sorted(PICTURES)), place=st.floats(0, 1), value=st.binary(max_size=9))
def test_a_changed_picture_is_read_or_refused_by_name(tmp_path_factory, format, place, value):
  """Not every format can tell; what is read is a picture."""
  data, folder = PICTURES[format], tmp_path_factory.mktemp('changed')
  i = int(place * len(data))
  try:
    picture = read_picture(folder, format, data[:i] + value + data[i + len(value) :])
  except UserError as error:
    assert 'cannot be read' in str(error) and len(str(error).splitlines()) == 1
  else:
    assert picture.shape == (1, 8, 8, 3) and picture.dtype == np.uint8


@FEW
@given(data=st.binary(max_size=300), suffix=st.sampled_from(['', '.pth', '.pt', '.npz']))
def test_what_is_no_checkpoint_is_refused(tmp_path_factory, data, suffix):
  path = tmp_path_factory.mktemp('checkpoint') / f'checkpoint_1{suffix}'
  path.write_bytes(data)
  setup = build(digits.get_config())
  with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
    patch.setattr(released_checkpoints, 'network_parameters', shapes_once)
    released_checkpoints.load(
      str(path), setup.model, (1, *setup.data_shape), setup.tx, setup.config.model.ema_rate
    )
  assert len(str(caught.value).splitlines()) == 1 and str(path) in str(caught.value)


HAND_MADE = st.sampled_from((
  '{}', '[]', '3', 'null', '{"model": 3}', '{"nothing": {}}',
  '{"model": {"name": "ncsnpp", "nf": 1e400}}',
  '{"model": {"name": "ncsnpp", "nf": "many"}}', '{"model": {"name": "mlp"}, "data": null}',
  '{"model": {"name": "mlp"}, "training": {"n_iters": []}}', '{"model": {"name": "nonsense"}}',
  '{"model": {"name": []}}', '{"model": {"name": "mlp"}, "seed": -1}',
))  # fmt: skip


@FEW
@given(text=st.one_of(st.text(max_size=40), HAND_MADE))
def test_a_config_that_was_changed_by_hand_is_refused(tmp_path_factory, text):
  folder = tmp_path_factory.mktemp('changed')
  (folder / 'config.json').write_text(text)
  with pytest.raises(UserError) as caught:
    run_lib.load(str(folder))
  assert len(str(caught.value).splitlines()) == 1
