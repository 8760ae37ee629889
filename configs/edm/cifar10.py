"""EDM on CIFAR-10: `configs/edm/cifar10.py[:variant]`."""

from ml_collections import ConfigDict

from configs import published

_UNCONDITIONAL = published.both_networks(published.CIFAR10)
_PLAIN = _UNCONDITIONAL | published.conditional(_UNCONDITIONAL, num_classes=10)
# Ten minutes of one H100, as docs/fast.md plans it: no time of it has been measured.
_FAST = {
  'model.ch_mult': (1, 2, 2),
  'model.num_res_blocks': 2,
  'model.dropout': 0.0,
  'model.dtype': 'bfloat16',
  'training.batch_size': 256,
  'training.n_iters': 20_000,
  'training.n_jitted_steps': 10,
  'training.log_freq': 100,
  'training.eval_freq': 1000,
  'training.snapshot_freq': 20_000,
  'training.snapshot_freq_for_preemption': 2000,
  'training.snapshot_sampling': False,  # its program would take a minute to compile
  'optim.lr': 1e-3,
  'optim.unit': 'images',
  'optim.warmup': 250_000,
  'optim.decay': 'cosine',
  'ema.half_life': 100_000.0,
  'eval.begin_ckpt': 1,
  'eval.end_ckpt': 1,
  'eval.batch_size': 1000,
  'eval.enable_bpd': True,
  'eval.bpd_repeats': 1,
  'eval.enable_sampling': True,
  'eval.num_samples': 10_000,
}
VARIANTS = _PLAIN | published.augmented(_PLAIN, 0.12) | {'fast': ('ddpmpp', _FAST)}


def get_config(variant: str = 'ddpmpp') -> ConfigDict:
  return published.config_of('cifar10', variant, VARIANTS)
