"""From a record to a row of fixed shape: items that samples make, and packing.

A record becomes a `PackItem` (`ToPackItem`), items that fit together are chosen
(`choose`), and a `Row` is laid out (`lay_out`). The arrays of a row are the
fields of `qwenvl_jax.batch.Batch` without B. `pipeline` decides which records
come when.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from qwenvl_jax import image
from qwenvl_jax.batch import NO_IMAGE
from qwenvl_jax.data.examples import EncodedSample, encode_sample
from qwenvl_jax.data.record_errors import Counts
from qwenvl_jax.errors import BadRecordError, ConfigError
from qwenvl_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packer:
  """How samples fill rows.

  Attributes:
    shards: V, streams of rows that the run is divided into; a multiple of
      processes times worker processes.
    pool: items of a group that each stream chooses from; more fill rows better
      and take more memory. 1 gives each item a row of its own.
    threads: that decode pictures in each process; 0 decodes where rows are
      planned.
    filler: group whose items without images also fill what is left of the rows
      of the others; '' for none. Samples do not see each other, so that it
      matters to nothing but the number of rows.
  """

  shards: int = 64
  pool: int = 32
  threads: int = 0
  filler: str = ''

  def __post_init__(self):
    if self.shards < 1 or self.pool < 1 or self.threads < 0:
      raise ConfigError(
        f'{self}: shards and pool must be at least 1, threads at least 0'
      )


@dataclasses.dataclass(frozen=True)
class RowShape:
  """The shape of a row.

  Attributes:
    length: T, tokens.
    image_slots: I, images.
    image_size: R, side of the square that images are squashed to.
    image_tokens: Q, ids in an image span.
  """

  length: int
  image_slots: int
  image_size: int
  image_tokens: int


@dataclasses.dataclass(frozen=True)
class PackItem:
  """What a record gives a row: samples that stay together.

  Attributes:
    source: label of the stream.
    samples: empty if the record was dropped.
    error: why it was dropped.
    repaired: keys of `record_errors.REPAIRED`.
  """

  source: str
  samples: tuple[EncodedSample, ...] = ()
  error: BadRecordError | None = None
  repaired: tuple[str, ...] = ()

  @property
  def tokens(self) -> int:
    return sum(map(len, self.samples))

  @property
  def images(self) -> int:
    return sum(len(x.images) for x in self.samples)

  @property
  def examples(self) -> int:
    return sum(x.examples for x in self.samples)


@dataclasses.dataclass
class RowStats:
  """What happened while a row was made, and where its stream stands after it.

  Attributes:
    group: of the items that the row was made for.
    counts: of records.
    dropped: for each source and reason, the message of one dropped record.
    records: names of the row's records.
    stream: number of the stream that made the row.
    streams: how many there are.
    position: where the stream goes on; None where `stream` rows and the row's
      number say it.
  """

  group: str = ''
  counts: Counts = dataclasses.field(default_factory=Counts)
  dropped: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
  records: tuple[str, ...] = ()
  stream: int = 0
  streams: int = 1
  position: list | None = None

  def drop(self, source: str, error: BadRecordError) -> None:
    """Counts a dropped record and keeps its message if it is the first."""
    self.counts.dropped(source, error.reason)
    self.dropped.setdefault((source, error.reason), str(error))


class Row(NamedTuple):
  """A row: `Batch`'s fields without B, and how it was made."""

  arrays: dict[str, np.ndarray]
  stats: RowStats


@dataclasses.dataclass(frozen=True)
class ToPackItem(grain.transforms.RandomMap):
  """Makes the item of a record; a function of the record and the generator.

  Attributes:
    shape: of the rows.
    tokenizer: their vocabulary.
    source: the open source; elements that cannot be read are errors.
    tasks: makes the samples of a record.
    label: names the source in counts.
    length_alpha: see `examples.encode_sample`.
    decode: whether pictures are decoded here, so that one that cannot be read
      leaves no row empty; a pool of decoded pictures would take much memory.
  """

  shape: RowShape
  tokenizer: Tokenizer
  source: Sequence[Any]
  tasks: Any
  label: str
  length_alpha: float = 0.0
  decode: bool = False

  def __repr__(self) -> str:
    # Grain asks for it with every record: it must not list the mixture.
    return self.label

  def random_map(self, element, rng: np.random.Generator) -> PackItem:
    # Python's generator chooses from short lists many times faster.
    choose = random.Random(int(rng.integers(1 << 62)))
    try:
      return self._item(_raised(element), choose)
    except BadRecordError as error:
      return PackItem(self.label, error=error)

  def _item(self, record, rng) -> PackItem:
    def another():
      return _raised(self.source[rng.randrange(len(self.source))])

    samples = self.tasks(record, rng, another)
    if not samples:
      raise BadRecordError(
        'no_question',
        f'{record.id} allows none of the questions of {self.tasks}',
      )
    shape, encoded, repaired = self.shape, [], []
    for sample in samples:
      whole = encode_sample(
        sample,
        self.tokenizer,
        shape.image_tokens,
        length_alpha=self.length_alpha,
        max_length=shape.length,
      )
      kept = cut(whole, shape.length, shape.image_slots)
      if len(kept) < len(whole):
        repaired.append('cut_text')
      encoded.append(kept)
    encoded = fill(encoded, shape.length, shape.image_slots)
    if self.decode:
      encoded = [decoded(x, shape.image_size, repaired) for x in encoded]
    return PackItem(self.label, tuple(encoded), repaired=tuple(repaired))


def _raised(element):
  if isinstance(element, BadRecordError):
    raise element
  return element


def fill(
  samples: Sequence[EncodedSample], length: int, image_slots: int
) -> list[EncodedSample]:
  """Returns the first sample and every later one for which there is room."""
  kept = list(samples[:1])
  tokens = sum(map(len, kept))
  images = sum(len(x.images) for x in kept)
  for sample in samples[1:]:
    more = len(sample.images)
    if tokens + len(sample) <= length and images + more <= image_slots:
      kept.append(sample)
      tokens += len(sample)
      images += more
  return kept


def cut(sample: EncodedSample, length: int, image_slots: int) -> EncodedSample:
  """Returns the sample, its end cut off if it is longer than a row.

  Raises:
    BadRecordError: an image would be cut, or there are more than slots, and the
      sample is not divisible.
  """
  # The closing tag belongs to the span.
  ends = [start + sample.image_tokens + 1 for start in sample.image_starts]
  images = sum(end <= length for end in ends[:image_slots])
  if images < len(ends):
    if sample.divisible:
      length = min(length, sample.image_starts[images] - 1)
    elif len(ends) > image_slots:
      raise BadRecordError(
        'too_long',
        f'{sample.record}: {len(ends)} images are more than a row has slots; '
        f'raise image_slots ({image_slots})',
      )
    else:
      raise BadRecordError(
        'too_long',
        f'{sample.record}: an image ends beyond token {length}; shorten the '
        'text before it, or raise sequence_length',
      )
  if not length:
    raise BadRecordError(
      'too_long',
      f'{sample.record}: not even its first image fits into a row; raise '
      'sequence_length or image_slots',
    )
  if len(sample) <= length:
    return sample
  return dataclasses.replace(
    sample,
    tokens=sample.tokens[:length],
    weights=sample.weights[:length],
    positions=sample.positions[:length],
    branch_ids=sample.branch_ids[:length],
    image_starts=sample.image_starts[:images],
    images=sample.images[:images],
  )


def choose(
  lengths: Sequence[int], images: Sequence[int], length: int, image_slots: int
) -> list[int]:
  """Chooses items of a pool that fill a row best: the first, and the best rest.

  Exact: no other choice with the first item has more tokens. The first is the
  one that waits longest, so none waits for ever; among equals earlier ones are
  preferred.

  >>> choose([5, 4, 3, 6], [0] * 4, 12, 0)
  [0, 1, 2]
  >>> choose([5, 4, 3, 6], [1] * 4, 12, 2)
  [0, 3]

  Args:
    lengths: tokens of each item; the first fits.
    images: images of each.
    length: tokens that fit.
    image_slots: images that fit.

  Returns:
    Positions in the pool, in order.
  """
  # Bit t of reach[k]: some of the items so far have t tokens and k images.
  mask = (1 << (length + 1)) - 1
  reach = [0] * (image_slots + 1)
  reach[images[0]] = 1 << lengths[0]
  steps = [reach]
  for size, count in zip(lengths[1:], images[1:]):
    before, reach = reach, reach.copy()
    for k in range(count, image_slots + 1):
      reach[k] |= before[k - count] << size & mask
    steps.append(reach)
  total = max(x.bit_length() for x in reach) - 1
  k = next(k for k, x in enumerate(reach) if x >> total & 1)
  chosen = []
  for position in range(len(lengths) - 1, 0, -1):
    if not steps[position - 1][k] >> total & 1:
      chosen.append(position)
      total -= lengths[position]
      k -= images[position]
  return [0, *reversed(chosen)]


def decoded(sample: EncodedSample, size: int, notes: list) -> EncodedSample:
  """Returns the sample, its images decoded to [size,size,3] uint8.

  Raises:
    BadRecordError: a picture that cannot be read.
  """
  pixels = tuple(
    image.pixels(x, size, sample.record, notes, image.MIN_SIDE)
    for x in sample.images
  )
  return dataclasses.replace(sample, images=pixels)


def lay_out(
  items: Sequence[PackItem], stats: RowStats, shape: RowShape, pad_id: int
) -> Row:
  """Decodes a row's pictures and lays its items out.

  A record whose picture cannot be read is left out of the row and counted.
  """
  samples = []
  for item in items:
    notes = []
    try:
      samples += [decoded(x, shape.image_size, notes) for x in item.samples]
    except BadRecordError as error:
      stats.drop(item.source, error)
    stats.counts.repaired(item.source, set(notes))
  stats.records = tuple(dict.fromkeys(x.record for x in samples))
  return Row(make_row(samples, shape, pad_id), stats)


def make_row(
  samples: Sequence[EncodedSample], shape: RowShape, pad_id: int = 0
) -> dict[str, np.ndarray]:
  """Lays samples one after the other, each a segment of its own.

  Args:
    samples: that fit into a row together, their images decoded.
    shape: T tokens, I images of side R.
    pad_id: fills the rest of `tokens`.

  Returns:
    int32 [T] tokens, targets, positions, segment_ids, branch_ids, float32 [T]
    loss_weights, uint8 [I,R,R,3] pixels, int32 [I] image_starts.
  """
  slots, side = shape.image_slots, shape.image_size
  ids = 'targets', 'positions', 'segment_ids', 'branch_ids'
  row = {
    'tokens': np.full(shape.length, pad_id, np.int32),
    **{name: np.zeros(shape.length, np.int32) for name in ids},
    'loss_weights': np.zeros(shape.length, np.float32),
    'pixels': np.zeros((slots, side, side, 3), np.uint8),
    'image_starts': np.full(slots, NO_IMAGE, np.int32),
  }
  start, slot = 0, 0
  for segment, sample in enumerate(samples, start=1):
    for image_start, picture in zip(sample.image_starts, sample.images):
      row['pixels'][slot] = picture
      row['image_starts'][slot] = start + image_start
      slot += 1
    end = start + len(sample)
    row['tokens'][start:end] = sample.tokens
    row['positions'][start:end] = sample.positions
    row['branch_ids'][start:end] = sample.branch_ids
    row['segment_ids'][start:end] = segment
    # A token is the target of the one before it. Where a continuation begins
    # that one belongs to another, but there the weight is 0.
    row['targets'][start : end - 1] = sample.tokens[1:]
    row['loss_weights'][start : end - 1] = sample.weights[1:]
    start = end
  return row
