"""Messages of tpu_pod.sh, and the clock that its waits and counts go by."""

import codecs
import contextlib
import io
import os
import re
import time

# What a terminal would obey instead of showing it.
_CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]')

# Tests let this clock run faster than real time.
_SPEEDUP = int(os.environ.get('QWENVL_POD_SPEEDUP') or 1)


class PodError(Exception):
  """Ends the script.

  Attributes:
    lines: the message, then remedies.
    status: exit status.
  """

  def __init__(self, *lines: str, status: int = 1):
    super().__init__(lines[0])
    self.lines = lines
    self.status = status


class UsageError(PodError):
  """An option that cannot be obeyed."""

  def __init__(self, message: str):
    super().__init__(message, 'see launch/tpu_pod.sh --help', status=2)


def printable(text: str) -> str:
  """Spells control characters (ESC) out; keeps line ends and tabs."""
  return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def say(*lines: str) -> None:
  """Prints a message to stderr, its later lines indented."""
  text = 'pod: ' + '\n     '.join(
    x.rstrip().replace('\n', '\\n') for x in lines
  )
  _write(2, printable(text) + '\n')


def show(text: str) -> bool:
  """Prints output to stdout; False if nobody can read it any more."""
  return _write(1, printable(text))


def relay(text: str, prefix: str = '     ') -> None:
  """Prints what another program said to stderr."""
  for line in text.splitlines():
    _write(2, printable(prefix + line) + '\n')


def _write(descriptor: int, text: str) -> bool:
  # Not through sys.stdout: a supervisor outlives a terminal that is gone, and
  # a thread that waits for a reader must not hold up the end of the process.
  data = text.encode(errors='backslashreplace')
  try:
    while data:
      data = data[os.write(descriptor, data) :]
  except OSError:
    return False
  return True


def decoder() -> io.IncrementalNewlineDecoder:
  """Decodes output piece by piece; a carriage return ends a line, too."""
  utf8 = codecs.getincrementaldecoder('utf-8')('replace')
  return io.IncrementalNewlineDecoder(utf8, translate=True)


def now() -> float:
  """Seconds since 1970, by the clock of this script."""
  return time.time() * _SPEEDUP


def pause(seconds: float) -> None:
  time.sleep(seconds / _SPEEDUP)


def duration(seconds: float) -> str:
  """3725 -> 1:02:05."""
  minutes, seconds = divmod(int(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02}:{seconds:02}'


def write_file(path: str, text: str) -> None:
  """Writes a file that appears whole, and survives a loss of power.

  Raises:
    OSError: it cannot be written; what was there stays.
  """
  os.makedirs(os.path.dirname(path), exist_ok=True)
  partial = f'{path}.{os.getpid()}.partial'
  try:
    with open(partial, 'w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(partial)
    raise


def read_file(path: str, limit: int = 2**20) -> str:
  """Reads a small regular file; '' if there is none.

  Raises:
    PodError: it is something else, or cannot be read.
  """
  try:
    if os.path.exists(path) and not os.path.isfile(path):
      raise PodError(f'{path} is no regular file')
    with open(path, encoding='utf-8') as file:
      text = file.read(limit + 1)
  except FileNotFoundError:
    return ''
  except (OSError, ValueError) as error:
    raise PodError(f'{path} cannot be read: {error}') from error
  if len(text) > limit:
    raise PodError(f'{path} holds more than {limit} characters')
  return text
