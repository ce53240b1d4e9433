"""The rules of the house, as WORKSPACE.md states them, and its documents."""

import ast
import functools
import os
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'qwenvl_jax'

# Who may import whom: imports point down only. A room is a folder or a top
# module of the package; `data.packing` would allow that one alone. Everyone may
# import its own room, and COMMON but for COMMON itself.
COMMON = ('batch', 'buckets', 'errors')
ROOMS = {
  'buckets': ('errors',),
  'batch': (),
  'errors': (),
  'text': (),
  'model': ('sharding', 'fsdp'),
  'fsdp': ('sharding',),
  'sharding': (),
  'configuration': (),
  'entry': (),
  'conversion': ('model', 'text', 'sharding'),
  'image': (),
  'data': ('text', 'image'),
  'train': ('model', 'data', 'sharding', 'fsdp', 'conversion', 'text'),
  'plan': ('train', 'infer', 'model', 'data', 'sharding'),
  'infer': ('model', 'text', 'image', 'conversion', 'sharding'),
  'serve': ('infer', 'model', 'text', 'image', 'sharding', 'conversion', 'api'),
  'eval': ('infer', 'data', 'text', 'model', 'image', 'sharding'),
  'api': (
    'conversion',
    'infer',
    'model',
    'text',
    'image',
  ),
  'checkpoint_options': ('api', 'infer'),
  'progress': (),
  'notebook': ('data', 'eval', 'image', 'text'),
}
# Console commands start a program, so they may also import what is made for
# that: the shared command line, configs, progress bars and the public face.
MAINS = ('main', 'cli', 'chat_cli')
FOR_MAINS = (
  *('entry', 'configuration', 'api', 'progress', 'checkpoint_options'),
)
# Put everything together; nobody imports them.
TOPS = ('__init__', 'quickstart')
# Packages of others that only some rooms may import.
GUESTS = {
  'torch': ('conversion',),
  'gin': ('configuration',),
  'tensorflow': (),
  'fastapi': ('serve',),
  'pydantic': ('serve',),
  'starlette': ('serve',),
  'uvicorn': ('serve',),
  'gradio': ('serve',),
  'vllm': ('serve',),
  'tpu_inference': ('serve',),
}


def modules():
  """(dotted name within the package, path) of every module."""
  for path in sorted(PACKAGE.rglob('*.py')):
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    if len(parts) > 1 and parts[-1] == '__init__':
      parts = parts[:-1]
    yield '.'.join(parts), path


@functools.cache
def syntax(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text(encoding='utf-8'), str(path))


def imports(path: pathlib.Path):
  """Every dotted name a module imports, at its top or within functions."""
  for node in ast.walk(syntax(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def within(name: str, prefixes) -> bool:
  return any(f'{name}.'.startswith(f'{prefix}.') for prefix in prefixes)


def import_violations(name: str, imported) -> list[str]:
  """What of `imported` the module `name` has no right to, by ROOMS, GUESTS."""
  room, is_main = name.split('.')[0], name.split('.')[-1] in MAINS
  allowed = {room, *ROOMS.get(room, ())}
  allowed |= set(() if room in COMMON else COMMON)
  allowed |= set(FOR_MAINS if is_main else ())
  wrong = []
  for target in imported:
    top, _, rest = target.partition('.')
    if top == PACKAGE.name:
      if room not in TOPS and not within(rest, allowed):
        wrong.append(target)
    elif top in GUESTS and room not in GUESTS[top]:
      wrong.append(target)
  return wrong


def test_rules_catch_violations():
  """A table of rules that forbids nothing would pass every other test."""
  check = import_violations
  assert check('model.rope', ['qwenvl_jax.data.sanitize', 'jax']) == [
    'qwenvl_jax.data.sanitize'
  ]
  assert check('infer.chat', ['qwenvl_jax.data.packing.make_row'])
  assert check('text.chatml', ['qwenvl_jax', 'qwenvl_jax.load']) != []
  assert check('errors', ['qwenvl_jax.batch'])
  assert check('train.loop', ['gin', 'torch', 'qwenvl_jax.entry.run'])
  assert not check('train.main', ['qwenvl_jax.entry.run', 'optax'])
  assert not check('infer.chat', ['qwenvl_jax.image.load'])
  assert not check('conversion.reader', ['torch', 'qwenvl_jax.errors.X'])


def test_imports_point_down():
  wrong = []
  for name, path in modules():
    room = name.split('.')[0]
    if room not in ROOMS and room not in TOPS:
      wrong.append(f'{room}: a new room, say in ROOMS what it may import')
      continue
    for target in import_violations(name, imports(path)):
      wrong.append(f'{path.relative_to(ROOT)} imports {target}')
  assert not wrong, '\n'.join(wrong)


def test_modules_say_what_they_are():
  wrong = []
  for _, path in modules():
    if not ast.get_docstring(syntax(path)):
      wrong.append(f'{path}: no docstring')
    if path.name == 'utils.py':
      wrong.append(f'{path}: name it after the idea it holds')
    # Without it, the folder is not in the wheel (assets are, as data).
    is_package = (path.parent / '__init__.py').exists()
    if not is_package and path.parent.name != 'assets':
      wrong.append(f'{path.parent}: no __init__.py')
  assert not wrong, '\n'.join(sorted(set(wrong)))


def missing_of_docstring(function: ast.FunctionDef) -> list[str]:
  """What the docstring of a public function should say, and does not."""
  text = ast.get_docstring(function)
  if not text:
    return ['a docstring']
  missing = []
  arguments = (*function.args.args, *function.args.kwonlyargs)
  types = [ast.unparse(x.annotation) for x in arguments if x.annotation]
  takes_arrays = any(re.search(r'\bndarray\b|jax\.Array\b', x) for x in types)
  if takes_arrays and 'Args:' not in text:
    missing.append('Args: with shapes')
  raised = {
    ast.unparse(getattr(node.exc, 'func', node.exc))
    for node in ast.walk(function)
    if isinstance(node, ast.Raise) and node.exc
  }
  if any(x.endswith('Error') for x in raised) and 'Error' not in text:
    missing.append(f'Raises: {", ".join(sorted(raised))}')
  return missing


@pytest.mark.parametrize(
  ('source', 'missing'),
  [
    ('def f(): pass', ['a docstring']),
    ('def f(x: jax.Array): "Does."', ['Args: with shapes']),
    ('def f():\n  "Does."\n  raise DataError("no")', ['Raises: DataError']),
    ('def f(x: int):\n  "Does."\n  raise SystemExit(1)', []),
  ],
)
def test_what_docstrings_lack_is_found(source, missing):
  (function,) = ast.parse(source).body
  assert missing_of_docstring(function) == missing


def test_public_functions_say_what_they_do_take_and_raise():
  wrong = [
    f'{path.relative_to(ROOT)}:{node.lineno} {node.name} lacks {missing}'
    for _, path in modules()
    for node in syntax(path).body
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    and not node.name.startswith('_')
    for missing in missing_of_docstring(node)
  ]
  assert not wrong, '\n'.join(wrong)


def test_modules_are_no_longer_than_one_idea():
  lines = {path: path.read_text().count('\n') for _, path in modules()}
  assert not {str(path): n for path, n in lines.items() if n > 450}


def text_files():
  """The project's text files: what git tracks, or all outside a checkout."""
  listed = subprocess.run(
    ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  if (ROOT / '.git').exists() and listed.returncode == 0:
    paths = [ROOT / name for name in listed.stdout.split('\0') if name]
  else:
    made = {'.venv', 'runs', 'build', 'dist', '__pycache__'}
    paths = []
    for folder, folders, files in os.walk(ROOT):
      folders[:] = [
        name
        for name in folders
        if name not in made and not name.endswith(('_cache', '.egg-info'))
      ]
      paths += [pathlib.Path(folder, name) for name in files]
  for path in sorted(paths):
    if path.is_file() and b'\0' not in path.read_bytes():
      yield path


def test_no_paths_of_one_machine():
  local = re.compile(r'(?<![\w.~<}])/(work|tmp|root|home|Users)/\w')
  wrong = []
  for path in text_files():
    text = path.read_text(encoding='utf-8', errors='replace')
    for number, line in enumerate(text.splitlines(), 1):
      if local.search(line):
        wrong.append(f'{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}')
  assert not wrong, '\n'.join(wrong)


def documents():
  """The map and the documents, with their texts."""
  for path in (
    ROOT / 'README.md',
    ROOT / 'WORKSPACE.md',
    *ROOT.glob('docs/*.md'),
  ):
    yield path.relative_to(ROOT), path.read_text(encoding='utf-8')


def defines(path: pathlib.Path, name: str) -> bool:
  """Whether a module has a function or class of that name, or its method."""
  body = syntax(path).body
  for part in name.split('.'):
    found = [x for x in body if getattr(x, 'name', None) == part]
    if not found:
      return False
    body = getattr(found[0], 'body', [])
  return True


def test_documents_name_files_and_functions_that_are_there():
  named = re.compile(
    r'(?<![\w/.<-])((?:[\w-]+/)*[\w-]+\.(?:py|sh))\b(?::([A-Za-z]\w*(?:\.\w+)*))?'
  )
  known = [path.relative_to(ROOT) for path in text_files()]
  folders = {part for path in known for part in path.parts[:-1]}
  wrong = []
  for document, text in documents():
    # Elsewhere, a name without a folder may be one of another project.
    ours = document.name in ('WORKSPACE.md', 'design.md')
    for name, function in named.findall(text):
      found = [x for x in known if f'/{x}'.endswith(f'/{name}')]
      if not found and (ours or name.split('/')[0] in folders):
        wrong.append(f'{document}: there is no {name}')
      elif function and not any(defines(ROOT / x, function) for x in found):
        wrong.append(f'{document}: {name} has no {function}')
  assert not wrong, '\n'.join(wrong)


def test_links_of_documents_lead_somewhere():
  wrong = [
    f'{document}: {target}'
    for document, text in documents()
    for target in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', text)
    if not (ROOT / document.parent / target).exists()
  ]
  assert not wrong, '\n'.join(wrong)
