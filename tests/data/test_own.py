"""A data set of one's own: parts, steps, and what does not fit a row."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.data import cli, formats, own, shards, storage
from qwenvl_jax.data.catalogue import FORMATS
from qwenvl_jax.data.pipeline import Pipeline, Stream
from qwenvl_jax.data.records import Record, Turn
from qwenvl_jax.data.survey import survey
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError


def record(number, words=3, question=2):
  turns = (Turn('user', 'what ' * question), Turn('assistant', 'it ' * words))
  return Record(id=f'mine/{number}', turns=turns)


class Listed:
  """Records in memory, of which some cannot be read."""

  def __init__(self, *records):
    self.records = records

  def open(self):
    return self

  def __len__(self):
    return len(self.records)

  def __getitem__(self, index):
    if isinstance(self.records[index], Exception):
      raise self.records[index]
    return self.records[index]


def look(vocabulary, length, *records):
  stream = Stream(Listed(*records), formats.Conversations(), name='mine')
  pipeline = Pipeline(
    streams=[stream],
    vocabulary=vocabulary,
    sequence_length=length,
    image_slots=0,
  )
  (found,) = survey(pipeline)
  return found


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A data folder with three data sets of 20 conversations."""
  folder = tmp_path_factory.mktemp('own')
  said = ('user', 'What?'), ('assistant', 'It.')
  turns = [{'from': who, 'value': text} for who, text in said]
  (folder / 'raw').mkdir()
  file = folder / 'raw' / 'all.json'
  file.write_text(
    json.dumps([{'id': i, 'conversations': turns} for i in range(20)])
  )
  for name in ('mine', 'mine2', 'mine3'):
    assert not cli.main(
      ['prepare', name, '--format', 'conversations', '--manual_dir',
       str(folder / 'raw'), '--data_dir', str(folder)]
    )  # fmt: skip
  return folder


@pytest.mark.parametrize('count', [2, 10, 137])
def test_parts_are_all_records_once(count):
  alone = np.arange(count)
  held = own.Part('mine', 'heldout').indices(alone)
  train = own.Part('mine').indices(alone)
  assert sorted([*held, *train]) == list(range(count))
  assert len(held) == max(1, round(0.05 * count))
  assert len(own.Part('mine', heldout=0).indices(alone)) == count


@pytest.mark.parametrize(
  ('sizes', 'held'),
  [
    # As many as are asked for, where whole pictures make up that number ..
    ([3] * 20 + [1] * 40, 5),
    # .. else fewer, ..
    ([3] * 33 + [1], 4),
    ([4] * 25, 4),
    # .. but at least the smallest picture.
    ([60, 40], 40),
  ],
)
def test_pictures_with_several_records_are_whole_in_a_part(sizes, held):
  pictures = np.random.default_rng(1).permutation(
    np.repeat(np.arange(len(sizes)), sizes)
  )
  found = own.Part('mine', 'heldout').indices(pictures)
  train = own.Part('mine').indices(pictures)
  assert len(found) == held
  assert sorted([*found, *train]) == list(range(len(pictures)))
  assert not set(pictures[found]) & set(pictures[train])


def stored(folder, *images):
  """Prepares records that show these pictures."""
  directory = storage.folder(folder, 'mine')
  directory.mkdir(parents=True)
  made = [
    dataclasses.replace(record(number), images=shown)
    for number, shown in enumerate(images)
  ]
  name = storage.shard_name('mine', 'train', 0, 1)
  storage.write_shard(directory / name, made)
  storage.write_info(directory, 'mine', {'train': [len(made)]})


def test_records_are_parted_by_what_their_pictures_hold(tmp_path):
  images = [(b'a',), (b'b',), (b'a',), (b'b', b'c'), (b'c',), (), (b'd',), ()]
  stored(tmp_path, *images)
  parts = [
    own.Part('mine', part, heldout=0.5, data_dir=tmp_path).open()
    for part in own.PARTS
  ]
  shown = [{x for record in part for x in record.images} for part in parts]
  assert shown[0] | shown[1] == {b'a', b'b', b'c', b'd'}
  assert not shown[0] & shown[1]
  assert [len(part) for part in parts] == [4, 4]


def test_what_prepare_noted_of_pictures_is_not_read_again(
  tmp_path, monkeypatch
):
  """And parts records as reading the pictures does."""
  said = ('user', '<image>What?'), ('assistant', 'It.')
  turns = [{'from': who, 'value': text} for who, text in said]
  shown = [0, 1, 0, 2, 2, 3]
  for number in set(shown):
    picture = Image.new('RGB', (40, 30), (0, 0, 60 * number))
    picture.save(tmp_path / f'{number}.png')
  (tmp_path / 'all.json').write_text(
    json.dumps([{'image': f'{x}.png', 'conversations': turns} for x in shown])
  )
  shards.prepare(
    'mine', {'train': FORMATS['conversations']}, tmp_path, tmp_path,
    with_digests=True,
  )  # fmt: skip
  part = own.Part('mine', 'heldout', heldout=0.4, data_dir=tmp_path)
  own._groups.cache_clear()
  monkeypatch.setattr(own, 'picture_digests', None)
  held = part.open().chosen
  assert len(held) == 2
  monkeypatch.undo()
  own._groups.cache_clear()
  for report in tmp_path.glob('mine/*/*.report.json'):
    report.unlink()
  assert part.open().chosen.tolist() == held.tolist()


def test_nothing_can_be_held_out_of_one_picture(tmp_path):
  stored(tmp_path, (b'a',), (b'a', b'b'), (b'b',))
  with pytest.raises(DataError, match='3 record.*share pictures.*HELDOUT=0'):
    own.Part('mine', data_dir=tmp_path).open()
  assert len(own.Part('mine', heldout=0, data_dir=tmp_path).open()) == 3
  nothing = own.Part('mine', 'heldout', heldout=0, data_dir=tmp_path)
  with pytest.raises(DataError, match='and TrainConfig.heldout=None to hold'):
    nothing.open()


def test_steps_of_epochs():
  part = own.Part('mine')
  assert own.steps(part, 8, 5.0, records=100) == 63
  assert own.steps(part, 8, 5.0, share=0.01, records=100) == 1
  with pytest.raises(DataError, match='mine is not prepared'):
    own.steps(part, 8, 5.0)


def test_old_conversations_are_mixed_in(place):
  """As shares of rows; an epoch of one's own records takes more steps."""
  part = own.Part('mine', data_dir=place)
  mixed = {'mine2': 0.5, 'mine3': 1.5}
  streams = own.streams(part, mixed=mixed)
  found = [(x.source.name, x.weight, len(x.source.open())) for x in streams]
  assert found == [('mine', 1.0, 19), ('mine2', 0.5, 20), ('mine3', 1.5, 20)]
  assert own.steps(part, 8, 5.0, records=100, mixed=mixed) == 188
  assert len(own.streams(part)) == 1


@pytest.mark.parametrize(
  ('mixed', 'said'),
  [
    ({'mine': 1.0}, 'names mine, which is DATA_SET'),
    ({'mine2': 0}, 'does not map data sets to rows of each .* above 0'),
    (['mine2'], 'does not map data sets to rows of each'),
    ({'lava': 1.0, 'mine2': 1.0}, 'prepare lava .*--format conversations'),
  ],
)
def test_mixtures_that_cannot_be(place, mixed, said):
  with pytest.raises((ConfigError, DataError), match=said):
    own.streams(own.Part('mine', data_dir=place), mixed=mixed)


def test_what_is_cut_is_named(vocabulary):
  found = look(
    vocabulary,
    100,
    record(0),
    record(1, words=200),
    record(2, question=200),
    BadRecordError('malformed', 'mine/3 is no record'),
  )
  assert found.cut == ['mine/1', 'mine/2'] and found.unlearned == ['mine/2']
  assert max(found.lengths) > 200
  found.check()
  said = '\n'.join(found.lines())
  assert '4 records' in said and 'and a row has 100' in said
  assert 'of 1 no answer is left: mine/2' in said
  assert '1 records are dropped (malformed), e.g. mine/3 is no record' in said


def test_if_all_answers_are_cut_nothing_is_trained(vocabulary):
  found = look(vocabulary, 60, *(record(i, question=99) for i in range(3)))
  with pytest.raises(DataError, match='3 are cut before it at 60 tokens'):
    found.check()
