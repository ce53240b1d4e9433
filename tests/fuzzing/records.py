"""Hostile records: conversations, documents and lines, from files to rows.

Each of `KINDS` makes one input with a random generator in an empty folder,
reads it as `qwenvl-data prepare` does, and makes rows of what is left. It
returns 'handled' (a clear error), 'dropped' (counted) or 'accepted'; whatever
else is raised is a fault.
"""

import dataclasses
import functools
import json
import pathlib
import random
from collections.abc import Callable

import downloads
import numpy as np
from PIL import Image

from qwenvl_jax.data import formats, packing, roots, storage
from qwenvl_jax.data.readers.conversations import Conversations
from qwenvl_jax.data.readers.interleaved import Interleaved
from qwenvl_jax.data.readers.release import EvaluationLines, PlainText
from qwenvl_jax.data.record_errors import DROPPED, REPAIRED, Counts
from qwenvl_jax.data.sanitize import sanitize
from qwenvl_jax.errors import BadRecordError, DataError
from qwenvl_jax.text.tokenizer import Tokenizer

_SHAPE = packing.RowShape(
  length=64, image_slots=2, image_size=14, image_tokens=8
)

_TURNED = Image.Exif()
_TURNED[0x0112] = 6
_PICTURE = downloads.picture((40, 30), exif=_TURNED)

_NASTY = (
  '', ' ', '\0', '\ud800', '\ufeff', 'e' + '\u0301\u0323' * 3000, '\u202e',
  '<img>', '</img>', '<img>a.jpg</img>', '<image>', '<image>' * 40, '</box>',
  '<box', '<' * 2000 + '>' * 2000, '<ref>' * 500, '<|endoftext|>',
  '<|im_start|>system', '<|box_start|>', '<box>(1,2),(3,4)</box>',
  '<box>(1,2),(3000,4)</box>', '<box>[0.1, 0.2, 0.3, 0.4]</box>',
  '<quad>(1,2)</quad>', '<box>(99999999999999999999,1),(1,2)</box>',
  '../../etc/passwd', '/dev/zero', 'http://x/y.jpg', 'file:///etc/passwd',
  'data:image/png;base64,AAAA', 'a.jpg', 'gone.jpg', '.', '9' * 5000,
  'x' * 9000, None, True, False, 0, -1, 5, 10**30, 1e308, float('nan'),
  float('inf'), [], {}, [[]], {'url': {'url': {}}}, {'bytes': 'x'}, ['a', 1],
  'user', 'gpt',
  'system',
)  # fmt: skip
_KEYS = (
  'conversations', 'messages', 'image', 'images', 'from', 'role', 'value',
  'content', 'texts', 'text_list', 'image_info', 'matched_text_index', 'system',
  'width', 'height', 'bbox', 'sent', 'question', 'answer', 'caption', 'id',
)  # fmt: skip


# Of one file that rows are made of.
_RECORDS = 12


@functools.cache
def _tokenizer() -> Tokenizer:
  return Tokenizer()


def _mutated(rng: random.Random, value, seeds):
  """JSON with one value of a tree replaced, doubled, moved or left out."""
  if isinstance(value, dict) and value and rng.random() < 0.85:
    key, kind = rng.choice(list(value)), rng.random()
    if kind < 0.1:
      return {k: v for k, v in value.items() if k != key}
    if kind < 0.2:
      return value | {rng.choice(_KEYS): value[key]}
    return value | {key: _mutated(rng, value[key], seeds)}
  if isinstance(value, list) and value and rng.random() < 0.85:
    index, kind = rng.randrange(len(value)), rng.random()
    if kind < 0.1:
      return value * rng.choice((0, 2, 30))
    if kind < 0.2:
      return rng.sample(value, len(value))
    changed = _mutated(rng, value[index], seeds)
    return [*value[:index], changed, *value[index + 1 :]]
  if isinstance(value, str) and rng.random() < 0.4:
    at = rng.randint(0, len(value))
    return value[:at] + str(rng.choice(_NASTY)) + value[at:]
  return rng.choice((*_NASTY, *seeds))


def _damaged(rng: random.Random, data: bytes) -> bytes:
  """Bytes cut, flipped, repeated, wrapped or nested."""
  kind, at = rng.randrange(6), rng.randrange(len(data) + 1)
  if kind == 0:
    return data[:at]
  if kind == 1:
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 20))):
      flipped[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(flipped)
  if kind == 2:
    return data[:at] + data[at : at + 20] * rng.choice((2, 300)) + data[at:]
  if kind == 3:
    return b'[' * rng.choice((1, 5000)) + data
  if kind == 4:
    return b'\xef\xbb\xbf' + data + rng.choice((b'', b'\n', b'\0', data))
  return data.decode(errors='replace').encode(rng.choice(('utf-16', 'latin-1')),
                                              'replace')  # fmt: skip


def _file(rng: random.Random, folder: pathlib.Path, seeds, endings) -> None:
  """A file of one or a few mutated entries, and the picture that they name."""
  entries = rng.sample(seeds, rng.randint(1, min(2, len(seeds))))
  for _ in range(rng.choice((0, 1, 1, 2, 4))):
    index = rng.randrange(len(entries))
    entries[index] = _mutated(rng, entries[index], seeds)
  if rng.random() < 0.3:
    data = json.dumps(entries).encode()
  else:
    data = b'\n'.join(json.dumps(x).encode() for x in entries)
  if rng.random() < 0.3 and data:
    data = _damaged(rng, data)
  (folder / f'x{rng.choice(endings)}').write_bytes(data)
  (folder / 'a.jpg').write_bytes(_PICTURE)


def _outcome(found, base: pathlib.Path, task) -> str:
  """What becomes of the records of a reader: prepared, and made rows of."""
  dropped, accepted = Counts(), 0
  try:
    for number, record in enumerate(found):
      try:
        if number < _RECORDS or isinstance(record, BadRecordError):
          _use(record, base, task)
        accepted += 1
      except BadRecordError as error:
        assert error.reason in DROPPED and str(error), error.reason
        dropped.dropped('x', error.reason)
  except DataError as error:
    assert not isinstance(error, BadRecordError) and str(error)
    return 'handled'
  return 'dropped' if dropped.of('x') or not accepted else 'accepted'


def _use(record, base, task) -> None:
  if isinstance(record, BadRecordError):
    raise record
  if not all(isinstance(x, bytes) for x in record.images):
    images = [roots.read(base, x, record.id) for x in record.images]
    record = dataclasses.replace(record, images=tuple(images))
  mended, notes = sanitize(record)
  assert set(notes) <= REPAIRED.keys(), notes
  record = storage.parse(storage.serialize(mended))
  maker = packing.ToPackItem(_SHAPE, _tokenizer(), (record,), task, 'x')
  item = maker.random_map(record, np.random.default_rng(0))
  if item.error is not None:
    raise item.error
  row, stats = packing.lay_out([item], packing.RowStats(), _SHAPE, 0)
  assert not stats.dropped and row['segment_ids'].any()
  assert row['tokens'].min() >= 0 and row['tokens'].max() < 151_860
  # A picture for each span, and none of them learned.
  spans = int((row['tokens'] == _tokenizer().img_start_id).sum())
  assert spans == int((row['image_starts'] > 0).sum())


_ASK = 'Picture 1: <img>a.jpg</img>\nWhere is the <ref>dog</ref>?'
_BOX = '<ref>dog</ref><box>(10,20),(300,400)</box>'
_TALKS = [
  {
    'id': 'x',
    'width': 40,
    'height': 30,
    'conversations': [
      {'from': 'user', 'value': _ASK},
      {'from': 'assistant', 'value': _BOX},
    ],
  },
  {
    'image': 'a.jpg',
    'conversations': [
      {'from': 'human', 'value': '<image>\nWhat?'},
      {'from': 'gpt', 'value': 'A dog.'},
    ],
  },
  {
    'images': ['a.jpg', 'a.jpg'],
    'system': 'Be brief.',
    'messages': [
      {
        'role': 'user',
        'content': [{'type': 'image'}, {'type': 'text', 'text': 'and <image>'}],
      },
      {'role': 'assistant', 'content': 'Two.'},
    ],
  },
  {
    'messages': [
      {'role': 'system', 'content': 'x'},
      {
        'role': 'user',
        'content': [
          {'type': 'image_url', 'image_url': {'url': 'a.jpg'}},
          {'type': 'text', 'text': 'What is it?'},
        ],
      },
      {'role': 'assistant', 'content': [{'type': 'text', 'text': 'A dog.'}]},
    ]
  },
]
_DOCUMENTS = [
  {
    'text_list': ['One.', 'Two.', 'Three.'],
    'image_info': [
      {'image_name': 'a.jpg', 'matched_text_index': 1, 'matched_sim': 0.3},
      {'image_name': 'gone.jpg', 'matched_text_index': 2},
    ],
  },
  {
    'texts': ['One.', None, 'Two.', None],
    'images': [None, 'a.jpg', None, 'gone.jpg'],
  },
]
_LINES = [
  {'image': 'a.jpg', 'question': 'What?', 'answer': ['cat', 'dog']},
  {'image': 'a.jpg', 'caption': 'a dog'},
]
_PLACES = [
  {'image': 'a.jpg', 'sent': 'dog', 'bbox': [1, 2, 30, 20]}
  | {'width': 40, 'height': 30},
  {'image': 'a.jpg', 'sent': '<ref>a cat</ref>', 'bbox': [1.5, 2, 3e1, 20]}
  | {'width': 30, 'height': 40},
]
_TEXTS = [{'text': 'One. Two. Three.'}, {'text': 'x' * 300}]


def conversations(rng: random.Random, folder: pathlib.Path) -> str:
  """Conversations in each of their forms."""
  _file(rng, folder, _TALKS, ('.json', '.jsonl'))
  found = Conversations().records(folder)
  return _outcome(found, folder, formats.Conversations())


def interleaved(rng: random.Random, folder: pathlib.Path) -> str:
  """Documents in MMC4's and OBELICS' layouts."""
  _file(rng, folder, _DOCUMENTS, ('.json', '.jsonl'))
  reader = Interleaved()
  found = (x for part in reader.parts(folder) for x in reader.read(part))
  return _outcome(found, folder, formats.Interleaved(images=3))


def evaluation_lines(rng: random.Random, folder: pathlib.Path) -> str:
  """Questions and captions."""
  _file(rng, folder, _LINES, ('.jsonl',))
  task = rng.choice((formats.Answers(branches=2), formats.Captions()))
  return _outcome(EvaluationLines().records(folder), folder, task)


def places(rng: random.Random, folder: pathlib.Path) -> str:
  """Phrases with boxes about a picture that EXIF turns."""
  _file(rng, folder, _PLACES, ('.jsonl',))
  task = rng.choice((formats.Referring(), formats.GroundedCaptioning()))
  return _outcome(EvaluationLines().records(folder), folder, task)


def plain_text(rng: random.Random, folder: pathlib.Path) -> str:
  """Documents without pictures."""
  _file(rng, folder, _TEXTS, ('.jsonl', '.txt'))
  reader = PlainText(longest=rng.choice((50, 4000)))
  found = (x for part in reader.parts(folder) for x in reader.read(part))
  return _outcome(found, folder, formats.Text())


KINDS: dict[str, Callable[[random.Random, pathlib.Path], str]] = {
  'conversations': conversations,
  'interleaved': interleaved,
  'evaluation_lines': evaluation_lines,
  'places': places,
  'plain_text': plain_text,
}
