"""What OpenAI's client can expect of any server of these models.

  QWENVL_BASE_URL=http://HOST:PORT/v1 pytest tests/serve/test_conformance.py

asks a server that runs, ours or another, with the key in QWENVL_API_KEY.
Without the variable, one is made here. Tests marked `ours` are about what
only our own server has. vLLM 0.25 on JAX refuses seeds, takes biases without
heeding them, answers 500 where addresses of pictures are refused, and its
engine ends at scores of prompts.
"""

import asyncio
import base64
import io
import json
import os

import openai
import pytest
from PIL import Image

BASE_URL = os.environ.get('QWENVL_BASE_URL')
ours = pytest.mark.skipif(
  bool(BASE_URL) and not os.environ.get('QWENVL_OURS'),
  reason='another server is asked (QWENVL_OURS=1 if it is ours)',
)
WORDS = [{'role': 'user', 'content': 'Describe a picture of a dog.'}]


def picture(color):
  buffer = io.BytesIO()
  Image.new('RGB', (64, 48), color).save(buffer, 'PNG')
  code = base64.b64encode(buffer.getvalue()).decode()
  url = f'data:image/png;base64,{code}'
  return {'type': 'image_url', 'image_url': {'url': url}}


PICTURES = [
  {
    'role': 'user',
    'content': [
      picture('red'),
      picture('blue'),
      {'type': 'text', 'text': 'What differs?'},
    ],
  }
]


@pytest.fixture(scope='module')
def any_client(request):
  if not BASE_URL:
    yield request.getfixturevalue('client')
    return
  key = os.environ.get('QWENVL_API_KEY', 'none')
  with openai.OpenAI(base_url=BASE_URL, api_key=key, max_retries=0) as found:
    yield found


@pytest.fixture(scope='module')
def model(any_client):
  return any_client.models.list().data[0].id


@pytest.fixture
def chat(any_client, model):
  def create(messages=WORDS, **settings):
    settings = {'temperature': 0, 'max_tokens': 8, 'model': model} | settings
    return any_client.chat.completions.create(messages=messages, **settings)

  return create


@pytest.fixture
def complete(any_client, model):
  def create(prompt, **settings):
    settings = {'temperature': 0, 'max_tokens': 4, 'model': model} | settings
    return any_client.completions.create(prompt=prompt, **settings)

  return create


def told(chunks):
  """(text, finish reason, usage) of a stream with one choice."""
  text, reason, usage = '', None, None
  for chunk in chunks:
    usage = chunk.usage or usage
    for choice in chunk.choices:
      text += choice.delta.content or ''
      reason = choice.finish_reason or reason
  return text, reason, usage


def test_models(any_client, model):
  assert model in [found.id for found in any_client.models.list()]


@ours
def test_a_model_by_its_name(any_client, model):
  assert any_client.models.retrieve(model).id == model
  with pytest.raises(openai.NotFoundError):
    any_client.models.retrieve('nobody-s')


@pytest.mark.parametrize('messages', [WORDS, PICTURES], ids=['text', 'images'])
def test_a_chat_and_its_stream(chat, model, messages):
  whole = chat(messages)
  assert whole.object == 'chat.completion' and whole.model == model
  (choice,) = whole.choices
  assert choice.message.role == 'assistant'
  assert choice.finish_reason in ('stop', 'length')
  usage = whole.usage
  assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
  assert 0 < usage.completion_tokens <= 8
  text, reason, streamed = told(
    chat(messages, stream=True, stream_options={'include_usage': True})
  )
  assert (text, reason) == (choice.message.content, choice.finish_reason)
  assert streamed.completion_tokens == usage.completion_tokens
  assert streamed.prompt_tokens == usage.prompt_tokens


def test_pictures_are_read(chat):
  with_pictures = chat(PICTURES).usage.prompt_tokens
  text = [{'role': 'user', 'content': PICTURES[0]['content'][2:]}]
  assert with_pictures > chat(text).usage.prompt_tokens + 2


def test_conversations_go_on(chat):
  said = chat().choices[0].message.content
  messages = [
    {'role': 'system', 'content': 'Be brief.'},
    *WORDS,
    {'role': 'assistant', 'content': said},
    {'role': 'user', 'content': 'And now?'},
  ]
  assert chat(messages).usage.prompt_tokens > chat().usage.prompt_tokens


def test_answers_end_at_stop_texts(chat):
  text = chat().choices[0].message.content
  middle = len(text) // 2
  stop = text[middle : middle + 2]
  for stream in False, True:
    found = chat(stop=[stop, 'never said'], stream=stream)
    if stream:
      said, reason, _ = told(found)
    else:
      said = found.choices[0].message.content
      reason = found.choices[0].finish_reason
    assert (said, reason) == (text.partition(stop)[0], 'stop')


def test_several_answers(chat):
  found = chat(n=3, temperature=1, top_p=1, max_tokens=4)
  assert sorted(choice.index for choice in found.choices) == [0, 1, 2]
  assert found.usage.completion_tokens <= 12
  chunks = chat(n=2, temperature=1, max_tokens=4, stream=True)
  assert {c.index for chunk in chunks for c in chunk.choices} == {0, 1}


@ours
def test_seeds_repeat_answers(chat):
  one, other = (
    chat(temperature=1.5, top_p=1, seed=5).choices[0].message.content
    for _ in range(2)
  )
  assert one == other


def test_log_probabilities(chat):
  (choice,) = chat(logprobs=True, top_logprobs=3).choices
  content = choice.logprobs.content
  said = b''.join(bytes(one.bytes) for one in content).decode()
  assert said.removesuffix('<|im_end|>') == choice.message.content
  for one in content:
    assert one.logprob <= 0
    best = max(one.top_logprobs, key=lambda x: x.logprob)
    assert one.token == best.token  # It was chosen greedily.


@ours
def test_bias(complete):
  said = [
    complete('a', max_tokens=1, logit_bias={token: 100}).choices[0].text
    for token in ('65', '66')
  ]
  assert said[0] != said[1]


@ours
def test_an_answer_has_the_form_that_was_asked_for(chat):
  found = chat(extra_body={'structured_outputs': {'choice': ['red', 'blue']}})
  assert found.choices[0].message.content in ('red', 'blue')
  found = chat(extra_body={'structured_outputs': {'regex': '[0-9]{3}'}})
  assert found.choices[0].message.content.isdecimal()
  schema = {
    'type': 'object',
    'properties': {'n': {'enum': [1, 2]}},
    'required': ['n'],
    'additionalProperties': False,
  }
  named = {'name': 'x', 'schema': schema}
  found = chat(
    max_tokens=200,
    response_format={'type': 'json_schema', 'json_schema': named},
  )
  assert json.loads(found.choices[0].message.content)['n'] in (1, 2)


def test_the_beginning_of_an_answer_is_continued(chat):
  begun = chat(max_tokens=2).choices[0].message.content
  messages = [*WORDS, {'role': 'assistant', 'content': begun}]
  more = {'continue_final_message': True, 'add_generation_prompt': False}
  found = chat(messages, max_tokens=6, extra_body=more)
  assert begun + found.choices[0].message.content == (
    chat(max_tokens=8).choices[0].message.content
  )


def test_prompts_are_continued(complete):
  found = complete(['a', 'b c'])
  assert found.object == 'text_completion'
  assert [choice.index for choice in found.choices] == [0, 1]
  alone = complete('b c').choices[0].text
  assert found.choices[1].text == alone
  streamed = complete('b c', stream=True)
  assert ''.join(chunk.choices[0].text for chunk in streamed) == alone


@ours
def test_prompts_are_scored(complete):
  prompt = 'A dog on a sofa.'
  (choice,) = complete(prompt, max_tokens=0, echo=True, logprobs=1).choices
  assert choice.text == prompt
  first, *others = choice.logprobs.token_logprobs
  assert first is None and len(others) == len(choice.logprobs.tokens) - 1
  assert all(logprob <= 0 for logprob in others)


def test_many_at_once(any_client, model):
  async def ask():
    async with openai.AsyncOpenAI(
      base_url=any_client.base_url, api_key=any_client.api_key
    ) as client:
      return await asyncio.gather(
        *(
          client.chat.completions.create(
            model=model, messages=WORDS, temperature=0, max_tokens=6
          )
          for _ in range(12)
        )
      )

  said = {found.choices[0].message.content for found in asyncio.run(ask())}
  assert len(said) == 1


@pytest.mark.parametrize(
  ('settings', 'error'),
  [
    ({'model': 'nobody-s'}, openai.NotFoundError),
    ({'max_tokens': 10**6}, openai.BadRequestError),
    ({'temperature': -1}, openai.BadRequestError),
    ({'top_p': 2}, openai.BadRequestError),
    ({'n': 0}, openai.BadRequestError),
    ({'top_logprobs': 3}, openai.BadRequestError),
    ({'logit_bias': {'10000000': 1}}, openai.BadRequestError),
    ({'messages': [{'role': 'user'}] * 2 + ['x']}, openai.BadRequestError),
    (
      {'extra_body': {'structured_outputs': {'regex': '('}}},
      openai.BadRequestError,
    ),
  ],
)
def test_mistakes_become_exceptions(chat, settings, error):
  with pytest.raises(error) as caught:
    chat(**settings)
  assert caught.value.body['message']


@pytest.mark.parametrize(
  'url',
  [
    'data:image/png;base64,AAAA',
    'nothing',
    pytest.param('file:///etc/hostname', marks=ours),
    pytest.param('http://127.0.0.1:9/a.png', marks=ours),
  ],
)
def test_pictures_that_are_none(chat, url):
  part = {'type': 'image_url', 'image_url': {'url': url}}
  with pytest.raises(openai.BadRequestError):
    chat([{'role': 'user', 'content': [part]}])
  assert chat().choices


@ours
def test_what_is_not_known_is_refused(chat):
  with pytest.raises(openai.BadRequestError, match='colour'):
    chat(extra_body={'colour': 'red'})


@ours
def test_boxes_in_pixels(chat):
  # Any box, in pixels of the last picture of 64 x 48.
  found = chat(
    PICTURES,
    max_tokens=64,
    extra_body={'structured_outputs': {'boxes': {'ref': 'the dog'}}},
  )
  (place,) = found.choices[0].message.boxes
  assert (place['ref'], place['picture']) == ('the dog', 2)
  assert all(0 <= x <= 64 for x in place['box'])


@ours
def test_the_request_is_named(any_client, model):
  raw = any_client.chat.completions.with_raw_response.create(
    model=model,
    messages=WORDS,
    max_tokens=1,
    extra_headers={'X-Request-Id': 'mine-7'},
  )
  assert raw.headers['x-request-id'] == 'mine-7'
  assert raw.parse()._request_id == 'mine-7'
