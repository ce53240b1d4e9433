"""Rules about the picture, and about how well the text fits it.

The paper names these rules and not their numbers: the defaults are ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from qwenvl_jax.data.cleaning.pair import Drop, Pair
from qwenvl_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """Drops small pictures.

  Attributes:
    minimum: pixels of the shorter side.
  """

  name: ClassVar[str] = 'size'

  minimum: int = 100

  def __call__(self, pair: Pair) -> Pair | Drop:
    width, height = pair.picture.size
    if min(width, height) < self.minimum:
      return Drop(f'{width} x {height} px')
    return pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class AspectRatio:
  """Drops long and thin pictures, which a square would distort.

  Attributes:
    maximum: longer side over shorter side.
  """

  name: ClassVar[str] = 'aspect_ratio'

  maximum: float = 3.0

  def __call__(self, pair: Pair) -> Pair | Drop:
    width, height = pair.picture.size
    if max(width, height) > self.maximum * min(width, height):
      ratio = max(width, height) / max(min(width, height), 1)
      return Drop(f'{width} x {height} px, {ratio:.1f} : 1')
    return pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readable:
  """Drops what does not decode to its last pixel (`image.load`).

  `clean` reports it as `unreadable_image`. Costs the most: last in order.
  """

  name: ClassVar[str] = 'unreadable_image'

  def __call__(self, pair: Pair) -> Pair | Drop:
    _ = pair.picture.decoded
    return pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipScore:
  """Drops texts that do not fit their picture, by the data set's own scores.

  Every data set computed its scores with another model, so that each has its
  own limit.

  Attributes:
    minimum: name of the source -> lowest score.
    missing: what happens to a pair of such a source without a score: 'keep' or
      'drop'.
  """

  name: ClassVar[str] = 'clip_score'

  minimum: Mapping[str, float] = dataclasses.field(default_factory=dict)
  missing: str = 'keep'

  def __post_init__(self):
    if self.missing not in ('keep', 'drop'):
      raise ConfigError(
        f"ClipScore.missing={self.missing!r} is neither 'keep' nor 'drop'"
      )

  def __call__(self, pair: Pair) -> Pair | Drop:
    least = self.minimum.get(pair.source)
    if least is None:
      return pair
    if pair.score is None:
      return Drop('no score') if self.missing == 'drop' else pair
    # Not `score < least`: a score that is not a number is no good fit.
    if not pair.score >= least:
      return Drop(f'{pair.score:.3f} < {least}')
    return pair
