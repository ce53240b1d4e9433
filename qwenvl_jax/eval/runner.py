"""Runs a task: asks what is not answered yet, then scores what there is."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.eval import predictions
from qwenvl_jax.eval.answering import Model, Problem
from qwenvl_jax.eval.predictions import ALL, Line, Shard
from qwenvl_jax.eval.prompting import digest
from qwenvl_jax.eval.task import Example, Item, Task

# Told how many of a process's examples are done, and of how many.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What is there of a task.

  Attributes:
    items: answered examples with their scores, in the order of the task.
    problems: key to why there is no answer.
    missing: examples that other processes have not asked yet.
  """

  items: tuple[Item, ...]
  problems: dict[str, Problem]
  missing: int = 0

  @property
  def reasons(self) -> dict[str, int]:
    """How many problems there are, by reason."""
    return dict(
      collections.Counter(problem.reason for problem in self.problems.values())
    )


def take(task: Task, data_dir: Path, limit: int | None = None) -> list[Example]:
  """Makes a task's examples.

  Args:
    limit: only so many, but whole groups; None for all.

  Raises:
    DataError: a file is missing or wrong, two examples share a key, or there
      is none.
  """
  task.check(data_dir)
  examples = list(_limited(task.examples(data_dir), limit))
  if not examples:
    raise DataError(f'{task.name}: its files hold no example')
  task.check_examples(data_dir, examples, limit is not None)
  keys = collections.Counter(example.key for example in examples)
  key, count = keys.most_common(1)[0]
  if count > 1:
    raise DataError(
      f'{task.name}: {count} examples have the key {key!r}; each needs its own'
    )
  return examples


def _limited(
  examples: Iterable[Example], limit: int | None
) -> Iterable[Example]:
  """The first examples; of groups that begin among them, all."""
  if limit is None:
    return examples
  examples = iter(examples)
  first = list(itertools.islice(examples, limit))
  groups = {example.group for example in first} - {None}
  # Groups stand together, or nearly so, in files; others end the search.
  if not groups:
    return first
  return first + [example for example in examples if example.group in groups]


def ask(
  task: Task,
  examples: Sequence[Example],
  model: Callable[[], Model],
  folder: Path,
  shard: Shard = ALL,
  progress: Progress = lambda done, total: None,
) -> None:
  """Asks what has no answer in a folder yet.

  Args:
    model: opens what answers; called only if there is something to ask.
    folder: of the task; receives the answers.

  Raises:
    ConfigError: the folder's answers are to other prompts.
  """
  known = read_answers(task, examples, folder)
  mine = sorted(examples, key=lambda example: example.key)
  mine = mine[shard.index :: shard.count]
  left = [
    example
    for example in mine
    if example.key not in known or isinstance(known[example.key].said, Problem)
  ]
  done = len(mine) - len(left)
  progress(done, len(mine))
  if not left:
    return
  with predictions.appending(folder, shard) as file:
    for example, said in model().answer(left, task.decoding):
      Line(digest(example), said).write(file, example.key)
      done += 1
      progress(done, len(mine))


def read_answers(
  task: Task, examples: Sequence[Example], folder: Path
) -> dict[str, Line]:
  """Reads a folder's answers to these examples.

  Raises:
    ConfigError: they are to other prompts.
  """
  found = predictions.read(folder)
  known = {x.key: found[x.key] for x in examples if x.key in found}
  for example in examples:
    line = known.get(example.key)
    if line is not None and line.asked != digest(example):
      raise ConfigError(
        f'{folder}: {example.key} was asked with another prompt or other '
        'choices than now; name another --out, or remove the folder'
      )
  return known


def score(task: Task, examples: Sequence[Example], folder: Path) -> Outcome:
  """Scores the answers that a folder has."""
  known = read_answers(task, examples, folder)
  items, problems = [], {}
  for example in examples:
    line = known.get(example.key)
    if line is None:
      continue
    if isinstance(line.said, Problem):
      problems[example.key] = line.said
      continue
    text, losses = line.said
    items.append(Item(example, text, task.parse(text, example), losses))
  scores = task.score_all(items, folder)
  items = [
    dataclasses.replace(item, scores=found)
    for item, found in zip(items, scores, strict=True)
  ]
  missing = len(examples) - len(items) - len(problems)
  return Outcome(tuple(items), problems, missing)
