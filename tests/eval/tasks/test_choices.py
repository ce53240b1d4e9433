"""ScienceQA, SEED-Bench and MMBench, with scores by hand."""

import csv
import dataclasses
import io
import json

import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.eval import registry, results, runner, tables
from qwenvl_jax.eval.annotations import videos


def scienceqa(files, listed=('4', '5')):
  problem = {
    'question': 'What does this show?',
    'choices': ['heat', 'cold'],
    'answer': 1,
    'hint': 'Look at it.',
    'image': 'image.png',
    'task': 'closed choice',
    'grade': 'grade8',
    'subject': 'natural science',
    'split': 'test',
  }
  files.json(
    'scienceqa/problems.json',
    {
      '1': {**problem, 'split': 'train'},
      '4': problem,
      '5': {**problem, 'hint': '', 'answer': 0},
      '6': {**problem, 'image': None},
    },
  )
  files.json('scienceqa/pid_splits.json', {'test': [*listed, '6']})
  files.pictures(*(f'scienceqa/test/{i}/image.png' for i in (4, 5)))


def test_scienceqa(files, run):
  scienceqa(files)
  task = registry.get('scienceqa_img')
  scores, outcome, _ = run(task, {'4': 'B', '5': 'B'}, 2)
  assert scores == {'accuracy': 0.5}
  first, second = (item.example for item in outcome.items)
  assert first.prompt.parts[1] == (
    'Context: Look at it.\nQuestion: What does this show?\n'
    'Options: A. heat\nB. cold\nAnswer:'
  )
  assert second.prompt.parts[1].startswith('Context: N/A\n')
  assert first.choices == (' A', ' B')


def test_problems_of_another_split_are_named(files):
  scienceqa(files, listed=('4',))
  task = dataclasses.replace(registry.get('scienceqa_img'), count=2)
  with pytest.raises(DataError, match='problem 5 is none of the test split'):
    runner.take(task, files.root)


def seed_bench(files):
  def question(number, dimension, data_id, answer, **more):
    return {
      'question_id': f'{number}',
      'question_type_id': dimension,
      'data_id': data_id,
      'question': 'How many?',
      **{f'choice_{x}': f'{x} of them' for x in 'abcd'},
      'answer': answer,
      **more,
    }

  files.json(
    'seed_bench/SEED-Bench.json',
    {
      'questions': [
        question('101', 1, '1454426_2591111986', 'A'),
        question('102', 1, '1454426_2591111986', 'B'),
        question('103', 5, '1454426_2591111986', 'C'),
        question('v0', 10, '1.webm', 'D'),
        question('v1', 12, 'P03/x.avi', 'A', segment=[10, 60]),
      ],
      'question_type': {'Scene Understanding': 1},
    },
  )
  files.pictures('seed_bench/SEED-Bench-image/1454426_2591111986')


def test_seed_bench(files, run):
  seed_bench(files)
  files.pictures(
    *(f'seed_bench/video_imgs_4/v{q}_{i}.jpg' for q in (0, 1) for i in range(4))
  )
  task = registry.get('seed_bench')
  said = {'101': 'A', '102': 'A', '103': 'C', 'v0': 'D', 'v1': 'B'}
  scores, outcome, _ = run(task, said, 5)
  assert scores == {'accuracy': 3 / 5}
  dimensions = [item.example.category for item in outcome.items]
  assert dimensions == [
    *['Scene Understanding'] * 2, 'Instances Counting', 'Action Recognition',
    'Procedure Understanding',
  ]  # fmt: skip
  picture, video = outcome.items[0].example.prompt, outcome.items[3].example
  assert picture.parts[1].startswith('\nQuestion: How many?\nOptions: A. a of')
  assert video.prompt.text.startswith(
    '<img>v0_0.jpg</img>\n<img>v0_1.jpg</img>\n<img>v0_2.jpg</img>\n'
    '<img>v0_3.jpg</img>\nQuestion: How many?\nOptions: A.'
  )
  pictures = registry.get('seed_bench_image')
  scores, *_ = run(pictures, said, 3)
  assert scores == {'accuracy': 2 / 3}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'question_type_id': [1]}, None),  # no dimension: not asked
    ({'answer': 'AB'}, "entry 0: 'AB' is none of A, B, C, D"),
    ({'data_id': '../x'}, 'entry 0: .*leads out of'),
    ({'choice_c': float('nan')}, "entry 0: 'choice_c' is nan"),
    ({'question_id': None}, "entry 0: 'question_id' is not text"),
  ],
)
def test_odd_questions_are_named(files, change, message):
  seed_bench(files)
  path = files.root / 'seed_bench/SEED-Bench.json'
  found = json.loads(path.read_text())
  found['questions'][0] |= change
  files.json('seed_bench/SEED-Bench.json', found)
  task = registry.get('seed_bench_image')
  if message is None:
    assert len(list(task.examples(files.root))) == 2
    return
  with pytest.raises(DataError, match=message):
    list(task.examples(files.root))


@pytest.mark.parametrize('questions', [5, None, [7], {'a': ['b']}])
def test_files_of_another_kind_are_named(files, questions):
  files.json('seed_bench/SEED-Bench.json', {'questions': questions})
  with pytest.raises(DataError, match='SEED-Bench.json'):
    list(registry.get('seed_bench_image').examples(files.root))
  files.json('docvqa/val_v1.0_withQT.json', {'data': questions})
  with pytest.raises(DataError, match='val_v1.0_withQT.json'):
    list(registry.get('docvqa_val').examples(files.root))
  files.json('GRIT/samples/test/refexp.json', questions)
  with pytest.raises(DataError, match='refexp.json'):
    list(registry.get('grit_refexp_test').examples(files.root))


def test_frames_are_taken_from_videos(files, tmp_path):
  av = pytest.importorskip('av')
  import numpy as np

  path = files.root / 'seed_bench/SSV2/1.webm'
  path.parent.mkdir(parents=True)
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('libvpx', rate=10)
    stream.width = stream.height = 32
    stream.pix_fmt = 'yuv420p'
    for number in range(21):
      grey = np.full((32, 32, 3), 10 * number, np.uint8)
      frame = av.VideoFrame.from_ndarray(grey, format='rgb24')
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  seed_bench(files)
  task = registry.get('seed_bench_video')
  found = {}
  with pytest.raises(DataError, match='x.avi is not there'):
    for example in task.examples(files.root):
      found[example.key] = example
  pictures = [x.open() for x in found['v0'].prompt.pictures]
  # Of 21 frames 20, in four parts: 2, 7, 12 and 16.
  grey = [np.asarray(x).mean() / 10 for x in pictures]
  assert grey == pytest.approx(videos.uniform(20, 4), abs=0.6)
  part = videos.frames(path, 4, 1.0, 2.0)
  grey = [np.asarray(x).mean() / 10 for x in part]
  assert grey == pytest.approx([11, 13, 15, 18], abs=0.6)


def mmbench(files, name='dev', answers=True, **other):
  """One question of three options in its three rotations, and one of two."""
  columns = [
    'index', 'question', 'hint', 'A', 'B', 'C', 'D', 'answer', 'category',
    'image', 'source', 'l2-category', 'comment', 'split',
  ]  # fmt: skip
  picture = files.base64()
  question = {'question': 'Which "one"?\nSay.', 'category': 'ocr', **other}
  rows = []
  options = ['sun', 'moon', 'star']
  for turn in range(3):
    turned = options[turn:] + options[:turn]
    rows.append(
      {
        'index': 7 + turn * 1_000_000,
        **dict(zip('ABC', turned)),
        'answer': 'ABC'[turned.index('moon')],
        'image': picture,
        **question,
      }
    )
  for turn in range(2):
    rows.append(
      {
        'index': 8 + turn * 1_000_000,
        'hint': 'None',
        **dict(zip('AB', ['None', 'one'][:: 1 - 2 * turn])),
        'answer': 'AB'[turn],
        'image': picture if not turn else '8',
        **question,
      }
    )
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, delimiter='\t')
  writer.writeheader()
  for row in rows:
    writer.writerow(row if answers else row | {'answer': ''})
  files.write(
    f'mmbench/mmbench_{name}_20230712.tsv', text.getvalue().encode('utf-8-sig')
  )


def test_mmbench_is_circular(files, run):
  mmbench(files)
  task = registry.get('mmbench_dev')
  # moon, moon, sun; None, None: two of three rotations are no right answer.
  said = {'7': 'B', '1000007': 'A', '2000007': 'B', '8': 'A', '1000008': 'B'}
  scores, outcome, folder = run(task, said, 5)
  assert len(outcome.items) == 5
  assert scores == {
    'accuracy': 0.5, 'accuracy_vote': 1, 'accuracy_single': 1,
  }  # fmt: skip
  prompt = outcome.items[0].example.prompt.parts[1]
  assert prompt == (
    'Context: N/A\nQuestion: Which "one"?\nSay.\n'
    'Options: A. sun\nB. moon\nC. star\nAnswer:'
  )
  table = (folder / 'mmbench_dev_submission.tsv').read_text().splitlines()
  assert table[0].split('\t') == ['index', *'ABCD', 'prediction']
  assert [x.split('\t')[-1] for x in table[1:]] == [*'BABAB']
  table = (folder / 'mmbench_dev_submission_vote.tsv').read_text().splitlines()
  assert [x.split('\t')[-1] for x in table[1:]] == [*'BACAB']


def test_mmbench_test_is_submitted(files, run):
  mmbench(files, 'test', answers=False)
  scores, _, folder = run(registry.get('mmbench_test'), lambda x: 'A', 5)
  assert scores == {}
  assert (folder / 'mmbench_test_submission.tsv').exists()
  _, [row] = tables.rows([results.load_summary(folder)])
  assert row[2] == 'no score'
  assert 'submit mmbench_test_submission.tsv' in row[5]


def test_damaged_tables_are_named(files):
  task = dataclasses.replace(registry.get('mmbench_dev'), count=5)
  mmbench(files)
  path = files.root / 'mmbench/mmbench_dev_20230712.tsv'
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) * 2 // 3])
  with pytest.raises(DataError, match=r'dev_20230712.tsv, line \d+: .*cut off'):
    runner.take(task, files.root)
  path.write_bytes(whole.replace(b'\thint\t', b'\tclue\t'))
  with pytest.raises(DataError, match="no column 'hint'.*another version"):
    runner.take(task, files.root)
  mmbench(files, A='')
  with pytest.raises(DataError, match='line 3: no options'):
    runner.take(task, files.root)
