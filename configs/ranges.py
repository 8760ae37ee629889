"""Ranges of the numbers in a config; `builders.values` checks what else they may be."""

from collections.abc import Callable
import math
from typing import Any

from ml_collections import FrozenConfigDict

from runtime.errors import UserError
from workdir import same_config

_POSITIVE = (
  'data.image_size', 'data.num_channels', 'data.max_pixels', 'model.nf', 'model.num_res_blocks',
  'model.num_layers', 'model.num_heads', 'model.patch_size',
  'model.fourier_scale', 'training.batch_size', 'training.n_iters', 'training.n_jitted_steps',
  'training.grad_accum', 'training.fsdp', 'training.log_freq', 'training.eval_freq',
  'training.snapshot_freq',
  'training.snapshot_freq_for_preemption', 'training.snapshot_samples', 'training.fid_samples',
  'training.eps', 'optim.lr',
  'optim.eps', 'sampling.n_steps_each', 'sampling.snr', 'sampling.eps', 'sampling.rtol',
  'sampling.atol', 'sampling.sde_rtol', 'sampling.sde_atol', 'sampling.rho', 'sampling.factor',
  'sampling.num_samples', 'sampling.num_conditions', 'sampling.blur_std', 'sampling.step_size',
  'ebm.n_steps',
  'ebm.step_size', 'ebm.buffer_size', 'eval.batch_size', 'eval.num_samples', 'eval.bpd_repeats',
  'eval.bpd_importance_samples', 'eval.bpd_dequantization_steps', 'eval.num_probes',
  'eval.bound_times',
  'classifier.blocks_per_group', 'classifier.channel_multiplier', 'classifier.batch_size',
  'classifier.n_iters', 'classifier.lr', 'model.sigma_data', 'training.time_std',
  'training.weight_gamma', 'ema.sigma_rel', 'distill.start_steps', 'distill.end_steps',
  'distill.rho', 'distill.doublings',
)  # fmt: skip
_NOT_NEGATIVE = (
  'seed', 'data.dim', 'data.condition_channels', 'training.keep_snapshots', 'training.fid_freq',
  'training.coupling_batch', 'model.init_scale', 'model.num_classes',
  'optim.weight_decay', 'optim.warmup',
  'optim.decay_until', 'ema.half_life', 'ema.use',
  'ebm.regularization', 'classifier.num_classes', 'classifier.weight_decay', 'classifier.warmup',
  'sampling.num_steps', 'sampling.s_churn', 'sampling.s_tmin', 'sampling.s_tmax',
  'sampling.s_noise', 'sampling.noise_std', 'eval.begin_ckpt', 'eval.end_ckpt',
  'distill.huber_c', 'distill.gap_k', 'distill.gap_b', 'distill.late_iters',
)  # fmt: skip
_BELOW_ONE = ('model.dropout', 'model.ema_rate', 'optim.beta1', 'distill.target_rate')
_SHARES = (
  'data.augment_probability', 'ema.ramp_up', 'training.label_dropout', 'ebm.restart',
  'sampling.eta',
)  # fmt: skip

# Fields, what holds of their values, and that in words.
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
  (_POSITIVE, lambda value: value > 0, 'positive'),
  (_NOT_NEGATIVE, lambda value: value >= 0, 'at least 0'),
  (_BELOW_ONE, lambda value: 0 <= value < 1, 'at least 0 and below 1'),
  (_SHARES, lambda value: 0 <= value <= 1, 'from 0 to 1'),
  (('sampling.guide_ema',), lambda value: value >= -1, 'at least -1'),
  (('model.num_scales', 'distill.num_steps'), lambda value: value >= 2, 'at least 2'),
  (('distill.gap_base',), lambda value: value > 1, 'above 1'),
  (('seed',), lambda value: value < 2**32, 'below 2^32'),
)
_MAY_BE_INFINITE = ('sampling.s_tmax', 'sampling.guidance_high')
# Fields of several numbers: their type, how many at least, the least of them, all that in words.
_SEQUENCES: tuple[tuple[str, type | tuple[type, ...], int, float, str], ...] = (
  ('model.ch_mult', int, 1, 1, 'positive whole numbers'),
  ('model.attn_resolutions', int, 0, 1, 'positive whole numbers, or none'),
  ('model.fir_kernel', (int, float), 2, 0, 'two numbers or more, at least 0'),
  ('ema.sigma_rels', float, 0, 0, 'numbers such as 0.05, or none'),
  ('ema.sweep', float, 0, 0, 'numbers such as 0.05, or none'),
  ('sampling.consistency_times', (int, float), 0, 0, 'times such as (0.8,), or none'),
  ('sampling.labels', (int, str), 0, 0, 'numbers of classes, from 0 on, or their names'),
)


def check(config: FrozenConfigDict) -> None:
  """Raises UserError for a number that no run could have."""
  for name, value in same_config.flatten(config.to_dict()):
    numbers = value if isinstance(value, tuple | list) else [value]
    for number in numbers:
      infinite = name not in _MAY_BE_INFINITE and number in (math.inf, -math.inf)
      if infinite or number != number:  # the latter holds of nan alone
        raise UserError(f'config.{name} must be finite; got {value}')
  for names, holds, words in _RANGES:
    for name in names:
      value = field(config, name)
      if value is not None and not holds(value):
        raise UserError(f'config.{name} must be {words}; got {value}')
  for name, kind, fewest, least, words in _SEQUENCES:
    values = field(config, name)
    if values is not None and not (
      len(values) >= fewest
      and all(isinstance(v, kind) for v in values)
      and all(v >= least for v in values if not isinstance(v, str))
    ):
      raise UserError(f'config.{name} must be {words}; got {values}')


def field(config: FrozenConfigDict, name: str) -> Any:
  """The value of a field, section.field, or None if this config has none of that name."""
  section, _, rest = name.partition('.')
  return config[section].get(rest) if rest else config[section]
