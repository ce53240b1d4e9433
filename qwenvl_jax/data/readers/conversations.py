"""Conversations about pictures in the forms that people have them in.

The release's, LLaVA's, ShareGPT's and OpenAI's `messages`, told apart by what
they hold; `CONVERSATION` shows them. All become turns in the release's form,
where `Picture 1: <img>PATH</img>` shows a picture.
"""

import dataclasses
import pathlib
import re
from typing import Any

from qwenvl_jax.data.readers import fields, json_lines
from qwenvl_jax.data.records import Record, Turn
from qwenvl_jax.errors import BadRecordError, DataError
from qwenvl_jax.text import grounding, special_tokens
from qwenvl_jax.text.tokenizer import image_paths

# What is asked for where an entry is nothing of the kind.
CONVERSATION = (
  "{'image': 'a.png', 'conversations': [{'from': 'user', 'value': "
  "'<image>\\nWhat is this?'}, {'from': 'assistant', 'value': ..}]}, or "
  "'messages' of {'role': .., 'content': ..}"
)

_LISTS = ('conversations', 'messages', 'conversation')
_ROLES = {
  'user': ('user', 'human'),
  'assistant': ('assistant', 'gpt', 'bot', 'model', 'chatgpt'),
  'system': ('system',),
}
_ROLE = {name: role for role, names in _ROLES.items() for name in names}
# Keys under which an entry or a turn names its pictures; the first counts.
_PICTURES = (
  'images', 'image', 'image_paths', 'image_path', 'image_files', 'image_file',
  'image_urls', 'image_url', 'img',
)  # fmt: skip
_OTHER_MEDIA = ('video', 'videos', 'audio', 'audios')

_PLACEHOLDER = '<image>'
# Boxes and pictures as other models write them.
_FOREIGN = re.compile(r'<\|(?:box|quad|object_ref|vision|image)_\w+\|>')
# Four shares of the sides: a box that is not of this model's form.
_SHARE = r'\s*[01]?\.\d+\s*'
_SHARES = re.compile(rf'[\[(]{_SHARE}(?:,{_SHARE}){{3}}[\])]')


@dataclasses.dataclass(frozen=True)
class Conversations(fields.Reader):
  """Every `.json` and `.jsonl` file of a folder.

  Attributes:
    folder: where the images are that the conversations name.
  """

  folder: str = ''

  def records(self, root: pathlib.Path) -> fields.Found:
    """Yields a record for each conversation."""
    for file in fields.files(root, ('.json', '.jsonl')):
      for record, entry in json_lines.entries(file):
        yield from fields.attempt(conversation, entry, record, record=record)


def conversation(entry: Any, record: str) -> Record:
  """Reads a conversation: what JSON holds, or raises the error in its place.

  Raises:
    BadRecordError: it cannot be learned from as it is.
  """
  if isinstance(entry, BadRecordError):
    raise entry
  turns = _turns(entry, record)
  shown = _Shown(_named(entry, record), record)
  notes = []
  made = [
    Turn(role, _checked(shown.text(content), record, notes))
    for role, content in turns
  ]
  shown.check_all()
  # Without a question before it, an answer teaches nothing: the release leaves
  # it out as well.
  start = bool(made) and made[0].role == 'system'
  while made[start:] and made[start].role == 'assistant':
    del made[start]
  if not any(x.role == 'user' for x in made):
    raise BadRecordError('malformed', f'{record}: no turn of the user')
  if not any(x.role == 'assistant' and x.text.strip() for x in made):
    raise BadRecordError('empty_text', f'{record}: the assistant says nothing')
  images = [path for x in made for path in image_paths(x.text)]
  if len(images) != shown.count:
    raise BadRecordError(
      'image_mismatch', f'{record}: a picture before the first question'
    )
  if images and any(_SHARES.search(x.text) for x in made):
    raise BadRecordError(
      'box_out_of_range',
      f'{record}: a box in shares of the sides; write <box>(x1,y1),(x2,y2)'
      '</box> in thousandths',
    )
  json_lines.check_count(len(images), record)
  size = (0, 0)
  if len(images) == 1 and {'width', 'height'} <= entry.keys():
    size = fields.size(entry, record)
  return Record(
    record, tuple(images), size, turns=tuple(made), notes=tuple(notes)
  )


def _turns(entry: Any, record: str) -> list[tuple[str, Any]]:
  """Returns roles and contents: text, or a list of parts."""
  found = [key for key in _LISTS if isinstance(entry, dict) and key in entry]
  turns = entry[found[0]] if found else None
  if not isinstance(turns, list):
    raise BadRecordError(
      'malformed', f'{record}: no conversation, which is {CONVERSATION}'
    )
  made = []
  if isinstance(entry.get('system'), str) and entry['system'].strip():
    made.append(('system', entry['system']))
  for number, turn in enumerate(turns, start=1):
    turn = turn if isinstance(turn, dict) else {}
    said = turn.get('from', turn.get('role'))
    role = _ROLE.get(said.strip().lower()) if isinstance(said, str) else None
    content = turn.get('value', turn.get('content', turn.get('text')))
    if role is None or (role == 'system' and made):
      raise BadRecordError(
        'malformed',
        f'{record}, turn {number}: its role is {said!r:.60}; it must be user '
        '(human) or assistant (gpt), of the first also system',
      )
    made.append((role, '' if fields.is_missing(content) else content))
  return made


def _named(entry: dict, record: str) -> list[str]:
  """Returns the paths of the pictures that an entry and its turns name.

  Raises:
    BadRecordError: something that is no path, or a video.
  """
  paths = []
  turns = next(entry[key] for key in _LISTS if key in entry)
  for found in (entry, *(x for x in turns if isinstance(x, dict))):
    for key in _OTHER_MEDIA:
      if found.get(key):
        raise BadRecordError('malformed', f'{record}: {key!r}, not a picture')
    values = [found[key] for key in _PICTURES if not _is_empty(found.get(key))]
    for value in values[:1]:
      for each in value if isinstance(value, list) else [value]:
        if not _is_empty(each):
          paths.append(json_lines.picture_path(each, record))
  return paths


def _is_empty(value: Any) -> bool:
  return fields.is_missing(value) or value in ('', [])


class _Shown:
  """Puts pictures where a conversation shows them, in order.

  Attributes:
    count: of the pictures shown so far.
  """

  def __init__(self, named: list[str], record: str):
    self.count = 0
    self._named, self._record = named, record
    self._next = 0
    self._spans = set()

  def text(self, content: Any) -> str:
    """Returns a turn's text with a span for each of its pictures."""
    parts = content if isinstance(content, list) else [content]
    return ''.join(map(self._part, parts))

  def check_all(self) -> None:
    """Raises BadRecordError if a picture is named and not shown."""
    left = self._named[self._next :]
    if not self._next and self._spans.issuperset(left):
      return
    if left:
      raise BadRecordError(
        'image_mismatch',
        f'{self._record}: names {len(self._named)} pictures and shows '
        f'{self.count}; write {_PLACEHOLDER} where each is to be seen',
      )

  def _part(self, part: Any) -> str:
    if isinstance(part, str):
      return self._with_pictures(part)
    if isinstance(part, dict):
      if isinstance(part.get('text'), str):
        return self._with_pictures(part['text'])
      if any(part.get(key) for key in json_lines.PICTURE_KEYS):
        return self._span(json_lines.picture_path(part, self._record))
      if part.get('type') in json_lines.PICTURE_KEYS:
        return self._span(self._take())
    raise BadRecordError(
      'malformed',
      f'{self._record}: {part!r:.60} is neither text nor a part of a list, '
      "which is {'type': 'text', 'text': ..} or {'type': 'image', 'image': "
      "'a.png'}",
    )

  def _with_pictures(self, text: str) -> str:
    first, *rest = text.split(_PLACEHOLDER)
    self._own_spans(first)
    made = [first]
    for after in rest:
      made.append(self._span(self._take()))
      self._own_spans(after)
      made.append(after.removeprefix('\n'))
    return ''.join(made)

  def _own_spans(self, text: str) -> None:
    paths = image_paths(text)
    self.count += len(paths)
    self._spans.update(paths)

  def _take(self) -> str:
    if self._next == len(self._named):
      raise BadRecordError(
        'image_mismatch',
        f'{self._record}: shows more pictures than the {len(self._named)} that '
        "it names; list their paths under 'images'",
      )
    self._next += 1
    return self._named[self._next - 1]

  def _span(self, path: str) -> str:
    self.count += 1
    return f'Picture {self.count}: <img>{path}</img>\n'


def _checked(text: str, record: str, notes: list[str]) -> str:
  """Returns a turn's text, its boxes put in order and within [0,1000).

  Raises:
    BadRecordError: tags that do not pair up, boxes of another form, or a
      control token.
  """
  found = special_tokens.find_control(text)
  foreign = _FOREIGN.search(text) if '<|' in text else None
  if found or foreign:
    raise BadRecordError(
      'control_token', f'{record}: {found or foreign[0]} is written out'
    )
  try:
    grounding.check_tags(text, record)
  except DataError as error:
    raise BadRecordError('unpaired_tag', str(error)) from error
  try:
    mapped = grounding.map_places(text, _in_order, record)
  except DataError as error:
    raise BadRecordError('box_out_of_range', str(error)) from error
  if mapped != text:
    notes.append('clipped_box')
  return mapped


def _in_order(points: tuple[int, ...]) -> tuple[int, ...]:
  """Returns a quad as it is, and a box with its upper left corner first."""
  if len(points) != 4:
    return points
  x1, y1, x2, y2 = points
  return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
