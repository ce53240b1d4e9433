"""What a report's numbers come from: the model, the code and the machine."""

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import jax

import qwenvl_jax
from qwenvl_jax.conversion import inspection
from qwenvl_jax.model.config import QwenVLConfig


def facts(config: QwenVLConfig, params: Mapping) -> dict[str, str]:
  """Returns what to say of a model, and where and when this is, by name."""
  now = datetime.datetime.now().astimezone()
  parts = ', '.join(
    f'{name} {inspection.rounded(inspection.count(tree))}'
    for name, tree in params.items()
  )
  return {
    'model': f'{inspection.in_short(config, params)} ({parts})',
    'date': f'{now:%Y-%m-%d %H:%M %Z}',
    'code': f'qwenvl_jax {qwenvl_jax.__version__}, {_commit()}',
    'machine': _machine(),
  }


def cores() -> int:
  """Returns how many cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1  # macOS cannot keep a process to some of them.


def _commit() -> str:
  """The commit of this checkout, and whether files differ from it."""
  root = Path(qwenvl_jax.__file__).resolve().parents[1]

  def git(*arguments: str) -> str | None:
    try:
      done = subprocess.run(
        ['git', *arguments], cwd=root, capture_output=True, text=True
      )
    except OSError:  # No git here.
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  # A package that lies in somebody's repository is not that repository's.
  if not (root / '.git').exists() or not (head := git('rev-parse', 'HEAD')):
    return 'no checkout'
  return f'commit {head[:10]}' + ' with changes' * bool(git('status', '-s'))


def _machine() -> str:
  """Processor, cores, memory, and the accelerators that JAX uses."""
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
  found = f'{_processor()}, {cores()} cores, {memory:.0f} GiB'
  kinds = [device.device_kind for device in jax.devices()]
  if jax.default_backend() != 'cpu':
    found += f', {len(kinds)} x {kinds[0]}'
  return f'{found}, Python {platform.python_version()}, JAX {jax.__version__}'


def _processor() -> str:
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  for line in lines:
    name, _, value = line.partition(':')
    if name.strip() == 'model name':
      return value.strip()
  return platform.processor() or platform.machine()
