import base64
import io

import numpy as np
import openai
import pytest
import reciter
from PIL import Image

from qwenvl_jax.text import chatml

PROMPT = 'I see something'


def complete(client, prompt, **settings):
  settings = {'temperature': 0, 'max_tokens': 8} | settings
  return client.completions.create(model='tiny', prompt=prompt, **settings)


def test_a_prompt_is_continued_as_it_is(client, handle):
  ids = handle.tokenizer.encode('</ref>')
  found = complete(client, ids, max_tokens=16)
  assert found.object == 'text_completion'
  assert reciter.ANSWER.endswith(found.choices[0].text)
  assert found.choices[0].text.startswith('<box>')
  assert found.choices[0].finish_reason == 'stop'
  assert found.usage.prompt_tokens == 1
  streamed = complete(client, ids, max_tokens=16, stream=True, echo=True)
  text = ''.join(chunk.choices[0].text for chunk in streamed)
  assert text == '</ref>' + found.choices[0].text


def test_several_prompts(client):
  found = complete(client, ['a', 'bb'], n=2, max_tokens=3)
  assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
  assert found.choices[0].text == found.choices[1].text
  assert found.usage.prompt_tokens == 3
  assert found.usage.completion_tokens == 12


def test_a_prompt_is_scored(client, handle):
  ids = handle.tokenizer.encode_ordinary(PROMPT)
  found = complete(client, PROMPT, max_tokens=0, echo=True, logprobs=2)
  (choice,) = found.choices
  assert choice.text == PROMPT and choice.finish_reason == 'length'
  logprobs = choice.logprobs
  assert ''.join(logprobs.tokens) == PROMPT
  assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
  (expected,) = handle.score([ids[:1]], [ids[1:]], top=2)
  np.testing.assert_allclose(
    logprobs.token_logprobs[1:], expected.logprobs, atol=1e-4
  )
  assert all(len(top) <= 2 for top in logprobs.top_logprobs[1:])
  assert logprobs.text_offset[:3] == [0, 1, 2]
  assert found.usage.completion_tokens == 0
  # The answer's follow.
  more = complete(client, PROMPT, max_tokens=2, echo=True, logprobs=1)
  tokens = more.choices[0].logprobs.token_logprobs
  assert tokens[1 : len(ids)] == logprobs.token_logprobs[1:]
  assert len(tokens) == len(ids) + 2


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    ({'prompt': ''}, 'one token'),
    ({'prompt': []}, 'prompt'),
    ({'prompt': [10**6]}, 'vocabulary'),
    ({'prompt': [-1]}, 'prompt'),
    ({'max_tokens': 0}, 'max_tokens=0'),
    ({'max_tokens': 10**5}, 'context'),
    ({'prompt': ['a'] * 17}, '17 prompts'),
    ({'best_of': 3}, 'best_of'),
    ({'suffix': 'x'}, 'suffix'),
  ],
)
def test_mistakes(client, settings, said):
  settings = {'prompt': 'a'} | settings
  with pytest.raises(openai.BadRequestError, match=said):
    complete(client, **settings)


def test_the_span_of_an_image_needs_one(client, handle):
  start = handle.config.image_start_id
  with pytest.raises(openai.BadRequestError):
    complete(client, [start, *[5] * 16, start + 1])


def test_a_prompt_with_pictures(client, handle):
  """What is shown is scored as the engine scores it; text opens nothing."""
  picture = Image.new('RGB', (9, 9), 'red')
  encoded = io.BytesIO()
  picture.save(encoded, 'png')
  url = f'data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}'
  tokenizer = handle.tokenizer
  ids = chatml.encode_parts(tokenizer, ['a', None, 'b</img>'], 16)
  found = complete(
    client,
    'a<img></img>b</img>',
    max_tokens=0,
    echo=True,
    logprobs=0,
    extra_body={'images': [url]},
  )
  pixels = np.asarray(picture.resize((28, 28)))[None]
  # The letter and the picture, then the rest.
  (expected,) = handle.score([ids[:19]], [ids[19:]], pixels)
  np.testing.assert_allclose(
    found.choices[0].logprobs.token_logprobs[19:], expected.logprobs, atol=1e-4
  )
  for prompt, images, said in (
    ('a', [url], '0 <img></img> in the prompt'),
    ([1], [url], 'one text'),
    ('<img></img>', ['data:,'], 'picture 1'),
  ):
    with pytest.raises(openai.BadRequestError, match=said):
      complete(client, prompt, extra_body={'images': images})
