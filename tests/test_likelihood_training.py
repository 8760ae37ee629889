"""`benchmarks.likelihood_training`: what it compares, and its tables."""

from pathlib import Path

from etils import epath
import pytest

from benchmarks import likelihood_training, results_page
from benchmarks.likelihood_training import TRIALS, VARIANTS

PAGE = Path(__file__).parent.parent / 'docs' / 'results.md'


def test_ways_to_train_differ_in_the_loss_alone():
  for trial in TRIALS:
    configs = [likelihood_training.config_of(trial, variant, {}) for variant in VARIANTS]
    assert all(config.data.uniform_dequantization for config in configs)
    different = set()
    for config in configs[1:]:
      for section in ('training', 'model', 'optim', 'data'):
        first, other = (dict(c[section]) for c in (configs[0], config))
        different |= {name for name in first if first[name] != other[name]}
    assert different == {'likelihood_weighting', 'time_law', 'stratified'}
    results_page.put(PAGE.read_text(), trial.mark, [])


def test_differences_are_of_the_same_images(tmp_path):
  """Their error is that of the differences: here 0.1, +- 0, though images differ by 2."""
  trial, rows = TRIALS[0], []
  for i, variant in enumerate(VARIANTS[:2]):
    row = {'variant': variant.name, 'seconds': 9.0, 'images_seen': 128_000}
    for name, less in (('bits', 0.1 * i), ('samples', 0.1 * i + 0.02), ('bound', 0.0)):
      folder = epath.Path(tmp_path / f'{name}{i}')
      folder.mkdir()
      lines = [f'{j},{j - less:.6f},' for j in (3, 5)]
      (folder / 'bpd_test.csv').write_text('\n'.join(['image,bits_per_dim,std_error', *lines]))
      key = 'bound_test' if name == 'bound' else 'bpd_test'
      row[name] = {key: 4.0 - less, f'{key}_std_error': 1.0, 'folder': str(folder), 'images': 2}
    rows.append(row)
  caption, _, _, _, first, second = likelihood_training.table(trial, rows)
  assert '128,000 images seen' in caption
  cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in (first, second)]
  assert [cell[:2] for cell in cells] == [
    ['sigma^2, uniform', '4.000 ± 1.000'],
    ['likelihood, uniform', '3.900 ± 1.000'],
  ]
  assert [cell[2] for cell in cells] == ['', '-0.1000 ± 0.0000']
  assert {cell[3] for cell in cells} == {'-0.0200 ± 0.0000'}


def test_a_dataset_that_there_is_not_is_told(capsys):
  with pytest.raises(SystemExit):
    likelihood_training.main(['--dataset', 'mnist'])
  assert 'fashion-mnist' in capsys.readouterr().err
