"""Settings of the site that `make docs` builds: pages of docs/, the README, notebooks, docstrings.

Pages are Markdown that GitHub shows as well; their links are those between files. What is made here
of them: links to a Python file lead to its page in the reference, and equations become MathML,
which browsers draw by themselves. A missing page, heading or picture is an error.
"""

from collections.abc import Iterator
import inspect
import os
from pathlib import Path
import re
import shutil
import sys

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # docstrings are read of what is imported
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

project = 'Score-based generative modelling through SDEs'
html_title = 'Score SDE'
copyright = 'the authors'
extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
]
root_doc = 'README'
# The root of the repository is that of the site, so that links between files hold.
_API = 'docs/api'
include_patterns = [
  '*.md', 'docs/*.md', f'{_API}/*.rst', 'notebooks/*.ipynb', 'assets/*.md', 'tests/golden/*.md',
]  # fmt: skip
exclude_patterns = ['.*', '**/.*', 'build', 'runs', 'shared']

html_theme = 'furo'
html_static_path = ['site.css']
html_css_files = ['site.css']
html_copy_source = False
html_show_sphinx = False
html_math_renderer = 'mathml'
pygments_style = 'friendly'

myst_enable_extensions = ['dollarmath']
myst_fence_as_directive = ['math']
myst_heading_anchors = 4
nb_execution_mode = 'off'
nb_merge_streams = True

autodoc_default_options = {
  'members': True,
  'undoc-members': True,
  'show-inheritance': True,
  'member-order': 'bysource',
}
autodoc_typehints_format = 'short'
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # they stand in the signature
napoleon_use_rtype = False
default_role = 'py:obj'  # `name` is a link where there is such a thing

# Room by room, in the order in which one reads them.
_AT_THE_ROOT = (
  'sde_lib', 'losses', 'sampling', 'likelihood', 'controllable_generation', 'run_lib',
)  # fmt: skip
_ROOMS = (
  'models', 'samplers', 'data', 'training', 'evaluation', 'builders', 'configs', 'workdir',
  'runtime',
)  # fmt: skip
# What stands beside every page; the README itself stays free of it.
_CONTENTS = """
```{toctree}
:hidden:
:caption: Begin

Overview <self>
notebooks/quickstart
notebooks/your_own_sde
docs/tutorial
docs/equations
docs/gallery
docs/results
```

```{toctree}
:hidden:
:caption: Use

docs/your_data
docs/training
docs/sampling
docs/conditioning
docs/evaluation
docs/likelihood
docs/distillation
docs/fast
docs/published
docs/data
docs/devices
```

```{toctree}
:hidden:
:caption: Look up

docs/configs
docs/fields
docs/fidelity
docs/performance
docs/scaling
docs/accelerators
docs/compiled
assets/README
tests/golden/README
CHANGELOG
```

```{toctree}
:hidden:
:caption: Code

docs/code
docs/extending
docs/api/index
CONTRIBUTING
```
"""


def modules(room: str) -> list[str]:
  """The names of the modules of a room, without those that it only runs or keeps to itself."""
  files = sorted((ROOT / room).glob('*.py'))
  return [f'{room}.{file.stem}' for file in files if not file.stem.startswith('_')]


def write_reference(app: Sphinx) -> None:
  """A page for each module, a page for each room, and their index; those of before go."""
  del app
  pages = {'index': _index('Reference', [*_AT_THE_ROOT, *_ROOMS])}
  for room in _ROOMS:
    body = _index(room, modules(room), f'.. automodule:: {room}\n   :no-members:\n\n')
    pages[room] = body
  for name in [*_AT_THE_ROOT, *(module for room in _ROOMS for module in modules(room))]:
    pages[name] = f'{_title(name)}.. automodule:: {name}\n'
  folder = ROOT / _API
  folder.mkdir(exist_ok=True)
  for file in folder.glob('*.rst'):
    if file.stem not in pages:
      file.unlink()
  for name, page in pages.items():
    file = folder / f'{name}.rst'
    if not file.exists() or file.read_text() != page:  # what has not changed is not built again
      file.write_text(page)


def _title(text: str) -> str:
  return f'{text}\n{"=" * len(text)}\n\n'


def _index(title: str, pages: list[str], before: str = '') -> str:
  listed = '\n'.join(f'   {page}' for page in pages)
  return f'{_title(title)}{before}.. toctree::\n   :maxdepth: 1\n\n{listed}\n'


def fit_the_site(app: Sphinx, docname: str, source: list[str]) -> None:
  """Adds the contents to the README; leads links to Python files and folders to the reference."""
  del app
  if not (ROOT / f'{docname}.md').exists():
    return
  here = (ROOT / docname).parent

  def to_reference(link: re.Match[str]) -> str:
    path = (here / link[1]).resolve()
    if path.is_relative_to(ROOT) and path != ROOT:
      name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
      if (ROOT / _API / f'{name}.rst').exists():
        return f'](/{_API}/{name}.rst)'
      if path.is_dir():
        return '](/docs/code.md)'
    return link[0]

  source[0] = re.sub(r'\]\((?!\w+:|#)([\w./-]+?/?(?:\.py)?)\)', to_reference, source[0])
  if docname == root_doc:
    source[0] += _CONTENTS


# Docstrings.

_SECTION = re.compile(r'(Args|Attributes|Raises|Returns|Yields):$')
_MARKS = re.compile(r'(\\|\*|\||(?<=\w)_(?!\w)|``)')  # of reStructuredText, and of nothing here


def fit_docstring(
  app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
  """Makes reStructuredText of a docstring as they are written here, in place.

  There, indented lines after an empty one, and columns, are equations or lists that stay as they
  are; stars and bars are the mathematics'. Sections are Google's.
  """
  del app, name, obj, options
  paragraphs = '\n'.join(lines).expandtabs().strip('\n').split('\n\n')
  lines[:] = [line for part in _as_rst(paragraphs) for line in [*part.split('\n'), '']]
  if what in ('property', 'attribute', 'data'):
    lines[:0] = ['..', '']  # a comment, or napoleon takes what is before a colon for a type


def fit_signature(
  app: Sphinx,
  what: str,
  name: str,
  obj: object,
  options: object,
  signature: str | None,
  returned: str | None,
) -> tuple[str, str | None] | None:
  """Arrays have the name by which they are imported."""
  del app, what, name, obj, options
  if signature is None:
    return None  # a module
  return _of_array(signature), returned and _of_array(returned)


def _of_array(signature: str) -> str:
  return re.sub(r'~?jaxlib\._jax\.Array', 'Array', signature)


def _as_rst(paragraphs: list[str]) -> Iterator[str]:
  in_section = False
  for paragraph in paragraphs:
    first = paragraph.lstrip('\n').split('\n')[0]
    if not first.startswith(' '):
      in_section = bool(_SECTION.match(first))
    verbatim = first.startswith(' ') or re.search(r'^(?!\* ).*\S {2,}\S', paragraph, re.MULTILINE)
    if verbatim and not in_section:
      yield '.. code-block:: text\n\n' + '\n'.join(
        f'  {line}' for line in inspect.cleandoc(paragraph).split('\n')
      )
    else:
      yield '\n'.join(map(_escaped, paragraph.split('\n')))


def _escaped(line: str) -> str:
  """A line whose marks, outside of `code`, stand for themselves; a short name is no link."""
  bullet = re.match(r' *\* ', line)
  start = bullet.end() if bullet else 0
  parts = re.split(r'(`[^`]*`)', line[start:])
  escaped = (
    _code(part) if part.startswith('`') else _MARKS.sub(lambda mark: f'\\{mark[0]}', part)
    for part in parts
  )
  return line[:start] + ''.join(escaped)


def _code(name: str) -> str:
  """`n` of the text at hand is not any n of another module."""
  return f'`{name}`' if re.fullmatch('`[a-z]+`', name) else name


# Equations.


def _mathml(equation: str, as_block: bool) -> str:
  """With a space between log and what has no brackets."""
  apply, bracket = '<mo>&ApplyFunction;</mo>', '<mo stretchy="false">('
  made = tex2mathml(equation, as_block)
  return re.sub(rf'{apply}(?!\s*{re.escape(bracket)})', '<mspace width="0.17em"></mspace>', made)


def inline_equation(translator: HTML5Translator, node: nodes.math) -> None:
  translator.body.append(_mathml(node.astext(), as_block=False))
  raise nodes.SkipNode


def equation(translator: HTML5Translator, node: nodes.math_block) -> None:
  translator.body.append(f'<div class="equation">{_mathml(node.astext(), as_block=True)}</div>')
  raise nodes.SkipNode


def begin_at_the_readme(app: Sphinx, error: Exception | None) -> None:
  """The first page is index.html, too."""
  if error is None and app.builder.format == 'html':
    shutil.copyfile(app.outdir / f'{root_doc}.html', app.outdir / 'index.html')


def setup(app: Sphinx) -> ExtensionMetadata:
  app.add_html_math_renderer('mathml', (inline_equation, None), (equation, None))
  app.connect('builder-inited', write_reference)
  app.connect('source-read', fit_the_site)
  app.connect('autodoc-process-docstring', fit_docstring, priority=100)  # before napoleon
  app.connect('autodoc-process-signature', fit_signature)
  app.connect('build-finished', begin_at_the_readme)
  return {'parallel_read_safe': True, 'parallel_write_safe': True}
