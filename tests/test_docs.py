"""What the documentation shows runs, and does what it says."""

from pathlib import Path
import re

from analytic import check_moments, gaussian
from analytic import TWO_MODES as DATA
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import fields
from data import sources
from data.batches import eval_batches
from losses import score_matching_loss
from samplers.base import GridSampler
from samplers.multistep import DDIM
from sde_lib import expand, SDE, VESDE
from tutorial import denoising, score_matching
import tutorial.__main__ as tutorial

ROOT = Path(__file__).parent.parent
DOCS = ROOT / 'docs'
KEY = jax.random.key(0)
DATA_OF_HALF = gaussian(jnp.zeros(2), 0.5)


@pytest.fixture(scope='module')
def shown() -> dict:
  """What the Python of docs/extending.md defines."""
  names: dict = {}
  for block in re.findall(r'```python\n(.*?)```', (DOCS / 'extending.md').read_text(), re.DOTALL):
    exec(block, names)
  return names


def test_the_new_sde_is_one(shown):
  """Its coefficients solve the moment equations, and lambda has an inverse."""
  sde, t = shown['CosineSDE'](), jnp.linspace(0.05, 1.0, 9)
  assert isinstance(sde, SDE)
  alpha, d_alpha = jax.jvp(sde.alpha, [t], [jnp.ones_like(t)])
  variance, d_variance = jax.jvp(lambda t: sde.sigma(t) ** 2, [t], [jnp.ones_like(t)])
  f, g = sde.drift_coef(t), sde.diffusion_coef(t)
  np.testing.assert_allclose(d_alpha, f * alpha, rtol=1e-4)
  np.testing.assert_allclose(d_variance, 2 * f * variance + g**2, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(sde.time_of_log_snr(sde.log_snr(t)), t, atol=1e-5)


@pytest.mark.parametrize(('name', 'nfe'), [('pc', 200), ('euler', 50)])
def test_the_new_samplers_recover_the_data(shown, name, nfe):
  """First-order steps: 50 have a bias of up to 10 %."""
  sampler = shown[name]
  x, taken = sampler(KEY, DATA.score_fn(sampler.sde), (2000, 2))
  assert taken == nfe
  check_moments(x, DATA, bias=0.1)


def test_the_new_solver_is_ddim(shown):
  ours = shown['euler']
  theirs = GridSampler(ours.sde, DDIM(), ours.grid)
  (x, _), (y, _) = (s(KEY, DATA.score_fn(s.sde), (8, 2)) for s in (ours, theirs))
  np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_the_new_network_learns(shown):
  """To see the noise in digits: of a mean square of 1, less than half is left."""
  model, objective = shown['setup'].model, shown['setup'].objective
  images = sources.load('digits', 'train', image_size=8, num_channels=1).gather(np.arange(64))
  rng_t, rng_z = jax.random.split(KEY)
  x0, t = 2 * jnp.float32(images) / 255 - 1, jax.random.uniform(rng_t, (64,), minval=0.05)
  z, tx = jax.random.normal(rng_z, x0.shape), optax.adam(1e-2)

  def loss(params: dict) -> jax.Array:
    score_fn = model.bind(params)
    each = score_matching_loss(objective, score_fn, x0, t, z, KEY)
    return each.mean()

  def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
    params, state = carry
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = tx.update(gradient, state)
    return (optax.apply_updates(params, updates), state), value

  params = model.init(KEY, x0.shape)
  values = jax.lax.scan(step, (params, tx.init(params)), None, length=200)[1]
  per_pixel = values / (1.0 if objective.reduce_mean else 32.0)  # half the sum over 64
  assert per_pixel[0] > 0.9 and per_pixel[-1] < 0.5


def test_the_new_data_source_has_two_kinds_of_images(shown):
  batches = shown['batches']
  batch = next(batches)
  batches.close()
  assert batch['data'].shape == (64, 8, 8, 1) and batch['data'].dtype == np.uint8
  of_rows, of_columns = (np.ptp(batch['data'], axis=axis).max((1, 2)) for axis in (2, 1))
  np.testing.assert_array_equal(of_columns > 0, batch['label'] == 1)  # lying: equal along a row
  np.testing.assert_array_equal(of_rows > 0, batch['label'] == 0)
  whole = next(iter(eval_batches(shown['Stripes'](), 1000)))
  assert whole['mask'].all() and whole['label'].mean() == 0.5
  assert len(np.unique(whole['data'].reshape(1000, -1), axis=0)) == 4


def test_the_new_preconditioning_reads_both_alike(shown):
  """alpha D = x + sigma^2 s (Tweedie); F = 0 is the score of N(0, 1/4); nothing cancels."""
  edm, rng = shown['edm'], np.random.default_rng(0)
  x, output = (jnp.asarray(rng.normal(size=(6, 2)), jnp.float32) for _ in range(2))
  alpha, sigma = jnp.full((6, 1), 0.7), jnp.array([1e-5, 1e-3, 0.1, 0.5, 1.0, 50.0])[:, None]
  score, denoised = edm.score_of(output, x, alpha, sigma), edm.denoised_of(output, x, alpha, sigma)
  np.testing.assert_allclose(alpha * denoised, x + sigma**2 * score, rtol=1e-4, atol=1e-5)
  true = DATA_OF_HALF.score_fn(VESDE(0.01, 50.0))
  t = jnp.linspace(0.0, 1.0, 6)
  alpha, sigma = (expand(f(t), x) for f in (true.sde.alpha, true.sde.sigma))
  np.testing.assert_allclose(edm.score_of(0.0, x, alpha, sigma), true(x, t), rtol=1e-5)


def test_the_new_objective_is_least_at_the_true_score(shown):
  """Of multiples c of the true score, in which the loss is a parabola, at c = 1."""
  objective, n = shown['objective'], 20_000
  t = objective.times(KEY, n)
  parts = np.floor(((np.asarray(t) - 0.01) / 0.99) ** 2 * 50 + 1e-4 / 50).clip(0, 49)
  assert np.ptp(np.bincount(parts.astype(int))) <= 4
  true, rng = DATA.score_fn(objective.kernels), jax.random.key(1)
  x0, z = DATA.sample(rng, n), jax.random.normal(KEY, (n, 2))
  alpha, sigma = (expand(v, x0) for v in objective.kernels.kernel(t))
  x = alpha * x0 + sigma * z

  def loss(c: float) -> float:
    each = objective.matching(lambda x, t: c * true(x, t), x, t, rng)
    return float((sigma[:, 0] ** 2 * each).mean())

  at = [loss(c) for c in (0.0, 1.0, 2.0)]
  curvature, slope = at[2] - 2 * at[1] + at[0], (at[2] - at[0]) / 2
  assert 1 - slope / curvature == pytest.approx(1.0, abs=0.05)


def test_the_new_feature_network_does_not_see_brightness(shown):
  images = np.random.default_rng(0).integers(0, 200, (5, 8, 8, 3), np.uint8)
  extract = shown['edges'].compile(jax.sharding.Mesh(np.array(jax.devices()), ('data',)))
  features = extract(images)
  assert features.shape == (5, 7 * 7 * 6) and features.std() > 0.1
  np.testing.assert_allclose(extract(images + 55), features, atol=1e-6)


TOLD_BY_NAME = ('tutorial', 'extending', 'training', 'sampling', 'evaluation', 'data', 'code')
PAGES = ['README.md', *(f'docs/{path.name}' for path in sorted(DOCS.glob('*.md')))]


@pytest.mark.parametrize('page', PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
  """To files that are there, and to headings in them."""
  for link, _, heading in re.findall(
    r'\]\((?!http)([^)#]*)(#?)([^)]*)\)', (ROOT / page).read_text()
  ):
    there = (ROOT / page).parent / link if link else ROOT / page
    assert there.exists(), link
    headings = re.findall(r'^#+ (.*)', there.read_text(), re.MULTILINE) if heading else []
    slugs = {re.sub(r'[^\w -]', '', text).strip().lower().replace(' ', '-') for text in headings}
    assert not heading or heading in slugs, (link, heading, slugs)


def test_the_site_has_every_page():
  """In its contents; `make docs` fails on one that is not."""
  contents = re.findall(r'^docs/\w+$', (DOCS / 'conf.py').read_text(), re.MULTILINE)
  assert sorted(f'{page}.md' for page in contents) == sorted(set(PAGES) - {'README.md'})


@pytest.mark.parametrize('page', ['README.md', *(f'docs/{name}.md' for name in TOLD_BY_NAME)])
def test_what_a_page_calls_by_a_name_of_this_code_has_it(page):
  text = (ROOT / page).read_text()
  code = '\n'.join(path.read_text() for path in ROOT.glob('**/*.py') if '.venv' not in path.parts)
  prose = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
  for name in re.findall(r'`(\w*[_A-Z]\w*)(?:\(.*?\))?`', prose):
    assert re.search(rf'\b{name}\b', code), name


@pytest.mark.parametrize('page', PAGES)
def test_the_python_files_that_a_page_names_are_there(page):
  """With their folders as seen from the root; a name alone, such as of a test, in any of them."""
  files = [path.relative_to(ROOT) for path in ROOT.glob('*/**/*.py') if '.venv' not in path.parts]
  files += [path.relative_to(ROOT) for path in ROOT.glob('*.py')]
  known = {str(path) for path in files} | {path.name for path in files}
  named = set(re.findall(r'(?<![\w*>/.-])[\w/]*\w\.py\b', (ROOT / page).read_text()))
  assert not named - known
  assert page != 'docs/fidelity.md' or len(named) > 10  # its rows name tests


def test_every_field_is_explained_and_the_page_of_fields_is_of_today():
  assert not [name for name, meaning in fields.meanings().items() if not meaning]
  made = 'made anew by python -m configs.fields > docs/fields.md'
  assert (DOCS / 'fields.md').read_text() == fields.page(), made


def test_the_tutorial_puts_what_a_chapter_prints_in_its_place():
  page = 'a\n<!-- printed by sdes -->\nold\n<!-- end -->\nb\n<!-- printed by x -->\n<!-- end -->\n'
  new = tutorial.put(page, 'sdes', ['1', '2'])
  assert new == page.replace('old\n', '```text\n1\n2\n```\n')
  assert tutorial.put(new, 'sdes', ['1', '2']) == new
  with pytest.raises(ValueError, match='0 places'):
    tutorial.put(page, 'likelihoods', [])
  text = (DOCS / 'tutorial.md').read_text()
  for chapter in tutorial.CHAPTERS:  # each has its place, and its figure
    tutorial.put(text, chapter, [])
    assert f'(tutorial/{chapter}.png)' in text


def test_the_parzen_identity_of_the_tutorial():
  """Denoising less explicit score matching is the same for every score, to 1e-5."""
  points = jnp.array([[0.0, 0.3], [0.5, -0.2], [-1.0, 0.1]])
  sde = VESDE(0.4, 2.0)
  scores = (lambda x, t: -x, lambda x, t: jnp.sin(x), lambda x, t: jnp.zeros_like(x))
  constants = [denoising.constant(points, sde, 0.0, score_fn) for score_fn in scores]
  np.testing.assert_allclose(constants, constants[0], rtol=1e-5)


def test_the_tutorial_fits_a_gaussian_to_its_sample():
  x = jax.random.normal(KEY, (100, 2)) @ jnp.array([[1.0, 0.3], [0.0, 0.5]]) + 1.0
  mu, m = score_matching.fit_gaussian(x)
  np.testing.assert_allclose(mu, x.mean(0), atol=1e-3)
  np.testing.assert_allclose(jnp.linalg.inv(m), jnp.cov(x.T, bias=True), atol=1e-3)
