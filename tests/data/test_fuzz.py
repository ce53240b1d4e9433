"""Whatever strangers write is dropped or repaired, counted, and never a crash.

One number of a seed, so that a failure can be had again.
"""

import json
import random

import downloads
import listed
import pytest

from qwenvl_jax.data import formats, shards, sources
from qwenvl_jax.data.packing import Packer
from qwenvl_jax.data.pipeline import Pipeline, Stream
from qwenvl_jax.data.readers.conversations import Conversations
from qwenvl_jax.data.readers.img2dataset import Img2Dataset
from qwenvl_jax.data.readers.release import EvaluationLines
from qwenvl_jax.data.record_errors import ErrorBudget

_NASTY = (
  '', ' ', '\0', '\ud800', '<img>', '</box>', '<|endoftext|>', '<|im_start|>',
  '../../etc/passwd', 'http://x/y.jpg', 'é' * 300, '\u202e', '9' * 400, None,
  True, -1, 1e308, float('nan'), [], {}, [[]], {'answer': None}, ['a', 1],
)  # fmt: skip
_PICTURE = downloads.picture()


def _damaged(rng, data: bytes) -> bytes:
  """Bytes with one thing wrong."""
  data = bytearray(data)
  kind = rng.randrange(4)
  if kind == 0:
    return bytes(data[: rng.randrange(len(data))])
  for _ in range(1 if kind == 1 else 20):
    data[rng.randrange(len(data))] = rng.randrange(256)
  return bytes(data) + (b'tail' if kind == 3 else b'')


def _mutated(rng, value):
  """JSON with one value replaced, somewhere."""
  if isinstance(value, dict) and value and rng.random() < 0.8:
    key = rng.choice(list(value))
    if rng.random() < 0.1:
      return {k: v for k, v in value.items() if k != key}
    return value | {key: _mutated(rng, value[key])}
  if isinstance(value, list) and value and rng.random() < 0.8:
    index = rng.randrange(len(value))
    return [_mutated(rng, x) if i == index else x for i, x in enumerate(value)]
  return rng.choice(_NASTY)


def _rows(data_dir, name, task, split='train'):
  stream = Stream(sources.Prepared(name, split, str(data_dir)), task)
  made = Pipeline(
    streams=(stream,), sequence_length=160, image_tokens=16, image_size=14,
    image_slots=2, batch_size=4, packer=Packer(shards=2, pool=4),
    limit=ErrorBudget(share=1.0), prefetch=0,
  )  # fmt: skip
  iterator = made.iterator()
  for _ in range(5):
    batch = next(iterator)
    assert batch['tokens'].max() < 151_860
  return iterator


def _prepared(tmp_path, name, reader, count):
  report = shards.prepare(
    name,
    {'train': reader},
    tmp_path / 'in',
    tmp_path,
    limit=ErrorBudget(share=1.0),
  )
  dropped = sum(report.counts.of('train').values())
  # Nothing is silent: what was seen was either written or counted.
  assert report.counts.seen_of('train') == dropped + sum(
    report.lengths['train']
  )
  assert report.counts.seen_of('train') >= count
  return report


def test_pairs(tmp_path):
  rng = random.Random(1)
  files = {}
  for number in range(150):
    about = {'width': 40, 'height': 30, 'caption': 'a bee on a flower'}
    about['noun_chunks'] = [[0, 5, 0.1, 0.2, 0.5, 0.6, 0.9]]
    about['ref_exps'] = [[0, 17, 0.1, 0.2, 0.5, 0.6, 0.9]]
    data, text = _PICTURE, b'a bee on a flower'
    if rng.random() < 0.3:
      data = _damaged(rng, data)
    if rng.random() < 0.2:
      text = _damaged(rng, text)
    if rng.random() < 0.5:
      about = _mutated(rng, about)
    files[f'{number:05d}.jpg'] = data
    files[f'{number:05d}.txt'] = text
    files[f'{number:05d}.json'] = json.dumps(about).encode()
  downloads.tar(tmp_path / 'in/0.tar', files)
  report = _prepared(tmp_path, 'pairs', Img2Dataset(grounded=True), 150)
  assert sum(report.lengths['train']) > 30
  assert {'unreadable_image', 'malformed'} <= report.counts.of('train').keys()
  for task in (formats.GroundedCaptions(), formats.Referring(branches=2)):
    _rows(tmp_path, 'pairs', task)


def test_damaged_archives(tmp_path):
  rng = random.Random(2)
  downloads.pairs(tmp_path / 'whole', ['one', 'two', 'three', 'four'])
  whole = (tmp_path / 'whole/00000.tar').read_bytes()
  for number in range(40):
    downloads.write(tmp_path, f'in/{number:03d}.tar', _damaged(rng, whole))
  _prepared(tmp_path, 'pairs', Img2Dataset(), 40)
  _rows(tmp_path, 'pairs', formats.Captions())


@pytest.mark.parametrize('kind', ['evaluation', 'conversations'])
def test_json(tmp_path, kind):
  rng = random.Random(3)
  downloads.write(tmp_path, 'in/a.jpg', _PICTURE)
  line = {'image': 'a.jpg', 'question': 'What?', 'answer': ['cat', 'dog']}
  place = {'image': 'a.jpg', 'sent': 'dog', 'bbox': [1, 2, 30, 20]}
  place |= {'width': 40, 'height': 30}
  talk = {
    'id': 'x',
    'conversations': [
      {'from': 'user', 'value': 'Picture 1: <img>a.jpg</img>\nWhat?'},
      {'from': 'assistant', 'value': '<ref>dog</ref><box>(1,2),(3,4)</box>'},
    ],
  }
  if kind == 'evaluation':
    lines = [_mutated(rng, rng.choice((line, place))) for _ in range(120)]
    text = [json.dumps(x).encode() for x in [line, place, *lines]]
    text = [_damaged(rng, x) if rng.random() < 0.2 else x for x in text]
    downloads.write(tmp_path, 'in/x.jsonl', b'\n'.join(text))
    reader, task = EvaluationLines(), formats.Answers()
  else:
    talks = [talk, *(_mutated(rng, talk) for _ in range(120))]
    downloads.write(tmp_path, 'in/x.json', talks)
    reader, task = Conversations(), formats.Conversations()
  _prepared(tmp_path, kind, reader, 100)
  _rows(tmp_path, kind, task)


def test_damaged_shards(tmp_path):
  """Bytes that went bad on the disk, record by record."""
  rng = random.Random(4)
  from qwenvl_jax.data import storage

  good = [storage.serialize(x) for x in listed.captions(40)]
  damaged = [_damaged(rng, x) if rng.random() < 0.5 else x for x in good]
  source = listed.Listed('x', tuple(damaged))
  stream = Stream(
    listed.Listed('s', sources.RecordSequence('x', source)), formats.Captions()
  )
  made = Pipeline(
    streams=(stream,), sequence_length=160, image_tokens=16, image_size=14,
    image_slots=4, batch_size=4, packer=Packer(shards=2, pool=4),
    limit=ErrorBudget(share=1.0), prefetch=0,
  )  # fmt: skip
  iterator = made.iterator()
  for _ in range(8):
    next(iterator)
  assert iterator.counts.of('s')
