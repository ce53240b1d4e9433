"""MME: a folder a subtask, and for each picture a file with two questions."""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from qwenvl_jax.data.readers import json_lines
from qwenvl_jax.errors import BadRecordError, DataError

_PICTURES = ('.jpg', '.jpeg', '.png')


class Question(NamedTuple):
  """A question about a picture, answered by 'yes' or 'no'."""

  subtask: str
  picture: pathlib.Path
  text: str
  answer: str


def questions(root: pathlib.Path, subtask: str) -> Iterator[Question]:
  """Yields the questions of a subtask, picture by picture.

  Text files lie beside the pictures, or in `questions_answers_YN/` with the
  pictures in `images/`, as in the official archive.

  Raises:
    DataError: no such folder, a picture that is not there, or a line that is
      not a question, a tab and yes or no; names file and line.
  """
  folder = root / subtask
  texts, pictures = folder / 'questions_answers_YN', folder / 'images'
  if not texts.is_dir():
    texts = pictures = folder
  files = sorted(texts.glob('[!.]*.txt'), key=lambda x: (len(x.stem), x.stem))
  if not files:
    raise DataError(f'{texts}: no .txt files; unpack MME_Benchmark again')
  for file in files:
    picture = _picture(pictures, file)
    for record, line in json_lines.lines(file):
      if isinstance(line, BadRecordError):
        raise line
      try:
        text = line.decode('utf-8-sig').strip()
      except UnicodeDecodeError as error:
        raise DataError(f'{subtask}/{record}: not UTF-8 ({error})') from error
      if not text:
        continue
      question, _, answer = text.rpartition('\t')
      answer = answer.strip().lower()
      if not question.strip() or answer not in ('yes', 'no'):
        raise DataError(
          f'{subtask}/{record}: {text[:60]!r} is no question, tab, yes or no'
        )
      yield Question(subtask, picture, question.strip(), answer)


def _picture(folder: pathlib.Path, text: pathlib.Path) -> pathlib.Path:
  for ending in _PICTURES:
    picture = folder / f'{text.stem}{ending}'
    if picture.exists():
      return picture
  raise DataError(
    f'{text}: no picture {text.stem}.jpg or .png in {folder}; get it from the '
    'authors of MME'
  )
