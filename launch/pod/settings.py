"""Settings: from options, else the environment, else files."""

from __future__ import annotations

import getpass
import os
import re

from pod.log import PodError, UsageError, read_file, write_file

# The checkout.
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), '../..'))

CAPACITIES = ('spot', 'reserved', 'on-demand')

# Whole numbers, and what they are if nobody says.
_NUMBERS = {
  'max-restarts': 100,
  'backoff': 60,
  'grace': 600,
  'queue-hours': 168,
  'lines': 100,
  'worker': 0,
  'local': None,
  'devices-per-process': 1,
  'port': 8000,
}

# Words, what they must look like, and how a message says so.
_NAME = r'[a-z]([-a-z0-9]*[a-z0-9])?', 'lower-case letters, digits and hyphens'
_WORDS = {
  'tpu': _NAME,  # As Cloud TPU wants it; it also names a folder.
  'zone': _NAME,
  'project': (r'[a-z][-a-z0-9.:]*', 'the id of a project'),
  'type': (
    r'(v2|v3|v4|v5p|v5litepod|v6e)-[1-9][0-9]{0,5}',
    'as v5litepod-256 (v5e), v5p-128, v6e-256 or v4-512; '
    'gcloud compute tpus accelerator-types list --zone ZONE',
  ),
  'runtime-version': (r'[a-z0-9][-a-z0-9._]*', 'as tpu-ubuntu2204-base'),
  'capacity': ('|'.join(CAPACITIES), 'spot, reserved or on-demand'),
  'ssh': (r'external|internal|iap', 'external, internal or iap'),
  'budget': (r'[0-9]{1,9}([.][0-9]+)?', 'it is not a number of hours'),
  **dict.fromkeys(_NUMBERS, (r'[0-9]{1,9}', 'it is not a whole number')),
}
_PATHS = (
  *('workdir', 'init', 'data', 'config', 'topology', 'state', 'settings'),
  'api-key-file',
)
_SWITCHES = ('delete-after', 'mount-data')
_DEFAULTS = {'capacity': 'on-demand', 'ssh': 'external'}
# Only from the command line: no file and no variable answers for a person.
_ASKED_NOW = ('dry-run', 'yes', 'follow')
_KNOWN = (*_WORDS, *_PATHS, *_SWITCHES)
# Remembered with a TPU, for later commands about it.
_OF_A_TPU = ('zone', 'project', 'type', 'capacity', 'runtime-version', 'ssh')

# The software of TPU VMs, https://cloud.google.com/tpu/docs/runtimes
_RUNTIMES = {
  'v6e': 'v2-alpha-tpuv6e',
  'v5p': 'v2-alpha-tpuv5',
  'v5litepod': 'v2-alpha-tpuv5-lite',
}


class Settings:
  """One attribute a setting, e.g. `max_restarts`; None or False if unsaid.

  Attributes:
    create_flags: more words for gcloud's create.
    extra: words for the program on the workers.
  """

  def __init__(self, arguments: list[str], environment=os.environ):
    self.create_flags: list[str] = []
    self.extra: list[str] = []
    options = self._parse(arguments)
    said = {}
    for name in _KNOWN:
      value = environment.get(f'QWENVL_POD_{name.upper().replace("-", "_")}')
      if value:
        said[name] = value
    said |= options
    path = said.get('settings')
    if path and not os.path.exists(path):
      raise PodError(f'--settings {path} does not exist')
    said = self._file(path or os.path.join(ROOT, 'pod.settings')) | said
    state = self._check('state', said.get('state')) or f'{ROOT}/runs/pod'
    self.state = os.path.abspath(state)
    self.tpu = said.get('tpu') or 'qwenvl-' + getpass.getuser().lower()
    self._check('tpu', self.tpu)
    self.folder = os.path.join(self.state, self.tpu)
    remembered = self._file(os.path.join(self.folder, 'settings'))
    if said.get('type', '') not in ('', remembered.get('type')):
      remembered.pop('runtime-version', None)  # It is the other type's.
    said = remembered | said
    for name in _KNOWN:
      value = said.get(name)
      if name in _SWITCHES:
        value = _yes_or_no(name, value or 'no')
      elif name in _NUMBERS:
        value = self._check(name, value)
        value = int(value) if value else _NUMBERS[name]
      elif name not in ('tpu', 'state'):
        value = self._check(name, value) or _DEFAULTS.get(name)
      else:
        continue
      setattr(self, name.replace('-', '_'), value)
    for name in _ASKED_NOW:
      setattr(self, name.replace('-', '_'), name in options)
    self.runtime_version = self.runtime_version or _RUNTIMES.get(
      (self.type or '').split('-')[0], 'tpu-ubuntu2204-base'
    )

  def _parse(self, arguments: list[str]) -> dict[str, str]:
    found, rest = {}, iter(arguments)
    for argument in rest:
      name, equals, value = argument.partition('=')
      if argument == '--':
        self.extra += rest
      elif name[2:] in CAPACITIES and not equals:
        found['capacity'] = name[2:]
      elif argument[2:] in (*_SWITCHES, *_ASKED_NOW):
        found[argument[2:]] = 'yes'
      elif not argument.startswith('--'):
        raise UsageError(
          f'unexpected argument {argument} (arguments of the program go '
          'after --)'
        )
      else:
        ours = name[2:] in (*_WORDS, *_PATHS, 'create-flag')
        theirs = name in ('--gin_file', '--steps') or name.startswith('--gin.')
        if not ours and not theirs:
          raise UsageError(f'unknown option {name}')
        words = [argument]
        if not equals:
          value = next(rest, None)
          if value is None:
            raise UsageError(f'{name} has no value')
          words.append(value)
        if theirs:
          self.extra += words
        elif not value:
          # Not "as if unsaid": `down --tpu=$UNSET` would delete another TPU.
          raise UsageError(f'{name} is missing its value')
        elif name == '--create-flag':
          self.create_flags.append(value)
        else:
          found[name[2:]] = value
    return found

  def _file(self, path: str) -> dict[str, str]:
    """Reads lines `name=value`; a file that is not there says nothing."""
    found = {}
    for number, line in enumerate(read_file(path).splitlines(), 1):
      name, equals, value = line.partition('=')
      if not line.strip() or line.startswith('#'):
        continue
      if not equals:
        raise PodError(f"{path} line {number}: '{line}' is not name=value")
      if name == 'create-flag':
        self.create_flags.append(value)
      elif name in _KNOWN:
        found[name] = value
      else:
        raise PodError(
          f"{path} line {number}: there is no setting '{name}'",
          'settings: ' + ' '.join((*_KNOWN, 'create-flag')),
        )
    return found

  @staticmethod
  def _check(name: str, value: str | None) -> str | None:
    if not value:
      return None
    pattern, meant = _WORDS.get(
      name, (r'[^\x00-\x1f\x7f]+', 'no control characters')
    )
    if not re.fullmatch(pattern, value):
      raise UsageError(f'--{name} {value}: {meant}')
    return value

  def need_zone(self) -> None:
    if not self.zone:
      raise UsageError(
        f'--zone is missing: the zone of TPU {self.tpu}, e.g. us-west4-a'
      )

  def remember(self) -> None:
    """Keeps what the TPU was made with, for the next command about it."""
    values = ((x, getattr(self, x.replace('-', '_'))) for x in _OF_A_TPU)
    text = ''.join(f'{name}={value}\n' for name, value in values if value)
    write_file(os.path.join(self.folder, 'settings'), text)

  @property
  def chips(self) -> int:
    """Types before v5e count cores, of which a chip has two; 0 if unsaid."""
    generation, _, count = (self.type or 'v6e-0').partition('-')
    return int(count) // (1 if generation in ('v6e', 'v5litepod') else 2)


def _yes_or_no(name: str, value: str) -> bool:
  for answer, words in ((True, 'yes true 1'), (False, 'no false 0')):
    if value.lower() in words.split():
      return answer
  raise UsageError(f'{name}={value}: yes or no')
