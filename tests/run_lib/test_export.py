"""Weights that leave a run come back as they were, and as PyTorch's release lays them out."""

import dataclasses
import json
import shutil

from etils import epath
import jax
import numpy as np
import pytest
from released_networks import setup_of, shapes_of, torch_content
from safetensors.numpy import load_file

from benchmarks.golden import load as load_golden
from builders.continuity import note_machine, write_config
from builders.setup import build
from builders.training import score_task
from configs import base, own
import run_lib
from runtime.errors import UserError
from training.checkpoints import Checkpoints, identity, Notes
from training.flat_tables import flat
from training.released_torch import from_torch, to_torch
from workdir import artifacts

CLASSES = ('cat', 'dog')


def config(**fields) -> base.ConfigDict:
  made = own.digits(base.vp('ddpmpp'))
  made.model.update(nf=8, ch_mult=(1, 1), attn_resolutions=(), num_res_blocks=1)
  made.model.update(fields)
  return made


def trained(workdir: epath.Path, seed: int, **fields) -> dict:
  """A workdir with a checkpoint of step 7, whose average is not its parameters; that average."""
  made = config(**fields)
  made.seed = seed
  setup = build(made)
  state = score_task(setup).init(jax.random.key(seed))
  average = jax.tree.map(lambda x: x + 1, state.params)
  state = dataclasses.replace(state, step=np.int32(7), averages=(average,))
  workdir.mkdir(exist_ok=True)
  with Checkpoints(workdir, Notes(CLASSES)) as checkpoints:
    checkpoints.save(state, keep=True)
  write_config(epath.Path(workdir), setup, 7)
  return state.ema_params


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A workdir, its average, and the folder of its weights."""
  workdir = tmp_path_factory.mktemp('run')
  average = trained(workdir, 0)
  return workdir, average, run_lib.export(config(), str(workdir), licence='CC0')


def same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_exported_weights_are_loaded_to_the_bit(run):
  _, average, folder = run
  setup, params = run_lib.load(str(folder))
  same(params, average)
  same(load_file(folder / 'weights.safetensors'), flat(average))
  assert setup.config.to_dict() == build(config()).config.to_dict()


def test_the_card_says_what_the_weights_are(run):
  _, average, folder = run
  card = json.loads((folder / 'card.json').read_text())
  assert card['parameters'] == sum(x.size for x in jax.tree.leaves(average))
  assert (card['step'], card['images_seen']) == (7, 7 * config().training.batch_size)
  assert (card['sde'], card['network'], card['licence']) == ('vpsde', 'ncsnpp', 'CC0')
  assert (card['classes'], card['data_shape']) == (list(CLASSES), [8, 8, 1])
  assert card['made_with']['command'] == ''  # pytest, not main.py
  assert card['trained_with'] == card['measured'] == {}


def test_the_card_has_the_command_and_the_report_of_these_weights(run, tmp_path, monkeypatch):
  workdir, average, _ = run
  workdir = shutil.copytree(workdir, tmp_path / 'evaluated')
  monkeypatch.setattr('sys.argv', ['./main.py', '--config', 'a b.py', '--mode', 'train'])
  note_machine(epath.Path(workdir))
  of_these = {'step': 7, 'checkpoint': identity(average), 'bpd_test': 4.5}
  of_a_former_run = of_these | {'checkpoint': '0'}
  for report, told in ((of_these, of_these), (of_a_former_run, {})):
    artifacts.write_json(workdir / 'eval' / 'report_7.json', report)
    folder = run_lib.export(config(), str(workdir), f'export_{len(told)}')
    card = json.loads((folder / 'card.json').read_text())
    assert card['measured'] == told
    assert card['trained_with']['command'] == "python main.py --config 'a b.py' --mode train"
    assert card['trained_with']['jax'] == jax.__version__


def test_weights_become_a_workdir_that_is_evaluated_and_trained_on(run, tmp_path, caplog):
  _, average, folder = run
  caplog.set_level('INFO', 'score_sde')
  run_lib.import_released(config(), str(tmp_path / 'new'), str(folder))
  assert 'the optimiser begins anew' in caplog.text
  same(run_lib.load(str(tmp_path / 'new'))[1], average)
  again = run_lib.export(config(), str(tmp_path / 'new'))
  assert (again / 'weights.safetensors').read_bytes() == (
    folder / 'weights.safetensors'
  ).read_bytes()
  card = json.loads((again / 'card.json').read_text())
  assert (card['step'], card['classes'], card['licence']) == (7, list(CLASSES), 'not stated')
  with pytest.raises(UserError, match=r'does not fit the config: config.model.nf: 8 there, 16 now'):
    run_lib.import_released(config(nf=16), str(tmp_path / 'other'), str(folder))


def test_a_folder_keeps_the_weights_of_one_checkpoint(run, tmp_path):
  workdir, _, folder = run
  before = (folder / 'card.json').read_bytes()
  run_lib.export(config(), str(workdir), licence='CC0')  # the same once more
  assert (folder / 'card.json').read_bytes() == before
  trained(tmp_path, 1)
  made = run_lib.export(config(), str(tmp_path))
  for file in folder.iterdir():
    if file.suffix:
      (made / file.name).write_bytes(file.read_bytes())
  with pytest.raises(UserError, match=r'another checkpoint; choose another --export_folder'):
    run_lib.export(config(), str(tmp_path))


@pytest.mark.parametrize(
  ('file', 'change', 'message'),
  [
    ('weights.safetensors', lambda data: data[:-1] + bytes([data[-1] ^ 1]), 'is damaged'),
    ('weights.safetensors', None, 'does not exist'),
    ('card.json', lambda data: data.replace(b'"format": 1', b'"format": 2'), 'update the code'),
    ('card.json', lambda data: b'[]', 'is not the card'),
  ],
)
def test_a_damaged_folder_is_told_in_one_line(run, tmp_path, file, change, message):
  _, _, folder = run
  for path in folder.iterdir():
    if path.suffix:
      (tmp_path / path.name).write_bytes(path.read_bytes())
  if change:
    (tmp_path / file).write_bytes(change((folder / file).read_bytes()))
  else:
    (tmp_path / file).unlink()
  with pytest.raises(UserError, match=message):
    run_lib.load(str(tmp_path))


def test_networks_that_pytorch_lacks_have_no_such_file(tmp_path, caplog):
  caplog.set_level('INFO', 'score_sde')
  trained(tmp_path, 0, num_classes=2)
  folder = run_lib.export(config(num_classes=2), str(tmp_path))
  assert not (folder / 'pytorch.safetensors').exists()
  assert 'has no such network' in caplog.text


@pytest.mark.parametrize('case', ['ddpm_vp_cont', 'npp_ve_cont_resid_in_fir'])
def test_the_layout_of_pytorch_is_that_of_its_release(case):
  """Names, axes and values of its own state come back from what is imported of it."""
  arrays = load_golden(f'pytorch_{case}')
  names = shapes_of(setup_of(arrays))
  content = torch_content(arrays)
  theirs = to_torch(from_torch(content, names).params, names)
  model = {k.removeprefix('module.'): v for k, v in content['model'].items()}
  model.pop('sigmas')
  assert theirs.keys() == model.keys()
  same(theirs, {name: model[name] for name in theirs})


def test_the_file_for_pytorch_has_all_that_its_network_keeps(run):
  """Its noise levels beside the parameters: the largest first, in float64, as the release does."""
  _, average, folder = run
  theirs = load_file(folder / 'pytorch.safetensors')
  sigmas, model = theirs.pop('sigmas'), config().model
  np.testing.assert_allclose(sigmas[[0, -1]], [model.sigma_max, model.sigma_min])
  assert sigmas.dtype == np.float64 and len(sigmas) == model.num_scales
  assert len(theirs) == len(jax.tree.leaves(average))
