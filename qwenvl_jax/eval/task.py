"""What a benchmark is: examples, prompts, decoding, and how answers score.

A `Task` makes `Example`s from files. The runner asks a model; what it says to
an example is an `Item`: text, then the parsed answer, then scores. Items of one
`group` (the rotations of a question, the two questions about a picture) make a
`Unit`, others one each. A task's scores are aggregated over units, and the
confidence interval draws units:

  text --parse--> answer --score--> scores --combine--> unit --aggregate-->

Scores are fractions (0 to 1 where the metric is a share) until they are shown.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwenvl_jax import image
from qwenvl_jax.errors import DataError

Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture of a prompt; opened when its example is asked.

  Attributes:
    source: path of a file, encoded bytes, or a function without arguments that
      returns one of these or a PIL image (a frame of a video, a Parquet cell).
    name: what errors and pages call it; the path where there is one.
  """

  source: str | os.PathLike | bytes | Callable[[], Any]
  name: str = ''

  def __str__(self) -> str:
    if self.name or isinstance(self.source, bytes) or callable(self.source):
      return self.name or 'picture'
    return os.fspath(self.source)

  def open(self) -> Image.Image:
    """Returns it as RGB, turned as its EXIF orientation says.

    Raises:
      DataError: there is no such file, or it is no picture.
    """
    source = self.source() if callable(self.source) else self.source
    return image.load(source, self.name)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What the model is asked: text and pictures, in reading order.

  In texts, `<ref>`, `<box>` and `<quad>` are tags; nothing else in them becomes
  a control token. The examples of a few-shot prompt are further parts.

  Attributes:
    parts: text and pictures.
    chat: the parts are the user's turn of a chat, where pictures are numbered
      (`Picture 1: ..`). Otherwise the model continues the parts as they are, a
      picture being its `<img>` span.
    system: of a chat; None for the model's own.
    numbered: of a chat; False for the turn as the parts are, its pictures
      without numbers.
  """

  parts: tuple[str | Picture, ...]
  chat: bool = False
  system: str | None = None
  numbered: bool = True

  @property
  def pictures(self) -> tuple[Picture, ...]:
    return tuple(part for part in self.parts if isinstance(part, Picture))

  @property
  def text(self) -> str:
    """The prompt for people: pictures are `<img>NAME</img>`."""
    return ''.join(
      part if isinstance(part, str) else f'<img>{part}</img>'
      for part in self.parts
    )


@dataclasses.dataclass(frozen=True)
class Example:
  """One question.

  Attributes:
    key: unique in its task, and the same in every run.
    prompt: what is asked.
    target: what `Task.score` compares with; JSON values, kept with the results.
    choices: continuations of the prompt. Where there are some, the answer is
      the likeliest (mean cross entropy of its tokens) and nothing is generated.
    group: examples of one name count together, see `Task.combine`.
    category: scores are also shown by it (subtask, language, dimension).
    boxes: true boxes x1, y1, x2, y2 in 1/1000 of the last picture, to draw.
    meta: further JSON values for `Task.score` and the pages.
  """

  key: str
  prompt: Prompt
  target: Any = None
  choices: tuple[str, ...] = ()
  group: str | None = None
  category: str | None = None
  boxes: tuple[tuple[float, float, float, float], ...] = ()
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How answers are generated; an end token always ends them.

  Attributes:
    max_tokens: of an answer.
    min_tokens: no end token before this many.
    temperature: 0 for the most likely token (greedy).
    top_p: of sampling.
    seed: of sampling; an example's key is part of its own.
    stop: texts that end an answer and are not part of it.
  """

  max_tokens: int = 10
  min_tokens: int = 0
  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0
  stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Item:
  """An example, and what became of it.

  Attributes:
    text: as the model said it, without the end token; of choices the likeliest.
    answer: of `Task.parse`.
    losses: mean cross entropy of each choice, in nats.
    scores: of `Task.score`.
  """

  example: Example
  text: str
  answer: Any = None
  losses: tuple[float, ...] = ()
  scores: Scores = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Unit:
  """The items of one group, which count as one.

  Attributes:
    scores: of `Task.combine`.
    category: of the first item.
  """

  items: tuple[Item, ...]
  scores: Scores

  @property
  def category(self) -> str | None:
    return self.items[0].example.category


@dataclasses.dataclass(frozen=True)
class File:
  """A file or folder that a task reads.

  Attributes:
    path: below the data folder.
    source: where it comes from: an address, and what to do with it.
  """

  path: str
  source: str


@dataclasses.dataclass(frozen=True)
class Task:
  """A benchmark; subclasses say what their examples are and how they score.

  Attributes:
    name: as the command line says it, `docvqa_val`.
    title: as a table says it, `DocVQA val`.
    metric: the score that tables show first.
    decoding: how answers are generated.
    files: what it reads, see `check`.
    template: the prompt, with `{}` where an example's own text stands.
    postprocessing: in words, what happens between the answer and its score.
    paper: the paper's figures, model ('Qwen-VL', 'Qwen-VL-Chat') to metric to
      figure, as they are printed there.
    scale: scores are multiplied by it where they are shown; 100 for percent.
    chat: whether it is asked in chats.
  """

  name: str
  title: str
  metric: str = 'accuracy'
  decoding: Decoding = Decoding()
  files: tuple[File, ...] = ()
  template: str = ''
  postprocessing: str = ''
  paper: Mapping[str, Mapping[str, float]] = dataclasses.field(
    default_factory=dict
  )
  scale: float = 100.0
  chat: bool = False

  def check(self, data_dir: Path) -> None:
    """Checks that the files are there, before a model is opened.

    Raises:
      DataError: one is missing, empty or not what it should be; names its
        source.
    """
    for file in self.files:
      path = data_dir / file.path
      if path.is_dir():
        if any(path.iterdir()):
          continue
        found = 'is an empty folder'
      elif not path.exists():
        found = 'no such file'
      elif not path.stat().st_size:
        found = 'is empty'
      else:
        continue
      raise DataError(f'{self.name}: {path}: {found}; it is {file.source}')

  def examples(self, data_dir: Path) -> Iterable[Example]:
    """Makes all examples, in the order of the files.

    Raises:
      DataError: an annotation cannot be read; names file, record and key.
    """
    raise NotImplementedError

  def check_examples(
    self, data_dir: Path, examples: Sequence[Example], limited: bool
  ) -> None:
    """Checks examples, before a model is opened.

    Args:
      limited: whether these are only the first.

    Raises:
      DataError: there are too few or too many, or pictures are missing.
    """

  def parse(self, text: str, example: Example) -> Any:
    """Returns the answer in what the model said; a JSON value."""
    return text.strip()

  def score(self, answer: Any, example: Example) -> Scores:
    """Returns the scores of one answer by the name of the metric."""
    raise NotImplementedError

  def score_all(self, items: Sequence[Item], folder: Path) -> list[Scores]:
    """Returns the scores of every item.

    Metrics of a whole corpus override this; each item gets its share, such that
    the mean is the corpus's score (CIDEr).

    Args:
      folder: of the run's task, where slow metrics keep what they have.
    """
    return [self.score(item.answer, item.example) for item in items]

  def combine(self, items: Sequence[Item]) -> Scores:
    """Returns the scores of a group: the mean of its items'."""
    return means([item.scores for item in items])

  def aggregate(self, units: Sequence[Unit]) -> Scores:
    """Returns the scores of the benchmark: the mean over units.

    Totals of categories override this. It is called a thousand times, for the
    interval, with units drawn at random: some of them twice.
    """
    return means([unit.scores for unit in units])

  def finish(self, items: Sequence[Item], folder: Path) -> list[str]:
    """Writes what is to be sent to a leaderboard; returns names of files."""
    return []


def means(scores: Iterable[Scores]) -> Scores:
  """Returns the mean of each metric over those that have it.

  >>> means([{'a': 0.0, 'b': 1.0}, {'a': 1.0}])
  {'a': 0.5, 'b': 1.0}
  """
  found = collections.defaultdict(list)
  for one in scores:
    for name, value in one.items():
      found[name].append(value)
  return {name: float(np.mean(values)) for name, values in found.items()}


def units(task: Task, items: Iterable[Item]) -> list[Unit]:
  """Returns items by group, in the order of the first of each."""
  groups = collections.defaultdict(list)
  for item in items:
    example = item.example
    key = (
      (False, example.key) if example.group is None else (True, example.group)
    )
    groups[key].append(item)
  return [Unit(tuple(group), task.combine(group)) for group in groups.values()]
