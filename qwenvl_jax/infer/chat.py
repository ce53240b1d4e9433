"""Conversations: what was said, the pictures shown, and the next answer.

A conversation is a tuple of turns, so that nothing changes behind a caller's
back; `Chat` keeps one for programs that want state.
"""

import codecs
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from qwenvl_jax import image as pictures_lib
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.infer import generate as generation
from qwenvl_jax.infer import prompts
from qwenvl_jax.infer.request import Request
from qwenvl_jax.infer.sampling import Sampling
from qwenvl_jax.infer.scheduler import Scheduler
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.text import chatml, grounding
from qwenvl_jax.text.tokenizer import Tokenizer, image_paths


class Model(Protocol):
  """What answers; an opened checkpoint (`qwenvl_jax.load`) is one."""

  config: QwenVLConfig
  tokenizer: Tokenizer

  def scheduler(self, max_len: int) -> Scheduler:
    """One with room for so many tokens, used by one conversation at a time."""


@dataclasses.dataclass(frozen=True)
class ChatSettings:
  """How a conversation is held.

  Attributes:
    system: the system turn's content.
    max_window_size: tokens of system turn and history; the oldest turns that do
      not fit are left out.
    max_new_tokens: most tokens of an answer.
    temperature: 0 gives the same answer every time; the release samples at 1.
    top_k: see `Sampling`; 0, as released.
    top_p: see `Sampling`; as released.
    adapter: see `Request`.
  """

  system: str = chatml.DEFAULT_SYSTEM
  max_window_size: int = chatml.MAX_WINDOW_SIZE
  max_new_tokens: int = 512
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 0.3
  adapter: str | None = None

  def __post_init__(self):
    Sampling(self.temperature, self.top_k, self.top_p)
    prompts.check_count('max_new_tokens', self.max_new_tokens)
    prompts.check_count('max_window_size', self.max_window_size)
    if '<img>' in self.system:
      raise ConfigError(
        'the system prompt holds an <img>; show pictures in a question instead'
      )


class Turn(NamedTuple):
  """A question, the pictures that came with it, and the answer.

  `query` is what the model read: it has an `<img>` span for each picture.
  """

  query: str
  pictures: tuple[Image.Image, ...]
  answer: str


History = tuple[Turn, ...]


class Prompt(NamedTuple):
  """What the model is given for one answer.

  Attributes:
    tokens: the context's ids.
    pixels: [I,R,R,3] uint8 for the context's spans.
    max_new_tokens: tokens there is room for, at most the settings'.
    dropped_turns: oldest turns that were left out.
  """

  tokens: list[int]
  pixels: np.ndarray
  max_new_tokens: int
  dropped_turns: int


def ask(query: str, images: Sequence = (), history: History = ()) -> Turn:
  """A new turn without its answer.

  Pictures are numbered through the conversation, `Picture N:`.

  Args:
    query: what the user says. `<img>PATH</img>` in it shows the picture at
      PATH, unless `images` are given: these then fill the spans in order.
    images: pictures shown before the text: paths, encoded bytes, PIL images or
      uint8 arrays [H,W,3].
    history: earlier turns.

  Raises:
    DataError: a picture cannot be opened, or there are both spans and images
      but not as many of one as of the other.
  """
  grounding.check_tags(query, 'the question', unfinished=True)
  paths = image_paths(query)
  if paths and images and len(paths) != len(images):
    raise DataError(
      f'the question has {len(paths)} <img> spans and comes with '
      f'{len(images)} pictures; give as many, or leave the spans out'
    )
  shown = tuple(pictures_lib.load(image) for image in images or paths)
  if images and not paths:
    first = 1 + sum(len(turn.pictures) for turn in history)
    items = [
      {'image': _name(image, number)}
      for number, image in enumerate(images, start=first)
    ]
    query = chatml.from_list_format([*items, {'text': query}], first)
  return Turn(query, shown, '')


def build_prompt(
  model: Model,
  turn: Turn,
  history: History = (),
  settings: ChatSettings = ChatSettings(),
) -> Prompt:
  """The context for the answer to `turn`, as the release builds it.

  Where the model has fewer positions than the window, more of the oldest turns
  are left out.

  Raises:
    DataError: the question alone leaves no room for an answer.
  """
  config = model.config
  positions = config.decoder.max_position_embeddings
  wanted = min(settings.max_new_tokens, positions // 4)
  for first in range(len(history) + 1):
    context = chatml.chat_context(
      model.tokenizer,
      turn.query,
      # An <img> that the model made up has no pixels.
      [(t.query, grounding.without_images(t.answer)) for t in history[first:]],
      settings.system,
      settings.max_window_size,
      config.adapter.queries,
    )
    room = positions - len(context.tokens)
    if room >= wanted:
      break
  if room < 1:
    raise DataError(
      f'the question takes {len(context.tokens)} tokens of {positions} that '
      'the model can read; shorten it or show fewer pictures'
    )
  dropped = first + context.dropped_turns
  side = config.vision.image_size
  shown = [p for t in (*history[dropped:], turn) for p in t.pictures]
  pixels = np.zeros((len(shown), side, side, 3), np.uint8)
  for index, picture in enumerate(shown):
    pixels[index] = pictures_lib.resize(picture, side)
  return Prompt(
    tokens=context.tokens,
    pixels=pixels,
    max_new_tokens=min(settings.max_new_tokens, room),
    dropped_turns=dropped,
  )


def answer(
  model: Model,
  prompt: Prompt,
  settings: ChatSettings = ChatSettings(),
  seed: int | tuple[int, ...] = 0,
) -> Iterator[str]:
  """The answer, piece by piece."""
  tokenizer = model.tokenizer
  request = Request.create(
    model.config,
    prompt.tokens,
    prompt.pixels,
    max_new_tokens=prompt.max_new_tokens,
    sampling=Sampling(
      settings.temperature,
      settings.top_k,
      settings.top_p,
      stop_ids=stop_ids(tokenizer),
      seed=seed,
    ),
    adapter=settings.adapter,
  )
  length = len(prompt.tokens) + prompt.max_new_tokens
  ids = generation.stream(model.scheduler(length), request)
  return stream_text(tokenizer, ids)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
  """What ends an answer: `<|im_end|>`, `<|im_start|>`, `<|endoftext|>`."""
  return tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
  """Text of ids as they come, never half a character."""
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  for token in ids:
    piece = decoder.decode(tokenizer.decode_bytes([token]))
    if piece:
      yield piece
  rest = decoder.decode(b'', final=True)
  if rest:
    yield rest


def chat(
  model: Model,
  query: str,
  images: Sequence = (),
  history: History | None = None,
  *,
  seed: int = 0,
  **settings,
) -> tuple[str, History]:
  """One turn.

  Args:
    images: pictures that come with it, see `ask`.
    history: what the last call returned, None to start.
    **settings: see `ChatSettings`.

  Returns:
    (answer, history with this turn).
  """
  history = tuple(history or ())
  settings = ChatSettings(**settings)
  turn = ask(query, images, history)
  prompt = build_prompt(model, turn, history, settings)
  text = ''.join(answer(model, prompt, settings, seed)).strip()
  return text, (*history, turn._replace(answer=text))


class Chat:
  """A conversation that goes on.

  Attributes:
    history: the turns so far.
    settings: may be replaced at any time.
    dropped_turns: turns that the last answer did not know of any more.
  """

  def __init__(
    self,
    model: Model,
    settings: ChatSettings = ChatSettings(),
    seed: int = 0,
  ):
    self._model = model
    self._seed = seed
    self._answers = 0
    self.settings = settings
    self.history: History = ()
    self.dropped_turns = 0

  @property
  def pictures(self) -> list[Image.Image]:
    """All pictures shown; `Picture N` is number N - 1."""
    return [p for turn in self.history for p in turn.pictures]

  def reset(self) -> None:
    """Forgets all turns."""
    self.history, self.dropped_turns = (), 0

  def ask(self, query: str, images: Sequence = ()) -> Iterator[str]:
    """Asks, and gives the answer piece by piece.

    A turn joins the history when its answer ends. One that is left early, or
    interrupted, joins with what was said so far, or not at all if that is
    nothing.

    Raises:
      DataError: see `ask` and `build_prompt`; the conversation stays as it was.
    """
    turn = ask(query, images, self.history)
    prompt = build_prompt(self._model, turn, self.history, self.settings)
    self.dropped_turns = prompt.dropped_turns
    seed = self._seed, self._answers
    self._answers += 1
    said, ended = [], False
    try:
      for piece in answer(self._model, prompt, self.settings, seed):
        said.append(piece)
        yield piece
      ended = True
    finally:
      if ended or said:
        text = ''.join(said).strip()
        self.history = (*self.history, turn._replace(answer=text))


def _name(image, number: int) -> str:
  """What stands in the span: the path, if it is plain text."""
  name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else ''
  return name if name and not set('<>') & set(name) else f'{number}.png'
