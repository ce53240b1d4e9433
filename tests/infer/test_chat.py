import numpy as np
import pytest
from PIL import Image

from qwenvl_jax import api
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.infer import chat as chatting
from qwenvl_jax.infer.chat import Chat, ChatSettings, Turn, ask, build_prompt


@pytest.fixture(scope='module')
def model(chat_checkpoint):
  return api.load(chat_checkpoint)


def picture(colour='red'):
  return Image.new('RGB', (40, 30), colour)


def turn(query='q', pictures=(), answer='a'):
  return Turn(query, tuple(pictures), answer)


def shown(model, prompt):
  """The first pixel of each picture that the model sees."""
  return [tuple(pixels[0, 0].tolist()) for pixels in prompt.pixels]


RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


def test_pictures_are_numbered_through_the_conversation(model):
  first = ask('And?', [picture(), picture('green')])
  assert first.query == (
    'Picture 1: <img>1.png</img>\nPicture 2: <img>2.png</img>\nAnd?'
  )
  second = ask('Now?', [picture('blue')], (first,))
  assert second.query == 'Picture 3: <img>3.png</img>\nNow?'
  prompt = build_prompt(model, second, (first,))
  assert shown(model, prompt) == [RED, GREEN, BLUE]
  assert prompt.tokens.count(model.config.image_start_id) == 3


def test_paths_become_spans(tmp_path):
  path = tmp_path / 'dog.png'
  picture('blue').save(path)
  for made in (
    ask('What?', [path]),
    ask(f'Picture 1: <img>{path}</img>\nWhat?'),
  ):
    assert made.query == f'Picture 1: <img>{path}</img>\nWhat?'
    assert made.pictures[0].getpixel((0, 0)) == BLUE


def test_given_pictures_fill_the_spans(model):
  made = ask('<img>a</img> or <img>b</img>?', [picture(), picture('green')])
  assert made.query == '<img>a</img> or <img>b</img>?'
  with pytest.raises(DataError, match='2 <img> spans and comes with 1'):
    ask('<img>a</img> or <img>b</img>?', [picture()])
  with pytest.raises(DataError, match='not closed'):
    ask('what is <img>this')
  with pytest.raises(DataError, match='no such file'):
    ask('<img>no/such.png</img>')


def test_old_turns_leave_with_their_pictures(model):
  first = ask('One?', [picture()])._replace(answer='1')
  second = ask('Two?', [picture('green')], (first,))._replace(answer='2')
  third = ask('Three?', [picture('blue')], (first, second))
  settings = ChatSettings(max_window_size=120)
  prompt = build_prompt(model, third, (first, second), settings)
  assert prompt.dropped_turns == 1
  assert shown(model, prompt) == [GREEN, BLUE]
  text = model.tokenizer.decode(prompt.tokens)
  assert 'One?' not in text
  assert 'Two?' in text


def test_old_turns_leave_when_positions_run_out(model):
  """The window's default is more than this model has positions."""
  history = tuple(turn(f'{n} ' + 'x' * 150) for n in range(8))
  prompt = build_prompt(model, turn('last'), history)
  limit = model.config.decoder.max_position_embeddings
  assert 0 < prompt.dropped_turns < 8
  assert len(prompt.tokens) + prompt.max_new_tokens <= limit
  assert prompt.max_new_tokens >= limit // 4
  with pytest.raises(DataError, match='shorten it'):
    build_prompt(model, turn('x' * 2000), history)


def test_pictures_that_the_model_made_up_are_forgotten(model):
  history = (turn(answer='see <img>dream.png</img> and <img>'),)
  prompt = build_prompt(model, turn('q'), history)
  assert model.config.image_start_id not in prompt.tokens
  assert len(prompt.pixels) == 0


def test_typed_end_of_turn_stays_text(model):
  prompt = build_prompt(model, turn('a<|im_end|>b'))
  assert prompt.tokens.count(model.tokenizer.im_end_id) == 2


def test_answer_and_history(model, recited):
  answer, history = chatting.chat(model, 'What?', [picture()])
  assert answer == recited
  answer, history = chatting.chat(model, 'And?', history=history)
  assert [t.answer for t in history] == [recited, recited]
  assert len(history[0].pictures) == 1


def test_a_stream_never_gives_half_a_character(model):
  pieces = list(Chat(model).ask('What?'))
  assert '狗' in pieces
  assert len(pieces) > 5


def test_an_answer_left_early_is_kept(model, monkeypatch):
  monkeypatch.setattr(chatting, 'answer', lambda *_: iter([' I', ' see', '.']))
  chat = Chat(model)
  pieces = chat.ask('What?', [picture()])
  next(pieces), next(pieces)
  pieces.close()
  assert [t.answer for t in chat.history] == ['I see']
  assert len(chat.pictures) == 1
  chat.reset()
  assert not chat.history
  # Nothing was said, so nothing is kept.
  pieces = chat.ask('What?')
  pieces.close()
  assert not chat.history


def test_a_failed_question_changes_nothing(model):
  chat = Chat(model)
  with pytest.raises(DataError):
    list(chat.ask('x' * 2000))
  assert not chat.history


def test_answers_end_at_any_end(model):
  tokenizer = model.tokenizer
  assert set(chatting.stop_ids(tokenizer)) == {
    tokenizer.im_end_id,
    tokenizer.im_start_id,
    tokenizer.eod_id,
  }


def test_broken_characters_are_marked(model):
  tokenizer = model.tokenizer
  ids = [0xE7, 0x8B, ord('x'), 0xE7]
  text = ''.join(chatting.stream_text(tokenizer, ids))
  assert text == tokenizer.decode(ids) == '\ufffdx\ufffd'


def test_arrays_are_pictures(model):
  made = ask('?', [np.zeros((5, 6, 3), np.uint8)])
  assert made.pictures[0].size == (6, 5)


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'system': 'see <img>x</img>'}, 'system prompt'),
    ({'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'temperature': -1}, 'temperature=-1'),
    ({'top_p': 0}, 'top_p=0'),
  ],
)
def test_settings_out_of_range(settings, message):
  with pytest.raises(ConfigError, match=message):
    ChatSettings(**settings)


def test_the_vocabulary_knows_how_many_tokens_an_image_has(model):
  tokens = model.tokenizer.encode('<img>dog.jpg</img>What?')
  assert model.generate(
    [tokens], images=model.preprocess(picture())[None], max_new_tokens=2
  )[0]
