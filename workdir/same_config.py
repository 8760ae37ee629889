"""Which fields of a config must stay as they are where a folder of a run is used again.

Every field stands in `LEARNED` or in `MAY_CHANGE`: a test fails on a new one that is in neither.
"""

from collections.abc import Iterator, Mapping
import itertools
import json
import os
import re
from typing import Any

from etils import epath

from configs.base import saved
from runtime.errors import UserError
from workdir import artifacts

# How parameters are read: what network they are of, and what its input and its output mean. It must
# agree wherever a checkpoint is used.
MODEL = (
  'model.name', 'model.nf', 'model.ch_mult', 'model.num_res_blocks', 'model.attn_resolutions',
  'model.resamp_with_conv', 'model.conditional', 'model.nonlinearity', 'model.normalization',
  'model.resblock_type', 'model.embedding_type', 'model.fourier_scale', 'model.fir',
  'model.fir_kernel', 'model.progressive', 'model.progressive_input', 'model.progressive_combine',
  'model.skip_rescale', 'model.init_scale', 'model.interpolation', 'model.num_layers',
  'model.num_heads', 'model.patch_size',
  'model.num_scales', 'model.sigma_min', 'model.sigma_max', 'model.beta_min', 'model.beta_max',
  'model.sigma_data', 'model.scale_by_sigma', 'model.output', 'model.num_classes', 'training.sde',
  'training.continuous', 'training.objective', 'training.single_scale', 'training.coupling',
  'data.image_size', 'data.num_channels', 'data.centered', 'data.dim', 'data.augment_probability',
  'data.condition', 'data.condition_channels',
  'ebm.buffer_size', 'distill.method',
)  # fmt: skip
# What is learned: the model, the data, the loss, and the optimiser whose state goes on. It must not
# change while a run goes on.
LEARNED = (
  *MODEL, 'seed', 'data.dataset', 'data.category', 'data.random_flip',
  'data.uniform_dequantization', 'data.fit', 'data.background', 'data.black', 'data.white',
  'training.reduce_mean', 'training.likelihood_weighting', 'training.eps',
  'training.time_law', 'training.time_mean', 'training.time_std', 'training.weight',
  'training.weight_gamma', 'training.weight_bias', 'training.coupling_batch',
  'training.learned_weight', 'training.label_dropout', 'ebm.regularization', 'optim.optimizer',
  'ema.sigma_rels', 'distill.start_steps', 'distill.end_steps', 'distill.num_steps',
  'distill.grid', 'distill.rho', 'distill.solver', 'distill.distance', 'distill.huber_c',
  'distill.weight', 'distill.target_rate', 'distill.doublings', 'distill.gap_base',
  'distill.gap_k', 'distill.gap_b',
)  # fmt: skip
# How it is learned, for how long, and what is made of it. Of `data.path` the images are compared,
# which may have moved.
MAY_CHANGE = (
  'data.path', 'data.tfds_dir', 'data.max_pixels', 'data.held_out',
  'data.skip_damaged', 'model.ema_rate', 'model.ema_warmup',
  'model.dropout', 'model.dtype', 'model.precision', 'model.remat', 'model.flash_attention',
  'training.batch_size',
  'training.n_iters', 'distill.late_iters', 'training.n_jitted_steps', 'training.grad_accum',
  'training.fsdp',
  'training.skip_nonfinite', 'training.stratified',
  'training.log_freq', 'training.eval_freq', 'training.snapshot_freq',
  'training.snapshot_freq_for_preemption', 'training.wandb', 'training.keep_snapshots',
  'training.snapshot_sampling',
  'training.snapshot_samples', 'training.fid_freq', 'training.fid_samples',
  'optim.lr', 'optim.beta1', 'optim.eps', 'optim.weight_decay',
  'optim.warmup', 'optim.decay', 'optim.decay_until', 'optim.unit',
  'optim.grad_clip', 'ema.half_life', 'ema.ramp_up', 'ema.sigma_rel', 'ema.sweep', 'ema.use',
  'ebm.n_steps', 'ebm.step_size', 'ebm.restart', 'classifier', 'sampling', 'eval',
)  # fmt: skip
# What samples and numbers depend on beside the checkpoint: it must not change within a folder of
# them.
FIXED_IN_EVAL = (
  *MODEL, 'model.dtype', 'model.precision', 'training.reduce_mean',
  'training.likelihood_weighting', 'training.eps', 'training.time_law', 'training.time_mean',
  'training.time_std', 'training.stratified', 'training.weight', 'training.weight_gamma',
  'training.weight_bias', 'training.coupling_batch', 'data.dataset', 'data.category', 'data.path',
  'data.held_out',
  'data.skip_damaged', 'data.uniform_dequantization', 'data.fit',
  'data.background', 'data.black', 'data.white', 'sampling', 'eval.batch_size', 'seed',
  'ema.use', 'distill',
)  # fmt: skip
# What the distances of a run's snapshots depend on, beside what it learns.
FIXED_IN_QUALITY = (
  *MODEL, 'model.dtype', 'model.precision', 'sampling', 'eval.batch_size', 'eval.features',
  'eval.stats_split', 'eval.stats_path', 'training.fid_samples', 'ema.use',
)  # fmt: skip
# How images are perturbed; what a classifier of such images depends on; what it learns.
FIXED_NOISE = (
  'training.sde', 'model.sigma_min', 'model.sigma_max', 'model.beta_min', 'model.beta_max',
  'data.image_size', 'data.num_channels', 'data.centered', 'data.dim',
)  # fmt: skip
CLASSIFIER = (
  *FIXED_NOISE, 'classifier.num_classes', 'classifier.blocks_per_group',
  'classifier.channel_multiplier',
)  # fmt: skip
LEARNED_BY_CLASSIFIER = (
  *CLASSIFIER, 'seed', 'data.dataset', 'data.category', 'data.random_flip',
  'data.uniform_dequantization', 'data.fit', 'data.background', 'data.black', 'data.white',
  'training.eps', 'optim.optimizer',
)  # fmt: skip

# Values of `data.condition` that name no folder, whose place may change.
_COMPUTED_CONDITION = re.compile('|gray|lowres:[0-9]+')

Changes = dict[str, tuple[Any, Any]]  # of a field: its value there, and now


def changes(path: epath.Path, config: Mapping[str, Any]) -> Changes:
  """What differs between the config saved at `path` and this one; nothing if none is saved."""
  if not path.exists():
    return {}
  return differences(saved(artifacts.read_json(path), path).to_dict(), config)


def differences(before: Mapping[str, Any], config: Mapping[str, Any]) -> Changes:
  """What differs between two configs."""
  old, new = dict(flatten(_as_json(before))), dict(flatten(_as_json(config)))
  return {
    name: (old.get(name), new.get(name))
    for name in sorted(old.keys() | new.keys())
    if _comparable(name, old.get(name)) != _comparable(name, new.get(name))
  }


def check_unchanged(
  path: epath.Path,
  config: Mapping[str, Any],
  fixed: tuple[str, ...],
  way_out: str = 'Give back these values, or choose another folder',
) -> None:
  """Compares a config with the one saved at `path`, if any, in the fields or sections `fixed`.

  Raises:
    UserError: if they differ; it names the fields, and says what to do: `way_out`.
  """
  different = {k: v for k, v in changes(path, config).items() if is_among(k, fixed)}
  if different:
    raise UserError(f'{path.parent} was made with another config: {told(different)}. {way_out}')


def is_among(name: str, fields: tuple[str, ...]) -> bool:
  """Whether a field stands in a table, by itself or with its section."""
  return name in fields or name.partition('.')[0] in fields


def told(different: Changes) -> str:
  """Changes, in words."""
  return '; '.join(f'config.{k}: {old!r} there, {new!r} now' for k, (old, new) in different.items())


def write(folder: epath.Path, config: Mapping[str, Any], step: int) -> None:
  """Writes `config.json`, with which a run goes on from a step.

  Where another one is there, both are kept, in `configs/step_<step>.json`.
  """
  path, history, new = folder / 'config.json', folder / 'configs', _as_json(config)
  before = artifacts.read_json(path) if path.exists() else None
  if before == new:
    return
  if before is not None:
    if not history.exists():
      artifacts.write_json(history / 'step_0.json', before)
    artifacts.write_json(_free(history, step), new)
  artifacts.write_json(path, new)


def _free(history: epath.Path, step: int) -> epath.Path:
  names = (f'step_{step}{f"-{i}" if i > 1 else ""}.json' for i in itertools.count(1))
  return next(path for path in map(history.joinpath, names) if not path.exists())


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
  """A config as it comes back from its file, with lists for tuples."""
  return json.loads(json.dumps(config))


def _comparable(name: str, value: Any) -> Any:
  """A value, but for what is written in several ways and means the same."""
  if name == 'data.dataset':
    return value.lower()
  if name == 'data.condition':
    return condition_kind(value)
  if name in ('data.path', 'sampling.guide') and value:
    return _real(value)
  return value


def condition_kind(value: str) -> str:
  """What `data.condition` makes of a model: for a folder it does not matter where that lies."""
  return value if _COMPUTED_CONDITION.fullmatch(value) else 'pairs'


def other_folder(
  path: epath.Path, config: Mapping[str, Any], section: str, name: str
) -> tuple[str, str] | None:
  """The folder that a field names in the config saved at `path`, and now, if it is another."""
  if not path.exists():
    return None
  saved_config = saved(artifacts.read_json(path), path)
  before, now = saved_config[section][name], config[section][name]
  if not before or _real(before) == _real(now):
    return None
  return before, now


def _real(path: str) -> str:
  return os.path.realpath(os.path.expanduser(path))


def flatten(tree: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  """The fields of a config, section.field, and their values."""
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from flatten(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value
