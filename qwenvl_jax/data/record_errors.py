"""Records that cannot be used as they are: the rules, and counting them.

Pictures and text come from strangers. A record either is used, or is repaired
and used, or is dropped; both of the latter are counted by reason and source,
never silent, and past a share of dropped records the run stops (`ErrorBudget`).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable

from qwenvl_jax.errors import ConfigError, DataError

# Why a record is dropped, and the rule.
DROPPED = {
  'outside_root': "a path out of its source's folder, or a URL: not opened",
  'missing_image': 'no file where the record says that its picture is',
  'unreadable_image': 'corrupt, cut off, or of an unknown format',
  'too_many_pixels': 'more pixels than `image.MAX_PIXELS`: not decoded',
  'tiny_image': 'a side of fewer than `image.MIN_SIDE` pixels',
  'invalid_utf8': 'text that is not UTF-8',
  'empty_text': 'no caption, question, answer or document',
  'no_box': 'no box of the record has an area within the picture',
  'control_token': 'a conversation with <|im_start|> and the like written out',
  'unpaired_tag': 'a conversation whose <img>, <ref> or <box> does not pair up',
  'image_mismatch': 'not as many pictures as places that show one',
  'box_out_of_range': 'a box of a conversation that is not in thousandths',
  'size_mismatch': 'width and height that are not those of the picture',
  'too_long': 'more than a row, a line or a text may hold',
  'no_question': 'nothing that the task can ask',
  'too_large': 'a file, member, cell or line beyond the limits on what is read',
  'malformed': 'fields that are missing or of another type',
  'unreadable_record': 'a damaged record file',
}

# What is mended, and how; the record is used.
REPAIRED = {
  'rotated': 'EXIF orientation applied',
  'first_frame': 'of an animation the first frame is taken',
  'converted': 'CMYK, palette, grey or 16 bits turned into 8-bit RGB',
  'flattened': 'transparent pixels put on white',
  'clipped_box': 'a box beyond the border cut there, or put in order in a text',
  'sorted_box': 'an inverted box, its corners put in order',
  'dropped_box': 'a box without area within the picture left out of a record',
  'missing_picture': 'a document goes on without a picture that is not there',
  'special_tag': "a vocabulary's special token taken out of plain text",
  'cut_text': "text beyond the row's length cut off at its end",
}


class Counts(collections.Counter):
  """How often what happened to the records of which source.

  Keys are `source/seen`, `source/dropped/REASON` and `source/repaired/REASON`.
  """

  def seen(self, source: str) -> None:
    self[f'{source}/seen'] += 1

  def dropped(self, source: str, reason: str) -> None:
    self[f'{source}/dropped/{reason}'] += 1

  def repaired(self, source: str, reasons: Iterable[str]) -> None:
    self.update(f'{source}/repaired/{reason}' for reason in reasons)

  def of(self, source: str, kind: str = 'dropped') -> dict[str, int]:
    """Reason -> count."""
    prefix = f'{source}/{kind}/'
    return {
      key.removeprefix(prefix): count
      for key, count in sorted(self.items())
      if key.startswith(prefix)
    }

  def seen_of(self, source: str) -> int:
    return self[f'{source}/seen']

  def kept_of(self, source: str) -> int:
    return self.seen_of(source) - sum(self.of(source).values())

  def sources(self) -> list[str]:
    return sorted(x.removesuffix('/seen') for x in self if x.endswith('/seen'))


@dataclasses.dataclass(frozen=True)
class ErrorBudget:
  """How many records of a source may be dropped.

  Attributes:
    share: of those seen.
    after: records seen of a source before it is judged, but at the end.
  """

  share: float = 0.1
  after: int = 1000

  def __post_init__(self):
    if not 0 <= self.share <= 1:
      raise ConfigError(f'{self.share} is no share of records, from 0 to 1')

  def check(
    self,
    counts: Counts,
    at_end: bool = False,
    remedy: str = 'take it out of the mixture, or raise '
    'record_errors.ErrorBudget.share',
    example: Callable[[str], str] = lambda source: '',
  ) -> None:
    """Raises DataError naming the source that is beyond the limit.

    Args:
      counts: what was seen and dropped so far.
      at_end: nothing more will be seen: few records are judged as well.
      remedy: what a person may do who cannot mend the source.
      example: called with that source, what to say of single records.
    """
    for source in counts.sources():
      dropped = counts.of(source)
      seen, bad = counts.seen_of(source), sum(dropped.values())
      if (at_end or seen >= self.after) and bad > self.share * seen:
        most = sorted(dropped.items(), key=lambda item: -item[1])[:4]
        reasons = ', '.join(f'{n} {r} ({DROPPED.get(r, r)})' for r, n in most)
        raise DataError(
          f'source {source}: {bad:,} of {seen:,} records had to be dropped, '
          f'more than the allowed {self.share:.0%}: {reasons}. Mend or prepare '
          f'it again, or {remedy}{example(source)}'
        )
