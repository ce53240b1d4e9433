"""Bodies that nobody should send: each gets an answer."""

import base64
import copy
import io
import json
import random

import httpx
import pytest
from PIL import Image
from serve_support import KEY

REQUESTS = 400

_BUFFER = io.BytesIO()
Image.new('RGB', (9, 7), 'red').save(_BUFFER, 'PNG')
PICTURE = (
  'data:image/png;base64,' + base64.b64encode(_BUFFER.getvalue()).decode()
)

CHAT = {
  'model': 'tiny',
  'messages': [
    {'role': 'system', 'content': 'Be brief.'},
    {
      'role': 'user',
      'content': [
        {'type': 'image_url', 'image_url': {'url': PICTURE}},
        {'type': 'text', 'text': 'What is this?'},
      ],
    },
  ],
  'max_tokens': 4,
  'temperature': 0.5,
  'top_p': 0.9,
  'top_k': 5,
  'min_p': 0.1,
  'n': 1,
  'seed': 7,
  'stop': ['x'],
  'stop_token_ids': [5],
  'logit_bias': {'5': 1},
  'logprobs': True,
  'top_logprobs': 2,
  'presence_penalty': 0.5,
  'frequency_penalty': 0.5,
  'repetition_penalty': 1.1,
  'response_format': {'type': 'text'},
  'structured_outputs': {'choice': ['yes', 'no']},
  'stream': False,
  'user': 'me',
}
COMPLETION = {
  'model': 'tiny',
  'prompt': ['I see', 'Hello'],
  'max_tokens': 3,
  'echo': True,
  'logprobs': 1,
  'n': 1,
  'temperature': 0,
}
BODIES = {
  '/v1/chat/completions': CHAT,
  '/v1/completions': COMPLETION,
  '/tokenize': {'prompt': 'Hello', 'model': 'tiny'},
  '/detokenize': {'tokens': [1, 2, 3]},
}
ODD = (
  None, True, False, 0, -1, 1, 3, 10**9, 10**30, -(10**30), 0.5, 1e308, 1e-300,
  '', 'x', 'x' * 5000, '<|im_end|>', '<img>a</img>', '\ud83d', '\0', 'ä' * 99,
  [], {}, [[]], [{}], [None], ['a', 1], {'a': 1}, {'url': 'file:///etc/passwd'},
  'http://127.0.0.1/', 'data:,x', PICTURE[:60], 'user', 'assistant',
  {'type': 'json_schema', 'json_schema': {'schema': {'type': 'nothing'}}},
  {'type': 'json_object'}, {'regex': '('}, {'regex': 'a{1000}{1000}'},
  {'json': '{'}, {'boxes': True}, {'choice': []}, {'choice': ['a'] * 20},
  [0] * 500, list(range(300)), {'5': 1e9}, {'-1': 1}, {'x': 1},
)  # fmt: skip


def mutated(rng: random.Random, body):
  """A body with some of its values changed, or its keys."""
  body = json.loads(json.dumps(body))
  for _ in range(rng.choice((0, 1, 1, 2, 4))):
    place = body
    while True:
      keys = [*place] if isinstance(place, dict) else [*range(len(place))]
      if not keys:
        break
      key = rng.choice(keys)
      inner = place[key]
      if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
        place = inner
        continue
      change = rng.random()
      if change < 0.75:
        place[key] = copy.deepcopy(rng.choice(ODD))
      elif change < 0.85:
        del place[key]
      elif isinstance(place, dict):
        place[rng.choice(('tools', 'x' * 300, 'best_of', 'é'))] = inner
      else:
        place.extend(copy.deepcopy([inner] * rng.choice((1, 30))))
      break
  return body


@pytest.mark.slow
def test_every_body_gets_an_answer(address, server):
  rng = random.Random(0)
  codes = []
  with httpx.Client(
    base_url=address, headers={'Authorization': f'Bearer {KEY}'}, timeout=60
  ) as client:
    for number in range(REQUESTS):
      path = rng.choice([*BODIES, '/v1/chat/completions'])
      body = mutated(rng, BODIES[path])
      text = json.dumps(body).encode()
      if rng.random() < 0.1:
        cut = rng.randrange(len(text))
        text = text[:cut] + bytes([rng.randrange(256)]) + text[cut + 1 :]
      answer = client.post(
        path, content=text, headers={'Content-Type': 'application/json'}
      )
      codes.append(answer.status_code)
      assert answer.status_code in (200, 400, 404), (number, path, text[:2000])
      if answer.status_code != 200:
        error = answer.json()['error']
        assert set(error) == {'message', 'type', 'param', 'code'}
        for secret in 'Traceback', '.py', '/etc', 'object at':
          assert secret not in answer.text or secret in text.decode('latin-1')
  assert 0.1 < codes.count(200) / REQUESTS < 0.9
  load = server.worker.scheduler.load
  assert load.free == server.worker.scheduler.engine.slots
  assert not load.running and not load.waiting
