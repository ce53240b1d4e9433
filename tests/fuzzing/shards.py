"""Hostile archives and annotations, read as `prepare` and `clean` read them.

Each kind makes one input with a random generator in an empty folder, and tells
what became of it: 'handled' (an error for people), 'dropped' (some records
counted as bad) or 'accepted'. Any other exception is a fault of the reader.
"""

import functools
import gzip
import io
import json
import pathlib
import pickle
import random
import tarfile
from collections.abc import Callable, Iterable

import downloads
import pyarrow
import pyarrow.parquet

from qwenvl_jax.data.cleaning.inputs import Source
from qwenvl_jax.data.cleaning.pair import Outcome
from qwenvl_jax.data.readers import answers, captions, places
from qwenvl_jax.data.readers.img2dataset import Img2Dataset
from qwenvl_jax.data.sanitize import sanitize
from qwenvl_jax.errors import BadRecordError, QwenVLError

_PICTURE = downloads.picture((12, 10))
_ODD = (
  None, True, 0, -1, 5, 2**63, 10**400, 1e308, float('nan'), float('inf'), '',
  ' ', 'nan', '\0', '\ud800', '\x1b[31m', '<img>', '../../x', 'http://x/y.jpg',
  'a' * 5000, [], {}, [[]], [None], {'': 0}, {'bytes': 'x', 'path': 'y'},
  ['yes', ['no']], {'answer': []}, [1, 2, 3, 4], [1e9] * 7,
)  # fmt: skip
_NAMES = (
  'a.jpg', 'a.txt', 'a.json', 'b.jpg', 'b.txt', '._a.jpg', '__MACOSX/a.txt',
  '.jpg', 'a', 'a.', 'a.b.jpg', 'a.txt.gz', 'a.json.gz', 'x/a.jpg', '../a.txt',
  '/a.jpg', 'a.JPG', 'a.jpg.', '\udcff.jpg', 'a/b/c.d.e.txt', 'é.txt', 'a.mp4',
)  # fmt: skip
_TYPES = (
  tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
  tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE,
  tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, b'?',
)  # fmt: skip


def damaged(rng: random.Random, data: bytes) -> bytes:
  """Bytes that are flipped, cut, repeated, or overwritten with extremes."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 8))):
    at = rng.randrange(len(data) or 1)
    kind = rng.randrange(6)
    if kind == 0:
      data[at : at + 1] = bytes([rng.randrange(256)])
    elif kind == 1:
      del data[at:]
    elif kind == 2:
      data[at:at] = data[at : at + rng.randrange(1, 600)]
    elif kind == 3:
      count = rng.choice((1, 4, 8, 12, 512))
      data[at : at + count] = (
        rng.choice((b'\0', b'\xff', b'7', b'\x7f')) * count
      )
    elif kind == 4:
      del data[at : at + rng.randrange(1, 600)]
    else:
      data[at : at + 2] = rng.choice((b'99', b'-1', b'[[', b'{"', b'\n0'))
  return bytes(data)


def odd(rng: random.Random, value):
  """JSON with some values replaced or left out, or nested deeply."""
  if rng.random() < 0.02:
    return functools.reduce(lambda x, _: [x], range(rng.choice((50, 900))), 0)
  if isinstance(value, dict) and value and rng.random() < 0.9:
    key = rng.choice(list(value))
    if rng.random() < 0.15:
      return {k: v for k, v in value.items() if k != key}
    return value | {key: odd(rng, value[key])}
  if isinstance(value, list) and value and rng.random() < 0.9:
    at = rng.randrange(len(value))
    return [odd(rng, x) if i == at else x for i, x in enumerate(value)]
  return rng.choice(_ODD)


def _fate(found: Callable[[], Iterable]) -> str:
  """What becomes of what a reader yields; records are mended as well."""
  bad = 0
  try:
    for record in found():
      try:
        if isinstance(record, BadRecordError):
          raise record
        sanitize(record)
      except BadRecordError:
        bad += 1
  except QwenVLError:
    return 'handled'
  return 'dropped' if bad else 'accepted'


def _prepared(folder: pathlib.Path, grounded=False) -> str:
  reader = Img2Dataset(grounded=grounded)
  return _fate(
    lambda: (x for p in reader.parts(folder) for x in reader.read(p))
  )


def _cleaned(path: pathlib.Path) -> str:
  try:
    (shard,) = Source(name='web', files=str(path)).shards()
    found = list(shard.read())
  except QwenVLError:
    return 'handled'
  bad = sum(isinstance(x, Outcome) for x in found)
  return 'dropped' if bad else 'accepted'


@functools.cache
def _whole_tar() -> bytes:
  made = io.BytesIO()
  with tarfile.open(fileobj=made, mode='w', format=tarfile.PAX_FORMAT) as tar:
    for key in ('0', '1', 'é' * 80):
      about = json.dumps({'caption': 'a bee', 'width': 12, 'height': 10})
      for name, data in (
        ('jpg', _PICTURE), ('txt', b'a bee'), ('json', about.encode()),
      ):  # fmt: skip
        _add(tar, f'{key}.{name}', data)
  return made.getvalue()


def _add(tar, name, data, kind=tarfile.REGTYPE):
  member = tarfile.TarInfo(name)
  member.size, member.type = len(data), kind
  tar.addfile(member, io.BytesIO(data))


def tar_bytes(rng: random.Random, folder: pathlib.Path) -> str:
  """A tar whose bytes went bad, or a compressed one."""
  data, name = damaged(rng, _whole_tar()), '0.tar'
  if rng.random() < 0.3:
    data, name = gzip.compress(data, 1), '0.tar.gz'
    data = damaged(rng, data) if rng.random() < 0.5 else data
  (folder / name).write_bytes(data)
  return rng.choice((_prepared, lambda x: _cleaned(x / name)))(folder)


def tar_members(rng: random.Random, folder: pathlib.Path) -> str:
  """A tar of members with odd names, types, order and JSON."""
  about = {'caption': 'a bee', 'width': 12, 'height': 10, 'similarity': 0.3}
  spans = [[0, 5, 0.1, 0.1, 0.9, 0.9, 1.0]]
  about |= {'noun_chunks': spans, 'ref_exps': spans, 'text': 'x'}
  made = io.BytesIO()
  form = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
  with tarfile.open(fileobj=made, mode='w', format=form) as tar:
    for _ in range(rng.randrange(1, 8)):
      name = rng.choice(_NAMES)
      data = _PICTURE
      if 'txt' in name:
        data = rng.choice((b'a bee', b'', b'\xef\xbb\xbfa', b'\xff', b'<img>'))
      if 'json' in name:
        data = json.dumps(odd(rng, about)).encode()
      if name.endswith('.gz'):
        data = rng.choice((gzip.compress(data, 1), data))
      if rng.random() < 0.2:
        data = damaged(rng, data)
      kind = rng.choice(_TYPES) if rng.random() < 0.2 else tarfile.REGTYPE
      _add(tar, name, data, kind)
  (folder / '0.tar').write_bytes(made.getvalue())
  if rng.random() < 0.3:
    return _cleaned(folder / '0.tar')
  return _prepared(folder, grounded=rng.random() < 0.7)


@functools.cache
def _whole_parquet(number: int) -> bytes:
  column = (
    [_PICTURE, None, b''],
    [{'bytes': _PICTURE, 'path': 'x'}, None, {'bytes': None, 'path': 'y'}],
    ['a.jpg', 'http://x', ''],
  )[number % 3]
  table = pyarrow.table(
    {
      ('jpg', 'image', 'png')[number % 3]: column,
      ('caption', 'text', 'TEXT')[number % 3]: ['a bee', 'x' * 90, None],
      'key': ['0', '1', '2'],
      'width': [12.0, float('nan'), 3.0],
      'noun_chunks': [[[0.0, 1.0]], [], None],
    }
  )
  made = io.BytesIO()
  pyarrow.parquet.write_table(
    table[: 1 if number > 8 else 3],
    made,
    compression=('none', 'snappy', 'zstd')[number // 3 % 3],
  )
  return made.getvalue()


def parquet_bytes(rng: random.Random, folder: pathlib.Path) -> str:
  """A Parquet file whose bytes went bad, mostly in its footer."""
  data = _whole_parquet(rng.randrange(18))
  footer = int.from_bytes(data[-8:-4], 'little') + 8
  if rng.random() < 0.7:
    end = damaged(rng, data[-footer:-8])
    data = data[:-footer] + end + len(end).to_bytes(4, 'little') + b'PAR1'
  else:
    data = damaged(rng, data)
  (folder / '0.parquet').write_bytes(data)
  grounded = rng.random() < 0.5
  if rng.random() < 0.5:
    return _cleaned(folder / '0.parquet')
  return _prepared(folder, grounded)


def parquet_values(rng: random.Random, folder: pathlib.Path) -> str:
  """A Parquet file with columns of any type."""
  odds = [x for x in _ODD if not isinstance(x, int) or abs(x or 0) < 2**62]
  kinds = (_PICTURE, {'bytes': _PICTURE, 'path': 'x'}, 'a.jpg')
  rows = [rng.choice((*kinds, rng.choice(odds)))] * rng.randrange(1, 4)
  if rng.random() < 0.3:
    rows[-1] = rng.choice((None, *kinds, rng.choice(odds)))
  columns = {rng.choice(('jpg', 'image', 'webp', 'url')): rows}
  for name in ('caption', 'text', 'TEXT', 'key', 'width', 'similarity'):
    if rng.random() < 0.5:
      columns[name] = [rng.choice(odds)] * len(rows)
  try:
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, folder / '0.parquet')
  except (pyarrow.ArrowException, UnicodeError, OverflowError):
    return 'handled'  # No such file can be.
  if rng.random() < 0.5:
    return _cleaned(folder / '0.parquet')
  return _prepared(folder)


def lines(rng: random.Random, folder: pathlib.Path) -> str:
  """JSONL with pictures beside it, as `clean` reads it."""
  (folder / 'a.jpg').write_bytes(_PICTURE)
  row = {'id': 'x', 'text': 'a bee', 'image': 'a.jpg', 'similarity': 0.3}
  made = [json.dumps(odd(rng, row)).encode() for _ in range(3)]
  made = [damaged(rng, x) if rng.random() < 0.3 else x for x in made]
  (folder / 'x.jsonl').write_bytes(b'\n'.join(made))
  return _cleaned(folder / 'x.jsonl')


_QA = {'image': 'a.jpg', 'question': 'What?', 'answer': 'dog'}
_GIVEN = [{'answer': 'dog', 'answer_confidence': 'yes'}] * 2
_OPTIONS = {'answerTexts': ['x', 'y'], 'correctAnswer': 1, 'questionId': 'q'}
_REF = {
  'image_id': 1,
  'split': 'train',
  'ann_id': 1,
  'sentences': [{'sent': 'a'}],
}
# Reader -> the files that it reads.
_ANNOTATED = (
  (answers.QaTable('q.json'), {'q.json': [_QA, _QA]}),
  (answers.QaTable('q.json', at='data'), {'q.json': {'data': {'1': _QA}}}),
  (
    answers.VqaPair('q.json', 'a.json', '{}.jpg'),
    {
      'q.json': {
        'questions': [{'question_id': 1, 'image_id': 2, 'question': 'What?'}]
      },
      'a.json': {'annotations': [{'question_id': 1, 'answers': _GIVEN}]},
    },
  ),
  (
    answers.OcrVqa(1),
    {
      'dataset.json': {
        'k': {'split': 1, 'questions': ['a'], 'answers': ['b'], 'imageURL': 'x'}
      }
    },
  ),
  (
    answers.VisualGenomeQa(),
    {
      'question_answers.json': [
        {'qas': [{'question': 'a', 'answer': 'b', 'image_id': 1, 'qa_id': 2}]}
      ]
    },
  ),
  (
    answers.Ai2d(test=False),
    {
      'questions/1.json': {'imageName': '1', 'questions': {'Who?': _OPTIONS}},
      'ai2d_test_ids.csv': ['2'],
    },
  ),
  (
    answers.ScienceQa('train'),
    {
      'problems.json': {
        '1': {'split': 'train', 'image': 'i', 'question': 'q', 'answer': 0}
        | {'choices': ['a', 'b'], 'hint': 'h'}
      }
    },
  ),
  (
    captions.CocoCaptions('c.json'),
    {
      'c.json': {
        'images': [{'id': 1, 'file_name': 'a.jpg'}],
        'annotations': [{'image_id': 1, 'caption': 'a'}],
      }
    },
  ),
  (
    captions.Karpathy('k.json', '', 'train'),
    {
      'k.json': {
        'images': [
          {'split': 'train', 'filename': 'a', 'sentences': [{'raw': 'a'}]}
        ]
      }
    },
  ),
  (
    places.VisualGenomeRegions(),
    {
      'region_descriptions.json': [
        {
          'id': 1,
          'regions': [{'x': 1, 'y': 1, 'width': 1, 'height': 1, 'phrase': 'p'}],
        }
      ]
    },
  ),
  (
    places.Refer('train'),
    {
      'refs(unc).p': [_REF],
      'instances.json': {
        'annotations': [{'id': 1, 'bbox': [1, 2, 3, 4]}],
        'images': [{'id': 1, 'file_name': 'a', 'width': 12, 'height': 10}],
      },
    },
  ),
)


def annotations(rng: random.Random, folder: pathlib.Path) -> str:
  """Annotations of a public data set with values of other types."""
  from qwenvl_jax.data import shards

  reader, files = rng.choice(_ANNOTATED)
  broken = rng.choice(list(files))
  for name, content in files.items():
    content = odd(rng, content) if name == broken else content
    data = json.dumps(content).encode()
    if name.endswith('.p'):
      try:
        data = pickle.dumps(content)
      except RecursionError:
        return 'handled'  # No such file can be.
    if name == broken and rng.random() < 0.1:
      data = damaged(rng, data)
    downloads.write(folder, name, data)

  def found():
    _, sources = shards._shards('x', reader, folder)
    return (x for source in sources for x in source())

  return _fate(found)


KINDS = {
  'tar_bytes': tar_bytes,
  'tar_members': tar_members,
  'parquet_bytes': parquet_bytes,
  'parquet_values': parquet_values,
  'lines': lines,
  'annotations': annotations,
}
