"""Opening the files that records name, and no others."""

import os
import pathlib
import re

from qwenvl_jax import buckets
from qwenvl_jax.errors import BadRecordError

# Bytes of the largest file that is taken for a picture.
MAX_PICTURE = 256 << 20

_URL = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*:')


def inside(root: str | os.PathLike, name: str, record: str) -> pathlib.Path:
  """The path of a file that a record names, if it lies in the source's folder.

  Symbolic links are followed first: one that leads out is refused as well. The
  folder itself may be one, since its owner named it.

  Args:
    root: the folder.
    name: as the record writes it, relative to the folder.
    record: names the record in errors.

  Raises:
    BadRecordError: a URL, an absolute path, or one that leaves the folder.
  """
  if not name or '\0' in name or _URL.match(name) or name.startswith('/'):
    raise BadRecordError(
      'outside_root',
      f'{record}: {name[:80]!r} is no path within {root}; no URL is fetched, '
      'put the file there and name it relative to that folder',
    )
  top = pathlib.Path(root).resolve()
  try:
    path = (top / name).resolve()
  except (OSError, ValueError, RuntimeError) as error:
    # Too long, not encodable, or links in a circle.
    raise BadRecordError(
      'missing_image', f'{record}: {name[:80]!r} cannot be a path ({error})'
    ) from error
  if not path.is_relative_to(top):
    raise BadRecordError(
      'outside_root',
      f'{record}: {name[:80]!r} leads out of {root}; put the file inside',
    )
  return path


def read(root: str | os.PathLike, name: str, record: str) -> bytes:
  """The bytes of a file that a record names.

  Raises:
    BadRecordError: as `inside`, or the file is missing, too large, or none that
      can be read to an end.
  """
  path = inside(root, name, record)
  try:
    with buckets.open_regular(path) as file:
      data = file.read(MAX_PICTURE + 1)
  except OSError as error:
    raise BadRecordError(
      'missing_image', f'{record}: {path} cannot be read ({error.strerror})'
    ) from error
  if len(data) > MAX_PICTURE:
    raise BadRecordError(
      'too_large', f'{record}: {path} has more than {MAX_PICTURE:,} bytes'
    )
  return data
