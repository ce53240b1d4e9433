"""The resolved configuration beside a run's checkpoints, and earlier ones."""

import itertools
import re
from pathlib import Path

from qwenvl_jax import buckets

# The configuration of the newest start; config.1.gin and so on are of earlier
# ones that differ from the one that followed.
CONFIG = 'config.gin'

_SHOWN = 120

# `key = value`; the value may go on in indented lines, as gin writes them.
_BINDING = re.compile(r'^([^\s#][^\n=]*?) = (.*(?:\n[ \t]+.*)*)', re.MULTILINE)


def changes(old: str, new: str) -> list[str]:
  r"""What differs between two configurations that gin wrote.

  >>> changes('x.A.peak = 0.1\n', 'x.A.peak = 0.2\nx.A.end = 0\n')
  ['x.A.end: not bound -> 0', 'x.A.peak: 0.1 -> 0.2']

  Returns:
    A line for each binding: its name, the old and the new value.
  """
  before, after = (
    dict(map(_binding, _BINDING.finditer(x))) for x in (old, new)
  )
  return [
    f'{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}'
    for key in sorted(before.keys() | after.keys())
    if before.get(key) != after.get(key)
  ]


def _binding(match: re.Match) -> tuple[str, str]:
  return match[1], ' '.join(match[2].removeprefix('\\').split())


def _shown(value: str | None) -> str:
  if value is None:
    return 'not bound'
  return value if len(value) <= _SHOWN else value[:_SHOWN] + '...'


def save(workdir: Path, resolved: str) -> list[str]:
  """Writes config.gin; one that differs is kept under another name.

  Returns:
    What differs: lines of `changes`.
  """
  path = workdir / CONFIG
  old = None
  if path.exists():
    old = path.read_bytes().decode(errors='replace')
  if old == resolved:
    return []
  differing = changes(old, resolved) if old is not None else []
  if differing:
    names = (workdir / f'config.{n}.gin' for n in itertools.count(1))
    buckets.write(next(x for x in names if not x.exists()), old)
  buckets.write(path, resolved)
  return differing
