"""Memory of a step of distillation beside plain training, as XLA plans it, of digits.

python -m benchmarks.distillation_memory
"""

from collections.abc import Iterator

import jax

from benchmarks import common
from builders.setup import build
from builders.training import make_schedule, task_of
from configs.distill import digits
from configs.edm import digits as edm_digits
from training import loop


def memory() -> Iterator[str]:
  """What XLA plans for a step of digits: bytes of all arrays, and those of the frozen teacher."""
  configs = {'plain (EDM)': edm_digits.get_config()}
  configs |= {name: digits.get_config(name) for name in ('cd', 'ect', 'progressive_edm')}
  yield '| step | teacher MB | state MB | temporary MB | all MB | beside plain |'
  yield '|---' * 6 + '|'
  plain = None
  for name, config in configs.items():
    setup = build(config)
    average = jax.eval_shape(
      lambda setup=setup: setup.model.init(jax.random.key(0), (1, *setup.data_shape))
    )
    task = task_of(setup, average)
    state = jax.eval_shape(task.init, setup.keys.key('init'))
    one_step, _ = loop.compile_steps(task, make_schedule(setup.config), setup.devices, state)
    batch = {'data': common.images(setup, setup.config.training.batch_size)}
    compiled = one_step.lower(state, task.frozen, batch, setup.keys.key('train')).compile()
    planned = compiled.memory_analysis()
    whole = planned.argument_size_in_bytes + planned.temp_size_in_bytes
    plain = plain or whole
    parts = (_bytes(task.frozen), _bytes(state), planned.temp_size_in_bytes, whole)
    cells = [name, *(f'{part / 1e6:.2f}' for part in parts), f'{whole / plain:.2f}']
    yield f'| {" | ".join(cells)} |'


def _bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == '__main__':
  for line in memory():
    print(line, flush=True)
