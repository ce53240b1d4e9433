"""Keys, limits, counters, and clients that go away."""

import concurrent.futures
import datetime
import hmac
import http.client
import ipaddress
import json
import re
import signal
import socket
import ssl
import time
import urllib.parse

import httpx
import openai
import pytest
import reciter
from serve_support import KEY, command, key_file, running

from qwenvl_jax.serve import main

HEADERS = {'Authorization': f'Bearer {KEY}'}
QUESTION = {'messages': [{'role': 'user', 'content': 'Hello'}]}


@pytest.fixture(scope='session')
def http_client(address):
  with httpx.Client(base_url=address, headers=HEADERS, timeout=60) as found:
    yield found


@pytest.mark.parametrize(
  'path', ['/v1/models', '/version', '/metrics', '/docs', '/openapi.json']
)
def test_every_route_but_health_wants_the_key(http_client, path):
  for header in (
    '',
    'Bearer wrong',
    KEY,
    f'Basic {KEY}',
    'Bearer',
    'Bearer ä',
  ):
    headers = {'Authorization': header.encode()}
    answer = http_client.get(path, headers=headers)
    assert answer.status_code == 401, header
    assert answer.json()['error']['code'] == 'invalid_api_key'
  assert http_client.get(path).status_code == 200


def test_posts_want_the_key(address):
  other = openai.OpenAI(base_url=f'{address}/v1', api_key='no')
  with other, pytest.raises(openai.AuthenticationError):
    other.chat.completions.create(model='tiny', **QUESTION)


def test_health_is_for_everybody(address):
  assert httpx.get(f'{address}/health').status_code == 200
  assert httpx.get(f'{address}/ready').status_code == 200


def test_keys_are_compared_in_constant_time(http_client, monkeypatch):
  equal, compared = hmac.compare_digest, []

  def compare(*digests):
    compared.append(digests)
    return equal(*digests)

  monkeypatch.setattr(hmac, 'compare_digest', compare)
  for header in '', 'Bearer x', f'Basic {KEY}', f'Bearer {KEY}':
    http_client.get('/version', headers={'Authorization': header})
  # Of one length whatever was sent, and for every request.
  assert [(len(a), len(b)) for a, b in compared] == [(32, 32)] * 4


def test_requests_are_named(http_client):
  def name(path, given):
    headers = {'X-Request-Id': given} | HEADERS
    return http_client.get(path, headers=headers).headers['x-request-id']

  assert name('/version', 'mine-7') == 'mine-7'
  for odd in 'a b', 'x' * 65, '<b>', '':
    assert re.fullmatch('[0-9a-f]{32}', name('/version', odd))
  refused = http_client.get('/version', headers={'Authorization': ''})
  assert refused.headers['x-request-id']


def test_models_and_versions(client, http_client):
  (model,) = client.models.list().data
  assert (model.id, model.max_model_len) == ('tiny', 768)
  assert client.models.retrieve('tiny') == model
  assert http_client.get('/version').json()['version']


def test_tokens_there_and_back(http_client):
  text = '<box>(1,2)</box> 狗 <|im_end|>'
  found = http_client.post('/tokenize', json={'prompt': text}).json()
  assert (
    found['count'] == len(found['tokens']) and found['max_model_len'] == 768
  )
  back = http_client.post('/detokenize', json={'tokens': found['tokens']})
  assert back.json() == {'prompt': text}
  chat = http_client.post('/tokenize', json=QUESTION).json()
  usage = http_client.post('/v1/chat/completions', json=QUESTION).json()[
    'usage'
  ]
  assert chat['count'] == usage['prompt_tokens']
  for body in {}, {'prompt': 'a', **QUESTION}, {'prompt': 5}:
    assert http_client.post('/tokenize', json=body).status_code == 400


@pytest.mark.parametrize(
  ('content', 'status'),
  [
    (b'', 400),
    (b'{', 400),
    (b'[]', 400),
    (b'\xff\xfe', 400),
    (b'{"messages": ' + b'[' * 100_000, 400),
    (b'{"messages": "' + b'x' * (33 * 2**20) + b'"}', 413),
    (b'{"messages": NaN}', 400),
  ],
)
def test_bodies_that_are_none(http_client, content, status):
  answer = http_client.post('/v1/chat/completions', content=content)
  assert answer.status_code == status
  assert set(answer.json()['error']) == {'message', 'type', 'param', 'code'}
  assert 'Traceback' not in answer.text and '.py' not in answer.text


def test_a_body_that_is_not_called_json_is_told_what_to_call_it(http_client):
  form = {'Content-Type': 'application/x-www-form-urlencoded'}
  for content, headers in [(json.dumps(QUESTION), form), ('[]', {})]:
    answer = http_client.post(
      '/v1/chat/completions', content=content, headers=headers
    )
    said = answer.json()['error']['message']
    assert answer.status_code == 400
    assert 'Content-Type: application/json' in said
  answer = http_client.post(
    '/v1/chat/completions',
    content='{"messages": oh}',
    headers={'Content-Type': 'application/json'},
  )
  assert 'no JSON from character 13' in answer.json()['error']['message']


def test_a_body_without_a_length_is_limited_too(address):
  url = urllib.parse.urlsplit(address)

  def parts():
    for _ in range(34):
      yield b'x' * 2**20

  connection = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
  try:
    connection.request(
      'POST',
      '/v1/chat/completions',
      parts(),
      {**HEADERS, 'Transfer-Encoding': 'chunked'},
    )
    assert connection.getresponse().status == 413
  except (BrokenPipeError, ConnectionResetError):
    pass  # Refused before all was sent.
  finally:
    connection.close()
  assert httpx.get(f'{address}/health').status_code == 200


def test_unknown_routes_and_methods(http_client):
  assert http_client.get('/v1/nothing').json()['error']['code'] is None
  assert http_client.get('/v1/chat/completions').status_code == 405


def counted(http_client, name):
  lines = http_client.get('/metrics').text.splitlines()
  values = [
    float(line.rsplit(' ', 1)[1])
    for line in lines
    if line.startswith(f'vllm:{name}{{')
  ]
  assert values, name
  return sum(values)


def test_what_is_counted(http_client):
  names = ('prompt_tokens_total', 'generation_tokens_total')
  names += ('request_success_total', 'e2e_request_latency_seconds_count')
  names += ('time_to_first_token_seconds_count',)
  seconds = (
    'time_to_first_token',
    'inter_token_latency',
    'e2e_request_latency',
  )
  names += tuple(f'{name}_seconds_sum' for name in seconds)
  before = [counted(http_client, name) for name in names]
  usage = http_client.post(
    '/v1/chat/completions', json=QUESTION | {'temperature': 0}
  ).json()['usage']
  after = [counted(http_client, name) for name in names]
  more = [b - a for a, b in zip(before, after, strict=True)]
  *more, first, between, whole = more
  assert more == [usage['prompt_tokens'], reciter.TOKENS, 1, 1, 1]
  assert first + between * (reciter.TOKENS - 1) == pytest.approx(whole)
  for name in 'num_requests_running', 'num_requests_waiting':
    assert counted(http_client, name) == 0
  assert counted(http_client, 'kv_cache_usage_perc') == 0


def wait_until(condition, seconds=30):
  ends = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < ends
    time.sleep(0.02)


LONG = QUESTION | {'ignore_eos': True, 'max_tokens': 700, 'min_tokens': 700}


@pytest.mark.parametrize('stream', [False, True])
def test_who_leaves_frees_the_slot(address, server, stream):
  load = lambda: server.worker.scheduler.load  # noqa: E731
  url = urllib.parse.urlsplit(address)
  connection = http.client.HTTPConnection(url.hostname, url.port)
  body = json.dumps(LONG | {'stream': stream})
  connection.request(
    *('POST', '/v1/chat/completions', body),
    {**HEADERS, 'Content-Type': 'application/json'},
  )
  wait_until(lambda: load().running == 1)
  connection.close()
  wait_until(lambda: load().running == 0)
  assert load().free == server.worker.scheduler.engine.slots


def test_a_full_queue_asks_to_come_back(make_server):
  server = make_server(slots=1, max_waiting=1, key=None)
  with running(server) as address:

    def ask():
      return httpx.post(
        f'{address}/v1/chat/completions', json=LONG, timeout=120
      )

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
      answers = [one.result() for one in [pool.submit(ask) for _ in range(6)]]
  codes = [answer.status_code for answer in answers]
  assert codes.count(429) >= 1 and codes.count(200) >= 1
  assert set(codes) == {200, 429}
  refused = next(a for a in answers if a.status_code == 429)
  assert refused.headers['Retry-After'] == '1'
  assert refused.json()['error']['type'] == 'rate_limit_error'


def test_many_at_once_get_what_they_get_alone(client):
  def ask(number):
    found = client.chat.completions.create(
      model='tiny',
      messages=[{'role': 'user', 'content': f'Question {number}'}],
      temperature=1,
      top_p=1,
      max_tokens=6,
      seed=number,
    )
    return found.choices[0].message.content

  alone = [ask(number) for number in range(12)]
  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    assert list(pool.map(ask, range(12))) == alone


def test_the_engine_s_failure_is_told_without_details(make_server, monkeypatch):
  server = make_server(key=None)

  def fail(*_):
    raise RuntimeError('/secret/path at 0xdead')

  monkeypatch.setattr(server.worker.scheduler.engine, 'forward', fail)
  with running(server) as address:
    answer = httpx.post(f'{address}/v1/chat/completions', json=QUESTION)
    assert answer.status_code == 500
    assert 'secret' not in answer.text and '0xdead' not in answer.text
    assert httpx.get(f'{address}/health').status_code == 200
    body = QUESTION | {'stream': True}
    text = httpx.post(f'{address}/v1/chat/completions', json=body).text
    assert 'generation_failed' in text and text.endswith('data: [DONE]\n\n')


@pytest.mark.slow
def test_the_command_serves_and_drains(tmp_path):
  folder = tmp_path / 'reciter'
  reciter.save(folder)
  key, named = key_file(tmp_path)
  with command(folder, named, '--slots=2', '--max_len=512') as (process, port):
    with openai.OpenAI(
      base_url=f'http://127.0.0.1:{port}/v1', api_key=key
    ) as client:
      stream = client.chat.completions.create(
        model='reciter', stream=True, temperature=0, **QUESTION
      )
      pieces = [next(iter(stream)).choices[0].delta.content]
      process.send_signal(signal.SIGTERM)
      pieces += [c.choices[0].delta.content or '' for c in stream]
    assert ''.join(pieces) == reciter.ANSWER
    assert process.wait(timeout=30) in (0, -signal.SIGTERM)


def test_a_port_that_is_taken_is_told_before_loading(tmp_path, capsys):
  with socket.create_server(('127.0.0.1', 0)) as other:
    port = other.getsockname()[1]
    assert main.main([f'--checkpoint={tmp_path}', f'--port={port}']) == 2
  assert f'--port={port} cannot be served at' in capsys.readouterr().err


@pytest.mark.slow
def test_https(tmp_path):
  reciter.save(tmp_path / 'reciter')
  pem = certificate(tmp_path / 'server.pem')
  arguments = f'--ssl_certfile={pem}', '--slots=1', '--max_len=64'
  with command(tmp_path / 'reciter', *arguments) as (_, port):
    trusted = ssl.create_default_context(cafile=pem)
    answer = httpx.get(f'https://127.0.0.1:{port}/health', verify=trusted)
    assert answer.status_code == 200
    with pytest.raises(httpx.HTTPError):
      httpx.get(f'http://127.0.0.1:{port}/health')


def certificate(path):
  """Writes a key and a certificate of 127.0.0.1 that it signs itself."""
  x509 = pytest.importorskip('cryptography.x509')
  from cryptography.hazmat.primitives import hashes, serialization
  from cryptography.hazmat.primitives.asymmetric import ec

  key = ec.generate_private_key(ec.SECP256R1())
  name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'tests')])
  now = datetime.datetime.now(datetime.UTC)
  local = x509.IPAddress(ipaddress.ip_address('127.0.0.1'))
  signed = (
    x509.CertificateBuilder(name, name, key.public_key(), 1)
    .not_valid_before(now - datetime.timedelta(days=1))
    .not_valid_after(now + datetime.timedelta(days=1))
    .add_extension(x509.SubjectAlternativeName([local]), critical=False)
    .sign(key, hashes.SHA256())
  )
  encoding = serialization.Encoding.PEM
  path.write_bytes(
    key.private_bytes(
      encoding,
      serialization.PrivateFormat.PKCS8,
      serialization.NoEncryption(),
    )
    + signed.public_bytes(encoding)
  )
  return path


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['--host=0.0.0.0'], '--api_key_file'),
    (['--api_key_file=/nowhere'], 'cannot be read'),
    (['--media_folder=/nowhere'], 'no folder'),
    (['--media_domain=http://a.org/b'], 'is no host'),
    (['--slots=0'], 'at least 1'),
    (['--timeout=0'], 'above 0'),
    (['--port=99999999'], 'another one'),
    (['--ssl_keyfile=/nowhere'], 'needs --ssl_certfile'),
    (['--ssl_certfile=/nowhere'], 'no certificate'),
    ([], 'config.json'),
  ],
)
def test_mistakes_of_the_command(arguments, said, tmp_path, capsys):
  assert main.main([f'--checkpoint={tmp_path}', *arguments]) == 2
  error = capsys.readouterr().err
  assert said in error and error.count('\n') == 1
