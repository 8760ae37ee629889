"""`python -m configs.fields` prints docs/fields.md: every field, its default, what it means.

The meanings are the comments of configs/base.py: the one behind a field, or else the one above it.
"""

import ast
from collections.abc import Iterator
import inspect
import io
import tokenize

from ml_collections import ConfigDict

from configs import base

_BEGIN = """# The fields of a config

Each can be set on the command line: `--config.sampling.num_steps=20`. The defaults here are those
of [configs/base.py](../configs/base.py); a config file changes some of them.
`python -m configs.fields > docs/fields.md` makes this page of the comments there.
"""
_TABLE = ('| field | default | meaning |', '|---|---|---|')
_SHOWN_NETWORKS = (
  'ddpm',
  'ncsnpp',
  'ncsnv2_64',
  'dit_b',
  'mlp',
)  # those of other sizes have no others


def meanings() -> dict[str, str]:
  """Section, and section.field, -> what the comment there in configs/base.py says, in its order."""
  source = inspect.getsource(base._default)
  comments, code = _comments(source), source.splitlines()
  section_of, told = {'config': ''}, {}
  for line in ast.walk(ast.parse(source)):
    if not isinstance(line, ast.Assign) or not isinstance(line.targets[0], ast.Attribute):
      continue
    first, *names = (ast.unparse(target) for target in line.targets)
    variable, _, field = first.partition('.')
    for name in names:  # data, of config.data = data = ConfigDict()
      section_of[name] = f'{field}.'
    above: list[str] = []
    while code[line.lineno - 2 - len(above)].strip().startswith('#'):
      above.insert(0, comments[line.lineno - 1 - len(above)])
    told[section_of[variable] + field] = comments.get(line.lineno) or ' '.join(above)
  return told


def page() -> str:
  """All of docs/fields.md."""
  return '\n'.join(_lines()) + '\n'


def _comments(source: str) -> dict[int, str]:
  """Number of a line, from 1 -> the comment in it."""
  tokens = tokenize.generate_tokens(io.StringIO(source).readline)
  return {
    token.start[0]: token.string.lstrip('# ') for token in tokens if token.type == tokenize.COMMENT
  }


def _lines() -> Iterator[str]:
  config = base._default()
  yield from (_BEGIN, *_TABLE)
  for name, meaning in meanings().items():
    section, _, field = name.partition('.')
    if isinstance(config[section], ConfigDict) and not field:
      yield from ('', f'## {name}: {meaning}', '')
      if section == 'model':
        yield from _of_networks()
      yield from _TABLE
    else:
      default = config[section][field] if field else config[name]
      yield f'| `{name}` | {_shown(default)} | {meaning} |'


def _of_networks() -> Iterator[str]:
  """The fields of `model` that depend on the network, with the value of each network."""
  networks = [base.NETWORKS[name] for name in _SHOWN_NETWORKS]
  yield from ('Fields that depend on the network, with the value of each:', '')
  yield f'| field | {" | ".join(f"`{name}`" for name in _SHOWN_NETWORKS)} |'
  yield '|---' * (len(networks) + 1) + '|'
  for field in dict.fromkeys(f for network in networks for f in network if f != 'name'):
    values = (_shown(network[field]) if field in network else '' for network in networks)
    yield f'| `model.{field}` | {" | ".join(values)} |'
  yield from ('', 'Fields that all networks have:', '')


def _shown(value: object) -> str:
  """A value as the command line takes it."""
  return f'`{value}`'.replace(' ', '') if value != '' else 'empty'


if __name__ == '__main__':
  print(page(), end='')
