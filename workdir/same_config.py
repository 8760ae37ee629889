"""Which fields of a config must stay as they are where a folder of a run is used again."""

from collections.abc import Iterator, Mapping
import json
from typing import Any

from etils import epath

from configs.base import saved
from runtime.errors import UserError
from workdir import artifacts

# What a checkpoint depends on, which must not change when its run goes on or is evaluated; and
# what samples depend on beside it, which must not change within an eval folder.
FIXED_IN_RUN = (
  'model', 'training.sde', 'training.continuous', 'training.objective', 'training.single_scale',
  'data.image_size', 'data.num_channels', 'data.centered', 'data.dim', 'ebm.buffer_size',
)  # fmt: skip
FIXED_IN_EVAL = (
  *FIXED_IN_RUN, 'model.dtype', 'model.precision', 'training.reduce_mean',
  'training.likelihood_weighting', 'training.eps', 'data.dataset', 'data.category', 'data.path',
  'data.uniform_dequantization', 'sampling', 'eval.batch_size', 'seed',
)  # fmt: skip
# How images are perturbed; what a classifier of such images depends on.
FIXED_NOISE = (
  'training.sde', 'model.sigma_min', 'model.sigma_max', 'model.beta_min', 'model.beta_max',
  'data.image_size', 'data.num_channels', 'data.centered', 'data.dim',
)  # fmt: skip
FIXED_IN_CLASSIFIER = (
  *FIXED_NOISE, 'classifier.num_classes', 'classifier.blocks_per_group',
  'classifier.channel_multiplier',
)  # fmt: skip
# Of a fixed section, unless they are named themselves.
_FREE = (
  'model.dropout', 'model.ema_rate', 'model.ema_warmup', 'model.dtype', 'model.remat',
  'model.precision',
)  # fmt: skip


def check_unchanged(path: epath.Path, config: Mapping[str, Any], fixed: tuple[str, ...]) -> None:
  """Compares a config with the one saved at `path`, if any, in the fields or sections `fixed`.

  Raises:
    UserError: if they differ; it names the fields.
  """
  if not path.exists():
    return
  # Through JSON, so that tuples are lists on both sides.
  before = saved(artifacts.read_json(path), path).to_dict()
  old, new = (json.loads(json.dumps(side)) for side in (before, config))
  old, new = dict(flatten(old)), dict(flatten(new))
  changes = [
    f'config.{name}: {old.get(name)!r} there, {new.get(name)!r} now'
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
    and (name in fixed or (name not in _FREE and any(name.startswith(f'{f}.') for f in fixed)))
  ]
  if changes:
    raise UserError(
      f'{path.parent} was made with another config: {"; ".join(changes)}. Give back these values, '
      'or choose another folder'
    )


def flatten(tree: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  """The fields of a config, section.field, and their values."""
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from flatten(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value
