"""Documents of texts and pictures in MMC4's and OBELICS' layouts."""

import json

import downloads
import pyarrow
import pyarrow.parquet
import pytest

from qwenvl_jax.data import cli, formats, shards, sources, storage
from qwenvl_jax.data.packing import Packer
from qwenvl_jax.data.pipeline import Pipeline, Stream
from qwenvl_jax.data.readers.interleaved import Interleaved
from qwenvl_jax.data.record_errors import ErrorBudget
from qwenvl_jax.errors import BadRecordError
from qwenvl_jax.text.tokenizer import Tokenizer

_A, _B = downloads.picture(seed=1), downloads.picture(seed=2)


def _image(name, index):
  return {'image_name': name, 'matched_text_index': index, 'raw_url': 'x'}


def _mmc4(*images, texts=('One.', 'Two.', 'Three.')):
  return {'text_list': list(texts), 'image_info': list(images)}


def _read(folder, *documents):
  lines = '\n'.join(map(json.dumps, documents)).encode()
  downloads.write(folder, 'docs.jsonl', lines)
  downloads.write(folder, 'a.jpg', _A)
  downloads.write(folder, 'p/b.jpg', _B)
  reader = Interleaved()
  return [x for part in reader.parts(folder) for x in reader.read(part)]


@pytest.mark.parametrize(
  ('document', 'images', 'texts', 'missing'),
  [
    (_mmc4(_image('a.jpg', 1)), (_A,), ('One.', 'Two. Three.'), 0),
    # In any order, several before one text, and after the last.
    (_mmc4(_image('p/b.jpg', 2), _image('a.jpg', 0)), (_A, _B),
     ('', 'One. Two.', 'Three.'), 0),
    (_mmc4(_image('a.jpg', 1), _image('p/b.jpg', 1)), (_A, _B),
     ('One.', '', 'Two. Three.'), 0),
    (_mmc4(_image('a.jpg', 3), _image('p/b.jpg', None)), (_A, _B),
     ('One. Two. Three.', '', ''), 0),
    # Missing: the texts around it are joined.
    (_mmc4(_image('gone.jpg', 1), _image('a.jpg', 2)), (_A,),
     ('One. Two.', 'Three.'), 1),
    (_mmc4(_image('../a.jpg', 0), {}, _image('a.jpg', 0)), (_A,),
     ('', 'One. Two. Three.'), 2),
    ({'texts': ['One.', None, 'Two.', 'Three.', None],
      'images': [None, 'a.jpg', None, None, 'p/b.jpg']}, (_A, _B),
     ('One.', 'Two.\n\nThree.', ''), 0),
    ({'texts': [None, 'One.'], 'images': [{'path': 'a.jpg'}, None]}, (_A,),
     ('', 'One.'), 0),
    ({'texts': ['One.', 'Two.'], 'images': ['a.jpg', 'http://x/y.jpg']}, (_A,),
     ('', 'One.\n\nTwo.'), 1),
    ({'texts': ['One.', float('nan'), 'Two.'], 'images': ['a.jpg']}, (_A,),
     ('', 'One.\n\nTwo.'), 0),
  ],
)  # fmt: skip
def test_texts_and_pictures_in_order(
  tmp_path, document, images, texts, missing
):
  (record,) = _read(tmp_path, document)
  assert record.images == images and record.texts == texts
  assert record.notes == ('missing_picture',) * missing
  assert storage.parse(storage.serialize(record)).texts == texts


def test_parquet_holds_pictures_and_opens_none(tmp_path):
  downloads.write(tmp_path, 'a.jpg', _A)
  table = pyarrow.table(
    {
      'texts': [['One.', None, 'Two.'], ['x', 'y'], ['z']],
      'images': [
        [None, {'bytes': _A, 'path': 'b.jpg'}, None],
        [{'bytes': None, 'path': 'a.jpg'}, {'bytes': _B, 'path': None}],
        [{'bytes': None, 'path': 'a.jpg'}],
      ],
    }
  )
  pyarrow.parquet.write_table(table, tmp_path / 'x.parquet')
  reader = Interleaved()
  (part,) = reader.parts(tmp_path)
  first, second, error = reader.read(part)
  assert (first.images, first.texts) == ((_A,), ('One.', 'Two.'))
  assert (second.images, second.texts) == ((_B,), ('x', 'y'))
  assert second.notes == ('missing_picture',)
  assert error.reason == 'missing_image' and "'a.jpg' is no pict" in str(error)


@pytest.mark.parametrize(
  ('document', 'reason', 'says'),
  [
    (_mmc4(_image('gone.jpg', 0)), 'missing_image', 'gone.jpg'),
    (_mmc4(), 'missing_image', 'without pictures'),
    (_mmc4(*[_image('a.jpg', 0)] * 257), 'too_long', '257 pictures'),
    (_mmc4(_image('a.jpg', 0), texts=['', ' ']), 'empty_text', 'without text'),
    (_mmc4(_image('a.jpg', 0), texts=['x', 5]), 'malformed', 'OBELICS'),
    ({'texts': 'One.', 'images': ['a.jpg']}, 'malformed', "'text_list'"),
    ({'text': 'One.'}, 'malformed', "'images': [null, 'a.jpg'"),
    (5, 'malformed', 'no document'),
  ],
)
def test_what_is_not_learned_from(tmp_path, document, reason, says):
  (error,) = _read(tmp_path, document)
  assert isinstance(error, BadRecordError) and error.reason == reason
  assert says in str(error) and 'docs.jsonl, line 1' in str(error)


def test_from_files_to_rows(tmp_path, capsys):
  _read(
    tmp_path / 'in',
    *(_mmc4(_image('a.jpg', n % 4), _image('p/b.jpg', 1)) for n in range(8)),
    _mmc4(_image('gone.jpg', 0), _image('a.jpg', 1)),
  )
  arguments = ['prepare', 'mine', '--format', 'interleaved', '--data_dir']
  arguments += [str(tmp_path), '--manual_dir', str(tmp_path / 'in')]
  assert cli.main(arguments) == 0
  capsys.readouterr()
  source = sources.Prepared('mine', 'train', str(tmp_path))
  made = Pipeline(
    streams=(Stream(source, formats.Interleaved()),), sequence_length=128,
    image_tokens=16, image_size=28, image_slots=4, batch_size=2, prefetch=0,
    packer=Packer(shards=1, pool=4),
  )  # fmt: skip
  row, stats = next(made.rows())
  tokenizer = Tokenizer()
  used = row['segment_ids'] == 1
  learned = row['loss_weights'] > 0
  text = tokenizer.decode(row['tokens'][used])
  assert text.count('<img>') >= 1 and text.endswith('<|endoftext|>')
  # Texts are learned, pictures and their tags are not.
  start = tokenizer.img_start_id
  assert not (row['targets'][learned] == start).any()
  targets = tokenizer.decode(row['targets'][used & learned])
  assert set(targets.replace('<|endoftext|>', '').split('.')) <= {
    'One', ' Two', ' Three', 'Two', 'Three', '',
  }  # fmt: skip
  assert (row['image_starts'] > 0).sum() > 2
  assert not stats.dropped


def test_a_preparation_counts_missing_pictures(tmp_path):
  _read(
    tmp_path / 'in',
    _mmc4(_image('gone.jpg', 0), _image('a.jpg', 1)),
    _mmc4(_image('gone.jpg', 0)),
  )
  report = shards.prepare(
    'x', {'train': Interleaved()}, tmp_path / 'in', tmp_path,
    limit=ErrorBudget(share=1),
  )  # fmt: skip
  assert report.counts.of('train') == {'missing_image': 1}
  assert report.counts.of('train', 'repaired') == {'missing_picture': 1}
