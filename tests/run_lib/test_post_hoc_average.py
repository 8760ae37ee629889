"""--mode ema: an average that training did not keep, of the snapshots of those that it did."""

from etils import epath
import jax
import numpy as np
import pytest

from builders.setup import build
from builders.training import score_task
from configs.toy import two_moons
from evaluation.held_out_loss import HeldOutLoss
import run_lib
from runtime.errors import UserError
from training import checkpoints as checkpoints_lib
from training import loop
from training.checkpoints import Checkpoints
from training.step import TrainState
from workdir import artifacts

STEPS = 40


def config_of(*sigma_rels: float):
  config = two_moons.get_config('vp')
  config.model.update(nf=8, num_layers=1, ema_rate=0.9)
  config.training.update(
    batch_size=8, n_iters=STEPS, n_jitted_steps=5, log_freq=20, eval_freq=40, snapshot_freq=10,
    snapshot_freq_for_preemption=40, snapshot_sampling=False,
  )  # fmt: skip
  config.sampling.update(method='ddim', num_steps=5)
  config.ema.sigma_rels = sigma_rels
  return config


def restored(config, folder: epath.Path) -> TrainState:
  setup = build(config)
  abstract = loop.abstract_state(score_task(setup), setup.devices, setup.keys)
  with Checkpoints(folder, create=False) as checkpoints:
    state = checkpoints.restore_latest(abstract)
  assert state is not None
  return state


@pytest.fixture(scope='module')
def workdir(tmp_path_factory) -> epath.Path:
  folder = epath.Path(tmp_path_factory.mktemp('ema'))
  run_lib.train(config_of(0.05, 0.10, 0.15), str(folder))
  return folder


def test_it_is_what_training_would_have_kept(workdir):
  """Of a run that kept three, one is left out, and made of snapshots of the others: to 1e-3."""
  state = restored(config_of(0.05, 0.10, 0.15), workdir)
  config = config_of(0.05, 0.10, 0.15)
  config.ema.sigma_rel = 0.12
  folder = run_lib.post_hoc_average(config, str(workdir))
  assert folder == workdir / 'ema' / '0.12'
  made = restored(config, folder)
  assert int(made.step) == STEPS
  jax.tree.map(np.testing.assert_array_equal, made.params, state.params)
  run_lib.train(config_of(0.12), str(workdir / 'direct'))
  direct = restored(config_of(0.12), workdir / 'direct').averages[1]
  kept = [jax.tree.leaves(average) for average in state.averages[2:]]
  for got, expected, of_010, of_015 in zip(
    jax.tree.leaves(made.averages[0]), jax.tree.leaves(direct), *kept, strict=True
  ):
    assert np.abs(got - expected).max() < 1e-3
    apart = np.abs(of_010 - of_015).max()  # neighbours differ by more than that
    assert np.abs(got - expected).max() < max(0.1 * apart, 1e-6)


def test_one_that_was_kept_comes_back(workdir):
  config = config_of(0.05, 0.10, 0.15)
  config.ema.sigma_rel = 0.10
  made = restored(config, run_lib.post_hoc_average(config, str(workdir)))
  kept = restored(config, workdir).averages[2]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), made.averages[0], kept)
  run_lib.sample(config, str(workdir / 'ema' / '0.1'), 'sample')  # a workdir like any other
  with pytest.raises(UserError, match='holds an average already'):
    run_lib.post_hoc_average(config, str(workdir))


@pytest.mark.parametrize(
  ('kept', 'wanted', 'message'),
  [
    ((), 0.1, r'config\.ema\.sigma_rels, for example'),
    ((0.05, 0.10, 0.15), 0.3, r'config\.ema\.sigma_rel: .* below 0\.2887; got 0\.3'),
    ((0.05, 0.10), 0.1, r'config\.ema\.sigma_rels: \[0\.05, 0\.1, 0\.15\] there'),
  ],
)
def test_what_cannot_be_made_is_refused(workdir, kept, wanted, message):
  config = config_of(*kept)
  config.ema.sigma_rel = wanted
  with pytest.raises(UserError, match=message):
    run_lib.post_hoc_average(config, str(workdir))


def test_a_workdir_without_snapshots_is_refused(tmp_path):
  with pytest.raises(UserError, match='holds no snapshots'):
    run_lib.post_hoc_average(config_of(0.05), str(tmp_path))


def sweep_of(*widths: float):
  config = config_of(0.05, 0.10, 0.15)
  config.ema.sweep = widths
  config.eval.update(batch_size=1000, num_samples=20)
  return config


def test_widths_are_compared_and_none_is_measured_twice(workdir, monkeypatch, caplog):
  """Stopped at the second of two, repeated with a third: each is measured once."""
  caplog.set_level('INFO', 'score_sde')
  measured, read = [], []
  measure, restore = HeldOutLoss.measure, checkpoints_lib._restore_parts

  def counted(self, params, step, folder):
    if len(measured) == stop_at:
      raise KeyboardInterrupt
    measured.append(folder.parent.name)
    return measure(self, params, step, folder)

  def noted(manager, step, like, names):
    read.append((step, *names))
    return restore(manager, step, like, names)

  monkeypatch.setattr(HeldOutLoss, 'measure', counted)
  monkeypatch.setattr(checkpoints_lib, '_restore_parts', noted)
  stop_at = 1
  with pytest.raises(KeyboardInterrupt):
    run_lib.sweep_averages(sweep_of(0.12, 0.05), str(workdir))
  # Each snapshot is read once, and of it the averages of power functions alone.
  names = 'ema_params_1', 'ema_params_2', 'ema_params_3'
  assert read == [(step, *names) for step in range(10, 41, 10)]
  stop_at = 9
  found = run_lib.sweep_averages(sweep_of(0.12, 0.05, 0.15, 0.05), str(workdir))
  assert measured == ['0.12', '0.05', '0.15']
  assert [report['sigma_rel'] for report in found] == [0.12, 0.05, 0.15]
  assert all(0 <= report['unknown_share'] < 0.01 for report in found)
  best = min(found, key=lambda report: report['score_error'])['sigma_rel']
  written = artifacts.read_json(workdir / 'ema' / 'eval' / 'sweep.json')
  assert (written['best'], written['by']) == (best, 'score_error')
  told = f'Best by score_error: the average of sigma_rel = {best}'
  assert told in (workdir / 'index.html').read_text() and told in caplog.text
  assert told in (workdir / 'ema' / 'eval' / 'table.md').read_text()
  assert (workdir / 'ema' / 'eval' / '0.12' / f'step_{STEPS}' / 'samples.png').exists()
  assert not checkpoints_lib.exist(workdir / 'ema' / 'eval' / '0.12')


def test_a_sweep_is_of_widths_that_there_are_and_of_something_to_compare(workdir):
  with pytest.raises(UserError, match=r'config\.ema\.sweep: .* below 0\.2887; got 0\.4'):
    run_lib.sweep_averages(sweep_of(0.1, 0.4), str(workdir))
  config = sweep_of(0.1)
  config.eval.enable_loss = False  # samples of points are compared with nothing
  with pytest.raises(UserError, match=r'config\.ema\.sweep compares .*enable_loss'):
    run_lib.sweep_averages(config, str(workdir))
