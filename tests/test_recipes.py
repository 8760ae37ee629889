"""`benchmarks.recipes`: what it compares, its classifier, its page, and that it goes on."""

import itertools
import json
from pathlib import Path

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from benchmarks import recipes, results_page, small_classifier
from builders.setup import build
from configs import own
from data import sources
import run_lib
from runtime.errors import UserError

DOCS = Path(__file__).parent.parent / 'docs'
CONFIGS = [
  (trial, recipe, recipes.config_of(trial, recipe, 1, {}))
  for trial, recipe in itertools.product(recipes.TRIALS, recipes.RECIPES)
]


def test_recipes_differ_in_what_they_are_alone():
  """Network, data, batches, images seen and learning rate are the same for all of a trial."""
  for trial in recipes.TRIALS:
    configs = [config for of, _, config in CONFIGS if of is trial]
    assert len({config.training.sde for config in configs}) == 5
    for section, own_fields in (
      ('model', {'sigma_min', 'sigma_max', 'scale_by_sigma', 'embedding_type', 'ema_rate'}),
      ('optim', {'grad_clip'}),
      ('data', {'centered'}),
    ):
      fields = [{k: v for k, v in c[section].items() if k not in own_fields} for c in configs]
      assert all(of == fields[0] for of in fields), section
    assert len({(c.training.batch_size, c.training.n_iters) for c in configs}) == 1
    assert {c.model.embedding_type for c in configs if c.training.sde != 'vesde'} == {'positional'}


@pytest.mark.parametrize(('sde', 'n'), [('ve', 20), ('ve', 200), ('vp', 200), ('edm', 20)])
def test_a_sampler_takes_as_many_evaluations_as_it_says(sde, n):
  """One less, where a step takes two; by a score that costs nothing."""
  recipe = next(recipe for recipe in recipes.RECIPES if recipe.sde == sde)
  config = recipes.config_of(recipes.QUICK, recipe, 1, {})
  config.update_from_flattened_dict(recipe.samplers[n][1])
  _, nfe = build(config).sampler(jax.random.key(0), lambda x, t: -x, (2, 1))
  assert nfe == (n - 1 if sde == 'edm' else n)


def test_flow_takes_as_many_evaluations_as_edm():
  edm, flow = ({n: fields for n, (_, fields) in r.samplers.items()} for r in recipes.RECIPES[3:])
  assert {n: f['sampling.num_steps'] for n, f in edm.items()} == {20: 10, 35: 18, 200: 100}
  assert {n: f['sampling.num_steps'] for n, f in flow.items()} == {20: 10, 35: 18, 200: 100}


def test_an_sde_has_the_same_network_as_the_others_and_its_own_embedding():
  assert own.small_ddpmpp('ve').model.embedding_type == 'fourier'
  assert own.small_ddpmpp('vp').model.embedding_type == 'positional'
  with pytest.raises(UserError, match='allowed: 16, '):
    own.fashion_mnist(own.small_ddpmpp('vp'), '32')


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> Path:
  """Where the command was run, quickly."""
  folder = tmp_path_factory.mktemp('recipes')
  recipes.main(['--quick', '--runs', str(folder)])
  return folder


def test_the_command_leaves_tables_and_pictures(runs):
  page = (runs / 'quick' / 'results.md').read_text()
  rows = [line.split('|')[1:-1] for line in page.splitlines() if line.startswith('| EDM | 1 |')]
  assert '640 images seen' in page and 'Heun (35)' in page
  values = [float(cell) for cell in rows[0][3:]]
  assert len(values) == 2 and all(value > 0 for value in values)
  pictures = {path.name for path in (runs / 'quick' / 'results').iterdir()}
  assert pictures == {'digits.png'}  # one recipe is compared with none


def test_several_recipes_are_plotted_beside_each_other(runs, tmp_path):
  outcome = json.loads((runs / 'quick' / 'digits' / recipes.OUTCOME).read_text())
  (tmp_path / results_page.PAGE).write_text((DOCS / results_page.PAGE).read_text())
  other = outcome['rows'][0] | {'recipe': 'flow'}
  results_page.write(outcome | {'rows': [*outcome['rows'], other]}, [outcome], tmp_path)
  pictures = {path.name: Image.open(path).size for path in (tmp_path / 'results').iterdir()}
  assert pictures.keys() == {'recipes.png', 'digits.png', 'digits_recipes.png'}
  assert pictures['recipes.png'] == (900, 340)  # one set of data: the other has one recipe alone


def test_what_is_measured_is_not_measured_again(runs, monkeypatch):
  page = runs / 'quick' / 'results.md'
  before = page.read_text()
  files = {path: path.stat().st_mtime_ns for path in runs.glob('**/report.json')}

  def fail(*_: object) -> None:
    raise AssertionError('it trains again')

  monkeypatch.setattr(run_lib, 'train', fail)
  recipes.main(['--quick', '--runs', str(runs)])
  assert page.read_text() == before
  assert len(files) == 2 and all(path.stat().st_mtime_ns == t for path, t in files.items())


def test_the_classifier_is_made_once_and_tells_digits(runs):
  """After 1280 images; its features are those that the command measured by."""
  train, test = (
    sources.load('digits', split, image_size=8, num_channels=1) for split in ('train', 'test')
  )
  path, training = epath.Path(runs / 'quick/digits/classifier_1280.npz'), recipes.QUICK.classifier
  network, accuracy = small_classifier.features_of(path, train, test, training)
  assert accuracy > 0.3  # of ten classes
  report = next(runs.glob('**/measured/35-*/report.json')).read_text()
  assert network.version in json.loads(report)['features']
  features = network.compile(jax.sharding.Mesh(np.array(jax.devices()), ('data',)))(
    test.gather(np.arange(5))
  )
  assert features.shape == (5, small_classifier.FEATURES)
  assert np.unique(features, axis=0).shape == features.shape


def test_tables_go_between_their_marks():
  page = 'a\n<!-- printed for x -->\nold\n<!-- end -->\nb\n'
  new = results_page.put(page, 'x', ['1', '2'])
  assert new == page.replace('old', '1\n2') and results_page.put(new, 'x', ['1', '2']) == new
  with pytest.raises(ValueError, match='0 places'):
    results_page.put(page, 'y', [])
  for trial in recipes.TRIALS:
    results_page.put((DOCS / 'results.md').read_text(), trial.name, [])


def test_a_grid_is_read_row_by_row():
  images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
  picture = np.asarray(results_page.grid(images, columns=3, width=6))  # the seventh fills no row
  assert picture.shape == (5, 8)  # with lines between
  np.testing.assert_array_equal(picture[::3, ::3], [[0, 1, 2], [3, 4, 5]])
  assert results_page.grid(images, columns=3, width=24).size == (26, 17)
