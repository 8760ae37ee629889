"""A new run that begins with the parameters of another."""

import dataclasses
from functools import cache
from pathlib import Path

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_class_names import config, draw

from builders.continuity import begin_from, write_config
from builders.setup import build
from builders.training import abstract_state, score_task
import run_lib
from runtime.errors import UserError
from training import checkpoints as checkpoints_lib
from training import fine_tuning, loop, released_checkpoints
from training.checkpoints import Checkpoints, Notes
from training.step import TrainState

PETS = 'hamster', 'hen', 'horse'


@cache
def initial(**fields) -> TrainState:
  setup = build(config('photos', **fields))
  with Checkpoints('none', create=False) as checkpoints:
    root = epath.Path('none')
    return loop.restore_or_init(score_task(setup), setup.devices, setup.keys, root, checkpoints)


def save(workdir: str, state: TrainState, classes: tuple[str, ...], **fields) -> None:
  """A workdir with a checkpoint."""
  with Checkpoints(workdir, Notes(classes)) as checkpoints:
    checkpoints.save(state, keep=True)
  setup = build(config('photos', **fields))
  write_config(epath.Path(workdir), setup, int(state.step))


@pytest.fixture(scope='module')
def there(tmp_path_factory):
  """Images in photos/; in first/ checkpoints 2 and 4, in plain/ one of a model without classes.

  It is the folder at work.
  """
  root = tmp_path_factory.mktemp('fine_tuning')
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(root)
    draw(root / 'photos')
    for name, classes in (('first', ('cat', 'dog', 'owl')), ('plain', ())):
      fields = {'model__num_classes': len(classes)}
      state = initial(**fields, seed=7)
      for step in (2, 4):
        averages = (jax.tree.map(lambda x, step=step: x + step, state.params),)
        later = dataclasses.replace(state, step=jnp.int32(step), averages=averages)
        save(name, later, classes, **fields)
    yield root


@cache
def state_of(workdir: str, step: int) -> TrainState:
  setup, _ = run_lib.load(workdir)
  with Checkpoints(workdir) as checkpoints:
    return checkpoints.restore(step, abstract_state(setup))


def begun(init_from: str, classes=('cat', 'dog', 'owl'), **fields) -> TrainState:
  """The state before the first step of a run with these classes."""
  setup = build(config('photos', **fields))
  notes = Notes(classes if setup.model.num_classes else ())
  _, begin = begin_from(init_from, epath.Path('new'), setup, notes)
  assert begin is not None
  return begin(initial(**fields))


def assert_of(new: TrainState, old: TrainState, but: tuple[str, ...] = ()) -> None:
  for own, others in ((new.params, old.params), (new.averages[0], old.averages[0])):
    flat = fine_tuning._flat(others)
    for name, value in fine_tuning._flat(own).items():
      same = name in flat and value.shape == flat[name].shape and bool((value == flat[name]).all())
      assert same == (name not in but), name


def test_a_run_begins_with_the_parameters_of_another_and_goes_on(there, caplog):
  """Repeated as it was, or without --init_from, it resumes; what it began with is remembered."""
  caplog.set_level('INFO')
  still = {'optim__lr': 1e-30, 'training__n_iters': 1, 'seed': 3, 'model__ema_warmup': False}
  still['model__ema_rate'] = 1 - 1e-12
  run_lib.train(config('photos', **still), 'second', 'first')
  old, new = state_of('first', 4), state_of('second', 1)
  assert {int(x) for x in jax.tree.leaves(new.opt_state) if x.dtype == np.int32} == {1}
  for a, b in ((new.params, old.params), (new.averages, old.averages)):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-20), a, b)
  assert 'beginning with the parameters of' in caplog.text
  assert 'config.seed: 42 there, 3 now' in caplog.text
  notes = checkpoints_lib.notes(epath.Path('second'))
  assert notes.classes == ('cat', 'dog', 'owl')
  assert notes.begun_from['workdir'] == str(there / 'first') and notes.begun_from['step'] == 4
  assert notes.begun_from['checkpoint'] == checkpoints_lib.identity(old.ema_params)
  for init_from in ('first', f'{there}/first/', ''):
    caplog.clear()
    run_lib.train(config('photos', **still), 'second', init_from)
    assert 'resuming second at step 1' in caplog.text and 'beginning' not in caplog.text
  assert 'it began with the parameters of' in caplog.text
  with pytest.raises(UserError, match=r'begun from .*/first, and --init_from plain is for a new'):
    run_lib.train(config('photos', **still), 'second', 'plain')
  run_lib.train(config('photos', **still | {'training__n_iters': 2}), 'second')
  assert checkpoints_lib.notes(epath.Path('second'), 2) == notes


def test_it_begins_at_step_0_with_a_fresh_optimiser_and_its_averages(there):
  old, new = state_of('first', 4), begun('first')
  assert int(new.step) == 0
  assert_of(new, old)
  jax.tree.map(np.testing.assert_array_equal, new.opt_state, initial().opt_state)
  leaves = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(new)]
  assert len(set(leaves)) == len(leaves)  # as the state is donated


@pytest.mark.parametrize(
  ('name', 'step'),
  [('first/checkpoints/2', 2), ('first/checkpoints', 4), ('first/', 4), ('./first', 4)],
)
def test_a_checkpoint_can_be_named(there, name, step):
  assert_of(begun(name), state_of('first', step))


@pytest.mark.parametrize(
  ('init_from', 'classes', 'fields', 'anew', 'said'),
  [
    ('first', PETS, {}, (fine_tuning.LABELS,), 'initialised anew'),  # as many, but others
    ('first', ('cat', 'dog'), {'model__num_classes': 2}, (fine_tuning.LABELS,), 'initialised'),
    ('first', (), {'model__num_classes': 0}, (), 'left out'),
    ('plain', PETS, {}, (fine_tuning.LABELS,), 'initialised anew'),
    ('first', ('cat', 'dog', 'owl'), {'data__image_size': 8}, (), ''),
    (
      'first',
      ('cat', 'dog', 'owl'),
      {'data__augment_probability': 0.1},
      (fine_tuning.AUGMENTATION,),
      '',
    ),
  ],
)
def test_other_classes_and_sizes_are_allowed(there, caplog, init_from, classes, fields, anew, said):
  caplog.set_level('INFO')
  assert_of(begun(init_from, classes, **fields), state_of(init_from, 4), anew)
  lines = [line for line in caplog.messages if line.startswith(fine_tuning.LABELS)]
  assert len(lines) == bool(said) and all(said in line for line in lines)


@pytest.mark.parametrize(
  ('workdir', 'init_from', 'fields', 'said'),
  [
    ('x', 'first', {'model__nf': 16}, r'bias is \(8,\) there, \(16,\) here; .* more'),
    ('x', 'first', {'data__num_channels': 3}, 'Conv_0/kernel is .* there'),
    ('x', 'nowhere', {}, 'nowhere holds no checkpoints; name a workdir'),
    ('x', 'photos', {}, 'holds no checkpoints'),
    ('x', 'first/config.json', {}, 'is a file; a released checkpoint becomes .* --mode import'),
    ('x', 's3://bucket/run', {}, '--init_from s3://bucket/run: s3:// cannot hold a workdir'),
    ('first', 'first', {}, 'first holds a run that was begun from nothing, .* new --workdir'),
    ('x', 'first/checkpoints/3', {}, 'holds no checkpoints'),
  ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(there, workdir, init_from, fields, said):
  before = sorted(p for p in there.rglob('*') if p.is_file() and p.name != '.lock')
  with pytest.raises(UserError, match=said) as error:
    run_lib.train(config('photos', **fields), workdir, init_from)
  assert len(str(error.value).splitlines()) == 1
  after = sorted(p for p in there.rglob('*') if p.is_file() and p.name != '.lock')
  assert after == before


def test_a_released_checkpoint_that_was_imported_is_a_beginning(there, monkeypatch):
  """The workdir that --mode import makes; of earlier code, whose classes are not known."""
  state = dataclasses.replace(initial(seed=5), step=jnp.int32(9))
  monkeypatch.setattr(released_checkpoints, 'load', lambda *_, **__: state)
  run_lib.import_released(config('photos'), 'imported', 'checkpoint_8')
  assert_of(begun('imported'), state)
  assert Path('imported/config.json').exists()
