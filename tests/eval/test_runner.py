"""Runs lose and double nothing, whoever shares them and whenever they end."""

import dataclasses
import json
import random

import pytest

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.eval import predictions, runner
from qwenvl_jax.eval.answering import Problem, Reply
from qwenvl_jax.eval.predictions import Shard
from qwenvl_jax.eval.task import Example, Prompt, Task


@dataclasses.dataclass(frozen=True)
class Numbers(Task):
  count: int = 40

  def examples(self, data_dir):
    for number in range(self.count):
      yield Example(
        key=f'n{number}',
        prompt=Prompt((f'{number}?',)),
        target=str(number),
        group=f'g{number // 4}',
      )

  def score(self, answer, example):
    return {'accuracy': float(answer == example.target)}


class Echo:
  """Says the question; counts what it is asked; may end, or fail at keys."""

  def __init__(self, ends_after=None, fails=()):
    self.asked, self.ends_after, self.fails = [], ends_after, fails

  def answer(self, examples, decoding):
    for example in examples:
      if len(self.asked) == self.ends_after:
        raise KeyboardInterrupt
      self.asked.append(example.key)
      if example.key in self.fails:
        yield example, Problem('missing_picture', f'{example.key}: no picture')
      else:
        yield example, Reply(example.prompt.text[:-1])


TASK = Numbers('numbers', 'Numbers')


@pytest.fixture
def examples():
  return runner.take(TASK, None)


def ask(examples, folder, model, shard=predictions.ALL):
  runner.ask(TASK, examples, lambda: model, folder, shard)


def test_shares_are_of_all_examples_and_disjoint(examples, tmp_path):
  asked = []
  for index in range(4):
    model = Echo()
    ask(examples, tmp_path, model, Shard(index, 4))
    asked += model.asked
    missing = runner.score(TASK, examples, tmp_path).missing
    assert missing == 40 - len(asked)
  assert sorted(asked) == sorted(example.key for example in examples)
  outcome = runner.score(TASK, examples, tmp_path)
  assert [item.example for item in outcome.items] == examples
  assert all(item.scores == {'accuracy': 1.0} for item in outcome.items)


def test_another_number_of_processes_goes_on(examples, tmp_path):
  ask(examples, tmp_path, Echo(), Shard(1, 3))
  model = Echo()
  ask(examples, tmp_path, model)
  assert len(model.asked) == 40 - len(range(1, 40, 3))
  assert runner.score(TASK, examples, tmp_path).missing == 0


@pytest.mark.parametrize('seed', range(8))
def test_ended_at_any_byte_nothing_is_lost_or_doubled(examples, tmp_path, seed):
  rng = random.Random(seed)
  with pytest.raises(KeyboardInterrupt):
    ask(examples, tmp_path, Echo(ends_after=rng.randrange(1, 40)))
  file = tmp_path / 'answers.jsonl'
  data = file.read_bytes()
  # As a kill leaves it: cut within any line.
  file.write_bytes(data[: rng.randrange(len(data))])
  ask(examples, tmp_path, Echo())
  keys = [json.loads(line)['key'] for line in file.read_bytes().splitlines()]
  assert sorted(keys) == sorted(example.key for example in examples)
  unasked = Echo()
  ask(examples, tmp_path, unasked)
  assert unasked.asked == []


def test_problems_are_counted_and_asked_again(examples, tmp_path):
  ask(examples, tmp_path, Echo(fails=('n3', 'n7')))
  outcome = runner.score(TASK, examples, tmp_path)
  assert outcome.reasons == {'missing_picture': 2}
  assert len(outcome.items) == 38 and outcome.missing == 0
  again = Echo()
  ask(examples, tmp_path, again)
  assert again.asked == ['n3', 'n7']
  assert runner.score(TASK, examples, tmp_path).reasons == {}


def test_answers_to_another_prompt_are_refused(examples, tmp_path):
  ask(examples, tmp_path, Echo())
  other = [
    dataclasses.replace(x, prompt=Prompt((f'{x.prompt.text} Answer:',)))
    for x in examples
  ]
  with pytest.raises(ConfigError, match='n0 was asked with another prompt'):
    ask(other, tmp_path, Echo())


def test_one_process_writes_a_file(examples, tmp_path):
  with (
    predictions.appending(tmp_path, Shard(0, 2)),
    predictions.appending(tmp_path, Shard(1, 2)),
    pytest.raises(ConfigError, match='another process'),
    predictions.appending(tmp_path, Shard(0, 2)),
  ):
    pass


def test_a_damaged_line_is_named(tmp_path):
  (tmp_path / 'answers.jsonl').write_text('{"key": "a"}\n')
  with pytest.raises(DataError, match=r'answers.jsonl, line 1'):
    predictions.read(tmp_path)


def test_a_limit_keeps_groups_whole():
  found = runner.take(TASK, None, limit=6)
  assert [example.key for example in found] == [f'n{i}' for i in range(8)]


def test_examples_need_keys_of_their_own():
  @dataclasses.dataclass(frozen=True)
  class Twice(Numbers):
    def examples(self, data_dir):
      yield from super().examples(data_dir)
      yield from super().examples(data_dir)

  with pytest.raises(DataError, match="2 examples have the key 'n0'"):
    runner.take(Twice('twice', 'Twice'), None)
