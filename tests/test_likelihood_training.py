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

  def report(name: str, less: float) -> dict:
    folder, found = epath.Path(tmp_path / name), {'bpd_test_images': 2, 'bound_test_images': 2}
    folder.mkdir()
    for key in ('bpd_test', 'bound_test'):
      lines = [f'{j},{j - less:.6f},' for j in (3, 5)]
      (folder / f'{key}.csv').write_text('\n'.join(['image,bits_per_dim,std_error', *lines]))
      found |= {key: 4.0 - less, f'{key}_std_error': 1.0}
    return {**found, 'folder': str(folder)}

  ways = {'usual': report('a', 0.0), 'better': report('b', 0.1)}
  noises = {'learned': report('c', 0.12)}
  lines = likelihood_training.tables(TRIALS[0], 128_000, ways, noises)
  assert '128,000 images seen' in lines[0]
  cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if '±' in line]
  assert cells == [
    ['usual', *2 * ['4.000 ± 1.000', '']],
    ['better', *2 * ['3.900 ± 1.000', '-0.1000 ± 0.0000']],
    ['uniform', *2 * ['3.900 ± 1.000', '']],
    ['learned', *2 * ['3.880 ± 1.000', '-0.0200 ± 0.0000']],
  ]


def test_a_dataset_that_there_is_not_is_told(capsys):
  with pytest.raises(SystemExit):
    likelihood_training.main(['--dataset', 'mnist'])
  assert 'fashion-mnist' in capsys.readouterr().err
