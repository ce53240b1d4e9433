"""Text <-> token ids: the released byte-pair vocabulary and its image spans.

A vocabulary is a `.tiktoken` file: one `base64(bytes) rank` a line, ranks from
0. The 217 special tokens follow the ranks in the release's order, so any such
file works: the released one, its first N ranks, or a `Tokenizer.subset`.

An image stands in text as `<img>PATH</img>` and in ids as `<img>`, exactly
`image_tokens` ids, `</img>`. The ids between are the path's UTF-8 bytes (byte
b is id b, not the rank of b) padded with `<imgpad>`. The model replaces them by
image features; images travel beside the ids, so a path that does not fit is cut
short rather than refused.
"""

import base64
import functools
import itertools
import os
import re
import sys
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.errors import DataError
from qwenvl_jax.text import bpe
from qwenvl_jax.text.special_tokens import SPECIAL_TOKENS

IMAGE_TOKENS = 256  # ids between `<img>` and `</img>` in the release

# Whatever may be a special token: none has a '<' or '>' inside.
_TAG = re.compile('<[^<> ]+>')

# Combining marks in a row; normalizing takes the square of their number.
_MOST_MARKS = 256

_UNKNOWN = '\N{REPLACEMENT CHARACTER}'


def _id_of(token: str) -> property:
  return property(lambda tokenizer: tokenizer._bpe.special[token])


class Tokenizer:
  """Encodes and decodes text with one vocabulary; immutable, picklable.

  >>> tokenizer = Tokenizer()
  >>> tokenizer.encode('Hello world!')
  [9707, 1879, 0]
  >>> tokenizer.decode([9707, 1879, 0])
  'Hello world!'
  """

  def __init__(
    self,
    path: str | os.PathLike | None = None,
    image_tokens: int = IMAGE_TOKENS,
  ):
    """Reads a vocabulary; each file is read once per process.

    Args:
      path: a `.tiktoken` file; None for the released vocabulary.
      image_tokens: what `encode` puts between `<img>` and `</img>` unless told
        otherwise (the adapter's queries).

    Raises:
      DataError: the file is missing or is not a vocabulary.
    """
    path = bpe.default_path() if path is None else buckets.as_path(path)
    path = buckets.absolute(path)
    try:
      version = buckets.version(path)
    except OSError as error:
      raise DataError(
        f'cannot read the vocabulary {path} ({error.strerror or error}); name '
        'a .tiktoken file, such as qwen.tiktoken of the released checkpoint'
      ) from error
    self._bpe = bpe.load(path, version)
    self.image_tokens = image_tokens

  @classmethod
  def from_ranks(
    cls, vocabulary: Sequence[bytes], image_tokens: int = IMAGE_TOKENS
  ) -> 'Tokenizer':
    """The tokenizer whose rank i is `vocabulary[i]`."""
    tokenizer = cls.__new__(cls)
    tokenizer._bpe = bpe.build(vocabulary, 'the given vocabulary')
    tokenizer.image_tokens = image_tokens
    return tokenizer

  def __reduce__(self):
    return Tokenizer.from_ranks, (self.vocabulary, self.image_tokens)

  def __eq__(self, other) -> bool:
    if not isinstance(other, Tokenizer):
      return NotImplemented
    return self._bpe is other._bpe or self.vocabulary == other.vocabulary

  def __hash__(self) -> int:
    return hash((len(self._bpe.ranks), self.vocabulary[-1]))

  def __repr__(self) -> str:
    return f'Tokenizer({len(self.vocabulary)} ranks)'

  @property
  def vocabulary(self) -> tuple[bytes, ...]:
    """The bytes of every rank, special tokens not included."""
    return self._bpe.vocabulary

  @property
  def special(self) -> dict[str, int]:
    """Every special token's id."""
    return dict(self._bpe.special)

  @property
  def vocab_size(self) -> int:
    """Ranks and special tokens (151860 in the release).

    The embedding table may be larger (151936 rows there).
    """
    return len(self._bpe.vocabulary) + len(SPECIAL_TOKENS)

  eod_id = _id_of('<|endoftext|>')  # Ends a document; also the padding.
  im_start_id = _id_of('<|im_start|>')
  im_end_id = _id_of('<|im_end|>')
  ref_start_id = _id_of('<ref>')
  ref_end_id = _id_of('</ref>')
  box_start_id = _id_of('<box>')
  box_end_id = _id_of('</box>')
  quad_start_id = _id_of('<quad>')
  quad_end_id = _id_of('</quad>')
  img_start_id = _id_of('<img>')
  img_end_id = _id_of('</img>')
  img_pad_id = _id_of('<imgpad>')

  def encode(
    self,
    text: str,
    image_tokens: int | None = None,
    allowed_special: str | Collection[str] = 'all',
  ) -> list[int]:
    """Token ids of `text` after NFC normalization.

    Args:
      text: any text; `<img>PATH</img>` spans become image spans.
      image_tokens: ids between `<img>` and `</img>`; None for the tokenizer's
        own number.
      allowed_special: special tokens to parse, 'all' or names as in
        `SPECIAL_TOKENS`; the others are encoded as the characters they are.

    Raises:
      DataError: an `<img>` that is parsed and never closed.
    """
    if image_tokens is None:
      image_tokens = self.image_tokens
    allowed = self._bpe.special
    if allowed_special != 'all':
      allowed = {x: allowed[x] for x in allowed_special if x in allowed}
    text = normalize(text)
    encode = functools.partial(self._encode_parts, allowed=allowed)
    if '<img>' not in allowed:
      return encode(text)
    ids, at = [], 0
    while (start := text.find('<img>', at)) >= 0:
      path = start + len('<img>')
      end = text.find('</img>', path)
      if end < 0 or text.find('<img>', path, end) >= 0:
        raise DataError(
          f'unclosed <img> before {text[path : path + 40]!r}: write '
          '<img>PATH</img>, or remove the tag'
        )
      ids += encode(text[at:start])
      ids += [
        self.img_start_id,
        *self._path_ids(text[path:end], image_tokens),
        self.img_end_id,
      ]
      at = end + len('</img>')
    return ids + encode(text[at:])

  def _encode_parts(self, text: str, allowed: Mapping[str, int]) -> list[int]:
    # tiktoken would be given all special tokens with each call, which takes
    # several times as long on text full of boxes.
    encode = self._bpe.encoding.encode_ordinary
    if not allowed or '<' not in text:
      return encode(text)
    ids, at = [], 0
    for match in _TAG.finditer(text):
      token = allowed.get(match[0])
      if token is not None:
        if at < match.start():
          ids += encode(text[at : match.start()])
        ids.append(token)
        at = match.end()
    return ids + encode(text[at:]) if at < len(text) else ids

  def encode_ordinary(self, text: str) -> list[int]:
    """Token ids of `text` where no special token is parsed."""
    return self.encode(text, allowed_special=())

  def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
    """Text of ids; never fails, whatever a model wrote.

    Image spans become `<img>PATH</img>` again. Bytes that are not UTF-8 and ids
    outside the vocabulary become U+FFFD.

    Args:
      ids: token ids, a list or an array.
      skip_special: leave out special tokens and image spans.
    """
    return self.decode_bytes(ids, skip_special).decode('utf-8', 'replace')

  def decode_bytes(
    self, ids: Sequence[int], skip_special: bool = False
  ) -> bytes:
    """As `decode`, before UTF-8: a token may hold part of a character."""
    ids = np.asarray(ids).reshape(-1).tolist()
    img_start_id = self.img_start_id
    parts = []
    at = 0
    while at < len(ids):
      if ids[at] == img_start_id:
        length, path = self._path_at(ids, at)
        if length:
          parts.append(b'' if skip_special else b'<img>%b</img>' % path)
          at += length
          continue
      parts.append(self._token_bytes(ids[at], skip_special))
      at += 1
    return b''.join(parts)

  def image_starts(
    self,
    ids: Sequence[int],
    image_tokens: int = IMAGE_TOKENS,
    record: str = 'the text',
  ) -> list[int]:
    """Where each image's features go: the index after each `<img>`.

    Args:
      ids: [T] token ids.
      image_tokens: the length every span must have.
      record: what an error names.

    Raises:
      DataError: a span that is cut off or of another length.
    """
    ids = np.asarray(ids).reshape(-1)
    starts = np.flatnonzero(ids == self.img_start_id) + 1
    for number, start in enumerate(starts.tolist(), start=1):
      end = start + image_tokens
      if end >= len(ids) or ids[end] != self.img_end_id:
        raise DataError(
          f'{record}: image {number} needs {image_tokens + 2} tokens from '
          f'token {start - 1} on, but its span is cut off or of another length '
          f'({len(ids)} tokens in all); allow more tokens, shorten the text '
          'before the image, or check image_tokens'
        )
    return starts.tolist()

  def save(self, path: str | os.PathLike) -> None:
    """Writes the vocabulary as a `.tiktoken` file, whole or not at all."""
    path = buckets.as_path(path)
    lines = (
      b'%b %d\n' % (base64.b64encode(token), rank)
      for rank, token in enumerate(self.vocabulary)
    )
    try:
      buckets.write(path, b''.join(lines))
    except OSError as error:
      raise DataError(
        f'cannot write the vocabulary {path} ({error.strerror or error}); '
        'check that the folder exists and the disk has room'
      ) from error

  def subset(self, texts: Iterable[str]) -> 'Tokenizer':
    """A smaller vocabulary that splits `texts` exactly as this one does.

    Kept are the 256 bytes, every token that the texts use, and every token that
    arises on the way to one, renumbered in order. On `texts` each merge step
    then finds the same best pair as before; any other text still encodes, into
    more tokens. (Text must be split into `encode` calls as it will be in use:
    a role word and its content are encoded apart in chats.)

    Args:
      texts: what the vocabulary must cover.
    """
    used = {bytes([byte]) for byte in range(256)}
    vocabulary = self.vocabulary
    tokens = set(itertools.chain.from_iterable(map(self.encode, texts)))
    for token in tokens:
      if token < len(vocabulary):
        used.add(vocabulary[token])
        # Merges within a token do not depend on the text around it: a pair
        # across its border never merged, so it never came first.
        used.update(self._merges(vocabulary[token]))
    return Tokenizer.from_ranks([v for v in vocabulary if v in used])

  def _merges(self, token: bytes) -> Iterable[bytes]:
    ranks = self._bpe.ranks
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
      merged = [left + right for left, right in itertools.pairwise(parts)]
      best = min(range(len(merged)), key=lambda i: ranks.get(merged[i], 1e9))
      if merged[best] not in ranks:
        return
      parts[best : best + 2] = [merged[best]]
      yield merged[best]

  def _path_ids(self, path: str, image_tokens: int) -> list[int]:
    # Cut between characters, so that what is kept still decodes.
    kept = path.encode('utf-8', 'replace')[:image_tokens]
    kept = kept.decode('utf-8', 'ignore').encode()
    return list(kept) + [self.img_pad_id] * (image_tokens - len(kept))

  def _path_at(self, ids: list[int], at: int) -> tuple[int, bytes]:
    """Length and path of the image span at `at`; length 0 if there is none."""
    try:
      end = ids.index(self.img_end_id, at)
    except ValueError:
      return 0, b''
    inside = ids[at + 1 : end]
    if self.img_pad_id in inside:
      inside = inside[: inside.index(self.img_pad_id)]
    if not all(0 <= token < 256 for token in inside):
      return 0, b''
    return end + 1 - at, bytes(inside)

  def _token_bytes(self, token: int, skip_special: bool) -> bytes:
    ranks = len(self.vocabulary)
    if 0 <= token < ranks:
      return self.vocabulary[token]
    if ranks <= token < self.vocab_size:
      return b'' if skip_special else SPECIAL_TOKENS[token - ranks].encode()
    return _UNKNOWN.encode()


def normalize(text: str) -> str:
  """Returns the text in NFC, without what follows 256 combining marks.

  No language has as many, and sorting a million of them takes hours.
  """
  if len(text) > _MOST_MARKS and not text.isascii():
    text = _marks().sub(r'\1', text)
  return unicodedata.normalize('NFC', text)


@functools.cache
def _marks() -> re.Pattern:
  points = map(chr, range(sys.maxunicode + 1))
  marks = ''.join(x for x in points if unicodedata.combining(x))
  return re.compile(f'([{marks}]{{{_MOST_MARKS}}})[{marks}]+')


def image_paths(text: str) -> list[str]:
  """Returns the paths of all `<img>PATH</img>` spans, in reading order."""
  paths, at = [], 0
  while (start := text.find('<img>', at)) >= 0:
    end = text.find('</img>', start)
    if end < 0:
      break
    paths.append(text[start + len('<img>') : end])
    at = end + len('</img>')
  return paths
