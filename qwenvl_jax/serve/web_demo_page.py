"""The page of the web demo: what stands where, and what a click does."""

import asyncio
import contextlib
import html
import pathlib
import uuid
from collections.abc import Sequence

import gradio as gr

from qwenvl_jax.serve import web_demo_turns as turns_lib
from qwenvl_jax.serve.limits import FORMATS, ApiError
from qwenvl_jax.serve.server import Server
from qwenvl_jax.serve.web_demo_asking import ask, grouped
from qwenvl_jax.serve.web_demo_turns import (
  Turn,
  all_pictures,
  draw_boxes,
  keep_picture,
  open_shared,
  readable,
  share,
  to_messages,
)
from qwenvl_jax.serve.web_demo_words import EXAMPLES, LANGUAGES, WORDS

# Fonts that are there; gradio's own themes ask Google for some.
_FONTS = (
  'system-ui',
  '-apple-system',
  'Segoe UI',
  'Noto Sans SC',
  'sans-serif',
)
THEME = gr.themes.Soft(
  primary_hue='violet',
  neutral_hue='slate',
  radius_size='lg',
  font=_FONTS,
  font_mono=('ui-monospace', 'monospace'),
)
CSS = (pathlib.Path(__file__).parent / 'assets/web_demo.css').read_text('utf-8')

_SUFFIXES = ['.jpg', *(f'.{name.lower()}' for name in FORMATS)]
# Clicks the hidden link to the file that was just written.
_DOWNLOAD = "() => document.querySelector('#saved a, a#saved, #saved').click()"
_EMPTY = {'text': '', 'files': []}


def _in_box(turn: Turn) -> dict:
  return {'text': turn.text, 'files': [*map(str, turn.pictures)]}


def _replace(turns: list[Turn], others: Sequence[Turn]) -> None:
  for turn in turns:
    turn.asked += 1
  turns[:] = others


def show(turns: Sequence[Turn], language: str) -> list[dict]:
  """A conversation as the chat shows it, two messages a turn."""
  words, messages, number = WORDS[language], [], 0
  several = len(all_pictures(turns)) > 1
  for turn in turns:
    content = []
    for path in turn.pictures:
      number += 1
      if several:
        content.append(f'*{words.picture.format(number)}*')
      content.append({'path': str(path)})
    # The question is last: that is where it is looked for when it is edited.
    content.append(turn.text)
    messages.append({'role': 'user', 'content': content})
    said: list = [readable(turn.answer)] if turn.answer else []
    for marked, path in turn.drawn:
      said += [words.marked.format(marked)] if several else []
      said.append({'path': str(path)})
    if turn.lacking:
      said.append(words.lacking.format(turn.lacking))
    said = [part for part in said if part] or ['…']
    messages.append({'role': 'assistant', 'content': said})
  return messages


def header(name: str, language: str) -> str:
  """HTML of the head of the page."""
  return (
    f'<h1>Qwen-VL <span class="model">{html.escape(name)}</span></h1>'
    f'<p>{html.escape(WORDS[language].lead)}</p>'
  )


class Page:
  """Builds the page and answers its events.

  A conversation lies in the server's memory, its pictures in a folder; what
  the browser shows is made from it and never read back.
  """

  def __init__(self, server: Server, folder: pathlib.Path):
    """Makes it."""
    self._server, self._folder = server, folder
    self._examples = [
      tuple(
        keep_picture(path.read_bytes(), folder / turns_lib.EXAMPLES)
        for path in one.pictures
      )
      for one in EXAMPLES
    ]

  def build(self) -> gr.Blocks:
    """The page, not yet mounted."""
    with gr.Blocks(
      title=f'{self._server.name} · Qwen-VL',
      analytics_enabled=False,
      fill_height=True,
    ) as page:
      turns = gr.State([])
      with gr.Row(elem_id='head'):
        head = gr.HTML(header(self._server.name, 'en'), elem_id='title')
        language = gr.Radio(
          [*LANGUAGES.items()],
          value='en',
          show_label=False,
          container=False,
          elem_id='language',
        )
      chat = gr.Chatbot(
        examples=self._cards('en'),
        show_label=False,
        height='max(420px, calc(100dvh - 300px))',
        editable='user',
        buttons=['copy'],
        layout='bubble',
        latex_delimiters=[],
        allow_file_downloads=True,
        feedback_options=None,
        elem_id='chat',
      )
      box = gr.MultimodalTextbox(
        placeholder=WORDS['en'].ask,
        show_label=False,
        file_types=_SUFFIXES,
        file_count='multiple',
        sources=['upload'],
        max_plain_text_length=100_000,
        autofocus=True,
        elem_id='box',
      )
      with gr.Row(elem_id='tools'):
        new = gr.Button(WORDS['en'].new, size='sm', elem_id='new')
        save = gr.Button(WORDS['en'].share, size='sm', elem_id='save')
        load = gr.UploadButton(
          WORDS['en'].open, file_types=['.json'], size='sm', elem_id='open'
        )
        saved = gr.DownloadButton('', visible='hidden', elem_id='saved')
      with gr.Accordion(WORDS['en'].settings, open=False) as settings:
        temperature = gr.Slider(
          0,
          2,
          1,
          step=0.05,
          label=WORDS['en'].temperature,
          info=WORDS['en'].temperature_info,
          elem_id='temperature',
        )

      view = [turns, chat, box]
      answer = {
        'fn': self.answer,
        'inputs': [turns, language, temperature],
        'outputs': view,
        'api_visibility': 'private',
        'show_progress': 'hidden',
        'concurrency_limit': None,
        # The last answer may not yet have noticed that nobody waits for it.
        'trigger_mode': 'multiple',
      }

      def on(event, function, inputs, outputs):
        # The browser shows that something is being answered, not when.
        return event(
          function,
          inputs,
          outputs,
          api_visibility='private',
          show_progress='hidden',
          concurrency_limit=None,
        )

      # Gradio's own way to cancel what runs can lose what the click that
      # cancels it shows: an answer itself sees that it is no longer wanted.
      for event, function, inputs in (
        (box.submit, self.ask, [turns, box, language]),
        (chat.example_select, self.example, [turns, language]),
        (chat.retry, self.retry, [turns, language]),
        (chat.edit, self.edit, [turns, language]),
      ):
        on(event, function, inputs, view).success(**answer)
      on(box.stop, self.stop, [turns, language], view)
      on(chat.undo, self.undo, [turns, language], view)
      for event in (chat.clear, new.click):
        on(event, self.clear, [turns], view)
      on(load.upload, self.open, [turns, load, language], view)
      on(save.click, self.save, [turns, language], [saved]).success(
        fn=None, js=_DOWNLOAD
      )
      labels = [head, chat, box, new, save, load, settings, temperature]
      on(language.change, self.relabel, [turns, language], labels)
      on(page.load, self.greet, None, [language])
    return page

  def _cards(self, language: str) -> list[dict]:
    return [
      {
        'text': one.text(language),
        'display_text': one.text(language),
        'icon': str(pictures[-1]),
        'files': [*map(str, pictures)],
      }
      for one, pictures in zip(EXAMPLES, self._examples, strict=True)
    ]

  # What follows answers events. `turns` is the conversation itself: it is
  # changed in place, so that all that runs at once sees the same.

  def greet(self, request: gr.Request) -> str:
    """The language that the browser asks for first."""
    asked = request.headers.get('accept-language', '').lower()
    return 'zh' if asked.startswith('zh') else 'en'

  def relabel(self, turns: list[Turn], language: str):
    """Everything that is written on the page."""
    words = WORDS[language]
    return (
      header(self._server.name, language),
      gr.update(value=show(turns, language), examples=self._cards(language)),
      gr.update(placeholder=words.ask),
      words.new,
      words.share,
      gr.update(label=words.open),
      gr.update(label=words.settings),
      gr.update(label=words.temperature, info=words.temperature_info),
    )

  # Only what somebody sends or takes back changes the box: an answer that ends
  # must not wipe out what is being typed meanwhile.

  def _running(self, turns, language, **box):
    turns[-1].due = True
    busy = gr.update(submit_btn=False, stop_btn=True, **box)
    return turns, show(turns, language), busy

  def _idle(self, turns, language, **box):
    idle = gr.update(submit_btn=True, stop_btn=False, **box)
    return turns, show(turns, language), idle

  def ask(self, turns: list[Turn], box: dict, language: str):
    """Takes a question in."""
    text, files = box['text'].strip(), [*map(pathlib.Path, box['files'])]
    if not text and not files:
      raise gr.Error(WORDS[language].ask, print_exception=False)
    turns.append(Turn(text, tuple(files)))
    return self._running(turns, language, value=_EMPTY)

  def example(self, turns: list[Turn], language: str, which: gr.SelectData):
    """Takes the question of a card in."""
    number = which.index if isinstance(which.index, int) else -1
    if not 0 <= number < len(EXAMPLES):
      raise gr.Error('no such example', print_exception=False)
    text = EXAMPLES[number].text(language)
    turns.append(Turn(text, self._examples[number]))
    return self._running(turns, language)

  def retry(self, turns: list[Turn], language: str):
    """Asks the last question again."""
    if not turns:
      raise gr.Error('nothing to ask again', print_exception=False)
    return self._running(turns, language)

  def edit(self, turns: list[Turn], language: str, what: gr.EditData):
    """Asks another question in place of one; what came after it goes."""
    index = what.index if isinstance(what.index, int) else what.index[0]
    number, value = index // 2, what.value
    if not 0 <= number < len(turns) or not isinstance(value, str):
      raise gr.Error('no such question', print_exception=False)
    del turns[number + 1 :]
    turns[number].text = value.strip()
    return self._running(turns, language)

  def undo(self, turns: list[Turn], language: str):
    """Takes the last question back into the box."""
    turn = turns.pop() if turns else Turn('')
    turn.asked += 1
    return self._idle(turns, language, value=_in_box(turn))

  def clear(self, turns: list[Turn]):
    """Begins a new conversation."""
    _replace(turns, [])
    return self._idle(turns, 'en', value=_EMPTY)

  async def answer(
    self,
    turns: list[Turn],
    language: str,
    temperature: float,
    request: gr.Request,
  ):
    """Answers the last question; yields the page as the answer grows."""
    # It may have been taken back before this began.
    if not turns or not turns[-1].due:
      yield gr.skip(), gr.skip(), gr.skip()
      return
    turn = turns[-1]
    turn.due = False
    turn.answer, turn.drawn, turn.lacking = '', (), ''
    turn.asked += 1
    mine = turn.asked
    limits, salt = self._server.limits, request.request.state.salt

    def wanted():
      return turn.asked == mine

    try:
      messages = await asyncio.to_thread(to_messages, [*turns], limits)
      pieces = ask(self._server, salt, messages, temperature=temperature)
      async with contextlib.aclosing(grouped(pieces, wanted)) as growing:
        async for piece in growing:
          turn.answer += piece
          yield turns, show(turns, language), gr.skip()
      if wanted():
        await asyncio.to_thread(draw_boxes, [*turns], self._folder)
    except ApiError as error:
      if wanted():
        self._refuse(error, language)
        if turns[-1] is turn:
          turns.pop()
        yield self._idle(turns, language, value=_in_box(turn))
        return
    if wanted():
      yield self._idle(turns, language)
    else:
      # What it showed last is shown again when it ends: let it be what is.
      yield turns, show(turns, language), gr.skip()

  def _refuse(self, error: ApiError, language: str) -> None:
    gr.Warning(html.escape(WORDS[language].errors.get(error.code, str(error))))

  def stop(self, turns: list[Turn], language: str):
    """Keeps what was answered so far."""
    if turns:
      turns[-1].due = False
      turns[-1].asked += 1
      draw_boxes(turns, self._folder)
      if not turns[-1].answer:
        turns[-1].answer = WORDS[language].stopped
    return self._idle(turns, language)

  def save(self, turns: list[Turn], language: str) -> str | None:
    """Writes the conversation into a file; returns its path."""
    try:
      text = share(turns, self._server.name, self._server.limits)
    except ApiError as error:
      self._refuse(error, language)
      return None
    path = self._folder / uuid.uuid4().hex / 'conversation.json'
    path.parent.mkdir()
    path.write_text(text, 'utf-8')
    return str(path)

  def open(self, turns: list[Turn], path: str, language: str):
    """Opens a conversation that was saved."""
    try:
      with open(path, 'rb') as file:
        data = file.read(2 * self._server.limits.body_bytes)
      opened = open_shared(data, self._folder, self._server.limits)
    except ApiError as error:
      self._refuse(error, language)
      return gr.skip(), gr.skip(), gr.skip()
    for number in range(1, len(opened) + 1):
      draw_boxes(opened[:number], self._folder)
    _replace(turns, opened)
    return self._idle(turns, language)
