"""What setup.cfg and constraints.txt say about the package is true."""

import ast
import configparser
import contextlib
import importlib.metadata
import importlib.util
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]

# Where installation names differ from import names.
DISTRIBUTIONS = {
  'PIL': 'pillow',
  'absl': 'absl-py',
  'fpdf': 'fpdf2',
  'gin': 'gin-config',
  'google': 'protobuf',
  'orbax': 'orbax-checkpoint',
  'vllm': 'vllm-tpu',
}
# Extras that ask for other extras name the package itself.
ITSELF = 'qwenvl-jax'
# Where packages stand that are installed apart from extras.
APART = ('launch/demo-requirements.txt', 'constraints-vllm.txt')


def setup_cfg() -> configparser.ConfigParser:
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg', encoding='utf-8')
  return parser


def normalized(requirement: str) -> str:
  name = re.match(r'[\w.-]+', requirement).group()
  return re.sub(r'[-_.]+', '-', name).lower()


def requirements(extras=()) -> set[str]:
  setup = setup_cfg()
  texts = [setup['options']['install_requires']]
  texts += [setup['options.extras_require'][extra] for extra in extras]
  lines = '\n'.join(texts).splitlines()
  names = {normalized(line) for line in lines if line[:1].isalpha()}
  return names - {ITSELF}


def imported(path: pathlib.Path) -> set[str]:
  """The top names of what a module imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      names |= {alias.name.partition('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names.add((node.module or '').partition('.')[0])
  return names


def test_imported_packages_are_declared():
  extras = setup_cfg()['options.extras_require']
  declared = requirements(extras)
  for name in APART:
    lines = (ROOT / name).read_text(encoding='utf-8').splitlines()
    declared |= {normalized(line) for line in lines if line[:1].isalpha()}
  wrong = []
  for path in sorted((ROOT / 'qwenvl_jax').rglob('*.py')):
    for top in imported(path) - sys.stdlib_module_names - {'qwenvl_jax'}:
      if normalized(DISTRIBUTIONS.get(top, top)) not in declared:
        wrong.append(f'{path.relative_to(ROOT)} imports {top}')
  assert not wrong, 'not declared: ' + '; '.join(sorted(set(wrong)))


def test_constraints_pin_what_is_required():
  lines = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
  pins = [line for line in lines if line and not line.startswith('#')]
  assert all(re.fullmatch(r'[\w.-]+==[\w.+-]+', pin) for pin in pins)
  pinned = {normalized(pin) for pin in pins}
  assert len(pinned) == len(pins)
  extras = setup_cfg()['options.extras_require']
  assert not requirements(extras) - pinned
  # What these need in turn, as far as it is installed here.
  seen, todo = set(), list(requirements(('dev', 'gcs', 'plan')))
  while todo:
    name = todo.pop()
    if name in seen:
      continue
    seen.add(name)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      needs = importlib.metadata.requires(name) or ()
      todo += [normalized(line) for line in needs if ';' not in line]
  assert not seen - pinned


def test_console_commands_exist():
  scripts = setup_cfg()['options.entry_points']['console_scripts']
  wrong = []
  for line in scripts.strip().splitlines():
    _, module, function = re.split(r'\s*[=:]\s*', line)
    if not importlib.util.find_spec(module):
      wrong.append(f'{line}: no such module')
    elif not callable(getattr(importlib.import_module(module), function, None)):
      wrong.append(f'{line}: no such function')
  assert not wrong, '\n'.join(wrong)
