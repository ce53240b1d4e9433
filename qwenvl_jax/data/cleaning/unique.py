"""Rules about many pairs at once: which of several alike are kept.

Each rule groups pairs by a key and keeps the best of every group. Keys are 16
bytes, so that billions can be compared without their pictures.
"""

import dataclasses
import functools
import hashlib
import unicodedata
from typing import ClassVar

import numpy as np
import scipy.fft
from PIL import Image

from qwenvl_jax.data.cleaning.pair import Pair
from qwenvl_jax.errors import ConfigError

# What is known about a pair when pairs are compared.
FINGERPRINT = np.dtype([('image', 'V16'), ('text', 'V16'), ('length', '<i4')])

# Of an image's key, bytes that tell it from billions of others. The rest is
# coarser, survives more, and serves among pictures of the same text.
_FINE = 12


@dataclasses.dataclass(frozen=True)
class Entry:
  """A pair that passed its shard's rules.

  Attributes:
    image, text: keys; equal keys mean alike. Of the image's, `_FINE` bytes for
      themselves, and the rest where the text is the same.
    length: characters of the text.
    shard, index: where it is; also decides between equals.
  """

  image: bytes
  text: bytes
  length: int
  shard: int
  index: int

  @property
  def place(self) -> tuple[int, int]:
    return self.shard, self.index


class _First:
  """Of alike pairs, keeps one: the first."""

  keep = 1

  def rank(self, entry: Entry) -> tuple:
    """Smaller is better; ends in the place, so that no two are equal."""
    return entry.place


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicatePairs(_First):
  """Keeps one of the pairs with the same picture and the same text."""

  name: ClassVar[str] = 'duplicate_pair'

  def key(self, entry: Entry) -> bytes:
    return entry.image[_FINE:] + entry.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongestText(_First):
  """Of a picture with several texts, keeps the longest."""

  name: ClassVar[str] = 'longest_text'

  def key(self, entry: Entry) -> bytes:
    return entry.image[:_FINE]

  def rank(self, entry: Entry) -> tuple:
    return (-entry.length, *entry.place)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicateTexts(_First):
  """Keeps a few pictures of a text that stands under many.

  Attributes:
    keep: how many.
  """

  name: ClassVar[str] = 'duplicate_text'

  keep: int = 1

  def __post_init__(self):
    if self.keep < 1:
      raise ConfigError(f'DuplicateTexts.keep={self.keep} would keep nothing')

  def key(self, entry: Entry) -> bytes:
    return entry.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fingerprints:
  """How pictures and texts are told apart.

  Attributes:
    images: 'look' for pictures that look alike (other size, other compression)
      or 'bytes' for identical files.
  """

  images: str = 'look'

  def __post_init__(self):
    if self.images not in ('look', 'bytes'):
      raise ConfigError(
        f"Fingerprints.images={self.images!r} is neither 'look' nor 'bytes'"
      )

  def __call__(self, pair: Pair) -> tuple[bytes, bytes, int]:
    """Key of the picture, key of the text, characters of the text."""
    look = None
    if self.images == 'look':
      look = perceptual_hash(pair.picture.decoded)
    image = look or _digest(pair.picture.encoded)
    return image, text_key(pair.text), len(pair.text)


# Pictures are compared at this size, by their lowest frequencies.
_SIDE = 32
_FREQUENCIES = 8
# Below it, compression decides. In the units of an orthonormal transform of
# grey levels.
_STRENGTH = 12.0
# A picture with fewer strong frequencies looks like too many others.
_LEAST_STRONG = 12
# The same for the coarser part of the key.
_COARSE_FREQUENCIES = 5
_COARSE_STRENGTH = 30.0


def perceptual_hash(picture: Image.Image) -> bytes | None:
  """16 bytes that mostly stay when a picture is resized or compressed again.

  Which of the 63 lowest frequencies (but the mean) of its brightness are
  clearly positive; in the last bytes, which of the 24 lowest are more so. None
  for pictures so plain that they have no look of their own.
  """
  small = picture.convert('L').resize((_SIDE, _SIDE), Image.Resampling.BOX)
  waves = scipy.fft.dctn(np.asarray(small, np.float64), norm='ortho')
  waves = waves[:_FREQUENCIES, :_FREQUENCIES]
  lowest = waves[:_COARSE_FREQUENCIES, :_COARSE_FREQUENCIES].ravel()[1:]
  waves = waves.ravel()[1:]
  if (np.abs(waves) > _STRENGTH).sum() < _LEAST_STRONG:
    return None
  fine = np.packbits(waves > _STRENGTH).tobytes().ljust(_FINE, b'\0')
  coarse = np.packbits(lowest > _COARSE_STRENGTH).tobytes()
  return (fine + coarse).ljust(16, b'\0')


def text_key(text: str) -> bytes:
  """16 bytes; equal for texts that differ in case, signs and spaces only."""
  folded = unicodedata.normalize('NFKC', text).casefold()
  return _digest(
    ' '.join(''.join(c if c.isalnum() else ' ' for c in folded).split())
  )


def _digest(data: bytes | str) -> bytes:
  if isinstance(data, str):
    data = data.encode('utf-8')
  return hashlib.blake2b(data, digest_size=16).digest()


def best(rule, entries) -> list[Entry]:
  """The best `rule.keep` entries of a group, best first.

  Associative: the best of groups' best are the best of all, so that a group of
  any size is compared in parts.
  """
  return sorted(entries, key=rule.rank)[: rule.keep]


@functools.lru_cache(maxsize=1)
def default_rules() -> tuple:
  """Returns the comparisons of pairs with each other, in order (Appendix A)."""
  return DuplicatePairs(), LongestText(), DuplicateTexts(keep=8)
