"""The release's evaluation files, and plain text.

Evaluation: a JSON object a line with an image's path, a question and an answer
or a caption. `conversations` reads fine-tuning files.
"""

import dataclasses
import pathlib
import re

from qwenvl_jax.data.readers import fields, json_lines
from qwenvl_jax.data.readers.answers import qa
from qwenvl_jax.data.records import Record, Region
from qwenvl_jax.errors import BadRecordError

_REFERRED = re.compile(r'<ref>(.*?)</ref>')


@dataclasses.dataclass(frozen=True)
class EvaluationLines(fields.Reader):
  """The release's evaluation files: JSON lines.

  `image` and `question` with `answer` (text, a list, or a list with
  confidences); `image` and `caption`; or `image`, `sent`, `bbox` (corners in
  pixels), `height` and `width`, as its RefCOCO files have it.

  Attributes:
    file: '*.jsonl' for all of the folder.
  """

  file: str = '*.jsonl'
  folder = ''

  def records(self, root: pathlib.Path) -> fields.Found:
    """One record a line."""
    for file in sorted(root.glob(self.file)):
      for record, line in json_lines.lines(file):
        if isinstance(line, BadRecordError) or line.strip():
          yield from fields.attempt(_line, line, record, record=record)


def _line(line: bytes | BadRecordError, record: str) -> Record:
  entry = json_lines.parse(line, record)
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
class PlainText(fields.Reader):
  """Documents without pictures: `.txt` and `.jsonl` files (`{'text': ..}`).

  In `.txt` files blank lines divide documents. What is longer is divided at
  line or sentence ends, so that nothing is lost to the length of a row.

  Attributes:
    language: 'en' or 'zh'.
    longest: characters of a piece at most.
  """

  language: str = 'en'
  longest: int = 4000
  folder = ''

  def parts(self, root: pathlib.Path) -> list[pathlib.Path]:
    return fields.files(root, ('.txt', '.jsonl'), '**/*')

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
    lines, size = [], 0
    for record, line in json_lines.lines(part):
      try:
        if isinstance(line, BadRecordError):
          raise line
        if part.suffix == '.jsonl':
          if line.strip():
            entry = json_lines.parse(line, record)
            yield fields.text_field(entry, 'text', record)
          continue
        text = fields.decode(line, record)
        if text.strip():
          lines.append(text)
          size += len(line)
        if lines and (not text.strip() or size > fields.MAX_LINE):
          yield ''.join(lines).strip()
          lines, size = [], 0
      except BadRecordError as error:
        yield error
    if lines:
      yield ''.join(lines).strip()


_END = re.compile(r'\n|[.!?] |[。！？]')


def pieces(text: str, longest: int) -> list[str]:
  """Cuts text at line ends, else after sentences, else where it must be.

  >>> pieces('One. Two. Three.', 10)
  ['One. Two. ', 'Three.']
  """
  found, at = [], 0
  while len(text) - at > longest:
    ends = [x.end() for x in _END.finditer(text, at, at + longest)]
    cut = ends[-1] if ends else at + longest
    found.append(text[at:cut])
    at = cut
  if text[at:].strip():
    found.append(text[at:])
  return found
