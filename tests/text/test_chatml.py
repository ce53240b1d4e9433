"""Chat contexts, SFT labels and the list format are the release's."""

import json
import pathlib

import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.text import chatml
from qwenvl_jax.text.tokenizer import Tokenizer

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'tokenizer.json'
GOLDEN = json.loads(GOLDENS.read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer()


@pytest.mark.parametrize('case', GOLDEN['chat_context'])
def test_context_as_released(tokenizer, case):
  window = {k: case[k] for k in ('max_window_size',) if k in case}
  context = chatml.chat_context(
    tokenizer, case['query'], case['history'], case['system'], **window
  )
  assert context.text == case['raw_text']
  assert context.tokens == case['ids']


@pytest.mark.parametrize('case', GOLDEN['sft'])
def test_sft_example_as_released(tokenizer, case):
  ids, labels = chatml.sft_example(
    tokenizer, case['conversations'], case['max_len']
  )
  assert ids == case['input_ids']
  assert labels == case['labels']


@pytest.mark.parametrize('case', GOLDEN['from_list_format'])
def test_from_list_format_as_released(case):
  assert chatml.from_list_format(case['list']) == case['text']


@pytest.mark.parametrize('case', GOLDEN['to_list_format'])
def test_to_list_format_as_released(case):
  assert chatml.to_list_format(case['text']) == case['list']
  boxes = [{**b, 'box': list(b['box'])} for b in chatml.to_boxes(case['text'])]
  assert boxes == case['boxes']


def test_typed_end_of_turn_stays_text(tokenizer):
  query = 'say <|im_end|> and <|endoftext|> <ref>x</ref>'
  tokens = chatml.chat_context(tokenizer, query).tokens
  assert tokens.count(tokenizer.im_end_id) == 2  # system and query
  assert tokenizer.eod_id not in tokens
  assert tokens.count(tokenizer.ref_start_id) == 1
  assert query in tokenizer.decode(tokens)


def test_window_drops_oldest_turns_and_says_which_images_went(tokenizer):
  history = [
    (f'Picture {i}: <img>{i}.png</img>\nwhat?', f'thing {i}') for i in range(4)
  ]
  full = chatml.chat_context(tokenizer, 'and now?', history, image_tokens=16)
  assert (full.dropped_turns, full.dropped_images) == (0, 0)
  assert full.image_paths == ['0.png', '1.png', '2.png', '3.png']
  small = chatml.chat_context(
    tokenizer, 'and now?', history, max_window_size=120, image_tokens=16
  )
  assert small.dropped_turns == small.dropped_images == 2
  assert small.image_paths == ['2.png', '3.png']
  for start in small.image_starts:
    assert small.tokens[start - 1] == tokenizer.img_start_id
    assert small.tokens[start + 16] == tokenizer.img_end_id
  assert tokenizer.decode(small.tokens) == small.text


def test_window_is_exclusive(tokenizer):
  history = [('a', 'b')]
  alone = chatml.chat_context(tokenizer, 'q').tokens
  both = chatml.chat_context(tokenizer, 'q', history).tokens
  # The query is not counted: the window sees the system turn and the history.
  query = len(alone) - len(tokenizer.encode(chatml.DEFAULT_SYSTEM)) - 4
  size = len(both) - query
  for window, dropped in ((size, 1), (size + 1, 0)):
    context = chatml.chat_context(
      tokenizer, 'q', history, max_window_size=window
    )
    assert context.dropped_turns == dropped


def test_history_survives_a_models_unfinished_words(tokenizer):
  history = [('what?', 'a <img>cut <ref>dog</ref><box>(1,2'), ('and?', None)]
  context = chatml.chat_context(tokenizer, 'now?', history)
  assert tokenizer.img_start_id not in context.tokens
  assert tokenizer.box_start_id in context.tokens
  assert tokenizer.decode(context.tokens) == context.text
  with pytest.raises(DataError, match='unclosed <img>'):
    chatml.chat_context(tokenizer, 'look: <img>a.png')


def test_of_a_conversation_the_answers_are_learned(tokenizer):
  turns = [
    {'from': 'user', 'value': 'Picture 1: <img>a.jpg</img>\nwho?'},
    {'from': 'assistant', 'value': '<ref>me</ref><box>(1,2),(3,4)</box>'},
  ]
  ids, labels = chatml.sft_example(tokenizer, turns, image_tokens=64)
  (start,) = tokenizer.image_starts(ids, 64)
  assert set(labels[start - 1 : start + 65]) == {chatml.NO_LOSS}
  trained = [x for x in labels if x != chatml.NO_LOSS]
  assert trained == [
    i for i, x in zip(ids, labels, strict=True) if x != chatml.NO_LOSS
  ]
  assert tokenizer.decode(trained) == (
    '<|im_start|><|im_end|>\n<|im_start|><|im_end|>\n'
    '<|im_start|><ref>me</ref><box>(1,2),(3,4)</box><|im_end|>\n'
  )


def test_truncation_may_cut_text_but_not_an_image(tokenizer):
  turns = [
    {'from': 'user', 'value': 'Picture 1: <img>a.jpg</img>\nwho?'},
    {'from': 'assistant', 'value': 'nobody at all'},
  ]
  ids, labels = chatml.sft_example(tokenizer, turns, image_tokens=16)
  cut = chatml.sft_example(tokenizer, turns, len(ids) - 3, image_tokens=16)
  assert cut == (ids[:-3], labels[:-3])
  with pytest.raises(DataError, match='llava 12, cut to 25: image 1'):
    chatml.sft_example(tokenizer, turns, 25, image_tokens=16, record='llava 12')


@pytest.mark.parametrize(
  ('turns', 'message'),
  [
    ([], 'rec: no turn left'),
    ([{'from': 'assistant', 'value': 'x'}], 'rec: no turn left'),
    ([{'from': 'human', 'value': 'x'}], "turn 1: 'from' is 'human'"),
    ([{'from': 'user'}], "turn 1 has no 'from' and 'value'"),
    (['hello'], 'turn 1 has no'),
    ([{'from': 'user', 'value': None}], "turn 1: 'value' must be text"),
    ([{'from': 'user', 'value': 'a <box>(1,2)'}], 'turn 1: <box> at .* 2'),
    ([{'from': 'user', 'value': 'a <img>b'}], 'turn 1: <img> at .*</img>'),
  ],
)
def test_malformed_conversations_are_refused_by_record(
  tokenizer, turns, message
):
  with pytest.raises(DataError, match=message):
    chatml.sft_example(tokenizer, turns, record='rec')


def test_list_format_numbers_on_and_takes_quads():
  items = [{'image': 'b.png'}, {'quad': [[1, 2, 3, 4, 5, 6, 7, 8]], 'ref': 'x'}]
  assert chatml.from_list_format(items, first_picture=3) == (
    'Picture 3: <img>b.png</img>\n'
    '<ref>x</ref><quad>(1,2),(3,4),(5,6),(7,8)</quad>'
  )
  with pytest.raises(DataError, match='item 1 .*audio'):
    chatml.from_list_format([{'audio': 'x.wav'}])
  with pytest.raises(DataError, match='box needs 4 numbers, not 3'):
    chatml.from_list_format([{'box': [[1, 2, 3]]}])


def test_to_list_format_takes_unfinished_text():
  assert chatml.to_list_format('a <ref>b</ref><box>(1,2') == [
    {'text': 'a '},
    {'ref': 'b'},
    {'text': '<box>(1,2'},
  ]
  assert chatml.to_boxes('<box>(1,2</box><box>(1,2),(3,4)') == []


def test_lists_are_made_in_the_length_of_the_text():
  text = '<ref>' * 200_000
  assert chatml.to_list_format(text) == [{'text': text}]
  assert chatml.to_list_format('<box>x</ref><ref>a<ref>b</ref>c</ref>') == [
    {'text': '<box>x</ref>'}, {'ref': 'a<ref>b'}, {'text': 'c</ref>'},
  ]  # fmt: skip


def test_a_conversation_may_bring_its_system_turn():
  talk = [('user', 'Hi'), ('assistant', 'Hello')]
  brief = chatml.conversation_spans([('system', 'Be brief.'), *talk])
  assert brief == chatml.conversation_spans(talk, 'Be brief.')
  assert brief[3] == chatml.TextSpan('Be brief.')
  learned = ''.join(x.text for x in brief if x.loss)
  assert learned == (
    '<|im_start|><|im_end|>\n' * 2 + '<|im_start|>Hello<|im_end|>\n'
  )
  assert chatml.conversation_spans([('assistant', 'x')]) == ()
