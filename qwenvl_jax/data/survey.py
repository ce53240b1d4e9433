"""How long the records of a pipeline are, and what of them does not fit.

Asked before the first step of a fine-tuning: with a few hundred records, a row
that is too short may leave nothing to learn from.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from qwenvl_jax.data import packing
from qwenvl_jax.data.pipeline import ErrorCatchingSource, Pipeline, Stream
from qwenvl_jax.errors import DataError
from qwenvl_jax.text.tokenizer import Tokenizer

# Records that are looked at; of more, so many evenly spread.
_LIMIT = 20_000
# Rows up to which lengths are told.
_ROWS = 16
_NAMED = 3


@dataclasses.dataclass
class Survey:
  """What the records of one stream are.

  Attributes:
    label: of the stream.
    records: how many were looked at.
    row: tokens that a row holds.
    lengths: tokens of each record that can be used, were rows long enough.
    images: of each of them.
    cut: names of those of which a row holds a part.
    unlearned: of these, those of which no learned token is left.
    dropped: why others cannot be used: reason to messages.
  """

  label: str
  records: int
  row: int
  lengths: list[int] = dataclasses.field(default_factory=list)
  images: list[int] = dataclasses.field(default_factory=list)
  cut: list[str] = dataclasses.field(default_factory=list)
  unlearned: list[str] = dataclasses.field(default_factory=list)
  dropped: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def lines(self) -> Iterator[str]:
    """What to say of it."""
    said = f'{self.label}: {self.records:,} records'
    if self.lengths:
      low, middle, high = np.percentile(self.lengths, (0, 50, 100))
      said += (
        f' with {sum(self.images):,} pictures (up to {max(self.images)} each); '
        f'tokens: shortest {low:,.0f}, median {middle:,.0f}, longest '
        f'{high:,.0f}, and a row has {self.row:,}'
      )
    yield said
    for names, what in (
      (self.cut, 'the ends of {} records are cut: {}'),
      (self.unlearned, 'of {} no answer is left: {}'),
    ):
      if names:
        yield f'{self.label}: {what.format(f"{len(names):,}", _some(names))}'
    for reason, messages in sorted(self.dropped.items()):
      yield (
        f'{self.label}: {len(messages):,} records are dropped ({reason}), '
        f'e.g. {messages[0]}'
      )

  def check(self) -> None:
    """Raises DataError if nothing is left to learn from."""
    if len(self.lengths) > len(self.unlearned):
      return
    reasons = []
    if self.unlearned:
      reasons.append(
        f'{len(self.unlearned):,} are cut before it at {self.row:,} tokens '
        '(raise Pipeline.sequence_length)'
      )
    if self.dropped:
      most = max(self.dropped.values(), key=len)
      count = sum(map(len, self.dropped.values()))
      reasons.append(f'{count:,} are dropped, e.g. {most[0]}')
    raise DataError(
      f'{self.label}: of {self.records:,} records no answer is left to learn '
      f'from: {", ".join(reasons)}'
    )


def survey(pipeline: Pipeline) -> Iterator[Survey]:
  """Looks at the records of each stream.

  Raises:
    DataError: a source or the vocabulary is missing.
  """
  tokenizer = Tokenizer(pipeline.vocabulary)
  for stream in pipeline.streams:
    yield _survey(pipeline, stream, tokenizer)


def _survey(pipeline: Pipeline, stream: Stream, tokenizer) -> Survey:
  source = ErrorCatchingSource(stream.source.open(), stream.label)
  row = pipeline.sequence_length
  real = packing.ToPackItem(
    pipeline.shape, tokenizer, source, stream.tasks, stream.label
  )
  longer = dataclasses.replace(pipeline.shape, length=_ROWS * row)
  whole = dataclasses.replace(real, shape=longer)
  # Every turn's, learned also where the answer is not there.
  frame = [tokenizer.im_start_id, tokenizer.im_end_id, *tokenizer.encode('\n')]
  count = min(len(source), _LIMIT)
  found = Survey(stream.label, len(source), row)
  for index in np.linspace(0, len(source) - 1, count).astype(int):
    element = source[int(index)]
    item = whole.random_map(element, np.random.default_rng(0))
    if item.tokens > row:
      kept = real.random_map(element, np.random.default_rng(0))
      if kept.error is None:
        found.cut.append(element.id)
        if not any(_learns(sample, frame) for sample in kept.samples):
          found.unlearned.append(element.id)
      item = item if kept.error is None else kept
    if item.error is None:
      found.lengths.append(item.tokens)
      found.images.append(item.images)
    else:
      messages = found.dropped.setdefault(item.error.reason, [])
      messages.append(str(item.error))
  return found


def _learns(sample, frame: list[int]) -> bool:
  """Whether a learned token is there that is not a turn's frame."""
  learned = np.asarray(sample.tokens)[np.asarray(sample.weights) > 0]
  return bool(np.any(~np.isin(learned, frame)))


def _some(names: list[str]) -> str:
  more = ' ..' if len(names) > _NAMED else ''
  return '; '.join(names[:_NAMED]) + more
