"""Folders are read as their users mean them, and what is left out is said."""

import os

import numpy as np
from PIL import Image
import pytest

from data import sources
from data.batches import eval_batches, train_batches
from data.sources import load
from runtime.errors import Failure, UserError


def make(root, *files, kind='PNG'):
  """Images at these places below a folder, each of another grey."""
  for i, name in enumerate(files):
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 4), 10 * i, np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(file, format=kind)
  return root


def both(root, **options):
  shape = {'image_size': 4, 'num_channels': 1}
  return [load('folder', s, path=str(root), **shape, **options) for s in ('train', 'test')]


def greys(source):
  return [int(image[-1, -1, 0]) for image in source]


CLASSES = ('cat', 'dog')


@pytest.mark.parametrize(
  ('train', 'test'),
  [
    ('train', 'test'), ('training', 'testing'), ('Train', 'Test'), ('TRAINING', 'VALID'),
    ('train', 'validation'), ('Training', 'val'), ('train', 'dev'), ('train', 'Eval'),
    ('data/train', 'data/test'), ('a/b/Train', 'a/b/dev'),
  ],
)  # fmt: skip
def test_held_out_images_are_never_trained_on(tmp_path, caplog, train, test):
  make(tmp_path, f'{train}/a.png', f'{train}/b.png', f'{test}/c.png')
  assert [greys(source) for source in both(tmp_path)] == [[0, 10], [20]]
  assert not caplog.text
  make(tmp_path / 'of classes', *(f'{part}/{c}/1.png' for part in (train, test) for c in CLASSES))
  for source in both(tmp_path / 'of classes'):
    assert source.class_names == CLASSES and source.class_counts() == [1, 1]


@pytest.mark.parametrize(
  ('folders', 'options', 'said'),
  [
    (
      ('train', 'test', 'val'),
      {},
      r'test/ and val/, all for testing; name one with --config\.data',
    ),
    (('train', 'Test', 'test'), {}, 'Test/ and test/, all for testing'),
    (('train', 'training', 'test'), {}, 'train/ and training/, all for training; rename one'),
    (('cat', 'dog', 'valid'), {}, 'valid/, whose images seem to be held out, and no train/'),
    (('train', 'test'), {'held_out': 'tset'}, "'tset' does not exist; .*did you mean 'test'"),
    (('cat/train', 'cat/test', 'dog/train'), {}, 'put these outside: train/CLASS and test/CLASS'),
  ],
)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, folders, options, said):
  with pytest.raises(UserError, match=said) as error:
    both(make(tmp_path, *(f'{folder}/1.png' for folder in folders)), **options)
  assert '\n' not in str(error.value)


def test_one_of_several_held_out_folders_can_be_named(tmp_path, caplog):
  make(tmp_path, 'train/a.png', 'test/b.png', 'val/c.png')
  assert [greys(source) for source in both(tmp_path, held_out='val')] == [[0], [20]]
  assert 'left out: 1 image outside of train/ and val/, such as test/b.png' in caplog.text


@pytest.mark.parametrize(
  ('files', 'names', 'counts', 'said'),
  [
    (('train/cat/1', 'train/dog/1', 'train/eel/1', 'test/cat/1', 'test/eel/1'),
     ('cat', 'dog', 'eel'), [[1, 1, 1], [1, 0, 1]], 'test/ has no images of dog'),
    (('train/cat/1', 'train/eel/1', 'test/cat/1', 'test/dog/1', 'test/eel/1'),
     ('cat', 'dog', 'eel'), [[1, 0, 1], [1, 1, 1]], 'train/ has no images of dog'),
    (('train/cat/1', 'train/dog/1', 'test/cat/1'), CLASSES, [[1, 1], [1, 0]], 'no images of dog'),
    (('train/cat/1', 'train/dog/1'), CLASSES, [[1, 1]] * 2, 'folders of classes are in train/'),
    (('images/cat/1', 'images/dog/1'), CLASSES, [[1, 1]] * 2, 'folders of classes are in images/'),
    (('x/y/cat/1', 'x/y/dog/a/1'), CLASSES, [[1, 1]] * 2, 'folders of classes are in x/y/'),
    (('cat/1', 'dog/1', 'preview'), CLASSES, [[1, 1]] * 2, 'classes, such as preview.png'),
    (('all/cat/1', 'all/dog/1', 'preview'), CLASSES, [[1, 1]] * 2, 'such as preview.png'),
    (('train/cat/1', 'train/dog/1', 'train/z', 'test/cat/1'), CLASSES, [[1, 1], [1, 0]],
     'left out: 1 image outside of the folders of classes, such as train/z.png'),
    (('train/a/cat/1', 'train/a/dog/1', 'test/b/cat/1'), CLASSES, [[1, 1], [1, 0]], 'train/a/'),
  ],
)  # fmt: skip
def test_classes_are_found_and_what_is_odd_is_said(tmp_path, caplog, files, names, counts, said):
  sources = both(make(tmp_path, *(f'{file}.png' for file in files)))
  assert [source.class_names for source in sources] == [names] * 2
  assert [source.class_counts() for source in sources] == counts
  assert said in caplog.text
  for source, count in zip(sources, counts, strict=True):
    labels = source.batch(np.arange(len(source)))['label']
    assert np.bincount(labels, minlength=len(names)).tolist() == count


def test_numbers_are_in_their_order_and_names_in_that_of_letters(tmp_path):
  numbers = both(make(tmp_path / 'a', *(f'{i}/1.png' for i in range(12))))[0]
  assert numbers.class_names == tuple(str(i) for i in range(12))
  assert [source // 10 for source in greys(numbers)] == [0, 1, 10, 11, *range(2, 10)]
  assert numbers.batch(np.arange(12))['label'].tolist() == [0, 1, 10, 11, *range(2, 10)]
  others = both(make(tmp_path / 'b', 'n10/1.png', 'n9/1.png', 'Ab/1.png'))[0]
  assert others.class_names == ('Ab', 'n10', 'n9')
  # One system writes e with an accent as one letter, another as two.
  accents = both(make(tmp_path / 'c', 'train/\xe9/1.png', 'train/a/1.png', 'test/e\u0301/1.png'))
  assert accents[0].class_names == ('a', '\xe9') and accents[1].class_counts() == [0, 1]


def test_without_labels_every_image_counts(tmp_path, caplog):
  make(tmp_path, 'a.png', 'cat/1.png', 'cat/2.png', 'cat/3.png', 'dog/1.png')
  train, _ = both(tmp_path, labelled=False)
  assert (len(train), train.num_classes) == (5, 0) and 'left out' not in caplog.text
  train, _ = both(tmp_path)
  assert (len(train), train.num_classes) == (4, 2)
  make(tmp_path, *(f'{i}.png' for i in range(4)))  # too many to be strays
  assert [len(source) for source in both(tmp_path)] == [9, 9]


def test_empty_and_unreadable_classes(tmp_path, caplog):
  make(tmp_path, 'cat/1.png', 'dog/1.png')
  (tmp_path / 'bird').mkdir()
  assert both(tmp_path)[0].class_names == CLASSES and 'bird/ has no images' in caplog.text
  (tmp_path / 'bird' / 'notes.txt').write_text('none yet')
  assert both(tmp_path)[0].class_names == CLASSES
  (tmp_path / 'bird' / 'a.heic').write_bytes(b'x')
  with pytest.raises(UserError, match=r'of class bird nothing can be read: .*\.heic 1'):
    both(tmp_path)


def test_every_format_that_pillow_opens_is_read(tmp_path, caplog):
  endings = {
    'JPEG': ('jpg', 'JPG', 'Jpeg', 'jfif', 'jpe'), 'PNG': ('PNG', 'apng'), 'TGA': ('tga',),
    'JPEG2000': ('jp2', 'j2k'), 'WEBP': ('webp',), 'PCX': ('pcx',), 'SGI': ('sgi',),
  }  # fmt: skip
  names = [f'{i}{kind}.{end}' for kind, ends in endings.items() for i, end in enumerate(ends)]
  for kind, ends in endings.items():
    make(tmp_path, *(f'{i}{kind}.{end}' for i, end in enumerate(ends)), kind=kind)
  make(tmp_path, 'noending')
  assert len(both(tmp_path)[0]) == len(names) + 1 and not caplog.records[2:]
  for name in ('a.heic', 'b.HEIC', 'c.npy', 'notes.txt', 'nothing'):
    (tmp_path / name).write_bytes(b'x')
  assert len(both(tmp_path)[0]) == len(names) + 1
  assert '4 files (.heic 2, .npy 1, no ending 1), such as a.heic' in caplog.text
  with pytest.raises(UserError, match=r'no images in .*\.heic 1'):
    (tmp_path / 'none').mkdir()
    (tmp_path / 'none' / 'a.heic').write_bytes(b'x')
    both(tmp_path / 'none')


def test_names_of_any_bytes(tmp_path, caplog):
  names = ['Ünïcödé 图片 😀.png', 'a b.png', 'q\'uo"te.png', 'new\nline.png', '%s%d.png', '-d.png']
  make(tmp_path / 'cat', *names, 'x' * 240 + '.png')
  make(tmp_path / 'dog', 'tmp.png')
  latin = os.fsencode(tmp_path) + b'/\xe9l\xe9phant'
  os.rename(tmp_path / 'dog', latin)
  os.rename(latin + b'/tmp.png', latin + b'/\xe9.png')
  train, _ = both(tmp_path)
  assert len(train) == 8 and len(list(train)) == 8
  assert train.class_names == ('\\xe9l\\xe9phant', 'cat')
  '\n'.join([*train.class_names, caplog.text]).encode()  # can be written anywhere
  with open(latin + b'/\xe9.png', 'wb') as file:
    file.write(b'not an image')
  with pytest.raises(UserError, match=r'\\xe9\.png') as error:
    list(both(tmp_path)[0])
  str(error.value).encode()
  (tmp_path / 'cat' / 'new\nline.png').write_bytes(b'')
  with pytest.raises(UserError, match=r'new\\nline\.png') as error:
    list(both(tmp_path)[0])
  assert '\n' not in str(error.value)


def test_links(tmp_path, caplog):
  make(tmp_path / 'away', 'x.png')
  root = make(tmp_path / 'here', 'real.png')
  for link, target in (('link.png', 'away/x.png'), ('folder', 'away'), ('loop', 'here')):
    (root / link).symlink_to(tmp_path / target)
  assert len(both(root)[0]) == 3 and 'nowhere' not in caplog.text
  (root / 'z.png').symlink_to(tmp_path / 'nothing.png')
  assert len(both(root)[0]) == 3
  assert '1 links that lead nowhere, such as z.png' in caplog.text
  classes = make(tmp_path / 'classes', 'a/1.png', 'a/2.png')
  (classes / 'b').symlink_to(classes / 'a')
  assert both(classes)[0].class_counts() == [2, 2]


# Damaged and lost images


def test_damaged_images_are_left_out_counted_and_always_the_same(tmp_path, caplog):
  root = make(tmp_path, *(f'{c}/{i}.png' for c in CLASSES for i in range(4)))
  for broken in ('cat/1', 'dog/0', 'dog/3'):
    (root / f'{broken}.png').write_bytes((root / 'cat/0.png').read_bytes()[:40])
  with pytest.raises(
    UserError, match=r'cat/1\.png .*or leave out all such with --config\.data\.skip'
  ):
    list(both(root)[0])
  caplog.clear()
  train, _ = both(root, skip_damaged=True)
  assert 'left out: 3 of 8 images, which cannot be read, such as: ' in caplog.text
  assert 'cat/1.png' in caplog.text
  assert train.class_counts() == [3, 2] and greys(train) == [0, 20, 30, 50, 60]
  again, _ = both(root, skip_damaged=True)
  streams = [train_batches(source, 4, seed=0) for source in (train, again)]
  for _ in range(4):
    first, second = (next(stream) for stream in streams)
    np.testing.assert_array_equal(first['data'], second['data'])
    np.testing.assert_array_equal(first['label'], second['label'])
  for i in (1, 2):
    (root / f'dog/{i}.png').write_bytes(b'')
  with pytest.raises(UserError, match='of class dog no image can be read'):
    both(root, skip_damaged=True)
  for i in range(4):
    (root / f'cat/{i}.png').write_bytes(b'')
  with pytest.raises(UserError, match=r'none of 8 images can be read; the first: .*0\.png'):
    both(root, skip_damaged=True)


@pytest.mark.parametrize('lost', ['folder', 'class', 'image', 'disk'])
def test_what_is_lost_in_mid_run_is_the_machines_failure(tmp_path, monkeypatch, lost):
  monkeypatch.setattr('data.images._MEMORY_LIMIT', 0)  # every image is read anew
  root = make(tmp_path / 'all', 'cat/1.png', 'dog/1.png')
  train, _ = both(root)
  target = {'class': root / 'cat', 'image': root / 'cat' / '1.png'}.get(lost, root)
  os.rename(target, tmp_path / 'gone')
  if lost == 'disk':  # where it was mounted
    (root / 'cat').mkdir(parents=True)
  with pytest.raises(Failure, match=r'cannot be read any more \((No such file|Not a dir)'):
    list(eval_batches(train, 2))
  if lost == 'disk':
    (root / 'cat').rmdir()
    root.rmdir()
  os.rename(tmp_path / 'gone', target)
  assert len(list(eval_batches(train, 2))) == 1
  make(root, 'cat/2.png')
  os.remove(root / 'cat' / '1.png')  # one alone is the user's to put back
  with pytest.raises(UserError, match='it is not there any more; put it back'):
    list(eval_batches(train, 2))

  def broken(i):
    raise OSError(5, 'Input/output error')

  train._read = sources.dataclasses.replace(
    train._read, records=sources.dataclasses.replace(train._read.records, read=broken)
  )
  with pytest.raises(Failure, match='Input/output error'):
    list(eval_batches(train, 2))


@pytest.mark.parametrize('value', [0, 7])
@pytest.mark.parametrize('kind', [np.uint16, np.int32, np.float32])
def test_images_that_show_nothing_are_refused(tmp_path, value, kind):
  for name in 'ab':
    Image.fromarray(np.full((4, 4), value, kind)).save(tmp_path / f'{name}.tif')
  with pytest.raises(
    UserError, match=r'every pixel of all images is \d+ of 255.*config\.data\.white'
  ):
    both(tmp_path)
