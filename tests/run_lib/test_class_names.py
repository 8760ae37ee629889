"""Names of classes stand with the checkpoint, and so does what tells the images from others."""

from pathlib import Path
import shutil

import numpy as np
from PIL import Image
import pytest
from whole_runs import values_of

from configs.vp import digits
import run_lib
from runtime.errors import UserError
from training import checkpoints

BRIGHT = {'cat': 40, 'dog': 120, 'owl': 220}


def config(folder: Path | str, **fields):
  made = digits.get_config()
  tiny = values_of(fields) | {
    'data.dataset': 'folder',
    'data.path': str(folder),
    'data.image_size': 4,
    'model.num_classes': 3,
    'model.attn_resolutions': (),
    'training.n_iters': 4,
    'training.snapshot_freq': 2,
    'training.snapshot_sampling': False,
    'eval.enable_sampling': False,
    'sampling.num_samples': 4,
    'sampling.method': 'ddim',
    'sampling.num_steps': 2,
  }
  made.update_from_flattened_dict(tiny | {k.replace('__', '.'): v for k, v in fields.items()})
  return made


def draw(folder: Path, names=tuple(BRIGHT)) -> Path:
  for name, value in zip(names, BRIGHT.values(), strict=True):
    (folder / name).mkdir(parents=True)
    for i in range(4):
      Image.fromarray(np.full((4, 4), value + i, np.uint8)).save(folder / name / f'{i}.png')
  return folder


@pytest.fixture(scope='module')
def half(tmp_path_factory) -> Path:
  """Images in photos/, and in run/ a run to step 2."""
  root = tmp_path_factory.mktemp('half')
  draw(root / 'photos')
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(root)
    run_lib.train(config('photos', training__n_iters=2), 'run')
  return root


@pytest.fixture
def there(half, tmp_path) -> Path:
  shutil.copytree(half, tmp_path, dirs_exist_ok=True)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(tmp_path)
    yield tmp_path


def test_names_stand_with_the_checkpoint_and_are_printed_once(there, caplog):
  caplog.set_level('INFO')
  assert checkpoints.notes(there / 'run').classes == tuple(BRIGHT)
  run_lib.train(config(there / 'photos'), 'run')
  said = [line for line in caplog.messages if 'classes' in line]
  assert said == ['3 classes: 0 cat (4 images), 1 dog (4 images), 2 owl (4 images)']
  assert checkpoints.notes(there / 'run', 4) == checkpoints.notes(there / 'run', 2)


@pytest.mark.parametrize('what', ['train', 'evaluate', 'sample'])
def test_a_renamed_class_is_refused_with_both_lists(there, what):
  (there / 'photos/cat').rename(there / 'photos/zebra')
  with pytest.raises(UserError) as error:
    getattr(run_lib, what)(config('photos'), 'run')
  said = str(error.value)
  assert '0 cat, 1 dog, 2 owl' in said and '0 dog' in said and '2 zebra' in said
  assert not (there / 'run/eval/config.json').exists()
  (there / 'photos/zebra').rename(there / 'photos/cat')
  getattr(run_lib, what)(config('photos'), 'run')


def test_classes_are_drawn_by_name(there, caplog):
  caplog.set_level('INFO')
  shutil.rmtree(there / 'photos')  # the checkpoint knows them
  run_lib.sample(config('photos', sampling__labels=('owl', 'cat', 1)), 'run')
  with np.load('run/sample/step_2/samples.npz') as arrays:
    assert arrays['labels'].tolist() == [2, 0, 1, 2]
  assert 'drawing the classes 2 owl, 0 cat, 1 dog' in caplog.messages
  wrong = config('photos', sampling__labels=('owll',))
  with pytest.raises(UserError, match="did you mean 'owl'"):
    run_lib.sample(wrong, 'run', 'other')


def test_images_that_moved_are_found(there):
  """As on a cluster that copies them for each job."""
  (there / 'photos').rename(there / 'elsewhere')
  run_lib.train(config('elsewhere'), 'run')
  assert checkpoints.notes(there / 'run').images == checkpoints.notes(there / 'run', 2).images


def test_other_images_are_refused(there):
  others = draw(there / 'others')
  for i in range(4):
    (others / 'cat' / f'{i}.png').rename(others / 'cat' / f'_{i}.png')
  with pytest.raises(UserError, match=r"images in config.data.path = 'photos', and 'others' hol"):
    run_lib.train(config('others'), 'run')


def test_images_that_changed_in_their_place_are_told(there, caplog):
  (there / 'photos/cat/3.png').unlink()
  run_lib.train(config(there / 'photos'), 'run')
  assert 'are not those of before' in caplog.text


def test_a_run_of_earlier_code_goes_on_where_its_images_lie(there, monkeypatch):
  """It wrote down neither names nor images: elsewhere they cannot be compared."""
  shutil.rmtree(there / 'run')
  plain = checkpoints.ocp.CheckpointManager.save

  def save(self, *args, custom_metadata, **kwargs):
    return plain(self, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.ocp.CheckpointManager, 'save', save)
    run_lib.train(config('photos', training__n_iters=2), 'run')
  assert checkpoints.notes(there / 'run') == checkpoints.Notes()
  shutil.copytree('photos', 'elsewhere')
  with pytest.raises(UserError, match='cannot be compared'):
    run_lib.train(config('elsewhere'), 'run')
  run_lib.train(config(f'{there}/../{there.name}/photos/'), 'run')  # the same place
  assert checkpoints.notes(there / 'run').classes == tuple(BRIGHT)
