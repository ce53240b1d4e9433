"""Somebody's own questions: lines of JSON, and a metric by name."""

import base64
import binascii
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax.data.readers import fields, json_lines
from qwenvl_jax.errors import (
  BadRecordError,
  ConfigError,
  DataError,
  did_you_mean,
)
from qwenvl_jax.eval import metrics
from qwenvl_jax.eval.metrics.captions import score_captions
from qwenvl_jax.eval.task import (
  Decoding,
  Example,
  Item,
  Picture,
  Prompt,
  Scores,
  Task,
)

HELP = (
  'own questions, a JSON object a line: "question", "answer" (text, number or '
  'a list of right ones), and "image" (a path beside the file, a data: URL, or '
  'a list of them; none for text alone); "id" names the line'
)

_QUESTION = ('question', 'query', 'prompt')
_ANSWER = ('answer', 'answers', 'target', 'caption', 'captions')
_IMAGE = ('image', 'images')


def _best(metric: Callable[[str, str], float]):
  """A metric of one right answer, over several: the best."""
  return lambda text, answers: max(metric(text, right) for right in answers)


# Name to what scores an answer, given all right ones; captions are scored
# together.
METRICS: dict[str, Callable[[str, Sequence[str]], float] | None] = {
  'exact_match': _best(metrics.exact_match),
  'relaxed_accuracy': _best(metrics.relaxed_accuracy),
  'vqa_accuracy': metrics.vqa_accuracy,
  'anls': metrics.anls,
  'cider': None,
}

# What stands around a question that is not asked in a chat; as the release
# asks.
_TEMPLATE = '{} Answer:'
_TEMPLATES = {'cider': '{}'}


@dataclasses.dataclass(frozen=True)
class JsonLines(Task):
  """Questions of a file, see `HELP`.

  Attributes:
    file: the lines.
  """

  file: Path = Path()

  def check(self, data_dir: Path) -> None:
    if not self.file.is_file():
      raise DataError(f'{self.file}: no such file; --jsonl names one')

  def examples(self, data_dir: Path) -> Iterator[Example]:
    for name, entry in json_lines.entries(self.file):
      try:
        if isinstance(entry, BadRecordError):
          raise entry
        yield self._example(entry, name)
      except BadRecordError as error:
        raise DataError(
          f'{self.file}: {error}; a line is {{"question": "..", "answer": '
          '"..", "image": ".."}'
        ) from error

  def _example(self, entry: Any, name: str) -> Example:
    if not isinstance(entry, dict):
      raise BadRecordError('malformed', f'{name}: no JSON object')
    question = fields.text_field(entry, _key(entry, _QUESTION, name), name)
    answers = _texts(entry, _key(entry, _ANSWER, name), name)
    pictures = [
      _picture(value, self.file.parent, name) for value in _images(entry, name)
    ]
    text = question if self.chat else self.template.format(question)
    return Example(
      key=name.removeprefix(f'{self.file.name}, '),
      prompt=Prompt((*pictures, text), chat=self.chat),
      target=answers,
    )

  def score(self, answer: str, example: Example) -> Scores:
    return {self.metric: METRICS[self.metric](answer, example.target)}

  def score_all(self, items: Sequence[Item], folder: Path) -> list[Scores]:
    if METRICS[self.metric] is not None:
      return super().score_all(items, folder)
    return _captions(items)


def make_task(
  file: Path, metric: str | None, chat: bool, max_tokens: int
) -> Task:
  """Makes the task of a file.

  Raises:
    ConfigError: there is no such metric.
  """
  if metric not in METRICS:
    said = f'no metric {metric!r}' if metric else '--jsonl needs --metric'
    raise ConfigError(said + did_you_mean(metric or '', METRICS))
  return JsonLines(
    name=file.stem,
    title=file.name,
    metric=metric,
    decoding=Decoding(max_tokens=max_tokens),
    template='{}' if chat else _TEMPLATES.get(metric, _TEMPLATE),
    postprocessing='white space around the answer is cut',
    chat=chat,
    file=file,
  )


def _captions(items: Sequence[Item]) -> list[Scores]:
  if not items:
    return []
  found = score_captions(
    {item.example.key: item.answer for item in items},
    {item.example.key: list(item.example.target) for item in items},
  )
  keys = [item.example.key for item in items]
  return [
    {'cider': found.cider[key], 'rouge_l': found.rouge_l[key]} for key in keys
  ]


def _key(entry: dict, names: Sequence[str], record: str) -> str:
  found = next((name for name in names if name in entry), None)
  if found is None:
    raise BadRecordError(
      'malformed',
      f'{record}: no {names[0]!r}{did_you_mean(names[0], entry)}',
    )
  return found


def _texts(entry: dict, key: str, record: str) -> list[str]:
  """One or several right answers; numbers are text."""
  value = entry[key]
  if not isinstance(value, list):
    return [fields.text_field(entry, key, record)]
  if not value:
    raise BadRecordError('empty_text', f'{record}: {key!r} is an empty list')
  numbered = {f'{key}[{i}]': one for i, one in enumerate(value)}
  return [fields.text_field(numbered, name, record) for name in numbered]


def _images(entry: dict, record: str) -> Iterable[Any]:
  key = next((name for name in _IMAGE if name in entry), None)
  value = None if key is None else entry[key]
  if fields.is_missing(value) or value == '':
    return ()
  found = value if isinstance(value, list) else [value]
  json_lines.check_count(len(found), record)
  return found


def _picture(value: Any, folder: Path, record: str) -> Picture:
  found = json_lines.picture_path(value, record)
  if not found.startswith('data:'):
    return Picture(folder / found)
  _, _, data = found.partition(',')
  return Picture(functools.partial(_decode, data, record), 'data URL')


def _decode(data: str, record: str) -> bytes:
  try:
    return base64.b64decode(data, validate=True)
  except binascii.Error as error:
    raise BadRecordError(
      'unreadable_image', f'{record}: a data: URL that is not base64'
    ) from error
