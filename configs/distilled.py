"""What the configs of --mode distill, configs/distill/, have in common: the methods.

A student has the network, the SDE and the data of its teacher, the config of which it is made from.
What a method changes is the loss, the optimiser and the sampler.
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from configs.base import Changes
from runtime.errors import unknown

# The rate is constant; a short run has an average that is short as well, `model.ema_warmup`.
_ALL: Changes = {
  'eval.enable_loss': False,
  'eval.enable_bpd': False,
  'optim.warmup': 0,
  'optim.unit': 'steps',
  'ema.half_life': 0.0,
}
# The learning rate falls to 0 in every stage; then the average is the student itself.
_PROGRESSIVE: Changes = {
  'distill.method': 'progressive',
  'sampling.method': 'ddim',
  'sampling.num_steps': 0,
  'optim.decay': 'linear',
  'model.ema_rate': 0.0,
  'model.ema_warmup': False,
}
_CONSISTENCY: Changes = {
  'sampling.method': 'consistency',
  'sampling.num_steps': 2,
  'optim.optimizer': 'RAdam',
  'optim.grad_clip': -1.0,
  'model.ema_rate': 0.9999,
}
# The law of noise levels of the improved techniques and of easy tuning.
_LATER_LAW: Changes = {'training.time_mean': -1.1, 'training.time_std': 2.0}
_CD: Changes = {'distill.method': 'cd', 'optim.lr': 4e-4, 'model.dropout': 0.0}
# As first published, but for its rate: with an average that is the target, and lags less and less.
_CT: Changes = {
  'distill.method': 'ct',
  'distill.start_steps': 2,
  'distill.end_steps': 150,
  'distill.target_rate': 0.9,
  'optim.lr': 4e-4,
  'model.dropout': 0.0,
}
_ICT: Changes = {'distill.method': 'ict', 'distill.start_steps': 10, 'distill.end_steps': 1280}
# By name: which of the teacher's configs a method begins with, and what it changes.
METHODS: dict[str, tuple[str, Changes]] = {
  'progressive': ('vp', _PROGRESSIVE | {'model.output': 'v', 'distill.grid': 'cosine'}),
  'progressive_edm': ('edm', _PROGRESSIVE),
  'cd': ('edm', _CONSISTENCY | _CD),
  'ct': ('edm', _CONSISTENCY | _CT),
  'ict': ('edm', _CONSISTENCY | _LATER_LAW | _ICT | {'optim.lr': 1e-4}),
  'ect': ('edm', _CONSISTENCY | _LATER_LAW | {'distill.method': 'ect', 'optim.lr': 1e-4}),
}


def config_of(
  method: str, teachers: Mapping[str, Callable[[], ConfigDict]], changes: dict[str, Changes]
) -> ConfigDict:
  """A config of a method, on the data of the configs that its teachers are trained by.

  Args:
    method: one of `METHODS`.
    teachers: those configs, by their SDE.
    changes: how long the methods train on these data, and the like; '' for all of them.

  Raises:
    UserError: if there is no such method.
  """
  if method not in METHODS:
    raise unknown('variant (distill)', method, METHODS)
  sde, of_method = METHODS[method]
  config = teachers[sde]()
  of_data = changes.get('', {}) | changes.get(of_method['distill.method'], {})
  config.update_from_flattened_dict(_ALL | of_method | of_data)
  return config
