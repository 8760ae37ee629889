"""Which fields may change in a run that goes on, field by field; the history; default workdirs."""

import json

from etils import epath
import pytest

from configs import base
from configs.points import config_of
from configs.vp import digits
import main
from runtime.errors import UserError
from workdir import artifacts, same_config
from workdir.same_config import check_unchanged, is_among, LEARNED, MAY_CHANGE


def all_fields() -> dict[str, object]:
  """Every field that a config can have, with a value."""
  fields = dict(same_config.flatten(base.saved({'model': {'name': 'mlp'}}, '').to_dict()))
  for network in base.NETWORKS.values():
    fields |= {f'model.{name}': value for name, value in network.items()}
  return fields


def another(value: object) -> object:
  """A value of the same kind."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, tuple | list):
    return (*value, 7)
  return f'{value}_' if isinstance(value, str) else value + 1


def test_every_field_may_change_or_may_not():
  """A new field of configs/base.py fails here, until workdir/same_config.py says which."""
  fields = all_fields()
  for name in fields:
    learned, free = name in LEARNED, is_among(name, MAY_CHANGE)
    assert learned + free == 1, f'config.{name} must be in one of LEARNED and MAY_CHANGE'
  assert set(LEARNED) <= set(fields)
  sections = {name.partition('.')[0] for name in fields}
  assert {name for name in MAY_CHANGE if '.' in name} <= set(fields)
  assert {name for name in MAY_CHANGE if '.' not in name} <= sections


@pytest.mark.parametrize('network', base.NETWORKS)
def test_what_is_learned_is_refused_field_by_field(tmp_path, network):
  config = base.vp(network)
  path = epath.Path(tmp_path / 'config.json')
  artifacts.write_json(path, config.to_dict())
  check_unchanged(path, config.to_dict(), LEARNED)
  for name, value in dict(same_config.flatten(config.to_dict())).items():
    if network != 'ncsnpp' and not name.startswith('model.'):
      continue  # the same whatever the network is
    changed = config.copy_and_resolve_references()
    if name == 'model.name':
      changed.model.name = 'mlp' if network != 'mlp' else 'ddpm'
    else:
      with changed.ignore_type():
        changed.update_from_flattened_dict({name: another(value)})
    assert list(same_config.changes(path, changed.to_dict())) == [name]
    if name in LEARNED:
      with pytest.raises(UserError, match=f'config.{name}: .* there, .* now') as error:
        check_unchanged(path, changed.to_dict(), LEARNED)
      assert len(str(error.value).splitlines()) == 1
    else:
      check_unchanged(path, changed.to_dict(), LEARNED)


def test_another_spelling_of_the_data_is_no_change(tmp_path):
  config = base.vp('ddpm')
  path = epath.Path(tmp_path / 'config.json')
  config.data.path = 'photos'
  artifacts.write_json(path, config.to_dict())
  config.data.update(dataset='cifar10', path='./photos/')
  assert not same_config.changes(path, config.to_dict())


def test_configs_are_kept_as_a_history(tmp_path):
  root, config = epath.Path(tmp_path), digits.get_config()
  rates = {}
  for step, lr in ((0, 1e-3), (500, 1e-3), (500, 1e-4), (500, 1e-5), (900, 1e-5)):
    config.optim.lr = lr
    same_config.write(root, config.to_dict(), step)
  for path in root.glob('configs/*.json'):
    rates[path.name] = json.loads(path.read_text())['optim']['lr']
  assert rates == {'step_0.json': 1e-3, 'step_500.json': 1e-4, 'step_500-2.json': 1e-5}
  assert json.loads((root / 'config.json').read_text())['optim']['lr'] == 1e-5


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    ({}, ''),
    ({'training.n_iters': 7, 'optim.lr': 1.0, 'eval.num_samples': 9, 'data.path': 'x'}, ''),
    ({'data.dataset': 'Digits'}, ''),
    ({'data.dataset': 'SVHN'}, '-dataset=SVHN'),
    ({'seed': 1, 'data.dataset': 'lsun/church'}, '-dataset=lsun-church-seed=1'),
    ({'model.ch_mult': (1, 2, 2)}, '-ch_mult=1,2,2'),
    ({'data.condition': 'lowres:4'}, '-condition=lowres-4'),
    ({'data.condition': '/a/sketches'}, '-condition=pairs'),  # which may move
  ],
)
def test_the_default_workdir_says_what_is_learned(tmp_path, fields, named):
  """What else is set leaves it; a run that was made before under the usual name stays there."""
  usual, of_file, config = str(tmp_path / 'digits'), digits.get_config(), digits.get_config()
  config.update_from_flattened_dict(fields)
  assert main.workdir_of(usual, of_file, config, begins=True) == usual + named
  assert main.workdir_of(usual, of_file, config, begins=False) == usual  # where all is looked for
  artifacts.write_json(epath.Path(usual) / 'config.json', config.to_dict())
  assert main.workdir_of(usual, of_file, config, begins=True) == usual
  artifacts.write_json(epath.Path(usual) / 'config.json', of_file.to_dict())
  assert main.workdir_of(usual, of_file, config, begins=True) == usual + named
  (tmp_path / f'digits{named}').mkdir(exist_ok=True)
  assert main.workdir_of(usual, of_file, config, begins=False) == usual + named


def test_two_configs_never_share_a_default_workdir(tmp_path):
  """Not even where the name would be too long for a disk."""
  of_file, names = config_of('two_moons', 'cd'), set()
  for sigma in (1.0, 2.0):
    config = config_of('two_moons', 'cd')
    with config.ignore_type():
      for name in LEARNED:
        value = dict(same_config.flatten(config.to_dict())).get(name)
        if value is not None:
          config.update_from_flattened_dict({name: another(value)})
    config.model.sigma_max = sigma
    names.add(main.workdir_of(str(tmp_path / 'run'), of_file, config, begins=True))
  assert len(names) == 2 and all(len(epath.Path(name).name) < 200 for name in names)


def test_a_folder_of_conditions_may_move_and_a_kind_of_condition_not(tmp_path):
  """Where it is another folder, that is told; its files are compared elsewhere."""
  saved_at, config = epath.Path(tmp_path) / 'config.json', digits.get_config()
  for before, now, other in (('a', './a', None), ('a', 'b', ('a', 'b')), ('', 'a', None)):
    config.data.condition = before
    artifacts.write_json(saved_at, config.to_dict())
    config.data.condition = now
    assert same_config.other_folder(saved_at, config.to_dict(), 'data', 'condition') == other
  for before, now in (('', 'a'), ('a', 'gray'), ('gray', 'lowres:4'), ('lowres:4', 'lowres:2')):
    config.data.condition = before
    artifacts.write_json(saved_at, config.to_dict())
    config.data.condition = now
    with pytest.raises(UserError, match=r'config\.data\.condition: '):
      check_unchanged(saved_at, config.to_dict(), LEARNED)
