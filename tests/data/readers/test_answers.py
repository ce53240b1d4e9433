import pickle

import downloads
import pytest

from qwenvl_jax.data.readers.answers import (
  OcrVqa,
  QaTable,
  ScienceQa,
  VisualGenomeQa,
  VqaPair,
  best_answer,
  qa,
)
from qwenvl_jax.data.readers.captions import CocoCaptions
from qwenvl_jax.data.readers.places import Refer, VisualGenomeRegions
from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import BadRecordError


@pytest.mark.parametrize(
  ('answers', 'confidences', 'best'),
  [
    (['a', 'b', 'b'], (), 'b'),
    (['a', 'b', 'b'], ('yes', 'maybe', 'no'), 'a'),
    (['a', 'b', 'b'], ('yes', 'maybe', 'maybe'), 'b'),
    (['b', 'a'], ('no', 'no'), 'b'),
    (['b', 'a'], ('unheard of', 'maybe'), 'a'),
  ],
)
def test_best_answer(answers, confidences, best):
  assert best_answer(answers, confidences) == best


def test_what_is_wrong_with_a_question_is_said(tmp_path):
  good = {'image': 'a.jpg', 'question': 'Q?', 'answer': 7}
  bad = [
    {},
    good | {'question': ' '},
    good | {'answer': []},
    good | {'answer': None},
    good | {'answer': [{'no': 'answer'}]},
    good | {'image': ['a.jpg']},
  ]
  downloads.write(tmp_path, 'q.json', [good, *bad])
  *errors, record = QaTable('q.json').records(tmp_path)
  assert record.questions[0].answer == '7'
  assert [x.reason for x in errors] == [
    'malformed', 'empty_text', 'empty_text', 'malformed', 'malformed',
    'malformed',
  ]  # fmt: skip
  assert 'q.json, question 1' in str(errors[0])


def test_questions_without_answers(tmp_path):
  downloads.vqav2(tmp_path)
  name = 'v2_mscoco_train2014_annotations.json'
  downloads.write(tmp_path, name, {'annotations': []})
  reader = VqaPair(
    'v2_OpenEnded_mscoco_train2014_questions.json', name, '{}.jpg'
  )
  assert [x.reason for x in reader.records(tmp_path)] == ['empty_text'] * 2


def test_an_empty_answer_of_several_is_left_out():
  given = [{'answer': x, 'answer_confidence': 'no'} for x in ('', 'cat')]
  asked = qa('Q?', [*given, {'answer': 'dog'}], 'r')
  assert asked.answers == ('cat', 'dog') and asked.answer == 'dog'
  nan = float('nan')
  assert qa('Q?', [nan, 'cat'], 'r').answer == 'cat'
  with pytest.raises(BadRecordError) as caught:
    qa('Q?', nan, 'r')
  assert caught.value.reason == 'empty_text'


_FILES = {
  QaTable('x.json'): {'image': 'a.jpg', 'question': 'Q?', 'answer': 'dog'},
  VisualGenomeQa('x.json'): {
    'qas': [{'question': 'Q?', 'answer': 'a', 'image_id': 1, 'qa_id': 2}]
  },
  OcrVqa(1, 'x.json'): {'split': 1, 'questions': ['a'], 'answers': ['b']},
  ScienceQa('train', 'x.json'): {
    'split': 'train', 'image': 'i', 'question': 'q', 'answer': 0,
    'choices': ['a', 'b'],
  },
  VisualGenomeRegions('x.json'): {
    'id': 1,
    'regions': [{'x': 1, 'y': 1, 'width': 2, 'height': 2, 'phrase': 'p'}],
  },
}  # fmt: skip


@pytest.mark.parametrize('reader', _FILES)
@pytest.mark.parametrize(
  'odd', [5, None, 'text', [], [1], {'answer': {}}, True]
)
def test_an_odd_entry_ends_nothing(reader, odd, tmp_path):
  """In the place of an entry, and of each of its fields."""
  good = _FILES[reader]
  entries = [odd, *({**good, key: odd} for key in good), good]
  keyed = {str(i): x for i, x in enumerate(entries)}
  listed = not isinstance(reader, (OcrVqa, ScienceQa))
  downloads.write(tmp_path, 'x.json', entries if listed else keyed)
  found = list(reader.records(tmp_path))
  assert isinstance(found[-1], Record)
  assert all(isinstance(x, (Record, BadRecordError)) for x in found)
  assert {x.reason for x in found if isinstance(x, BadRecordError)} <= {
    'malformed', 'empty_text',
  }  # fmt: skip


def test_odd_answers_and_captions_end_nothing(tmp_path):
  given = [{'answer': 'a', 'answer_confidence': ['yes']}]
  notes = [{'question_id': 1, 'answers': given}, 5, {'question_id': [1]}]
  notes.append({'question_id': 2, 'answers': ['b']})
  asked = [
    {'question_id': x, 'question': 'Q?', 'image_id': 1} for x in (1, 2, [3])
  ]
  downloads.write(tmp_path, 'q.json', {'questions': [*asked, 'x']})
  downloads.write(tmp_path, 'a.json', {'annotations': notes})
  *errors, record = VqaPair('q.json', 'a.json', '{}.jpg').records(tmp_path)
  assert [x.reason for x in errors] == ['malformed'] * 3
  assert record.questions[0].answer == 'b'
  notes = [{'image_id': 1, 'caption': x} for x in ('one', '', None, ['x'])]
  notes += [{'image_id': {}, 'caption': 'x'}, 'x']
  images = [{'id': 1, 'file_name': 'a.jpg'}, {'id': [], 'file_name': 'b'}, 7]
  downloads.write(tmp_path, 'c.json', {'images': images, 'annotations': notes})
  found = list(CocoCaptions('c.json').records(tmp_path))
  assert [x.captions for x in found if isinstance(x, Record)] == [('one',)]
  assert len(found) == 8


def test_odd_references_end_nothing(tmp_path):
  ref = {
    'image_id': 1,
    'split': 'val',
    'ann_id': 1,
    'sentences': [{'sent': 's'}],
  }
  refs = [ref, 5, {**ref, 'image_id': 2}, {**ref, 'image_id': 3, 'ann_id': []}]
  downloads.write(tmp_path, 'refs(unc).p', pickle.dumps(refs))
  size = {'width': 40, 'height': 30}
  images = [{'id': x, 'file_name': 'a.jpg', **size} for x in (1, 3)] + [None]
  boxes = [{'id': 1, 'bbox': [1, 2, 3, 4]}, {'id': {}}, 'x']
  downloads.write(
    tmp_path, 'instances.json', {'annotations': boxes, 'images': images}
  )
  found = list(Refer('val').records(tmp_path))
  assert [isinstance(x, Record) for x in found].count(True) == 1
  assert [x.reason for x in found if isinstance(x, BadRecordError)] == [
    'malformed'
  ] * 3
