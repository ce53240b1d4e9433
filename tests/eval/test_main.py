"""The command: runs, resumes, refuses, compares; on one's own questions."""

import json

import pytest
import reciter
from PIL import Image

from qwenvl_jax.eval.main import main


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp('model') / 'reciting'
  reciter.save(folder)
  return folder


@pytest.fixture
def questions(tmp_path, data_url):
  Image.new('RGB', (60, 40), 'red').save(tmp_path / 'red.png')
  lines = [
    {'id': 'right', 'question': 'What?', 'answer': reciter.ANSWER},
    {'question': 'And?', 'answers': ['no', 7], 'image': 'red.png'},
    {'question': 'Two?', 'answer': 'x', 'images': ['red.png', data_url(1)]},
    {'question': 'Gone?', 'answer': 'x', 'image': 'gone.png'},
  ]
  file = tmp_path / 'mine.jsonl'
  file.write_text('\n'.join(map(json.dumps, lines)))
  return file


def run(checkpoint, questions, out, *more):
  return main(
    [
      f'--checkpoint={checkpoint}',
      f'--jsonl={questions}',
      '--metric=exact_match',
      '--chat',
      '--max_tokens=16',
      '--slots=2',
      f'--out={out}',
      *more,
    ]
  )


def test_a_run_from_questions_to_pages(checkpoint, questions, tmp_path, capsys):
  out = tmp_path / 'out'
  assert run(checkpoint, questions, out) == 0
  said = capsys.readouterr().out
  assert '33.33' in said and '1 missing_picture' in said
  lines = (out / 'mine' / 'predictions.jsonl').read_text().splitlines()
  found = {line['key']: line for line in map(json.loads, lines)}
  assert list(found) == ['right', 'line 2', 'line 3']
  assert found['right']['scores'] == {'exact_match': 1.0}
  assert found['line 2']['prediction'] == reciter.ANSWER
  assert found['line 2']['target'] == ['no', '7']
  results = json.loads((out / 'mine' / 'results.json').read_text())
  assert results['scores']['exact_match']['score'] == pytest.approx(1 / 3)
  assert results['counts']['problems'] == {'missing_picture': 1}
  assert 'gone.png' in results['problems']['line 4']
  assert results['decoding']['max_tokens'] == 16
  assert len(results['model']['digest']) == 32
  assert 'jax' in results['versions']
  assert '| mine.jsonl | exact_match | 33.33 |' in (
    (out / 'results.md').read_text()
  )
  page = (out / 'pictures.html').read_text()
  # Worst first; of the text alone, no picture.
  assert page.index('And?') < page.index('Two?') < page.index('What?')
  assert page.count('data:image/jpeg;base64,') == 3
  before = (out / 'mine' / 'answers.jsonl').read_bytes()
  # Nothing is asked but what had no answer.
  assert run(checkpoint, questions, out) == 0
  after = (out / 'mine' / 'answers.jsonl').read_bytes()
  assert after.startswith(before) and after.count(b'\n') == 5


def test_a_run_without_an_answer_fails(checkpoint, tmp_path, capsys):
  file = tmp_path / 'mine.jsonl'
  file.write_text('{"question": "Q", "answer": "a", "image": "gone.png"}')
  assert run(checkpoint, file, tmp_path / 'out') == 2
  said = capsys.readouterr().err.splitlines()[-1]
  assert 'none of 1 examples has an answer' in said and 'gone.png' in said


def test_a_file_where_the_folder_of_a_run_belongs(
  checkpoint, questions, capsys
):
  assert run(checkpoint, questions, questions) == 2
  assert f'error: {questions}: ' in capsys.readouterr().err


def test_shares_come_together(checkpoint, questions, tmp_path, capsys):
  out = tmp_path / 'out'
  for index in range(4):
    assert run(checkpoint, questions, out, f'--shard={index}/4') == 0
    said = capsys.readouterr().out
    assert ('left to other processes' in said) == (index < 3)
  assert '33.33' in said
  assert run(checkpoint, questions, tmp_path / 'alone') == 0
  both = [
    (folder / 'mine' / 'predictions.jsonl').read_text()
    for folder in (out, tmp_path / 'alone')
  ]
  assert both[0] == both[1]


def test_a_run_in_a_bucket(checkpoint, questions, bucket, tmp_path, capsys):
  out = f'{bucket.url}/eval'
  for index in (1, 0):
    assert run(checkpoint, questions, out, f'--shard={index}/2') == 0
  assert '33.33' in capsys.readouterr().out
  assert run(checkpoint, questions, tmp_path / 'disk') == 0
  on_disk = (tmp_path / 'disk/mine/predictions.jsonl').read_bytes()
  assert bucket.objects['eval/mine/predictions.jsonl'] == on_disk
  assert b'33.33' in bucket.objects['eval/results.md']
  before = bucket.objects['eval/mine/answers.0-of-2.jsonl']
  assert run(checkpoint, questions, out, '--shard=0/2') == 0
  after = bucket.objects['eval/mine/answers.0-of-2.jsonl']
  assert after.startswith(before)
  assert main(['compare', out, str(tmp_path / 'disk')]) == 0


def test_another_model_or_decoding_is_refused(
  checkpoint, questions, tmp_path, capsys
):
  out = tmp_path / 'out'
  assert run(checkpoint, questions, out, '--limit=1') == 0
  assert run(checkpoint, questions, out, '--max_tokens=3') == 2
  assert "decoding {'max_tokens': 16}" in capsys.readouterr().err
  assert run(checkpoint, questions, out, '--dtype=bfloat16') == 2
  error = capsys.readouterr().err
  assert "now it is {'dtype': 'bfloat16'}" in error
  assert len(error.splitlines()) == 1


def test_runs_are_compared(
  checkpoint, questions, tmp_path, capsys, monkeypatch
):
  monkeypatch.setenv('COLUMNS', '200')
  first, second = tmp_path / 'first', tmp_path / 'second'
  assert run(checkpoint, questions, first) == 0
  lines = questions.read_text().replace('"no"', json.dumps(reciter.ANSWER))
  questions.write_text(lines)
  assert run(checkpoint, questions, second) == 0
  capsys.readouterr()
  assert main(['compare', str(first), str(second)]) == 0
  said = capsys.readouterr().out
  assert '+33.33' in said
  page = (second / 'compare.html').read_text()
  assert 'And?' in page and 'What?' not in page
  assert main(['compare', str(first), str(tmp_path)]) == 2
  assert 'no task in both' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('line', 'said'),
  [
    ('{"question": "a"}', "line 1: no 'answer'"),
    ('{"questoin": "a", "answer": "b"}', 'did you mean questoin'),
    ('{"question": "a", "answer": []}', "'answer' is an empty list"),
    ('{"question": "", "answer": "b"}', "'question' is empty"),
    ('{"question": "a", "answer": "b", "image": 5}', 'a picture is 5'),
    ('[1]', 'no JSON object'),
    ('{"question"', 'line 1'),
    ('', 'hold no example'),
  ],
)
def test_lines_that_are_no_questions_are_named(
  line, said, tmp_path, capsys, checkpoint
):
  file = tmp_path / 'wrong.jsonl'
  file.write_text(line)
  assert run(checkpoint, file, tmp_path / 'out') == 2
  error = capsys.readouterr().err
  assert said in error and 'wrong' in error
  assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['--tasks=a', '--checkpoint=x'], "no task 'a'"),
    (['--tasks=scenes_test'], '--checkpoint=DIR or --base_url=URL'),
    (['--checkpoint=x'], '--list shows'),
    (['--jsonl=x', '--checkpoint=x'], 'needs --metric'),
    (['--jsonl=x', '--metric=anles', '--checkpoint=x'], 'did you mean anls'),
    (['--checkpoint=no', '--tasks=scenes_test'], 'no does not exist'),
    (
      ['--tasks=mme', '--checkpoint=x', '--data_dir=gs://b/d'],
      '--data_dir=gs://b/d is in a bucket',
    ),
    (['--taks=a'], 'did you mean --tasks'),
    (
      ['--jsonl=x', '--metric=anls', '--checkpoint=x', '--max_tokens=0'],
      '--max_tokens=0: must be at least 1',
    ),
    (['--base_url=localhost', '--tasks=mme'], '--base_url=localhost is no'),
    (['compare', 'a', 'b', '--pictures=-1'], '--pictures=-1'),
  ],
)
def test_mistakes_on_the_command_line(arguments, said, capsys):
  assert main(arguments) == 2
  error = capsys.readouterr().err
  assert said in error and len(error.splitlines()) == 1


def test_tasks_are_listed(capsys):
  assert main(['--list']) == 0
  assert 'scenes_test' in capsys.readouterr().out
