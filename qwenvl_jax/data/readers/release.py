"""The release's own formats, and plain text.

Evaluation: a JSON object a line with an image's path, a question and an answer
or a caption. Fine-tuning: a JSON list of `{'id': .., 'conversations': [{'from':
.., 'value': ..}, ..]}` whose values name images as `<img>PATH</img>`.
"""

import dataclasses
import json
import pathlib
import re

from qwenvl_jax.data.readers import fields
from qwenvl_jax.data.readers.answers import qa
from qwenvl_jax.data.records import Record, Region, Turn
from qwenvl_jax.errors import BadRecordError
from qwenvl_jax.text import special_tokens
from qwenvl_jax.text.tokenizer import image_paths

_REFERRED = re.compile(r'<ref>(.*?)</ref>')


@dataclasses.dataclass(frozen=True)
class EvaluationLines:
  """The release's evaluation files: JSON lines.

  `image` and `question` with `answer` (text, a list, or a list with
  confidences); `image` and `caption`; or `image`, `sent`, `bbox` (corners in
  pixels), `height` and `width`, as its RefCOCO files have it.

  Attributes:
    file: '*.jsonl' for all of the folder.
  """

  file: str = '*.jsonl'

  files = ()

  def images_in(self, root: pathlib.Path) -> pathlib.Path:
    return root

  def records(self, root: pathlib.Path) -> fields.Found:
    """One record a line."""
    for file in sorted(root.glob(self.file)):
      with open(file, 'rb') as lines:
        for number, line in enumerate(lines, start=1):
          if line.strip():
            yield from _caught(_line, line, f'{file.name}, line {number}')


def _caught(make, *arguments) -> fields.Found:
  try:
    yield make(*arguments)
  except BadRecordError as error:
    yield error


def _line(line: bytes, record: str) -> Record:
  try:
    entry = json.loads(fields.decode(line, record))
  except (ValueError, RecursionError) as error:
    raise BadRecordError('malformed', f'{record}: {error}') from error
  made = Record(record, (fields.text_field(entry, 'image', record),))
  if 'sent' in entry:
    phrase = fields.text_field(entry, 'sent', record)
    phrase = ''.join(_REFERRED.findall(phrase)) or phrase
    box = fields.numbers(fields.field(entry, 'bbox', record), 4, record)
    size = fields.size(entry, record)
    return dataclasses.replace(
      made, size=size, regions=(Region(phrase, (box,)),)
    )
  if 'question' in entry:
    asked = fields.text_field(entry, 'question', record)
    answers = fields.field(entry, 'answer', record)
    id_ = str(entry.get('question_id', ''))
    return dataclasses.replace(
      made, questions=(qa(asked, answers, record, id_),)
    )
  caption = fields.field(entry, 'caption', record)
  captions = caption if isinstance(caption, list) else [caption]
  captions = tuple(fields.text_field(x, '', record) for x in captions)
  return dataclasses.replace(made, captions=captions)


@dataclasses.dataclass(frozen=True)
class Conversations:
  """The release's fine-tuning files: every `.json` of the folder.

  Attributes:
    folder: where the images are that the conversations name.
  """

  folder: str = ''

  files = ()

  def images_in(self, root: pathlib.Path) -> pathlib.Path:
    return root / self.folder

  def records(self, root: pathlib.Path) -> fields.Found:
    """One record a conversation."""
    for file in sorted(root.glob('*.json')):
      for number, entry in enumerate(fields.load_json(root, file.name)):
        name = entry.get('id', number) if isinstance(entry, dict) else number
        yield from _caught(_conversation, entry, f'{file.name}, {name}')


def _conversation(entry, record: str) -> Record:
  turns, images = [], []
  for turn in fields.field(entry, 'conversations', record):
    role = fields.text_field(turn, 'from', record)
    # Not stripped: white space is part of what is said.
    text = fields.field(turn, 'value', record)
    if role not in ('user', 'assistant') or not isinstance(text, str):
      raise BadRecordError(
        'malformed', f"{record}: a turn is of 'user' or 'assistant', with text"
      )
    if special_tokens.find_control(text):
      raise BadRecordError(
        'control_token', f'{record}: a turn that writes a control token out'
      )
    images += image_paths(text)
    turns.append(Turn(role, text))
  if not any(x.role == 'assistant' and x.text.strip() for x in turns):
    raise BadRecordError('empty_text', f'{record}: the assistant says nothing')
  return Record(record, tuple(images), turns=tuple(turns))


@dataclasses.dataclass(frozen=True)
class PlainText:
  """Documents without pictures: `.txt` and `.jsonl` files (`{'text': ..}`).

  In `.txt` files blank lines divide documents. What is longer is divided at
  line or sentence ends, so that nothing is lost to the length of a row.

  Attributes:
    language: 'en' or 'zh'.
    longest: characters of a piece at most.
  """

  language: str = 'en'
  longest: int = 4000

  files = ()

  def parts(self, root: pathlib.Path) -> list[pathlib.Path]:
    return sorted([*root.glob('**/*.txt'), *root.glob('**/*.jsonl')])

  def read(self, part: pathlib.Path) -> fields.Found:
    """One record a piece of a document."""
    for number, found in enumerate(self._documents(part)):
      if isinstance(found, BadRecordError):
        yield found
        continue
      for index, text in enumerate(pieces(found, self.longest)):
        record = f'{part.name}/{number}/{index}'
        yield Record(record, language=self.language, text=text)

  def _documents(self, part):
    lines = []
    with open(part, 'rb') as file:
      for number, line in enumerate(file, start=1):
        record = f'{part.name}, line {number}'
        try:
          text = fields.decode(line, record)
          if part.suffix == '.jsonl':
            yield fields.text_field(_json(text, record), 'text', record)
          elif text.strip():
            lines.append(text)
          elif lines:
            yield ''.join(lines).strip()
            lines = []
        except BadRecordError as error:
          yield error
    if lines:
      yield ''.join(lines).strip()


def _json(line: str, record: str):
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as error:
    raise BadRecordError('malformed', f'{record}: {error}') from error


def pieces(text: str, longest: int) -> list[str]:
  """Cuts text at line ends, else after sentences, else where it must be.

  >>> pieces('One. Two. Three.', 10)
  ['One. Two. ', 'Three.']
  """
  found = []
  while len(text) > longest:
    ends = list(re.finditer(r'\n|[.!?] |[。！？]', text[:longest]))
    cut = ends[-1].end() if ends else longest
    found.append(text[:cut])
    text = text[cut:]
  return [*found, text] if text.strip() else found
