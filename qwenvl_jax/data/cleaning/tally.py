"""What happened to the pairs of a shard: counts, and a few of each to look at.

Tallies add up, in any order, to the tally of everything.
"""

import base64
import collections
import dataclasses
import json

from qwenvl_jax.data.cleaning.pair import Broken, Outcome, Pair, thumbnail

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
class Tally:
  """Counts by (source, reason).

  Attributes:
    outcomes: every record once; the reason KEPT for those that are kept.
    changed: texts that a rule changed, by (source, name of the rule).
    dropped: examples of outcomes, of kept ones too.
    altered: examples of changed texts.
  """

  outcomes: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  changed: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  dropped: list[Example] = dataclasses.field(default_factory=list)
  altered: list[Example] = dataclasses.field(default_factory=list)

  def add(self, outcome: Outcome, before: str) -> None:
    """Counts what the rules of a shard say of a pair.

    One that passes is counted by `add_compared`, when all are compared.

    Args:
      outcome: of `pair.clean`.
      before: its text before.
    """
    if outcome.reason:
      self._count(self.outcomes, self.dropped, outcome.reason, outcome, before)
    for name in outcome.changed:
      self._count(self.changed, self.altered, name, outcome, before)

  def add_compared(self, pair: Pair, reason: str) -> None:
    """Counts a pair that passed its shard's rules: kept, or one too many."""
    outcome = Outcome(pair, reason)
    self._count(self.outcomes, self.dropped, reason, outcome, pair.text)

  def _count(self, counter, examples, reason, outcome, before):
    pair = outcome.pair
    key = pair.source, reason
    counter[key] += 1
    if counter[key] <= _EXAMPLES:
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

  def add_broken(self, broken: Broken) -> None:
    """Counts a record without a pair."""
    key = broken.source, broken.reason
    self.outcomes[key] += 1
    if self.outcomes[key] <= _EXAMPLES:
      self.dropped.append(
        Example(broken.reason, broken.source, broken.id, '', broken.detail)
      )

  def __add__(self, other: 'Tally') -> 'Tally':
    return Tally(
      self.outcomes + other.outcomes,
      self.changed + other.changed,
      self.dropped + other.dropped,
      self.altered + other.altered,
    )

  def thinned(self, examples: int) -> 'Tally':
    """With at most so many examples of each reason and source."""

    def thin(kept):
      seen, chosen = collections.Counter(), []
      for example in kept:
        key = example.source, example.reason
        seen[key] += 1
        if seen[key] <= examples:
          chosen.append(example)
      return chosen

    return dataclasses.replace(
      self, dropped=thin(self.dropped), altered=thin(self.altered)
    )

  def to_json(self) -> str:
    return json.dumps(
      {
        'outcomes': [[*key, n] for key, n in sorted(self.outcomes.items())],
        'changed': [[*key, n] for key, n in sorted(self.changed.items())],
        'dropped': [dataclasses.asdict(x) for x in self.dropped],
        'altered': [dataclasses.asdict(x) for x in self.altered],
      },
      ensure_ascii=False,
    )

  @classmethod
  def from_json(cls, text: str) -> 'Tally':
    """Raises ValueError or KeyError on what `to_json` did not write."""
    read = json.loads(text)

    def counter(rows):
      return collections.Counter({(s, r): n for s, r, n in rows})

    return cls(
      counter(read['outcomes']),
      counter(read['changed']),
      [Example(**x) for x in read['dropped']],
      [Example(**x) for x in read['altered']],
    )
