"""A conversation of the web demo: what was asked, with which pictures.

Without gradio: the same turns make the request to the server, the boxes that
are drawn, and the file that a conversation is shared as.
"""

import base64
import dataclasses
import hashlib
import io
import json
import mimetypes
import pathlib
import re
from collections.abc import Iterator, Sequence

import pydantic
from PIL import Image

from qwenvl_jax import image
from qwenvl_jax.serve.fetch import fetch
from qwenvl_jax.serve.limits import FORMATS, ApiError, Limits
from qwenvl_jax.serve.pictures import open_pictures
from qwenvl_jax.serve.schemas import ImagePart, Message
from qwenvl_jax.text import drawing, grounding

# Folder of the pictures that stay.
EXAMPLES = 'examples'
# What a shared conversation says that it is.
_KIND = 'qwenvl_jax conversation'
# Longer side of a picture that boxes are drawn on, in pixels.
_SIDE = 1024
# How a question or an answer names a picture.
_NAMED = re.compile(
  r'(?:picture|image|图片?)\s*(\d{1,3})|第\s*(\d{1,3})\s*[张幅]', re.IGNORECASE
)


@dataclasses.dataclass
class Turn:
  """A question and its answer.

  Attributes:
    text: what was asked.
    pictures: files of what came with it.
    answer: as the model wrote it, boxes and all.
    drawn: (number of a picture, file that shows it with its boxes).
    lacking: characters of labels that no font could show.
    due: whether its answer is wanted and has not begun.
    asked: how often it was asked; an older answer does not go on.
  """

  text: str
  pictures: tuple[pathlib.Path, ...] = ()
  answer: str = ''
  drawn: tuple[tuple[int, pathlib.Path], ...] = ()
  lacking: str = ''
  due: bool = False
  asked: int = 0


def all_pictures(turns: Sequence[Turn]) -> list[pathlib.Path]:
  """Files of all pictures; `Picture N` is number N - 1."""
  return [path for turn in turns for path in turn.pictures]


def to_messages(turns: Sequence[Turn], limits: Limits) -> list[dict]:
  """The conversation in OpenAI's form, pictures as data URLs.

  Answers that were asked for and have not begun are left out.

  Raises:
    ApiError: pictures that are gone, or larger together than a request.
  """
  left, messages = limits.body_bytes, []
  for number, turn in enumerate(turns, start=1):
    content = []
    for path in turn.pictures:
      data = _read(path, left)
      left -= len(data)
      kind = mimetypes.guess_type(path.name)[0] or 'image/unknown'
      url = f'data:{kind};base64,{base64.b64encode(data).decode()}'
      content.append({'type': 'image_url', 'image_url': {'url': url}})
    content.append({'type': 'text', 'text': turn.text})
    messages.append({'role': 'user', 'content': content})
    if number < len(turns) or turn.answer:
      messages.append({'role': 'assistant', 'content': turn.answer})
  return messages


def _read(path: pathlib.Path, most: int) -> bytes:
  try:
    with path.open('rb') as file:
      data = file.read(most + 1)
  except OSError as error:
    raise ApiError(
      'a picture of this conversation is no longer here; begin a new one',
      code='picture_gone',
    ) from error
  if len(data) > most:
    raise ApiError(
      'the pictures of this conversation are too large together', status=413
    )
  return data


def share(turns: Sequence[Turn], model: str, limits: Limits) -> str:
  """The file that a conversation is shared as.

  JSON whose `messages` any client can send to the server as they are.
  """
  about = {'kind': _KIND, 'model': model}
  messages = to_messages(turns, limits)
  return json.dumps(about | {'messages': messages}, ensure_ascii=False)


class _Shared(pydantic.BaseModel):
  kind: str
  messages: list[Message]


def open_shared(
  data: bytes, folder: pathlib.Path, limits: Limits
) -> list[Turn]:
  """Opens what `share` made; trusts nothing in it.

  Raises:
    ApiError: another file, or one that asks for too much.
  """
  wrong = ApiError(
    'this file is not a conversation that was saved here', code='not_shared'
  )
  if len(data) > 4 * limits.body_bytes // 3 + 2**20:
    raise wrong
  try:
    shared = _Shared.model_validate_json(data)
  except (pydantic.ValidationError, RecursionError) as error:
    raise wrong from error
  roles = [message.role for message in shared.messages]
  pairs = ['user', 'assistant'] * (len(roles) // 2 + 1)
  if (
    shared.kind != _KIND
    or len(roles) > limits.messages
    or roles != pairs[: len(roles)]
  ):
    raise wrong
  urls = [
    part.url
    for message in shared.messages
    if isinstance(message.content, list)
    for part in message.content
    if isinstance(part, ImagePart)
  ]
  if any(not url.startswith('data:') for url in urls):
    raise wrong
  # Decoded once, so that what is shown later is known to be a picture.
  open_pictures(urls, limits, side=1)
  return [*_turns(shared.messages, folder, limits)]


def _turns(messages, folder, limits) -> Iterator[Turn]:
  turn = Turn('')
  for message in messages:
    content = message.content or ''
    if message.role == 'assistant':
      turn.answer = _text(content)
    else:
      parts = [] if isinstance(content, str) else content
      pictures = tuple(
        keep_picture(fetch(part.url, limits, 'a picture'), folder)
        for part in parts
        if isinstance(part, ImagePart)
      )
      turn = Turn(_text(content), pictures)
      yield turn


def _text(content) -> str:
  if isinstance(content, str):
    return content
  return ''.join(
    part.text for part in content if not isinstance(part, ImagePart)
  )


def keep_picture(data: bytes, folder: pathlib.Path) -> pathlib.Path:
  """Writes an encoded picture under a name that tells its format."""
  with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
    suffix = picture.format.lower()
  path = folder / hashlib.sha256(data).hexdigest() / f'picture.{suffix}'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  return path


def places_by_picture(
  question: str, answer: str, count: int
) -> dict[int, list[grounding.Place]]:
  """Which picture the places of an answer belong to.

  That is the picture which the answer named last before them, else the one
  that the question is about, else the last one shown, as in the release.

  Args:
    question: may name a picture: `Picture 2`, `图2`, `第2张`.

  Returns:
    Places by the number of their picture, from 1.
  """
  asked = {_number(match) for match in _NAMED.finditer(question)}
  asked &= {*range(1, count + 1)}
  current = asked.pop() if len(asked) == 1 else count
  found: dict[int, list[grounding.Place]] = {}
  begin = 0
  for match in [*_NAMED.finditer(answer), None]:
    end = match.start() if match else len(answer)
    places = grounding.parse(answer[begin:end]).places
    places = [place for place in places if place.boxes or place.quads]
    if places and current:
      found.setdefault(current, []).extend(places)
    if match and 1 <= _number(match) <= count:
      current = _number(match)
    begin = end
  return found


def _number(match: re.Match) -> int:
  return int(match[1] or match[2])


def draw_boxes(turns: Sequence[Turn], folder: pathlib.Path) -> None:
  """Draws the places of the last answer on the pictures they belong to."""
  turn, pictures = turns[-1], all_pictures(turns)
  found = places_by_picture(turn.text, turn.answer, len(pictures))
  drawn, lacking = [], ''
  for number, places in sorted(found.items()):
    # The server has opened it before, within its limits.
    picture = image.load(pictures[number - 1])
    picture.thumbnail((_SIDE, _SIDE))
    canvas, missing = drawing.draw(picture, places)
    lacking += missing
    packed = io.BytesIO()
    canvas.save(packed, 'WEBP', quality=90)
    drawn.append((number, keep_picture(packed.getvalue(), folder)))
  turn.drawn, turn.lacking = tuple(drawn), lacking


def readable(answer: str) -> str:
  """An answer as a person reads it: phrases of boxes in bold, no numbers.

  Boxes that make no sense stay as they are; the last one may yet be finished.
  """
  parsed = grounding.parse(answer)
  text = parsed.text.strip()
  refs = {place.ref.strip() for place in parsed.places} - {''}
  if refs:
    either = '|'.join(map(re.escape, sorted(refs, key=len, reverse=True)))
    text = re.sub(either, lambda match: f'**{match[0]}**', text)
  wrong = [
    f'`{left}`'
    for left in parsed.leftovers
    if left.startswith(('<box>', '<quad>')) and not answer.endswith(left)
  ]
  return ' '.join([text, *wrong]).strip()
