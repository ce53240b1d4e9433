"""A program that compiles a grammar where nothing can come to harm.

Some schemas and patterns of a few characters keep llguidance busy for hours, or
fill the memory. `grammar` therefore starts this file in a process of its own,
with limits, before it compiles such a grammar itself. It runs as a plain file:
it needs nothing of this package.
"""

import contextlib
import json
import sys

# Enough to compile with: the vocabulary of single bytes and an end.
_BYTES = [bytes([byte]) for byte in range(256)]


class _ByteTokenizer:
  """What llguidance asks of a tokenizer; id b is byte b."""

  eos_token_id = 256
  bos_token_id = None
  tokens = [*_BYTES, b'<end>']
  special_token_ids = [256]

  def __call__(self, text) -> list[int]:
    return list(text.encode() if isinstance(text, str) else text)


def _limit(seconds: int, size: int) -> None:
  """Ends this process once it takes more than `seconds` or `size` bytes."""
  import resource

  for what, value in (
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_AS, size),
    (resource.RLIMIT_CORE, 0),
  ):
    # Not every system has every limit, or lets it be set.
    with contextlib.suppress(ValueError, OSError):
      resource.setrlimit(what, (value, value))


def main() -> None:
  """Reads a job on standard input, writes the error or '' on standard output.

  Both are JSON. The job: `path` (sys.path), `seconds`, `size` (bytes),
  `source` (the grammar as llguidance takes it) and `limits`.
  """
  job = json.load(sys.stdin)
  sys.path[:] = job['path']
  _limit(job['seconds'], job['size'])
  import llguidance

  matcher = llguidance.LLMatcher(
    llguidance.LLTokenizer(llguidance.TokenizerWrapper(_ByteTokenizer())),
    job['source'],
    log_level=0,
    limits=llguidance.LLParserLimits(**job['limits']),
  )
  if not matcher.is_error():
    matcher.compute_bitmask()
  json.dump(matcher.get_error(), sys.stdout)


if __name__ == '__main__':
  main()
