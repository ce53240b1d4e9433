"""The terminal side of a conversation: commands, pictures, streaming."""

import contextlib
import difflib
import os
import pathlib
import re
import shlex
import signal
import sys
import tempfile
import unicodedata

from PIL import Image
from rich.console import Console

from qwenvl_jax import image as pictures_lib
from qwenvl_jax.errors import DataError, QwenVLError, printable
from qwenvl_jax.infer.chat import Chat
from qwenvl_jax.text import drawing, grounding

_HELP = """\
Type a question and press Enter. Besides questions there are
  /image PATH ...   show a picture (or several) with your next question
  /save [PATH] [N]  draw the boxes of the last answer on a picture and save it
                    (answer.png; the latest picture, or Picture N)
  /raw              print the last answer as the model wrote it, with its tags
  /reset            forget the conversation and begin a new one
  /help             this text
  /exit             leave, as Ctrl-D does
Ctrl-C stops an answer. Pictures are numbered: "Picture 1", "Picture 2", ...\
"""
_COMMANDS = ('/image', '/save', '/raw', '/reset', '/help', '/exit', '/quit')

# How a typed command begins; '/usr/share' and '/ 2' are no commands.
_COMMAND = re.compile(r'(/[a-z]+)(?:\s+(.*))?', re.IGNORECASE | re.DOTALL)


class _HeldInterrupt:
  """Keeps Ctrl-C until a token is out; a second one interrupts at once.

  An exception in the midst of tracing or compiling leaves JAX in disorder: the
  process may crash when it ends.
  """

  def __init__(self):
    self.came = False

  def __enter__(self):
    self._before = signal.signal(signal.SIGINT, self._keep)
    return self

  def __exit__(self, *_):
    signal.signal(signal.SIGINT, self._before)

  def _keep(self, *_):
    if self.came:
      raise KeyboardInterrupt
    self.came = True


class Session:
  """The conversation and the terminal."""

  def __init__(
    self, chat: Chat, pictures: list[Image.Image], raw: bool = False
  ):
    """Begins one.

    Args:
      raw: print answers as the model writes them, rather than in words.
    """
    self._chat = chat
    self._next_pictures = pictures
    self._raw = raw
    self._interactive = sys.stdin.isatty()
    self._drawings = None

  def converse(self) -> int:
    """Reads lines until the end of input.

    Raises:
      DataError: a line of a script cannot be done; those after it may depend on
        it and are not read.
    """
    number = 0
    if self._interactive:
      _prepare_line_editing()
      write_note('Ask something; /help lists what else you can type.', 'dim')
    while True:
      try:
        line = self._read()
      except EOFError:
        return 0
      except KeyboardInterrupt:
        if not self._interactive:
          raise
        print()
        continue
      number += 1
      try:
        if self.obey(line) == 'exit':
          return 0
      except QwenVLError as error:
        if not self._interactive:
          raise DataError(f'line {number}: {error}') from error
        write_note(f'error: {error}')
      except KeyboardInterrupt:
        if not self._interactive:
          raise
        write_note('\nstopped', 'dim')

  def obey(self, line: str) -> str | None:
    """Does what a line says; returns 'exit' if it says so."""
    line = line.strip()
    command = _COMMAND.fullmatch(line)
    if command is None:
      if line:
        self.ask(line)
      return None
    name, rest = command[1].lower(), (command[2] or '').strip()
    match name:
      case '/image':
        self._show(rest)
      case '/save':
        self._save_command(rest)
      case '/reset':
        self._reset()
      case '/raw':
        write_text(self._last_answer() + '\n')
      case '/help':
        write_note(_HELP)
      case '/exit' | '/quit':
        return 'exit'
      case _:
        close = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f'did you mean {close[0]}?' if close else '/help lists them'
        raise DataError(f'there is no command {name}; {hint}')
    return None

  def ask(self, question: str, save: str | None = None) -> None:
    """Asks, and prints the answer as it comes.

    Args:
      save: where to write the latest picture with the answer's boxes.
    """
    known = len(self._chat.history)
    forgotten = self._chat.dropped_turns
    pieces = self._chat.ask(question, self._next_pictures)
    shown = pieces if self._raw else grounding.stream_words(pieces)
    with _HeldInterrupt() as interrupt:
      with spinner('reading'):
        piece = next(shown, None)
      while piece is not None:
        write_text(piece)
        if interrupt.came:
          pieces.close()
          break
        piece = next(shown, None)
    print(flush=True)
    if interrupt.came:
      if not self._interactive:
        raise KeyboardInterrupt
      write_note('stopped', 'dim')
    if self._chat.dropped_turns > forgotten:
      write_note(
        f'(the model does not see the oldest {self._chat.dropped_turns} turns '
        'any more; /reset begins anew)'
      )
    if len(self._chat.history) > known:
      self._next_pictures = []
      if save:
        self.save(save)
      else:
        self._show_boxes()

  def _show_boxes(self) -> None:
    """Draws the last answer's boxes, or says how to see them."""
    shapes = _count_shapes(self._chat.history[-1].answer)
    if not shapes or not self._chat.pictures:
      return
    if self._interactive:
      # Not here: a file of every answer would be in the way.
      self._drawings = self._drawings or tempfile.mkdtemp(prefix='qwenvl-chat-')
      self.save(_free_name(os.path.join(self._drawings, 'answer.png')))
    elif not self._raw:
      write_note(f'({shapes}: --save or /save draws, --raw or /raw tells)')

  def save(self, path: str, number: int | None = None) -> None:
    """Draws the last answer's boxes on a picture of the conversation.

    Args:
      path: file to write; its suffix says the format.
      number: which picture, from 1; None for the latest.

    Raises:
      DataError: there is no such picture or answer, or it cannot be written.
    """
    pictures = self._chat.pictures
    text = self._last_answer()
    if not pictures:
      raise DataError(
        'there is no picture in this conversation; /image PATH shows one'
      )
    number = len(pictures) if number is None else number
    if not 1 <= number <= len(pictures):
      raise DataError(
        f'there is no Picture {number}; the conversation has {len(pictures)}'
      )
    drawn, lacking = drawing.draw(pictures[number - 1], text)
    file = pathlib.Path(path).expanduser()
    try:
      drawn.save(file)
    except (OSError, ValueError, KeyError) as error:
      reason = getattr(error, 'strerror', None) or error
      raise _unwritable(file, reason) from error
    shapes = _count_shapes(text) or 'no boxes'
    write_note(f'Picture {number} with {shapes} is saved as {file}')
    if lacking:
      write_note(
        f'no font has the characters {lacking}, so labels show ? for them; '
        'install a font such as fonts-wqy-microhei'
      )

  def _last_answer(self) -> str:
    if not self._chat.history:
      raise DataError('there is no answer yet; ask something first')
    return self._chat.history[-1].answer

  def _reset(self) -> None:
    turns, waiting = len(self._chat.history), len(self._next_pictures)
    pictures = len(self._chat.pictures) + waiting
    self._chat.reset()
    self._next_pictures = []
    write_note(
      f'new conversation: {_counted(turns, "question")} and '
      f'{_counted(pictures, "picture")} are forgotten'
      + f' ({waiting} of them not asked about yet)'
      * bool(waiting),
      'dim',
    )

  def _read(self) -> str:
    if self._interactive:
      return input('\nYou: ')
    line = sys.stdin.readline()
    if not line:
      raise EOFError
    return line

  def _show(self, rest: str) -> None:
    if not rest:
      raise DataError('/image needs the path of a picture: /image dog.jpg')
    # A path with spaces need not be quoted if it is the only one.
    paths = [rest]
    if not os.path.exists(os.path.expanduser(rest)):
      with contextlib.suppress(ValueError):
        paths = shlex.split(rest)
    opened = [open_picture(path) for path in paths]
    first = len(self._chat.pictures) + len(self._next_pictures) + 1
    self._next_pictures = [*self._next_pictures, *opened]
    for number, (path, picture) in enumerate(zip(paths, opened), first):
      width, height = picture.size
      write_note(f'Picture {number}: {path} ({width} x {height})', 'dim')

  def _save_command(self, rest: str) -> None:
    try:
      words = shlex.split(rest)
    except ValueError:
      words = [rest]
    number = int(words.pop()) if words and words[-1].isdecimal() else None
    self.save(' '.join(words) or _free_name('answer.png'), number)


def open_picture(path: str) -> Image.Image:
  """Opens a picture; `~` in its path is the home folder."""
  return pictures_lib.load(os.path.expanduser(path))


def check_writable(path: str) -> None:
  """Raises DataError if no picture can be written there."""
  file = pathlib.Path(path).expanduser()
  if not file.parent.is_dir():
    raise _unwritable(file, 'the folder does not exist')
  if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
    raise _unwritable(file, f'no picture format has the suffix {file.suffix!r}')


def _unwritable(file: pathlib.Path, reason: object) -> DataError:
  return DataError(
    f'cannot write {file} ({reason}); name a .png or .jpg in a folder that '
    'exists'
  )


def _count_shapes(answer: str) -> str:
  """'1 box', '2 boxes' (quads count), or '' if there is nothing to draw."""
  places = grounding.parse(answer).places
  count = sum(len(place.boxes) + len(place.quads) for place in places)
  return f'{count} box{"es" if count > 1 else ""}' if count else ''


def _counted(count: int, name: str) -> str:
  return f'{count or "no"} {name}{"" if count == 1 else "s"}'


def _free_name(name: str) -> str:
  """The name, or the first of name-2, name-3, ... that is not taken."""
  path = pathlib.Path(name)
  number = 1
  while path.exists():
    number += 1
    path = pathlib.Path(name).with_stem(f'{pathlib.Path(name).stem}-{number}')
  return str(path)


def write_text(text: str) -> None:
  """Prints part of an answer; a model's control characters stay out."""
  shown = (c for c in text if c in '\n\t' or unicodedata.category(c) != 'Cc')
  print(''.join(shown), end='', flush=True)


def write_note(text: str, style: str = '') -> None:
  """Prints what is no answer beside the answers, so that these can be piped."""
  sys.stdout.flush()
  console = Console(stderr=True, highlight=False)
  console.print(printable(text), style=style, markup=False, soft_wrap=True)


def spinner(text: str):
  """Shows that something is going on, on terminals only."""
  console = Console(stderr=True)
  if not (console.is_terminal and sys.stdout.isatty()):
    return contextlib.nullcontext()
  return console.status(text)


def _prepare_line_editing() -> None:
  """Arrow keys bring back earlier lines; Tab completes paths."""
  try:
    import readline
  except ImportError:  # Windows
    return
  readline.set_completer_delims(' \t\n')
  readline.parse_and_bind('tab: complete')
