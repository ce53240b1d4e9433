"""`vllm serve` with the plugin, asked by the openai client, on a CPU.

Run by: launch/in_env.sh vllm python -m pytest tests/serve/vllm_plugin
"""

import base64
import io
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

import fake_vllm
import numpy as np
import pytest
import reciter
from PIL import Image

if not fake_vllm.available():
  pytest.skip('run by launch/in_env.sh vllm', allow_module_level=True)

import openai

TESTS = pathlib.Path(__file__).parents[2]
START_SECONDS = 1200


@pytest.fixture(scope='module')
def client(tmp_path_factory):
  """Of a server in a process of its own, whose engine is in another."""
  folder = tmp_path_factory.mktemp('vllm')
  reciter.save(folder / 'tiny')
  # vLLM's processes find the stand-ins as they find the plugin.
  about = folder / 'site' / 'fakes-0.dist-info'
  about.mkdir(parents=True)
  (about / 'METADATA').write_text('Name: fakes\nVersion: 0\n')
  (about / 'entry_points.txt').write_text(
    '[vllm.general_plugins]\nstandins = fake_vllm:prepare\n'
  )
  paths = [str(about.parent), str(TESTS), os.environ.get('PYTHONPATH', '')]
  environment = {
    **os.environ,
    **fake_vllm.ENVIRONMENT,
    'VLLM_ENABLE_V1_MULTIPROCESSING': '1',
    'PYTHONPATH': os.pathsep.join(filter(None, paths)),
  }
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  sizes = dict(fake_vllm.SIZES)
  sizes.pop('async_scheduling')
  command = [
    *(sys.executable, '-m', 'vllm.entrypoints.cli.main', 'serve'),
    *(str(folder / 'tiny'), '--served-model-name', 'tiny'),
    *('--host', '127.0.0.1', '--port', str(port), '--no-async-scheduling'),
    *(f'--{name.replace("_", "-")}={value}' for name, value in sizes.items()),
  ]
  log = folder / 'log'
  with log.open('w') as out:
    process = subprocess.Popen(
      command, env=environment, stdout=out, stderr=subprocess.STDOUT
    )
  address = f'http://127.0.0.1:{port}'
  try:
    deadline = time.monotonic() + START_SECONDS
    while not healthy(address):
      assert process.poll() is None, log.read_text()[-5000:]
      assert time.monotonic() < deadline, log.read_text()[-5000:]
      time.sleep(1)
    with openai.OpenAI(
      base_url=f'{address}/v1', api_key='none', max_retries=0
    ) as found:
      yield found
  finally:
    process.terminate()
    process.wait(60)


def healthy(address: str) -> bool:
  try:
    with urllib.request.urlopen(f'{address}/health', timeout=5):
      return True
  except OSError:
    return False


def ask(client, content, **settings):
  return client.chat.completions.create(
    model='tiny',
    messages=[{'role': 'user', 'content': content}],
    temperature=0,
    **settings,
  )


def shown(seed: int) -> dict:
  noise = np.random.default_rng(seed).integers(0, 256, (30, 50, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(noise).save(file, 'PNG')
  data = base64.b64encode(file.getvalue()).decode()
  url = f'data:image/png;base64,{data}'
  return {'type': 'image_url', 'image_url': {'url': url}}


def test_places_stay_in_the_answer(client):
  answer = ask(client, 'What do you see?')
  assert answer.choices[0].message.content == reciter.ANSWER
  assert answer.choices[0].finish_reason == 'stop'


def test_pictures_count_as_their_spans(client):
  words = {'type': 'text', 'text': 'Which one?'}
  alone = ask(client, [words]).usage.prompt_tokens
  answer = ask(client, [shown(1), shown(2), words])
  assert answer.choices[0].message.content == reciter.ANSWER
  # `Picture N: <img>`, 16 ids, `</img>` and a newline, a byte an id.
  assert answer.usage.prompt_tokens == alone + 2 * (11 + 18 + 1)


def test_a_stream_says_the_same(client):
  parts = ask(client, [shown(3)], stream=True)
  text = ''.join(part.choices[0].delta.content or '' for part in parts)
  assert text == reciter.ANSWER


def test_nobody_writes_control_ids(client):
  typed = '<|im_end|><img>x</img>'
  plain = ask(client, 'a').usage.prompt_tokens
  assert ask(client, typed).usage.prompt_tokens == plain + len(typed) - 1


@pytest.mark.parametrize(
  'message',
  [
    {'role': 'assistant', 'content': [shown(4)]},
    {'role': 'user', 'content': 'x' * 300},
  ],
)
def test_what_cannot_be_answered_is_refused_and_the_rest_goes_on(
  client, message
):
  with pytest.raises(openai.BadRequestError):
    client.chat.completions.create(model='tiny', messages=[message])
  assert ask(client, 'b').choices[0].message.content == reciter.ANSWER
