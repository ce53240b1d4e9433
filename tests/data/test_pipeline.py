import dataclasses
import itertools

import numpy as np
import pytest

from qwenvl_jax import image
from qwenvl_jax.batch import NO_IMAGE, Batch
from qwenvl_jax.data import formats, pipeline, sources, tasks
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.text.tokenizer import Tokenizer


@pytest.fixture
def settings(small_scenes, vocabulary):
  return {
    'streams': (
      pipeline.Stream(small_scenes, tasks.Questions(), weight=3),
      pipeline.Stream(small_scenes, tasks.Questions(in_words=True), weight=1),
    ),
    'vocabulary': vocabulary,
    'sequence_length': 288,
    'batch_size': 4,
    'prefetch': 4,
  }


def _take(iterator, count):
  return list(itertools.islice(iterator, count))


def _equal(left, right):
  return all(
    a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    for a, b in zip(left, right, strict=True)
  )


def test_batches_have_the_contract_shapes(settings):
  batch = next(pipeline.Pipeline(**settings).iterator())
  batch = Batch(**batch)
  assert batch.tokens.shape == (4, 288) and batch.tokens.dtype == np.int32
  assert batch.pixels.shape == (4, 1, 112, 112, 3)
  assert batch.pixels.dtype == np.uint8
  assert batch.image_starts.shape == (4, 1)
  assert (batch.loss_weights.sum(axis=1) > 0).all()
  assert batch.tokens.max() < Tokenizer(settings['vocabulary']).vocab_size


def test_same_seed_same_rows_other_seed_other_rows(settings):
  first = _take(pipeline.Pipeline(**settings).iterator(), 3)
  settings['prefetch'] = 0
  assert _equal(first, _take(pipeline.Pipeline(**settings).iterator(), 3))
  settings['seed'] = 1
  assert not _equal(first, _take(pipeline.Pipeline(**settings).iterator(), 3))


def test_a_saved_state_goes_on_exactly(settings):
  source = sources.Scenes(
    settings['streams'][0].source.data_dir, config='small', limit=10
  )
  streams = [dataclasses.replace(x, source=source) for x in settings['streams']]
  made = pipeline.Pipeline(**settings | {'streams': streams})
  iterator = made.iterator()
  # Far enough that the source is in a later round.
  _take(iterator, 9)
  state = iterator.get_state()
  expected = _take(iterator, 3)
  other = made.iterator()
  next(other)
  other.set_state(state)
  assert _equal(expected, _take(other, 3))


def test_processes_share_the_rows(settings):
  made = pipeline.Pipeline(**settings)
  whole = _take(made.iterator(), 3)
  parts = [_take(made.iterator(index, 2), 3) for index in range(2)]
  for step in range(3):
    for index in range(2):
      rows = parts[index][step]['tokens']
      assert rows.shape[0] == 2
      np.testing.assert_array_equal(rows, whole[step]['tokens'][index::2])


def test_questions_change_from_round_to_round(settings, small_scenes):
  source = sources.Scenes(small_scenes.data_dir, config='small', limit=4)
  settings['streams'] = (pipeline.Stream(source, tasks.Questions()),)
  rounds = _take(pipeline.Pipeline(**settings).iterator(), 3)
  pictures = [
    sorted(row.tobytes() for row in batch['pixels']) for batch in rounds
  ]
  assert pictures[0] == pictures[1] == pictures[2]
  tokens = [
    sorted(row.tobytes() for row in batch['tokens']) for batch in rounds
  ]
  assert tokens[0] != tokens[1] != tokens[2]


def test_streams_mix_by_weight(settings):
  batches = _take(pipeline.Pipeline(**settings).iterator(), 10)
  starts = np.concatenate([x['image_starts'][:, 0] for x in batches])
  assert (starts == NO_IMAGE).sum() == 10 and (starts == 1).sum() == 30


def test_chats_with_two_pictures(settings, small_scenes):
  stream = pipeline.Stream(small_scenes, tasks.Chats(two=1, branches=2))
  settings.update(streams=(stream,), image_slots=2, sequence_length=384)
  batch = next(pipeline.Pipeline(**settings).iterator())
  assert (batch['image_starts'] != NO_IMAGE).all()
  start = Tokenizer(settings['vocabulary']).img_start_id
  rows = np.arange(4)[:, None]
  assert (batch['tokens'][rows, batch['image_starts'] - 1] == start).all()
  assert (batch['pixels'][:, 0] != batch['pixels'][:, 1]).any()


def test_one_question_without_branches(settings, small_scenes):
  stream = pipeline.Stream(small_scenes, tasks.Questions(branches=0))
  settings.update(streams=(stream,), sequence_length=176)
  for batch in _take(pipeline.Pipeline(**settings).iterator(), 3):
    assert not batch['branch_ids'].any()
    used = batch['segment_ids'] > 0
    np.testing.assert_array_equal(batch['positions'][used], np.nonzero(used)[1])


def test_easy_vqa_and_the_released_vocabulary(settings):
  stream = pipeline.Stream(sources.EasyVqa('test'), formats.Answers(branches=6))
  settings.update(streams=(stream,), vocabulary=None, sequence_length=192)
  batch = next(pipeline.Pipeline(**settings).iterator())
  weights, targets = batch['loss_weights'][0], batch['targets'][0]
  answers = Tokenizer().decode(targets[weights > 0]).split('<|endoftext|>')
  known = 'circle green red gray yes teal black rectangle yellow triangle '
  known = {*(known + 'brown blue no').split(), ''}
  assert {x.strip() for x in answers} <= known and len(answers) > 2


@pytest.mark.slow
def test_worker_processes_make_the_same_rows(settings):
  here = _take(pipeline.Pipeline(**settings).iterator(), 2)
  made = pipeline.Pipeline(**settings, workers=1)
  iterator = made.iterator()
  assert _equal(here, _take(iterator, 2))
  state = iterator.get_state()
  expected = _take(iterator, 2)
  other = made.iterator()
  other.set_state(state)
  assert _equal(expected, _take(other, 2))


def test_vision_batches(small_scenes):
  made = pipeline.VisionPipeline(source=small_scenes, batch_size=4, grid=8)
  first = _take(made.iterator(), 2)
  assert first[0]['pixels'].shape == (4, 112, 112, 3)
  assert first[0]['patch_labels'].shape == (4, 8, 8)
  assert first[0]['patch_boxes'].shape == (4, 8, 8, 4)
  assert _equal(first, _take(made.iterator(), 2))
  small = pipeline.VisionPipeline(source=small_scenes, image_size=56, grid=4)
  batch = next(small.iterator())
  assert batch['pixels'].shape == (32, 56, 56, 3)
  assert batch['patch_labels'].shape == (32, 4, 4)


def test_pixels_are_those_of_the_record(settings, small_scenes):
  records = {
    image.pixels(x.image, 112).tobytes(): x for x in small_scenes.open()
  }
  tokenizer = Tokenizer(settings['vocabulary'])
  asked = tasks.Questions(kinds={'caption': 1}, chinese=0, branches=1)
  settings['streams'] = (pipeline.Stream(small_scenes, asked),)
  batch = next(pipeline.Pipeline(**settings).iterator())
  for row in range(4):
    scene = records[batch['pixels'][row, 0].tobytes()]
    learned = batch['targets'][row][batch['loss_weights'][row] > 0]
    assert f'{scene.colour_name("en")} background' in tokenizer.decode(learned)


def test_impossible_settings_say_what_to_change(settings, small_scenes):
  with pytest.raises(ConfigError, match='batch_size=4.*3 processes'):
    pipeline.Pipeline(**settings).iterator(0, 3)
  with pytest.raises(ConfigError, match='streams'):
    pipeline.Pipeline(**settings | {'streams': ()}).iterator()
  for key in ('batch_size', 'sequence_length', 'image_tokens', 'prefetch'):
    for value in (-1, 2.5, '8'):
      with pytest.raises(ConfigError, match=f'Pipeline.{key}=.*whole number'):
        pipeline.Pipeline(**settings | {key: value}).iterator()
  for weight in (0, -1, float('nan'), '1'):
    stream = pipeline.Stream(small_scenes, tasks.Questions(), weight=weight)
    with pytest.raises(ConfigError, match='weight=.*Scenes.*above 0'):
      pipeline.Pipeline(**settings | {'streams': (stream,)}).iterator()
  with pytest.raises(ConfigError, match="'captoin'"):
    tasks.Questions(kinds={'captoin': 1})
  alone = sources.Scenes(small_scenes.data_dir, config='small', max_objects=1)
  stream = pipeline.Stream(alone, tasks.Questions(kinds={'left_of': 1}))
  with pytest.raises(ConfigError, match='left_of'):
    next(pipeline.Pipeline(**settings | {'streams': (stream,)}).iterator())
  with pytest.raises(DataError, match='scenes/train/.*sequence_length'):
    next(pipeline.Pipeline(**settings | {'sequence_length': 40}).iterator())
