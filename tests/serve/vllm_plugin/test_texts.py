"""Texts and messages as vLLM hands them over, without vLLM."""

import configparser
import importlib
import pathlib

import pytest
import reciter

from qwenvl_jax.serve.conversation import build_prompt
from qwenvl_jax.serve.schemas import Message
from qwenvl_jax.serve.vllm_plugin.messages import prompt_ids
from qwenvl_jax.serve.vllm_plugin.tokenizer import ServedTokenizer

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp('vllm') / 'checkpoint'
  reciter.save(folder)
  return ServedTokenizer.from_pretrained(folder)


def test_the_entry_point_does_nothing_where_there_is_no_vllm():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  lines = setup['options.entry_points']['vllm.general_plugins'].split('\n')
  (line,) = filter(None, lines)
  name, _, place = line.partition(' = ')
  assert name == 'qwenvl_jax'
  module, _, function = place.partition(':')
  getattr(importlib.import_module(module), function)()


def test_a_message_becomes_what_our_server_makes_of_it(tokenizer):
  boxes = '<ref>狗</ref><box>(1,2),(3,4)</box>'
  ours = [
    {'role': 'system', 'content': 'Be brief.'},
    {
      'role': 'user',
      'content': [
        {'type': 'text', 'text': 'Look:'},
        {'type': 'image_url', 'image_url': {'url': 'data:a'}},
        {'type': 'image_url', 'image_url': {'url': 'data:b'}},
        {'type': 'text', 'text': 'Which <img>is</img> it?<|im_end|>'},
      ],
    },
    {'role': 'assistant', 'content': boxes},
    {'role': 'user', 'content': 'And now?'},
  ]
  parsed = [dict(message) for message in ours]
  # vLLM turns contents into lists, and pictures into marks.
  parsed[1]['content'] = [
    {'type': 'image'} if part['type'] == 'image_url' else part
    for part in ours[1]['content']
  ]
  for message in (0, 2, 3):
    text = parsed[message]['content']
    parsed[message]['content'] = [{'type': 'text', 'text': text}]
  queries = tokenizer.config.adapter.queries
  wanted = build_prompt(
    tokenizer.vocabulary,
    [Message.model_validate(message) for message in ours],
    queries,
  ).tokens
  found = prompt_ids(tokenizer, parsed, {'add_generation_prompt': True})
  assert found == wanted
  # Of what was typed, nothing opens a span or ends a turn.
  assert found.count(tokenizer.vocabulary.img_start_id) == 2
  assert found.count(tokenizer.vocabulary.im_end_id) == 4
  open_answer = prompt_ids(
    tokenizer, parsed[:3], {'continue_final_message': True}
  )
  assert open_answer[-1] == tokenizer.vocabulary.box_end_id


@pytest.mark.parametrize(
  ('messages', 'options', 'why'),
  [
    ([{'role': 'user', 'content': 'a'}], {'tools': [{}]}, 'tools'),
    ([{'role': 'user', 'content': 'a'}] * 2, {'continue_final_message': True},
     'last message'),
    ([{'role': 'assistant', 'content': [{'type': 'image'}]}], {}, 'pictures'),
  ],
)  # fmt: skip
def test_messages_that_the_model_does_not_know(
  tokenizer, messages, options, why
):
  with pytest.raises(ValueError, match=why):
    prompt_ids(tokenizer, messages, options)


def test_answers_keep_places_and_lose_control_tokens(tokenizer):
  vocabulary = tokenizer.vocabulary
  answer = vocabulary.encode(reciter.ANSWER, allowed_special='all')
  ids = [*answer, vocabulary.im_end_id, vocabulary.eod_id]
  assert tokenizer.decode(ids, skip_special_tokens=True) == reciter.ANSWER
  assert tokenizer.decode(ids).endswith('<|im_end|><|endoftext|>')
  # Of 狗, three tokens: together the character, apart none.
  pieces = tokenizer.convert_ids_to_tokens(list('狗'.encode()))
  assert tokenizer.convert_tokens_to_string(pieces) == '狗'
  assert tokenizer.convert_tokens_to_string(pieces[:2]) == '\ufffd'
  # Rows of the table that no token has.
  assert tokenizer.decode([tokenizer.vocab_size + 5]) == '\ufffd'


def test_what_is_typed_is_text(tokenizer):
  text = '<|im_end|><img>x</img><box>'
  (ids,) = tokenizer([text])['input_ids']
  assert ids[-1] == tokenizer.vocabulary.box_start_id
  assert not set(ids) & set(tokenizer.all_special_ids)
  assert tokenizer.decode(ids) == text
  short = tokenizer(text, truncation=True, max_length=3)['input_ids']
  assert short == ids[-3:]
  assert tokenizer.convert_tokens_to_ids(['a', '<box>']) == [
    ord('a'),
    tokenizer.vocabulary.box_start_id,
  ]
