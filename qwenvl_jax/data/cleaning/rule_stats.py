"""What happened to the pairs of a shard: counts, and a few of each to look at.

They add up, in any order, to those of everything.
"""

import base64
import collections
import dataclasses
import json

from qwenvl_jax.data.cleaning.pair import Outcome, thumbnail
from qwenvl_jax.data.record_errors import Counts

KEPT = ''
# Of each reason, source and shard.
_EXAMPLES = 2


@dataclasses.dataclass(frozen=True)
class Example:
  """A pair to look at.

  Attributes:
    reason: why it was dropped; KEPT if it was not; of a changed text, the name
      of the rule that changed it.
    before: its text before it was cleaned, if that changed.
    thumbnail: base64 of a JPEG; '' if there is no picture.
  """

  reason: str
  source: str
  id: str
  text: str
  detail: str = ''
  before: str = ''
  thumbnail: str = ''


@dataclasses.dataclass
class RuleStats:
  """Counts by source and reason.

  Attributes:
    counts: every record once; dropped by a rule or a reason of reading, and
      repaired where a rule changed the text.
    dropped: examples of outcomes, of kept ones too.
    altered: examples of changed texts.
  """

  counts: Counts = dataclasses.field(default_factory=Counts)
  dropped: list[Example] = dataclasses.field(default_factory=list)
  altered: list[Example] = dataclasses.field(default_factory=list)

  @property
  def outcomes(self) -> collections.Counter:
    """Records by (source, reason), KEPT being one."""
    found = self._by_source('dropped')
    for source in self.counts.sources():
      found[source, KEPT] = self.counts.kept_of(source)
    return +found

  @property
  def changed(self) -> collections.Counter:
    """Texts that a rule changed, by (source, name of the rule)."""
    return self._by_source('repaired')

  def _by_source(self, kind) -> collections.Counter:
    return collections.Counter(
      {
        (source, reason): count
        for source in self.counts.sources()
        for reason, count in self.counts.of(source, kind).items()
      }
    )

  def add(self, outcome: Outcome, before: str) -> None:
    """Counts what the rules of a shard say of a pair.

    `before` is its text before. One that passes is counted by `add_final`, when
    all are compared.
    """
    if outcome.reason:
      self.add_final(outcome, before)
    self.counts.repaired(outcome.pair.source, outcome.changed)
    for name in outcome.changed:
      _keep(self.altered, name, outcome, before)

  def add_final(self, outcome: Outcome, before: str) -> None:
    """Counts a pair that is dropped, or kept after all are compared."""
    source = outcome.pair.source
    self.counts.seen(source)
    if outcome.reason:
      self.counts.dropped(source, outcome.reason)
    _keep(self.dropped, outcome.reason, outcome, before)

  def __add__(self, other: 'RuleStats') -> 'RuleStats':
    counts = Counts(self.counts)
    counts.update(other.counts)
    return RuleStats(
      counts, self.dropped + other.dropped, self.altered + other.altered
    )

  def thinned(self, examples: int) -> 'RuleStats':
    """With at most so many examples of each reason and source."""

    def thin(kept):
      chosen = []
      for example in kept:
        if _count_of(chosen, example.source, example.reason) < examples:
          chosen.append(example)
      return chosen

    return RuleStats(self.counts, thin(self.dropped), thin(self.altered))

  def to_json(self) -> str:
    return json.dumps(
      vars(self), default=dataclasses.asdict, ensure_ascii=False
    )

  @classmethod
  def from_json(cls, text: str) -> 'RuleStats':
    """Raises ValueError or KeyError on what `to_json` did not write."""
    read = json.loads(text)
    return cls(
      Counts(read['counts']),
      [Example(**x) for x in read['dropped']],
      [Example(**x) for x in read['altered']],
    )


def _count_of(examples, source, reason) -> int:
  return sum(x.source == source and x.reason == reason for x in examples)


def _keep(examples, reason, outcome, before) -> None:
  """Adds an example, unless there are enough of its reason and source."""
  pair = outcome.pair
  if _count_of(examples, pair.source, reason) < _EXAMPLES:
    encoded = thumbnail(pair.picture)
    examples.append(
      Example(
        reason,
        pair.source,
        pair.id,
        pair.text[:400],
        outcome.detail,
        before[:400] if before != pair.text else '',
        base64.b64encode(encoded).decode(),
      )
    )
