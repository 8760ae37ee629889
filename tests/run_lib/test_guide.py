"""Autoguidance in whole runs: samples are of a model and of its guide, and change with either."""

import dataclasses
import json
from pathlib import Path
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_toy import tiny, UNSEEN

from builders.continuity import write_config
from builders.evaluation import make_drawing
from builders.guide import load_guide
from builders.setup import build
from builders.training import score_task
from configs.toy import branches
from controllable_generation import Autoguidance
from evaluation.draw import Guide
import run_lib
from runtime.errors import UserError
from training import loop
from training.checkpoints import Checkpoints, Notes
from workdir import rounds

FIELDS = {
  **UNSEEN, 'ema__sigma_rels': (), 'eval__features': '', 'eval__enable_loss': False,
  'eval__enable_sampling': True, 'eval__begin_ckpt': 2,
  'sampling__method': 'euler', 'sampling__num_samples': 100,
}  # fmt: skip


def config(**fields):
  return tiny('edm', branches, **FIELDS | fields)


@pytest.fixture(scope='module')
def there(tmp_path_factory):
  """The workdirs strong and weak, and others that no guide can be; the folder at work."""
  root = tmp_path_factory.mktemp('guides')
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(root)
    save('strong')
    save('weak', seed=1)  # of the same size, so that no other program is compiled
    yield root


def save(workdir: str, classes: tuple[str, ...] = ('left', 'right'), **fields) -> None:
  """A workdir with checkpoints 6 and 12 of parameters and averages that were never trained."""
  setup = build(config(**fields))
  with Checkpoints(workdir, Notes(classes)) as checkpoints:
    root = epath.Path(workdir)
    state = loop.restore_or_init(score_task(setup), setup.devices, setup.keys, root, checkpoints)
    for step in (6, 12):
      averages = [jax.tree.map(lambda x, i=i: x + i / 10, state.params) for i in range(2)]
      averages = tuple(averages[: len(state.averages)])
      new = dataclasses.replace(state, step=jnp.int32(step), averages=averages)
      checkpoints.save(new, keep=True)
      state = dataclasses.replace(new, params=jax.tree.map(lambda x: 1.1 * x, state.params))
  write_config(root, setup, 12)


def copy(there: Path, name: str, **fields) -> None:
  """A workdir like weak, whose config says something else."""
  shutil.copytree(there / 'weak', there / name)
  path = there / name / 'config.json'
  values = json.loads(path.read_text())
  for field, value in fields.items():
    section, _, key = field.partition('__')
    values[section][key] = value
  path.write_text(json.dumps(values))


def guided(scale: float = 2.0, guide: str = 'weak', **fields):
  return config(sampling__guide=guide, sampling__guide_scale=scale, **fields)


def drawn(folder: str) -> np.ndarray:
  with np.load(f'strong/{folder}/step_12/samples.npz') as arrays:
    return arrays['samples']


def test_samples_are_guided_where_the_scale_is_not_one(there):
  """As by hand; at a scale of 1, and by the model itself, they are the model's to the bit."""
  for name, wanted in {
    'plain': config(), 'one': guided(1.0), 'itself': guided(3.0, 'strong'), 'guided': guided(),
  }.items():  # fmt: skip
    report = run_lib.sample(wanted, 'strong', name)
  np.testing.assert_array_equal(drawn('one'), drawn('plain'))
  np.testing.assert_array_equal(drawn('itself'), drawn('plain'))
  assert np.abs(drawn('guided') - drawn('plain')).max() > 1e-3
  setup, params = run_lib.load('strong')
  weak, weak_params = run_lib.load('weak')
  labels = jnp.arange(64) % 2  # all classes in turn
  models = (setup.model.bind(params, labels=labels), weak.model.bind(weak_params, labels=labels))
  score_fn = Autoguidance(*models, scale=2.0)
  key = jax.random.fold_in(setup.keys.key('draw'), 0)
  x, nfe = build(config()).sampler(key, score_fn, drawn('guided')[:64].shape)
  np.testing.assert_allclose(x, drawn('guided')[:64], atol=1e-5)
  assert report['nfe'] == nfe


def test_a_guide_is_one_of_the_checkpoints_of_a_run(there):
  """The newest, or the one that is named; the average is the one that its config says, or ours."""
  save('averages', ema__sigma_rels=(0.1,), ema__use=1)

  def chosen(guide: str, average: int = -1) -> Guide:
    wanted = build(guided(guide=guide, sampling__guide_ema=average))
    return load_guide(wanted, epath.Path('strong'))

  newest = chosen('averages')
  assert newest.step == 12 and make_drawing(build(config()), newest).mark.endswith(newest.identity)
  assert chosen('averages/checkpoints').identity == newest.identity
  assert chosen('averages', 1).identity == newest.identity != chosen('averages', 0).identity
  earlier = chosen('averages/checkpoints/6')
  assert earlier.step == 6 and earlier.identity != newest.identity
  run_lib.export(config(), 'weak')  # of which there is one average
  assert chosen('weak/export').identity == chosen('weak/export', 0).identity
  assert chosen('weak/export').identity == chosen('weak').identity
  with pytest.raises(UserError, match='guide_ema must be below 1'):
    chosen('weak/export', 1)


def test_another_guide_makes_other_samples(there):
  """Of the same name and step, too; a loss stays, as no guide is in it."""
  copy(there, 'changing')
  wanted = guided(guide='changing')
  (before,) = run_lib.evaluate(wanted, 'strong', 'eval')
  run_lib.sample(wanted, 'strong', 'sample')
  first = drawn('sample')
  assert run_lib.evaluate(wanted, 'strong', 'eval') == [before]
  assert before['guide'] | {'checkpoint': ''} == {'checkpoint': '', 'step': 12, 'scale': 2.0}

  save('other', seed=2)
  for name in ('checkpoints', 'checkpoints-meta'):
    shutil.rmtree(there / 'changing' / name)
    shutil.copytree(there / 'other' / name, there / 'changing' / name)
  (there / 'strong/eval/report_12.json').write_text(json.dumps(before | {'loss': 7.0}))
  (after,) = run_lib.evaluate(guided(guide='changing', eval__enable_loss=True), 'strong', 'eval')
  run_lib.sample(wanted, 'strong', 'sample')
  assert after['loss'] == 7.0
  assert after['guide']['checkpoint'] != before['guide']['checkpoint']
  assert np.abs(drawn('sample') - first).max() > 1e-4
  with np.load('strong/eval/step_12/samples_0.npz') as arrays:
    assert str(arrays['version']) == f'guide {after["guide"]["checkpoint"]}'
  aside = there / 'strong/sample/former'
  assert [p.name.split('-')[1] for p in aside.iterdir()] == [before['guide']['checkpoint']]


def test_drawing_that_is_stopped_goes_on_to_the_same_samples(there, monkeypatch):
  run_lib.sample(guided(), 'strong', 'whole')
  keep, made = rounds.kept_or_made, list[str]()

  def stopped(path, name, n, make, version=''):
    if made:
      raise KeyboardInterrupt
    if path.name == '0.npz':
      made.append(path.name)
    return keep(path, name, n, make, version)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(rounds, 'kept_or_made', stopped)
    run_lib.sample(guided(), 'strong', 'parts')
  assert made and not Path('strong/parts/step_12/samples.npz').exists()
  run_lib.sample(guided(), 'strong', 'parts')
  np.testing.assert_array_equal(drawn('parts'), drawn('whole'))


@pytest.mark.parametrize(
  ('name', 'changed', 'fields', 'said'),
  [
    ('nowhere', None, {}, 'guide nowhere holds no checkpoints; name a workdir'),
    ('weak/config.json', None, {}, 'is a file; a released checkpoint becomes a workdir'),
    ('weak/checkpoints/7', None, {}, 'guide weak/checkpoints/7 holds no checkpoints'),
    ('s3://bucket/run', None, {}, 'guide s3://bucket/run: s3:// cannot hold a workdir'),
    ('weak', None, {'sampling__guide_ema': 1}, 'guide_ema must be below 1, the number of averages'),
    ('noise', {'training__sde': 'vpsde'}, {}, r'noise of VPSDE\(.*\), and this one with noise of'),
    ('levels', {'model__sigma_max': 40.0}, {}, r'EDMSDE\(sigma_max=40.0\), and this one'),
    ('shape', {'data__dataset': 'gaussian', 'data__dim': 3}, {}, r'shape \(3,\), and this one'),
    ('classes', {'model__num_classes': 3}, {}, 'num_classes = 3, and this one with config.model'),
    ('paired', {'training__sde': 'flow', 'training__coupling': 'optimal_transport',
                'model__num_classes': 0, 'sampling__method': 'flow_heun'}, {}, 'noise of Rect'),
    ('jumps', {'distill__method': 'ct', 'sampling__method': 'consistency'}, {},
     'is a consistency model, which has no score'),
    ('told', {'training__label_dropout': 0.0}, {'sampling__guidance_scale': 2.0},
     'label_dropout = 0, so it does not know all classes together'),
    ('network', {'model__nf': 12}, {}, 'guide: none of the 2 checkpoints in'),
    ('size', {'model__nf': 'x'}, {}, 'config.sampling.guide: .*size/config.json does not fit'),
    ('one', {'training__single_scale': True, 'sampling__method': 'langevin',
             'training__time_law': ''}, {}, 'one level of noise, t = 0.002'),
  ],
)  # fmt: skip
def test_what_can_be_no_guide_is_refused(there, name, changed, fields, said):
  if changed:
    copy(there, name, **changed)
  with pytest.raises(UserError, match=said) as error:
    run_lib.sample(guided(guide=name, **fields), 'strong', 'refused')
  assert '\n' not in str(error.value)
  assert not (there / 'strong/refused').exists()


def test_a_guide_of_other_classes_is_refused(there):
  """Of as many, with other names; one of earlier code, which did not note them, may have any."""
  save('swapped', ('right', 'left'))
  save('earlier', ())
  assert load_guide(build(guided(guide='earlier')), epath.Path('strong'))
  with pytest.raises(
    UserError, match=r'0 right, 1 left; .*0 left, 1 right.*Name a guide in config'
  ):
    load_guide(build(guided(guide='swapped')), epath.Path('strong'))


def test_guidance_by_class_is_of_the_autoguided_scores(there):
  """Each class, and all of them together: so that a scale of 0 still ignores the classes."""
  setup, params = run_lib.load('strong')
  save('small', model__nf=8)
  own = build(guided(guide='small', sampling__guidance_scale=3.0)).config
  setup = dataclasses.replace(setup, config=own)
  guide = load_guide(setup, epath.Path('strong'))
  drawing = make_drawing(setup, guide)
  x, t, wanted = jnp.ones((4, 2)), jnp.full(4, 0.7), {'label': np.int32([0, 1, 1, 0])}
  at = jax.jit(lambda score_fn: score_fn(x, t))

  def led_away(**told: jax.Array) -> np.ndarray:
    own, weak = setup.model.bind(params, **told), guide.model.bind(guide.params, **told)
    return np.asarray(2 * at(own) - at(weak))

  of_all, of_class = led_away(), led_away(labels=jnp.asarray(wanted['label']))
  expected = of_all + 3 * (of_class - of_all)
  np.testing.assert_allclose(at(drawing.score_fn(params, wanted)), expected, rtol=1e-4)
  blind = dataclasses.replace(drawing, guidance_scale=0.0)
  np.testing.assert_allclose(at(blind.score_fn(params, wanted)), of_all, rtol=1e-5)
  np.testing.assert_allclose(at(drawing.score_fn(params, {})), of_all, rtol=1e-5)
