import dataclasses
import json
import logging
import math

import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.eval import registry, runner


def vqa(files, folder, prefix, split, number_of_questions=2):
  """VQAv2's and OK-VQA's two files, and their pictures."""
  names = ('v2_OpenEnded_mscoco', 'v2_mscoco')
  if prefix == 'okvqa':
    names = ('OpenEnded_mscoco', 'mscoco')
  questions = [
    {'image_id': 9 + i, 'question': f'What is {i}?', 'question_id': 90 + i}
    for i in range(number_of_questions)
  ]
  notes = [
    {
      'question_id': 90 + i,
      'image_id': 9 + i,
      'question_type': 'what is',
      'answer_type': 'other',
      'answers': [
        {'answer': text, 'answer_confidence': 'yes', 'answer_id': number}
        for number, text in enumerate(people(i), 1)
      ],
    }
    for i in range(number_of_questions)
  ]
  about = {'info': {}, 'license': {}, 'data_subtype': f'{split}2014'}
  files.json(
    f'{folder}/{names[0]}_{split}2014_questions.json',
    {**about, 'questions': questions},
  )
  files.json(
    f'{folder}/{names[1]}_{split}2014_annotations.json',
    {**about, 'annotations': notes},
  )
  files.pictures(
    *(
      f'{folder}/{split}2014/COCO_{split}2014_{9 + i:012}.jpg'
      for i in range(number_of_questions)
    )
  )


def people(question):
  """Ten answers: three alike; one person said nothing at all."""
  if question % 2:
    return ['cat'] * 10
  return ['red'] * 3 + [''] + ['blue', 'green', 'pink', 'grey', 'black', 'tan']


def test_vqav2(files, run):
  vqa(files, 'vqav2', 'vqav2', 'val')
  task = registry.get('vqav2_val')
  scores, outcome, _ = run(task, {'90': 'Red.', '91': 'dog'}, count=2)
  # Seven people see three others who said red, three see two others.
  assert scores == {'vqa_accuracy': pytest.approx(0.9 / 2)}
  first = outcome.items[0].example.prompt
  assert first.parts[1] == 'What is 0? Answer:'
  assert first.text.startswith('<img>COCO_val2014_000000000009.jpg</img>What')


def test_few_shot_examples_come_from_the_train_split(files, run):
  vqa(files, 'okvqa', 'okvqa', 'val')
  vqa(files, 'okvqa', 'okvqa', 'train', 6)
  task = registry.get('okvqa_val_2shot')
  scores, outcome, _ = run(task, {'90': 'red', '91': 'cat'}, count=2)
  assert scores == {'vqa_accuracy': pytest.approx(0.95)}
  prompt = outcome.items[0].example.prompt
  assert [type(x) is str for x in prompt.parts] == [False, True] * 3
  assert all('train2014' in str(x) for x in prompt.pictures[:2])
  assert 'val2014' in str(prompt.pictures[2])
  assert prompt.parts[1].endswith((' Answer: red', ' Answer: cat'))
  assert prompt.parts[1] != prompt.parts[3]
  # The same in every run, and another draw for another seed.
  again = list(task.examples(files.root))
  assert again[0].prompt.text == prompt.text
  other = dataclasses.replace(task, seed=1)
  assert [x.prompt.text for x in other.examples(files.root)] != [
    x.prompt.text for x in again
  ]


def test_vizwiz_and_textvqa(files, run):
  answers = [{'answer': 'unanswerable', 'answer_confidence': 'no'}] * 10
  files.json(
    'vizwiz/Annotations/val.json',
    [
      {
        'image': 'VizWiz_val_00000000.jpg',
        'question': 'What is this?',
        'answers': answers,
        'answer_type': 'unanswerable',
        'answerable': 0,
      }
    ],
  )
  files.pictures('vizwiz/val/VizWiz_val_00000000.jpg')
  scores, *_ = run(registry.get('vizwiz_val'), {'0': 'unanswerable'}, 1)
  assert scores == {'vqa_accuracy': 1}
  files.json(
    'textvqa/TextVQA_0.5.1_val.json',
    {
      'dataset_name': 'TextVQA',
      'data': [
        {
          'question_id': 34602,
          'image_id': '003a8ae2ef43b901',
          'question': 'what is the brand?',
          'answers': ['nous les gosses', 'dakota', *['dakota digital'] * 8],
        }
      ],
    },
  )
  files.pictures('textvqa/train_images/003a8ae2ef43b901.jpg')
  scores, *_ = run(registry.get('textvqa_val'), {'34602': 'Dakota'}, 1)
  assert scores['vqa_accuracy'] == pytest.approx(0.9 / 3)


def test_gqa_gives_both_readings(files, run):
  files.json(
    'gqa/testdev_balanced_questions.json',
    {
      '201307251': {
        'imageId': 'n161313',
        'question': 'What is on the plate?',
        'answer': 'pizza slice',
        'isBalanced': True,
      },
      '201640614': {
        'imageId': 'n235859',
        'question': 'Who is wearing the dress?',
        'answer': 'woman',
      },
    },
  )
  files.pictures('gqa/images/n161313.jpg', 'gqa/images/n235859.jpg')
  said = {'201307251': 'pizza slice', '201640614': 'It is the woman.'}
  scores, *_ = run(registry.get('gqa_testdev'), said, 2)
  assert scores == {'accuracy': 1, 'accuracy_release': 0.5}


def test_docvqa(files, run):
  files.json(
    'docvqa/val_v1.0_withQT.json',
    {
      'dataset_name': 'SP-DocVQA',
      'dataset_split': 'val',
      'data': [
        {
          'questionId': 49153,
          'question': 'What is the ‘actual’ value?',
          'image': 'documents/pybv0228_81.png',
          'docId': 14465,
          'answers': ['0.28', 'ITC Limited'],
          'data_split': 'val',
        }
      ],
    },
  )
  files.pictures('docvqa/documents/pybv0228_81.png')
  scores, *_ = run(registry.get('docvqa_val'), {'49153': 'ITC Ltd'}, 1)
  assert scores == {'anls': pytest.approx(1 - 4 / 11)}


def charts(files):
  for kind, entries in (
    ('human', [('1.png', 'How many?', '100'), ('2.png', 'Who?', 'Yes')]),
    ('augmented', [('3.png', 'How many in 2019?', '45%')]),
  ):
    files.json(
      f'chartqa/test/test_{kind}.json',
      [{'imgname': x, 'query': y, 'label': z} for x, y, z in entries],
    )
  files.pictures(*(f'chartqa/test/png/{i}.png' for i in (1, 2, 3)))


def test_chartqa_averages_its_halves(files, run):
  charts(files)
  said = {'human/0': '95', 'human/1': 'no', 'augmented/0': '0.46'}
  scores, *_ = run(registry.get('chartqa_test'), said, 3)
  # Of two human answers one, and the one that is augmented; the release counts
  # 5% of the answer, so that 95 is not 100.
  assert scores == {
    'relaxed_accuracy': (0.5 + 1) / 2,
    'relaxed_accuracy_release': (0 + 1) / 2,
  }
  scores, *_ = run(registry.get('chartqa_human'), {'0': '95', '1': 'yes'}, 2)
  assert scores['relaxed_accuracy'] == 1


def test_ai2d(files, run):
  files.write('ai2d/ai2d_test_ids.csv', b'\xef\xbb\xbf0\n')
  for name in ('0', '1'):
    files.json(
      f'ai2d/questions/{name}.png.json',
      {
        'imageName': f'{name}.png',
        'questions': {
          'What is A?': {
            'abcLabel': True,
            'answerTexts': ['ears', 'nose', 'mouth', 'face'],
            'correctAnswer': 3,
            'questionId': f'{name}.png-0',
          }
        },
      },
    )
    files.pictures(f'ai2d/images/{name}.png')
  scores, outcome, _ = run(registry.get('ai2d_test'), {'0.png-0': 'Face'}, 1)
  assert scores == {'accuracy': 1}
  assert outcome.items[0].example.prompt.parts[1] == (
    'What is A? Options: ears, nose, mouth, face. Answer:'
  )


def test_ai2d_as_the_release_has_it(files, run):
  line = {
    'image': 'data/ai2diagram/images/0.png',
    'question': 'What is A? (A) ears (B) face',
    'question_id': 7,
    'answer': 'face',
  }
  lines = json.dumps(line) + '\n' + json.dumps(line | {'answer': 'ears'})
  files.write('ai2d/test.jsonl', lines.encode())
  task = registry.get('ai2d_test')
  with pytest.raises(DataError, match='ai2d/images: no such file'):
    task.check(files.root)
  files.pictures('ai2d/images/0.png')
  scores, outcome, _ = run(task, lambda x: 'Face', 2)
  assert scores == {'accuracy': 0.5}
  assert outcome.items[0].example.prompt.parts[1] == (
    'What is A? (A) ears (B) face Answer:'
  )


def test_ocrvqa(files, run, caplog):
  files.json(
    'ocrvqa/dataset.json',
    {
      '000': {
        'imageURL': 'http://ecx.images.com/images/51.jpg',
        'questions': ['Who wrote this book?', 'Is this a novel?', 'Who?'],
        'answers': ['A. J. Cronin', 'No', ''],
        'title': 'The Citadel',
        'split': 3,
      },
      '001': {'split': 1, 'questions': ['x'], 'answers': ['y']},
    },
  )
  files.pictures('ocrvqa/images/000.jpg')
  said = {'000/0': 'a. j. cronin', '000/1': 'Yes'}
  with caplog.at_level(logging.WARNING):
    scores, *_ = run(registry.get('ocrvqa_test'), said)
  assert scores == {'accuracy': 0.5}
  assert 'ocrvqa: 1 questions without text or answer' in caplog.text


def test_wrong_downloads_are_named(files):
  task = dataclasses.replace(registry.get('chartqa_human'), count=2)
  with pytest.raises(DataError, match='no such file.*github.com/vis-nlp'):
    runner.take(task, files.root)
  charts(files)
  runner.take(task, files.root)
  more = dataclasses.replace(task, count=1250)
  with pytest.raises(DataError, match='2 examples, but there are 1,250.*cut'):
    runner.take(more, files.root)
  # A few examples are enough to try.
  assert len(runner.take(more, files.root, limit=1)) == 1
  (files.root / 'chartqa/test/png/1.png').unlink()
  with pytest.raises(DataError, match='1 of 2 pictures.*first is.*1.png'):
    runner.take(task, files.root)
  files.write('chartqa/test/test_human.json', b'')
  with pytest.raises(DataError, match='test_human.json: is empty'):
    runner.take(task, files.root)
  files.write('chartqa/test/test_human.json', b'[{"imgname": "2.png", "que')
  with pytest.raises(DataError, match='not JSON.*download it again'):
    runner.take(task, files.root)


@pytest.mark.parametrize(
  ('entry', 'message'),
  [
    ({'label': math.nan}, 'question 0, answer: the value is nan'),
    ({'label': None}, 'question 0, answer: the value is not text'),
    ({'query': ['x']}, "question 0.*'query' is not text"),
    ({'imgname': '../../secret.png'}, 'leads out of'),
    ({'imgname': 'http://x/y.png'}, 'no URL is fetched'),
  ],
)
def test_bad_annotations_are_named(files, entry, message):
  charts(files)
  good = {'imgname': '1.png', 'query': 'How many?', 'label': '5'}
  files.json('chartqa/test/test_human.json', [{**good, **entry}])
  with pytest.raises(DataError, match=message):
    list(registry.get('chartqa_human').examples(files.root))


def test_numbers_as_answers_are_text(files):
  charts(files)
  entry = {'imgname': '1.png', 'query': 'How many?', 'label': 5}
  files.json('chartqa/test/test_human.json', [entry])
  [example] = registry.get('chartqa_human').examples(files.root)
  assert example.target == ['5']
