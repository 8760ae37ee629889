"""The model that comes with the code is what its card says, and who has trained nothing is told."""

import json
from pathlib import Path
import re

from etils import epath
import jax
import numpy as np
import pytest

from builders.data import load_source
from builders.setup import build
from builders.weights import nothing_trained
from configs.base import saved
from configs.edm import digits
from configs.vp import cifar10
from configs.vp import digits as vp_digits
from evaluation.metrics import frechet_distance, Moments
import run_lib
from runtime.errors import UserError
from workdir import same_config

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / 'assets' / 'edm' / 'digits'
CARD = json.loads((FOLDER / 'card.json').read_text())
COMMAND = (
  'python main.py --config configs/edm/digits.py --mode import --checkpoint assets/edm/digits'
)


def test_its_samples_are_as_far_from_the_data_as_the_card_says():
  """But for what few samples add, which as many images of the data show; noise is at 9.9."""
  setup, params = run_lib.load(str(FOLDER))
  shape = (150, *setup.data_shape)
  x, _ = setup.sampler(jax.random.key(0), setup.model.bind(params), shape)
  source = load_source(setup.config, 'train')
  data = source.gather(np.arange(len(source)))

  def moments(images):
    return Moments.of(images.reshape(len(images), -1) / 255)

  def distance(images):
    ours, all_data = moments(images), moments(data)
    return frechet_distance(ours.mean, ours.cov, all_data.mean, all_data.cov)

  apart = distance(setup.codec.to_stored(np.asarray(x))) - distance(data[::10])
  assert abs(apart) < CARD['measured']['frechet_pixels'] + 0.05


def test_its_card_says_how_it_was_made():
  assert CARD['dataset'] == 'digits' and 'Alpaydin' in CARD['licence']
  made = 'python main.py --config configs/edm/digits.py --mode '
  assert CARD['trained_with']['command'] == made + 'train'
  assert CARD['made_with']['command'].startswith(made + 'export')
  assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2_000_000
  config = saved(CARD['config'], FOLDER).to_dict()
  assert not same_config.differences(config, build(digits.get_config()).config.to_dict())


@pytest.mark.parametrize('use', [run_lib.sample, run_lib.evaluate, run_lib.export])
def test_where_nothing_is_trained_the_way_to_it_is_told(tmp_path, use):
  with pytest.raises(UserError) as refused:
    use(digits.get_config(), str(tmp_path))
  told = str(refused.value)
  assert 'train first (--mode train)' in told and '\n' not in told
  assert told.endswith(f'{COMMAND} --workdir {tmp_path}')  # where the command looks for it
  named = re.search(r'--checkpoint (\S+)', told)
  assert named and (ROOT / named[1]).samefile(FOLDER)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('config', 'workdir', 'end'),
  [
    (digits.get_config(), 'runs/edm/digits', COMMAND),
    (digits.get_config(), 'my runs/a', f"{COMMAND} --workdir 'my runs/a'"),
    (vp_digits.get_config(), 'runs/vp/digits', COMMAND),  # another model goes elsewhere
    (cifar10.get_config(), 'runs/vp/cifar10', 'train first (--mode train)'),  # other data
  ],
)
def test_the_way_is_that_of_the_config(config, workdir, end):
  assert str(nothing_trained(epath.Path(workdir), build(config))).endswith(end)


def test_what_is_neither_a_run_nor_weights_is_told_to_load(tmp_path):
  with pytest.raises(UserError, match=r"neither the workdir of a run nor .*'assets/edm/digits'"):
    run_lib.load(str(tmp_path))
