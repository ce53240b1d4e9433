"""Processes that share the questions, and are killed, answer as one would."""

import collections
import json
import os
import random
import subprocess
import sys
import time

import golden as golden_files
import pytest
from PIL import Image

from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.eval.main import main
from qwenvl_jax.model.stacking import stack_layers

pytestmark = pytest.mark.slow

_COUNT = 96


@pytest.fixture(scope='module')
def asked(tmp_path_factory, random_handle):
  """Arguments that ask a model whose answers differ; every fourth is right."""
  folder = tmp_path_factory.mktemp('asked')
  config = random_handle.config.replace(scan_layers=True)
  assets.write_assets(folder / 'model', config)
  random_handle.tokenizer.save(folder / 'model' / assets.VOCABULARY)
  golden_files.save_params(folder / 'model', stack_layers(random_handle.params))
  Image.new('RGB', (60, 40), 'red').save(folder / 'red.png')
  lines = [
    {'id': f'q{i}', 'question': f'{i}?', 'answer': 'a', 'image': 'red.png'}
    for i in range(_COUNT)
  ]
  file = folder / 'mine.jsonl'

  def arguments(out):
    return [
      f'--checkpoint={folder / "model"}',
      f'--jsonl={file}',
      '--metric=exact_match',
      '--max_tokens=24',
      '--max_len=192',
      '--slots=2',
      f'--out={out}',
    ]

  file.write_text('\n'.join(map(json.dumps, lines)))
  assert main(arguments(folder / 'first')) == 0
  for line, said in zip(lines[::4], predictions(folder / 'first')[::4]):
    line['answer'] = said['prediction']
  file.write_text('\n'.join(map(json.dumps, lines)))
  return arguments


@pytest.fixture(scope='module')
def alone(asked, tmp_path_factory):
  """The folder of a run by one process that nothing happened to."""
  out = tmp_path_factory.mktemp('alone')
  assert main(asked(out)) == 0
  return out


def predictions(out):
  file = out / 'mine' / 'predictions.jsonl'
  return [json.loads(line) for line in file.read_text().splitlines()]


def scores(out):
  return json.loads((out / 'mine' / 'results.json').read_text())['scores']


def answer_files(out):
  return sorted((out / 'mine').glob('answers*.jsonl'))


def start(arguments, index):
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'qwenvl_jax.eval.main', *arguments),
      f'--shard={index}/4',
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )


def test_four_at_once_killed_again_and_again(asked, alone, tmp_path):
  rng = random.Random(0)
  out = tmp_path / 'out'
  lines_at_kills = []
  for count in (4, 2):
    running = [start(asked(out), index) for index in range(count)]
    before = sum(map(os.path.getsize, answer_files(out)))
    # Some answers more, then whatever moment it is.
    while sum(map(os.path.getsize, answer_files(out))) == before:
      assert any(one.poll() is None for one in running)
      time.sleep(0.01)
    for one in rng.sample(running, count):
      time.sleep(rng.uniform(0, 0.1))
      one.kill()
    for one in running:
      one.communicate()
    lines_at_kills.append(
      sum(file.read_bytes().count(b'\n') for file in answer_files(out))
    )
  # It was stopped on its way, and each time it went on.
  assert 0 < lines_at_kills[0] < lines_at_kills[-1] < _COUNT, lines_at_kills
  running = [start(asked(out), index) for index in range(4)]
  for one in running:
    _, error = one.communicate(timeout=300)
    assert one.returncode == 0, error.decode()
  keys = collections.Counter(
    json.loads(line)['key']
    for file in answer_files(out)
    for line in file.read_text().splitlines()
  )
  assert keys == {f'q{i}': 1 for i in range(_COUNT)}
  assert predictions(out) == predictions(alone)
  assert scores(out) == scores(alone)
  # Mixing answers up would be seen.
  assert len({said['prediction'] for said in predictions(alone)}) > _COUNT / 2
  assert scores(alone)['exact_match']['score'] < 0.5
