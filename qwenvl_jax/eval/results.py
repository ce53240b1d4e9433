"""The folder of a run: what was asked of which model, answers and scores.

run.json                  the model, its settings, versions
TASK/answers*.jsonl       what was said, as it came (`predictions`)
TASK/predictions.jsonl    each example with answer, target and scores
TASK/results.json         scores with intervals, counts, prompt, decoding
results.md, results.html  all tasks beside the paper's figures
pictures.html             pictures with question, answer, truth and boxes
"""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax import buckets
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.eval import interval
from qwenvl_jax.eval.runner import Outcome
from qwenvl_jax.eval.task import Example, Item, Prompt, Task, means, units

RUN = 'run.json'
RESULTS = 'results.json'
PREDICTIONS = 'predictions.jsonl'

_PACKAGES = (
  *('qwenvl_jax', 'jax', 'jaxlib', 'flax', 'numpy', 'pillow', 'tiktoken'),
)


def versions() -> dict[str, str]:
  """What the figures may depend on, by name."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {'python': platform.python_version()} | found


def claim(folder: Path, about: Mapping[str, Any]) -> None:
  """Says what a folder's answers are of; one of others is refused.

  Args:
    about: the model and versions, or the decoding; JSON values.

  Raises:
    ConfigError: names what differs.
  """
  path = folder / RUN
  now = json.loads(json.dumps(about))  # Tuples are lists there.
  if not path.exists():
    buckets.make_folder(folder)
    buckets.write(path, _dump(now))
    return
  try:
    before = json.loads(path.read_text('utf-8'))
  except ValueError as error:
    raise ConfigError(f'{path} is not JSON; remove {folder}') from error
  for key in {**before, **now}:
    if before.get(key) != now.get(key):
      raise ConfigError(
        f'{folder} is of {key} {_short(before.get(key), now.get(key))}, now '
        f'it is {_short(now.get(key), before.get(key))}; name another --out'
      )


def _short(value: Any, other: Any) -> Any:
  """A value, or of a mapping what differs."""
  if isinstance(value, dict) and isinstance(other, dict):
    differs = {k: v for k, v in value.items() if other.get(k, v) != v}
    return differs or value
  return value


def summarize(
  task: Task,
  examples: Sequence[Example],
  outcome: Outcome,
  identity: Mapping[str, Any],
) -> dict[str, Any]:
  """Scores of a task, and all that a figure needs beside it; JSON values."""
  found = units(task, outcome.items)
  scores = task.aggregate(found) if found else {}
  bounds = interval.of_task(task, found)
  categories = {}
  for unit in found:
    if unit.category is not None:
      categories.setdefault(unit.category, []).append(unit.scores)
  first = examples[0].prompt
  return {
    'task': task.name,
    'title': task.title,
    'metric': task.metric,
    'scale': task.scale,
    'scores': {
      name: {
        'score': value,
        'interval': list(bounds[name]),
        'count': sum(name in unit.scores for unit in found) or len(found),
      }
      for name, value in scores.items()
    },
    'categories': {
      name: {'count': len(of), **means(of)} for name, of in categories.items()
    },
    'counts': {
      'examples': len(examples),
      'answered': len(outcome.items),
      'units': len(found),
      'not_asked_yet': outcome.missing,
      'problems': outcome.reasons,
    },
    'problems': {
      key: problem.message
      for key, problem in list(outcome.problems.items())[:20]
    },
    'prompt': {
      'template': task.template,
      'first': first.text,
      'chat': first.chat,
      'system': first.system,
      'choices': list(examples[0].choices),
    },
    'decoding': dataclasses.asdict(task.decoding),
    'postprocessing': task.postprocessing,
    'paper': {name: dict(figures) for name, figures in task.paper.items()},
    'files': [dataclasses.asdict(file) for file in task.files],
    'model': dict(identity),
    'versions': versions(),
  }


def save(
  folder: Path, task: Task, summary: Mapping[str, Any], items: Sequence[Item]
) -> None:
  """Writes a task's `results.json` and `predictions.jsonl`."""
  with (
    buckets.atomic_write(folder / PREDICTIONS) as path,
    path.open('w', encoding='utf-8', errors='backslashreplace') as file,
  ):
    for item in items:
      file.write(json.dumps(_record(item), ensure_ascii=False) + '\n')
  written = task.finish(items, folder)
  if written:
    summary = {**summary, 'submissions': written}
  buckets.write(folder / RESULTS, _dump(summary))


def _record(item: Item) -> dict[str, Any]:
  example = item.example
  record = {
    'key': example.key,
    'prompt': example.prompt.text,
    'prediction': item.text,
    'answer': item.answer,
    'target': example.target,
    'scores': item.scores,
  }
  for name in ('choices', 'group', 'category', 'boxes'):
    if value := getattr(example, name):
      record[name] = value
  if example.meta:
    record['meta'] = dict(example.meta)
  if item.losses:
    record['losses'] = item.losses
  return record


def load_items(folder: Path) -> list[Item]:
  """Reads a task's predictions; prompts are text, without pictures.

  Raises:
    DataError: they are not there, or not what `save` writes.
  """
  path = folder / PREDICTIONS
  try:
    lines = path.read_text('utf-8').split('\n')
  except OSError as error:
    raise DataError(
      f'{path} cannot be read ({error.strerror}); qwenvl-eval writes it when a '
      'task is scored'
    ) from error
  return list(_items([line for line in lines if line], path))


def _items(lines: Sequence[str], path: Path) -> Iterator[Item]:
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      example = Example(
        record['key'],
        Prompt((record['prompt'],)),
        record['target'],
        tuple(record.get('choices', ())),
        record.get('group'),
        record.get('category'),
        tuple(map(tuple, record.get('boxes', ()))),
        record.get('meta', {}),
      )
      yield Item(
        example,
        record['prediction'],
        record['answer'],
        tuple(record.get('losses', ())),
        record['scores'],
      )
    except (ValueError, KeyError, TypeError) as error:
      raise DataError(
        f'{path}, line {number} is no prediction ({error!r:.80}); score the '
        'task again'
      ) from error


def load_summary(folder: Path) -> dict[str, Any]:
  """Reads the `results.json` of a task's folder.

  Raises:
    DataError: it is not there, or not JSON.
  """
  path = folder / RESULTS
  try:
    return json.loads(path.read_text('utf-8'))
  except (OSError, ValueError) as error:
    raise DataError(f'{path} cannot be read; score the task again') from error


def load_summaries(folder: Path) -> list[dict[str, Any]]:
  """Reads those of all tasks of a run, in the order of their names."""
  return [
    load_summary(path.parent) for path in sorted(folder.glob(f'*/{RESULTS}'))
  ]


def _dump(value: Any) -> bytes:
  # Halves of surrogate pairs, which strangers' text may hold, are escaped.
  text = json.dumps(value, ensure_ascii=False, indent=1) + '\n'
  return text.encode('utf-8', 'backslashreplace')
