"""Training steps and evaluations beside those of `diffusers`' UNet2DModel, in PyTorch.

Networks of equal width and depth, random images of the same shape, float32, the same devices, in
turns. A training step of both has denoising score matching, clipped gradients, Adam and the moving
average of the parameters. On a GPU, PyTorch may need XLA_PYTHON_CLIENT_PREALLOCATE=false.

  pip install diffusers torch
  python -m benchmarks.diffusers_unet [--network NAME] [--batch N] [--steps N] [--json PATH]
"""

from collections.abc import Callable
import sys
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from benchmarks import common
from builders.setup import Setup
from builders.training import score_task
from sde_lib import ScoreFn
from training import loop

try:
  import diffusers
  import torch
except ImportError:
  sys.exit('this benchmark needs PyTorch: pip install diffusers torch')

# As the files of google/ncsnpp-celebahq-256 and google/ddpm-cifar10-32 have them.
FORMS = {
  'ncsnpp': {
    'blocks': ('SkipDownBlock2D', 'AttnSkipDownBlock2D', 'SkipUpBlock2D', 'AttnSkipUpBlock2D'),
    'fields': {
      'time_embedding_type': 'fourier',
      'norm_num_groups': None,
      'mid_block_scale_factor': 2**0.5,
      'flip_sin_to_cos': True,
      'freq_shift': 0,
    },
  },
  'ddpmpp': {
    'blocks': ('DownBlock2D', 'AttnDownBlock2D', 'UpBlock2D', 'AttnUpBlock2D'),
    'fields': {
      'norm_num_groups': 32,
      'flip_sin_to_cos': False,
      'freq_shift': 1,
      'downsample_padding': 0,
    },
  },
}
NETWORKS = [name for name in common.NETWORKS if name.split()[1] in FORMS]


def unet(setup: Setup, form: str) -> diffusers.UNet2DModel:
  """diffusers' network of the size of the config's."""
  model, size = setup.config.model, setup.config.data.image_size
  plain_down, attn_down, plain_up, attn_up = FORMS[form]['blocks']
  attends = [size // 2**level in model.attn_resolutions for level in range(len(model.ch_mult))]
  return diffusers.UNet2DModel(
    sample_size=size,
    block_out_channels=tuple(model.nf * mult for mult in model.ch_mult),
    layers_per_block=model.num_res_blocks,
    down_block_types=tuple(attn_down if attend else plain_down for attend in attends),
    up_block_types=tuple(attn_up if attend else plain_up for attend in reversed(attends)),
    attention_head_dim=None,
    dropout=model.dropout,
    norm_eps=1e-6,
    **FORMS[form]['fields'],
  )


class Torch:
  """The same work in PyTorch."""

  def __init__(self, setup: Setup, form: str, batch: int) -> None:
    size, channels = setup.config.data.image_size, setup.config.data.num_channels
    self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    self.network = unet(setup, form).to(self.device)
    self.parameters = list(self.network.parameters())
    self.average = [p.detach().clone() for p in self.parameters]
    optim = setup.config.optim
    self.adam = torch.optim.Adam(self.parameters, lr=optim.lr, betas=(optim.beta1, 0.999))
    self.clip = optim.grad_clip
    self.x0 = torch.rand(batch, channels, size, size, device=self.device)
    self.t = torch.full((batch,), 0.5, device=self.device)

  def _wait(self) -> None:
    if self.device == 'cuda':
      torch.cuda.synchronize()

  def train_step(self) -> None:
    std = torch.exp(4 * torch.rand(len(self.x0), device=self.device))
    z = torch.randn_like(self.x0)
    out = self.network(self.x0 + std[:, None, None, None] * z, std).sample
    loss = (out + z).square().flatten(1).sum(1).mean()
    self.adam.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
    self.adam.step()
    with torch.no_grad():
      torch._foreach_lerp_(self.average, self.parameters, 1e-3)
    self._wait()

  def evaluate(self) -> None:
    with torch.inference_mode():
      self.network.eval()(self.x0, self.t)
    self.network.train()
    self._wait()


def here(setup: Setup, batch: int) -> dict[str, Callable[[], Any]]:
  """The work of `Torch` in this code."""
  task, rng = score_task(setup), setup.keys.key('train')
  state = jax.jit(task.init, compiler_options=loop.once_options())(setup.keys.key('init'))
  score_fn = setup.model.bind(jax.tree.map(jnp.copy, state.params))  # the state is donated
  images = setup.devices.put({'data': common.images(setup, batch)})
  update = jax.jit(task.update, donate_argnums=0, compiler_options=loop.compiler_options())
  x, t = jax.random.normal(rng, (batch, *setup.data_shape)), jnp.full(batch, 0.5)

  @jax.jit
  def call(score_fn: ScoreFn, x: Array, t: Array) -> Array:
    return score_fn(x, t)

  def train_step() -> None:
    nonlocal state
    state, _ = jax.block_until_ready(update(state, None, images, rng))

  return {
    'training step': train_step,
    'evaluation': lambda: jax.block_until_ready(call(score_fn, x, t)),
  }


def measure(name: str, batch: int, steps: int) -> dict[str, dict[str, float]]:
  """Seconds of both, and parameters."""
  setup = common.network(name, {'training.batch_size': batch})
  theirs = Torch(setup, name.split()[1], batch)
  works = {'training step': theirs.train_step, 'evaluation': theirs.evaluate}
  results = {}
  for what, run in here(setup, batch).items():
    measured = common.timed({'diffusers': works[what], 'here': run}, steps)
    results[what] = {which: seconds for which, (seconds, _) in measured.items()}
  params = jax.eval_shape(
    lambda rng: setup.model.init(rng, (1, *setup.data_shape)), setup.keys.key('init')
  )
  results['million parameters'] = {
    'diffusers': sum(p.numel() for p in theirs.parameters) / 1e6,
    'here': sum(p.size for p in jax.tree.leaves(params)) / 1e6,
  }
  return results


def table(results: dict[str, dict[str, float]], batch: int) -> str:
  """What `measure` found, as text, with the ratios of times."""
  rows = []
  for what, row in results.items():
    rows.append([what, row['diffusers'], row['here']])
    if what == 'million parameters':
      rows[-1] += ['', '']
    else:
      rows[-1] += [row['diffusers'] / row['here'], batch / row['here']]
  return common.table(['seconds', 'diffusers', 'here', 'ratio', 'images/s here'], rows)


def main() -> None:
  parser = common.parser(__doc__)
  parser.add_argument('--network', choices=NETWORKS, default='reduced ncsnpp')
  parser.add_argument('--batch', type=int, default=16, help='images (16)')
  parser.add_argument('--steps', type=int, default=5, help='of each (5); the median counts')
  args = parser.parse_args()
  results = measure(args.network, args.batch, args.steps)
  print(f'torch {torch.__version__}; diffusers {diffusers.__version__}')
  common.report(table(results, args.batch), results, args.json)


if __name__ == '__main__':
  main()
