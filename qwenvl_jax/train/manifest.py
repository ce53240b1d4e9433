"""What files a checkpoint consists of, to find out what happened to them.

The arrays carry checksums of their own (`checkpoint.checksums`), which cost no
reading; this covers the rest, and what can be told before anything is read: a
file that is missing or was cut.
"""

import hashlib
import json
from pathlib import Path

from qwenvl_jax import buckets

FILE = 'files.json'

# Larger files hold arrays, which are checked by their contents.
_DIGEST_LIMIT_BYTES = 2**20


def write_checksums(folder: Path, limit: int = _DIGEST_LIMIT_BYTES) -> None:
  """Writes the manifest of a complete checkpoint.

  Of files up to `limit` bytes, contents are noted, too.
  """
  sizes = buckets.sizes(folder)
  small = [name for name, size in sizes.items() if size <= limit]
  digests = {
    name: _digest(data) for name, data in buckets.contents(folder, small)
  }
  files = {name: (size, digests.get(name)) for name, size in sizes.items()}
  files.pop(FILE, None)
  text = json.dumps(files, indent=1, sort_keys=True)
  buckets.write(folder / FILE, text)


def verify(folder: Path) -> str | None:
  """What is wrong with the files of a checkpoint.

  Returns:
    The first finding; None if there is none, or no manifest (the run ended
    between saving and `write_checksums`).
  """
  if not (folder / FILE).exists():
    return None
  try:
    wanted = json.loads((folder / FILE).read_text())
    found = buckets.sizes(folder)
    for name, (size, _) in wanted.items():
      if name not in found:
        return f'{name} is missing'
      if found[name] != size:
        return f'{name} has {found[name]} bytes, was saved with {size}'
    small = [name for name, (_, digest) in wanted.items() if digest is not None]
    for name, data in buckets.contents(folder, small):
      if _digest(data) != wanted[name][1]:
        return f'{name} has changed since it was saved'
  except (OSError, ValueError, TypeError, AttributeError) as error:
    if buckets.in_bucket(folder) and buckets.unreachable(error):
      raise
    return f'{FILE} cannot be read ({error})'
  return None


def _digest(data: bytes) -> str:
  return hashlib.blake2b(data, digest_size=16).hexdigest()
