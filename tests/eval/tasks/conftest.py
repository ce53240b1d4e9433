"""Tiny files in the official formats, and a model that says what it is told."""

import base64
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Mapping

import pytest
from PIL import Image

from qwenvl_jax.eval import results, runner
from qwenvl_jax.eval.answering import Reply
from qwenvl_jax.eval.task import Example, Task


class Told:
  """Says a text, or prefers a choice, by key or by a function of examples."""

  def __init__(self, replies: Mapping[str, str] | Callable[[Example], str]):
    self._reply = replies if callable(replies) else lambda x: replies[x.key]

  def answer(self, examples, decoding):
    for example in examples:
      said = self._reply(example)
      for one in example.prompt.pictures:
        one.open()
      if example.choices:
        losses = tuple(0.1 if x.strip() == said else 2 for x in example.choices)
        said = example.choices[losses.index(0.1)]
        yield example, Reply(said, losses)
      else:
        yield example, Reply(said)


@dataclasses.dataclass(frozen=True)
class Files:
  """A data folder that tests fill."""

  root: pathlib.Path

  def json(self, name: str, value) -> None:
    self.write(name, json.dumps(value).encode())

  def write(self, name: str, data: bytes) -> None:
    path = self.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)

  def pictures(self, *names: str, size=(40, 20), orientation: int = 1) -> None:
    for name in names:
      self.write(name, encoded(size, name, orientation))

  def base64(self) -> str:
    return base64.b64encode(encoded()).decode()


def encoded(size=(40, 20), name: str = 'x.png', orientation: int = 1) -> bytes:
  stream = io.BytesIO()
  picture = Image.new('RGB', size, 'red')
  exif = picture.getexif()
  exif[0x0112] = orientation
  kind = 'PNG' if name.endswith('.png') else 'JPEG'
  picture.save(stream, kind, exif=exif)
  return stream.getvalue()


@pytest.fixture
def files(tmp_path) -> Files:
  return Files(tmp_path / 'data')


@pytest.fixture
def run(files, tmp_path):
  """Runs a task as `qwenvl-eval` does; returns summary, outcome and folder."""

  def go(task: Task, replies, count: int | None = None):
    if count is not None:
      task = dataclasses.replace(task, count=count)
    folder = tmp_path / 'run' / task.name
    folder.mkdir(parents=True, exist_ok=True)
    examples = runner.take(task, files.root)
    runner.ask(task, examples, lambda: Told(replies), folder)
    outcome = runner.score(task, examples, folder)
    assert not outcome.problems and not outcome.missing
    summary = results.summarize(task, examples, outcome, {})
    results.save(folder, task, summary, outcome.items)
    scores = {name: x['score'] for name, x in summary['scores'].items()}
    return scores, outcome, folder

  return go
