import collections
import dataclasses
import itertools
import json
import random

import listed
import numpy as np
import pytest

from qwenvl_jax.batch import NO_IMAGE
from qwenvl_jax.data import formats, packing
from qwenvl_jax.data.batches import Batches
from qwenvl_jax.data.packing import Packer
from qwenvl_jax.data.pipeline import Pipeline, Stream
from qwenvl_jax.data.record_errors import ErrorBudget
from qwenvl_jax.data.records import Record, Turn
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError
from qwenvl_jax.text.tokenizer import Tokenizer

_TOKENIZER = Tokenizer()

_STREAMS = (
  Stream(
    listed.Listed('captions', listed.captions(60)),
    formats.Captions(), 6, 'caption',
  ),
  Stream(
    listed.Listed('questions', listed.questions(30)),
    formats.Answers(branches=3), 2, 'vqa',
  ),
  Stream(
    listed.Listed('more', listed.questions(20, asked=1)),
    formats.Answers(), 1, 'vqa',
  ),
  Stream(
    listed.Listed('text', listed.documents(40)), formats.Text(), 3, 'text'
  ),
)  # fmt: skip


def _pipeline(**changes):
  settings = {
    'streams': _STREAMS,
    'sequence_length': 128,
    'image_tokens': 16,
    'image_size': 28,
    'image_slots': 4,
    'batch_size': 8,
    'packer': Packer(shards=8, pool=8),
    'prefetch': 2,
    'limit': ErrorBudget(after=50),
  }
  return Pipeline(**settings | changes)


def _take(iterator, count):
  return list(itertools.islice(iterator, count))


def _equal(left, right):
  return all(
    a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    for a, b in zip(left, right, strict=True)
  )


def _texts(row):
  """The texts of a row's segments."""
  return [
    _TOKENIZER.decode(row['tokens'][row['segment_ids'] == segment])
    for segment in range(1, row['segment_ids'].max() + 1)
  ]


def test_choose_is_exact():
  rng = random.Random(0)
  for _ in range(60):
    count = rng.randint(1, 8)
    lengths = [rng.randint(1, 12) for _ in range(count)]
    images = [rng.randint(0, 2) for _ in range(count)]
    chosen = packing.choose(lengths, images, 24, 3)
    assert chosen[0] == 0 and chosen == sorted(set(chosen))

    def fits(some, lengths=lengths, images=images):
      tokens = sum(lengths[i] for i in some)
      return tokens <= 24 and sum(images[i] for i in some) <= 3

    assert fits(chosen)
    best = max(
      sum(lengths[i] for i in some)
      for size in range(count + 1)
      for some in itertools.combinations(range(count), size)
      if 0 in some and fits(some)
    )
    assert sum(lengths[i] for i in chosen) == best


def test_segments_restart_and_images_are_whole():
  for row, _ in _take(_pipeline().rows(), 40):
    segments, positions = row['segment_ids'], row['positions']
    used = segments > 0
    assert used.sum() == np.flatnonzero(used).size == used[: used.sum()].sum()
    for segment in range(1, segments.max() + 1):
      prefix = (segments == segment) & (row['branch_ids'] == 0)
      np.testing.assert_array_equal(positions[prefix], np.arange(prefix.sum()))
    # A target is the next token of the same segment.
    learned = np.flatnonzero(row['loss_weights'])
    assert (segments[learned] == segments[learned + 1]).all()
    assert (row['targets'][learned] == row['tokens'][learned + 1]).all()
    for start in row['image_starts'][row['image_starts'] != NO_IMAGE]:
      assert row['tokens'][start - 1] == _TOKENIZER.img_start_id
      assert row['tokens'][start + 16] == _TOKENIZER.img_end_id
      assert len(set(segments[start - 1 : start + 17])) == 1


def test_a_row_is_of_one_task():
  seen = set()
  for row, stats in _take(_pipeline().rows(), 60):
    (kind,) = {
      'vqa' if 'Answer:' in text else 'caption' if 'caption' in text else 'text'
      for text in _texts(row)
    }
    assert stats.group == kind
    seen.add(kind)
  assert seen == {'caption', 'vqa', 'text'}


def test_documents_fill_what_is_left():
  def fill(**changes):
    packer = Packer(shards=8, pool=8, **changes)
    rows = [x for x, _ in _take(_pipeline(packer=packer).rows(), 80)]
    return np.mean([x['segment_ids'] > 0 for x in rows]), rows

  without, _ = fill()
  with_filler, rows = fill(filler='text')
  assert with_filler > without
  mixed = [x for x in rows if (x['image_starts'] != NO_IMAGE).any()]
  assert any('<img>' not in text for x in mixed for text in _texts(x))


def test_examples_are_mixed_by_weight():
  counts = collections.Counter()
  for row, stats in _take(_pipeline(image_size=14).rows(), 500):
    group = stats.group
    for segment in range(1, row['segment_ids'].max() + 1):
      branches = row['branch_ids'][row['segment_ids'] == segment].max()
      counts[group] += int(branches) or 1
  total = counts.total()
  for group, share in (('caption', 6), ('vqa', 3), ('text', 3)):
    assert counts[group] / total == pytest.approx(share / 12, rel=0.08)


def test_every_sample_comes_once_a_round():
  stream = Stream(listed.Listed('c', listed.captions(48)), formats.Captions())
  made = _pipeline(streams=(stream,), packer=Packer(shards=4, pool=4))
  numbers = []
  for row, _ in made.rows():
    numbers += [x.split(':')[1].split()[0] for x in _texts(row)]
    if len(numbers) > 48 * 6:
      break
  counts = collections.Counter(numbers)
  assert len(counts) == 48
  # Up to what waits in the pools and what was taken ahead.
  assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_share_the_rows(processes):
  made = _pipeline()
  whole = _take(made.iterator(), 4)
  parts = [_take(made.iterator(p, processes), 4) for p in range(processes)]
  for step, batch in enumerate(whole):
    for name, values in batch.items():
      for process in range(processes):
        np.testing.assert_array_equal(
          parts[process][step][name], values[process::processes]
        )


def test_threads_change_nothing():
  whole = _take(_pipeline().iterator(), 3)
  threads = _pipeline(packer=Packer(shards=8, pool=8, threads=2)).iterator()
  assert _equal(whole, _take(threads, 3))
  threads.close()


@pytest.mark.slow
def test_worker_processes_change_nothing():
  whole = _take(_pipeline().iterator(), 6)
  workers = _pipeline(workers=2).iterator()
  assert _equal(whole[:3], _take(workers, 3))
  state = json.loads(json.dumps(workers.get_state()))
  workers.close()
  other = _pipeline().iterator()
  other.set_state(state)
  assert _equal(whole[3:], _take(other, 3))


def test_a_saved_state_goes_on_exactly():
  whole = _take(_pipeline().iterator(), 12)
  iterator = _pipeline().iterator()
  _take(iterator, 7)
  # As a checkpoint holds it.
  state = json.loads(json.dumps(iterator.get_state()))
  other = _pipeline().iterator()
  next(other)
  other.set_state(state)
  assert _equal(whole[7:], _take(other, 5))
  assert other.get_state()['row'] == 96


@pytest.mark.parametrize(('before', 'after'), [(4, 2), (2, 8), (1, 4), (4, 1)])
def test_a_run_goes_on_with_other_processes(before, after):
  made = _pipeline()
  whole = _take(made.iterator(), 8)
  iterators = [made.iterator(p, before) for p in range(before)]
  for iterator in iterators:
    _take(iterator, 5)
  states = [json.loads(json.dumps(x.get_state())) for x in iterators]
  for process in range(after):
    iterator = made.iterator(process, after)
    iterator.set_state(Batches.merge(states, process))
    for step, batch in enumerate(_take(iterator, 3), start=5):
      for name, values in batch.items():
        np.testing.assert_array_equal(values, whole[step][name][process::after])


def test_bad_records_are_counted_and_left_out():
  good = listed.captions(40)
  broken = dataclasses.replace(good[0], images=(good[0].images[0][:90],))
  tiny = dataclasses.replace(good[0], images=(b'',))
  unreadable = BadRecordError('unreadable_record', 'x')
  silent = Record('silent', good[0].images)
  source = listed.Listed('c', (*good, broken, tiny, unreadable, silent))
  stream = Stream(source, formats.Captions())
  made = _pipeline(
    streams=(stream,),
    packer=Packer(shards=2, pool=4),
    limit=ErrorBudget(share=1),
  )
  iterator = made.iterator()
  for batch in _take(iterator, 20):
    assert (batch['segment_ids'] > 0).any(axis=1).all()
  seen = iterator.counts.seen_of('c')
  dropped = iterator.counts.of('c')
  assert dropped.keys() == {
    'unreadable_image', 'unreadable_record', 'no_question',
  }  # fmt: skip
  assert sum(dropped.values()) == pytest.approx(seen * 4 / 44, rel=0.2)
  metrics = iterator.describe([iterator.sums()])
  assert metrics['data/dropped/c/no_question'] == dropped['no_question']
  assert 0.5 < metrics['data/utilization'] < 1
  # They go on where the run does.
  other = made.iterator()
  other.set_state(json.loads(json.dumps(iterator.get_state())))
  assert other.describe([other.sums()]) == metrics


def test_too_many_bad_records_stop_the_run():
  bad = tuple(BadRecordError('unreadable_record', 'x') for _ in range(10))
  source = listed.Listed('half', (*listed.captions(10), *bad))
  streams = (*_STREAMS, Stream(source, formats.Captions(), 3, 'caption'))
  made = _pipeline(streams=streams, limit=ErrorBudget(share=0.2, after=20))
  with pytest.raises(DataError, match='source half: .* unreadable_record'):
    _take(made.iterator(), 30)
  stream = Stream(listed.Listed('all', bad), formats.Captions())
  with pytest.raises(DataError, match='all: unreadable_record'):
    next(_pipeline(streams=(stream,)).iterator())


def test_one_sample_a_row_drops_them_too():
  bad = tuple(BadRecordError('unreadable_record', 'x') for _ in range(5))
  source = listed.Listed('some', (*listed.captions(10), *bad))
  stream = Stream(source, formats.Captions())
  made = _pipeline(streams=(stream,), packer=None, limit=ErrorBudget(share=1))
  iterator = made.iterator()
  for batch in _take(iterator, 10):
    assert (batch['segment_ids'].max(axis=1) == 1).all()
  assert iterator.counts.of('some').keys() == {'unreadable_record'}
  made = dataclasses.replace(made, limit=ErrorBudget(share=0.1, after=40))
  with pytest.raises(DataError, match='source some'):
    _take(made.iterator(), 20)


def test_an_image_that_would_be_cut_drops_its_record():
  talk = (Turn('user', 'word ' * 120 + '<img>0</img>'), Turn('assistant', 'x'))
  picture = listed.captions(1)[0].images
  many = (Turn('user', '<img>0</img>' * 5), Turn('assistant', 'x'))
  long = (Turn('user', '<img>0</img>'), Turn('assistant', 'word ' * 200))
  records = (
    Record('cut', picture, turns=talk),
    Record('many', picture * 5, turns=many),
    Record('long', picture, turns=long),
  )
  stream = Stream(listed.Listed('talk', records), formats.Conversations())
  made = _pipeline(streams=(stream,), packer=Packer(shards=1, pool=2))
  made = dataclasses.replace(made, limit=ErrorBudget(share=1), image_slots=4)
  iterator = made.iterator()
  batch = next(iterator)
  assert ((batch['image_starts'] != NO_IMAGE).sum(axis=1) == 1).all()
  assert iterator.counts.of('talk').keys() == {'too_long'}
  assert iterator.counts.of('talk', 'repaired')['cut_text'] > 0


def test_impossible_divisions_say_what_to_change():
  with pytest.raises(ConfigError, match='shards=8.*multiple of 3'):
    next(_pipeline(batch_size=9).iterator(0, 3))
  with pytest.raises(ConfigError, match='3 workers.*multiple of 6'):
    next(_pipeline(workers=3).iterator(0, 2))
  iterator = _pipeline().iterator()
  next(iterator)
  state = iterator.get_state()
  fewer = _pipeline(streams=_STREAMS[:1]).iterator()
  fewer.set_state(state)
  with pytest.raises(DataError, match='3 tasks, the mixture 1'):
    next(fewer)
  with pytest.raises(DataError, match='InitFrom'):
    fewer.set_state({'next_index': 3})


def _single(**changes):
  bad = tuple(BadRecordError('unreadable_record', 'x') for _ in range(5))
  cut = dataclasses.replace(
    listed.captions(1)[0], images=(listed.captions(1)[0].images[0][:90],)
  )
  source = listed.Listed('some', (*listed.captions(20), *bad, cut))
  stream = Stream(source, formats.Captions())
  settings = {
    'packer': None,
    'limit': ErrorBudget(share=1),
    'streams': (stream,),
  }
  return _pipeline(**settings | changes)


def test_a_row_of_one_sample_is_never_empty_and_goes_on_exactly():
  whole = _take(_single().iterator(), 12)
  for batch in whole:
    assert (batch['segment_ids'].max(axis=1) == 1).all()
  iterator = _single(prefetch=0).iterator()
  assert _equal(whole[:5], _take(iterator, 5))
  assert iterator.counts.of('some').keys() == {
    'unreadable_record', 'unreadable_image',
  }  # fmt: skip
  state = json.loads(json.dumps(iterator.get_state()))
  # Only streams that left something out have a position of their own.
  assert 0 < len(state['shards']) < 40
  parts = [_single().iterator(process, 2) for process in range(2)]
  for process, part in enumerate(parts):
    part.set_state(Batches.merge([state], process))
    for batch, expected in zip(_take(part, 7), whole[5:], strict=True):
      np.testing.assert_array_equal(
        batch['tokens'], expected['tokens'][process::2]
      )


@pytest.mark.parametrize('workers', [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
@pytest.mark.parametrize('processes', [1, 2, 8])
def test_rows_of_one_sample_divide_among_workers(workers, processes):
  made = _pipeline(packer=None)
  maker = made._starter(0, 1).func.__self__
  assert maker.streams % (workers * processes) == 0


def test_states_of_older_runs_go_on():
  """They hold the number of rows alone where a row is one sample."""
  stream = Stream(listed.Listed('c', listed.captions(30)), formats.Captions())
  made = _pipeline(packer=None, streams=(stream,))
  whole = _take(made.iterator(), 9)
  other = made.iterator()
  other.set_state({'row': 48, 'shards': {}, 'counts': {}, 'tokens': [0, 0]})
  assert _equal(whole[6:], _take(other, 3))
  # Of packed rows, the number of shards was not kept.
  packed = _pipeline().iterator()
  whole = _take(packed, 3)
  state = packed.get_state()
  del state['of']
  again = _pipeline().iterator()
  again.set_state(state)
  assert _equal(_take(packed, 2), _take(again, 2))


def test_another_number_of_shards_is_refused():
  iterator = _pipeline().iterator()
  next(iterator)
  other = _pipeline(packer=Packer(shards=16, pool=8)).iterator()
  other.set_state(iterator.get_state())
  with pytest.raises(ConfigError, match='8 shards.* 16; keep Packer.shards'):
    next(other)


def test_an_error_shows_a_record():
  made = _single(limit=ErrorBudget(share=0.1, after=40))
  with pytest.raises(DataError, match='source some.*For example: x'):
    _take(made.iterator(), 20)


@pytest.mark.parametrize('packer', [None, Packer(shards=2, pool=2)])
def test_a_bad_record_has_one_fate(packer):
  """Dropped and counted, whatever the rows; never an error of the run."""
  picture = listed.captions(1)[0].images

  def talk(name, text, images=picture):
    turns = (Turn('user', text), Turn('assistant', 'x'))
    return Record(name, images, turns=turns)

  good = talk('good', '<img>0</img>a')
  records = (
    good, good, good,
    talk('tag', 'Use <img> with src.'),
    talk('blind', 'What is this?'),
    talk('more', '<img>0</img><img>1</img>'),
    talk('invented', '<img>0</img>', ()),
    talk('unreadable', '<img>0</img>', (picture[0][:90],)),
    Record('silent', picture),
    BadRecordError('unreadable_record', 'cut'),
  )  # fmt: skip
  stream = Stream(listed.Listed('talk', records), formats.Conversations())
  made = _pipeline(
    packer=packer, streams=(stream,), prefetch=0, limit=ErrorBudget(share=1)
  )
  iterator = made.iterator()
  for batch in _take(iterator, 8):
    # Of packed rows, one may hold nothing but a picture that cannot be read.
    shown = (batch['image_starts'] != NO_IMAGE).any(axis=1)
    assert shown.all() or packer
  assert iterator.counts.of('talk').keys() == {
    'unpaired_tag', 'image_mismatch', 'unreadable_image', 'no_question',
    'unreadable_record',
  }  # fmt: skip
  rows = _take(made.rows(), 12)
  assert {x for _, stats in rows for x in stats.records} == {'good'}
  for row, stats in rows:
    assert (row['segment_ids'].max() > 0) == bool(stats.records)
  told = {key: text for _, x in rows for key, text in x.dropped.items()}
  assert 'tag: ' in told['talk', 'unpaired_tag']
