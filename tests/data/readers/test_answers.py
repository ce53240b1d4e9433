import downloads
import pytest

from qwenvl_jax.data.readers.answers import QaTable, VqaPair, best_answer


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
