"""The page that explains a workdir, read by a parser and a browser; and Weights & Biases."""

import base64
from html.parser import HTMLParser
import io
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
from urllib.parse import unquote_to_bytes

from etils import epath
import numpy as np
from PIL import Image
import pytest

from configs.vp import digits
from runtime.errors import UserError
from workdir import artifacts, page, pictures

RED = (255, 0, 0)
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')


@pytest.fixture
def workdir(tmp_path) -> epath.Path:
  """What a run of 40 steps leaves, with names that HTML must not take for its own."""
  root = epath.Path(tmp_path / 'a <b> & c')
  root.mkdir()
  artifacts.write_json(root / 'config.json', digits.get_config().to_dict())
  lines = [{'step': s, 'loss': 5 / s, 'grad_norm': 1.0} for s in range(1, 41)]
  lines += [{'step': s, 'eval_loss': 6 / s} for s in (20, 40)]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  artifacts.write(root / 'metrics.jsonl', (text + '{"step": 4').encode())  # the last is cut off
  red = np.broadcast_to(np.array(RED, np.uint8), (4, 8, 8, 3))
  picture = pictures.grid(red)
  for step in (20, 40):
    (root / 'checkpoints' / str(step)).mkdir(parents=True)
    artifacts.write_png(root / 'samples' / f'iter_{step}' / 'sample.png', picture)
  artifacts.write_png(root / 'eval' / 'step_40' / 'samples.png', picture)
  artifacts.write_json(root / 'eval' / 'report_40.json', {'step': 40, 'fid': 12.5, 'nfe': 7})
  (root / 'eval' / 'report_41.json').write_text('{"step"')
  levels = [{'t': [0.0, 0.5], 'loss': 1.0, 'accuracy': 0.75}]
  artifacts.write_json(root / 'classifier' / 'report.json', {'images': 9, 'levels': levels})
  artifacts.write_npz(root / 'sample' / 'step_40' / 'samples.npz', samples=red)
  artifacts.write_png(root / 'sample' / 'step_40' / 'samples.png', picture)
  page.write(root)
  return root


class Parsed(HTMLParser):
  """Text, pictures and links of a page whose tags are closed in their order."""

  def __init__(self, html: str):
    super().__init__()
    self.open, self.files, self.embedded, self.text, self.curves = [], [], [], '', 0
    self.feed(html)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    if tag not in ('meta', 'img', 'input'):
      self.open.append(tag)
    self.files += [value for name, value in attrs if name == 'href']
    self.embedded += [value for name, value in attrs if name == 'src']

  def handle_startendtag(self, tag, attrs):
    self.curves += tag == 'polyline'

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_the_page_shows_what_is_there(workdir):
  found = Parsed((workdir / 'index.html').read_text())
  assert 'a <b> & c' in found.text and 'At step 40' in found.text
  assert 'fid' in found.text and '12.5' in found.text and 'Best by fid' in found.text
  assert '0 to 0.5' in found.text and '0.75' in found.text  # of the classifier
  assert found.curves == 3  # loss with eval_loss, and grad_norm
  assert len(set(found.files)) == 4 and all((workdir / f).exists() for f in found.files)
  assert 'config.training.n_iters' in found.text


def test_the_page_is_one_file_that_can_be_sent(workdir):
  """Its pictures are in it: small ones as they are, large ones reduced, films unless long."""
  picture = workdir / 'sample' / 'step_40' / 'samples.png'
  original = picture.read_bytes()
  Image.new('RGB', (3000, 2000), RED).save(picture)
  Image.new('RGB', (8, 8), RED).save(picture.parent / 'trajectory.gif')
  page.write(workdir)
  sources = Parsed((workdir / 'index.html').read_text()).embedded
  images = [(source.partition(',')[0], decoded(source)) for source in sources]
  assert [kind for kind, _ in images].count('data:image/png;base64') == 3
  assert base64.b64encode(original).decode() in {source.partition(',')[2] for source in sources}
  large = next(image for kind, image in images if 'jpeg' in kind)
  assert large.size == (1024, 683) and large.getpixel((9, 9))[0] > 250
  assert any('gif' in kind for kind, _ in images)
  picture.write_bytes(b'cut off')  # is linked to
  page.write(workdir)
  assert 'sample/step_40/samples.png' in Parsed((workdir / 'index.html').read_text()).embedded


def decoded(source: str) -> Image.Image:
  return Image.open(io.BytesIO(base64.b64decode(source.partition(',')[2])))


def test_a_curve_can_be_read_off(workdir):
  """Round numbers on its axes; what the pointer reads are the values; what is cut off is said."""
  lines = [{'step': s, 'loss': 5 / s} for s in range(1, 41)]
  (curve,) = page._curves(lines)
  assert [tick.label for tick in curve.x_ticks] == ['10', '20', '30', '40']
  assert [tick.label for tick in curve.y_ticks] == ['1', '2', '3', '4']
  (line,) = json.loads(curve.data)
  np.testing.assert_allclose(line['points'], [(s, 5 / s) for s in range(1, 41)], rtol=1e-4)
  points = [tuple(map(float, p.split(','))) for p in curve.lines[0].points.split()]
  left, top, right, bottom = curve.box
  assert points[0] == (left, top) and points[-1] == (right, bottom)
  assert curve.cut == '1 of 40 points lie above 4.025' and '0.125 at step 40' in curve.last
  odd = [{'step': 1, 'loss': None, 'rate': 1.0}, {'step': 2, 'loss': float('inf'), 'rate': 3.0}]
  assert [curve.title for curve in page._curves(odd)] == ['rate']  # no loss is finite
  flat = page._curves([{'step': 7, 'loss': 2.0}])
  assert flat[0].range == (7.0, 7.0) and flat[0].lines[0].points


def test_measures_stand_in_tables_by_what_they_are_of():
  report = {'step': 9, 'fid': 2.0, 'fid_floor': 1.0, 'fid_seconds': 3.0, 'bpd_test': 3.1, 'nfe': 35}
  report |= {'bpd_test_std_error': 0.1, 'bpd_test_seconds': 4.0, 'loss': 0.5, 'eval_note': 'x'}
  tables = {title: list(rows[0]) for title, rows in page._tables([report])}
  assert tables == {
    'Likelihood': ['step', 'bpd_test', 'bpd_test_std_error'],
    'Loss': ['step', 'loss'],
    'Distance of two halves of the data': ['step', 'fid_floor'],
    'Distance from the data': ['step', 'fid', 'nfe'],
    'Seconds': ['step', 'fid_seconds', 'bpd_test_seconds'],
  }


def test_names_that_are_not_utf8_have_a_page(workdir):
  """Nor do names end early at a mark that means something in an address."""
  config = digits.get_config()
  config.data.path = 'photos\udcff'
  artifacts.write_json(workdir / 'config.json', config.to_dict())
  (workdir / 'eval').rename(workdir / 'ev\udcff#al?%41')
  page.write(workdir)
  found = Parsed((workdir / 'index.html').read_bytes().decode())
  assert 'photos' in found.text and 'Evaluation: ev?#al?%41/' in found.text
  files = [Path(os.fsdecode(unquote_to_bytes(name))) for name in found.files]
  assert len(set(files)) == 4 and all((workdir / file).exists() for file in files)


def test_an_empty_folder_has_a_page(tmp_path):
  page.write(epath.Path(tmp_path))
  assert 'none yet' in Parsed((tmp_path / 'index.html').read_text()).text


def test_a_browser_shows_its_pictures(workdir, tmp_path):
  browser = next(filter(None, map(shutil.which, BROWSERS)), None)
  if browser is None:
    pytest.skip(f'none of {", ".join(BROWSERS)} is installed')
  picture = tmp_path / 'page.png'
  where = Path(workdir / 'index.html').as_uri()
  flags = ['--headless', '--no-sandbox', '--disable-gpu', '--window-size=1100,1600']
  subprocess.run(
    [browser, *flags, f'--screenshot={picture}', where],
    check=True,
    capture_output=True,
    timeout=120,
  )
  pixels = np.asarray(Image.open(picture).convert('RGB')).reshape(-1, 3)
  assert (pixels == RED).all(-1).sum() > 4 * 60 * 60  # those of four grids


# Weights & Biases.


class FakeWandb:
  """Notes what it is told."""

  def __init__(self):
    self.told = []

  def __getattr__(self, name):
    def note(*args, **kwargs):
      self.told.append((name, args, kwargs))
      return self

    return note


def test_metrics_also_go_to_weights_and_biases(workdir, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  for step in (40, 41):  # the second resumes
    with artifacts.Metrics(workdir, step, 'digits') as metrics:
      metrics.write(step + 1, loss=2.0)
  first, again = [kwargs for name, _, kwargs in fake.told if name == 'init']
  assert first == again and first['project'] == 'digits' and first['resume'] == 'allow'
  assert first['config']['data']['dataset'] == 'digits'
  logged = [args for name, args, _ in fake.told if name == 'log']
  assert logged == [({'step': 41, 'loss': 2.0},), ({'step': 42, 'loss': 2.0},)]
  assert [name for name, _, _ in fake.told].count('finish') == 2


def test_without_weights_and_biases_its_project_is_refused(workdir, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match='pip install wandb'):
    artifacts.Metrics(workdir, 0, 'digits')
