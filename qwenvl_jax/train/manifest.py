"""What files a checkpoint consists of, to find out what happened to them.

The arrays carry checksums of their own (`checkpoint.checksums`), which cost no
reading; this covers the rest, and what can be told before anything is read: a
file that is missing or was cut.
"""

import hashlib
import json
from pathlib import Path

FILE = 'files.json'

# Larger files hold arrays, which are checked by their contents.
_READ = 2**20


def seal(folder: Path, limit: int = _READ) -> None:
  """Writes the manifest of a complete checkpoint.

  Args:
    folder: of one step.
    limit: bytes of the largest file whose contents are noted.
  """
  files = {name: _described(path, limit) for name, path in _files(folder)}
  temporary = folder.parent / f'.{FILE}.{folder.name}'
  temporary.write_text(json.dumps(files, indent=1, sort_keys=True))
  temporary.replace(folder / FILE)


def damage(folder: Path) -> str | None:
  """What is wrong with the files of a checkpoint.

  Returns:
    The first finding; None if there is none, or no manifest (the run ended
    between saving and `seal`).
  """
  if not (folder / FILE).exists():
    return None
  try:
    wanted = json.loads((folder / FILE).read_text())
    for name, (size, digest) in wanted.items():
      path = folder / name
      if not path.exists():
        return f'{name} is missing'
      found = path.stat().st_size
      if found != size:
        return f'{name} has {found} bytes, was saved with {size}'
      if digest is not None and _digest(path) != digest:
        return f'{name} has changed since it was saved'
  except (OSError, ValueError, TypeError, AttributeError) as error:
    return f'{FILE} cannot be read ({error})'
  return None


def _files(folder: Path):
  for path in folder.rglob('*'):
    if path.is_file() and path.name != FILE:
      yield path.relative_to(folder).as_posix(), path


def _described(path: Path, limit: int) -> tuple[int, str | None]:
  size = path.stat().st_size
  return size, _digest(path) if size <= limit else None


def _digest(path: Path) -> str:
  return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
