"""TouchStone with a judge on this machine, and with its replies replayed."""

import csv
import dataclasses
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.eval import judge, registry, runner


@pytest.fixture
def table(files):
  columns = [
    'index', 'question', 'human_annotation', 'gpt4_ha_answer', 'category',
    'task_name', 'image',
  ]  # fmt: skip
  text = io.StringIO()
  writer = csv.writer(text, delimiter='\t')
  writer.writerow(columns)
  for number in range(2):
    writer.writerow(
      [number, f'What is {number}?', 'A dog.', 'REFERENCE', 'Visual', 'task',
       files.base64()]
    )  # fmt: skip
  files.write('TouchStone/touchstone_20230831.tsv', text.getvalue().encode())
  return dataclasses.replace(registry.get('touchstone_en'), count=2)


@pytest.fixture
def endpoint(monkeypatch):
  """Prefers whoever is first; about question 1, is at a loss when swapped."""
  asked = []

  class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
      length = int(self.headers['Content-Length'])
      body = json.loads(self.rfile.read(length))
      asked.append(body)
      query = body['messages'][1]['content']
      swapped = query.index('OURS') < query.index('REFERENCE')
      reply = '8 6.5'
      if swapped and 'What is 1?' in query:
        reply = 'Both are fine.'
      message = {'role': 'assistant', 'content': reply}
      data = json.dumps(
        {
          'id': 'x',
          'object': 'chat.completion',
          'created': 0,
          'model': 'judge',
          'choices': [
            {'index': 0, 'message': message, 'finish_reason': 'stop'}
          ],
        }
      ).encode()
      self.send_response(200)
      self.send_header('Content-Type', 'application/json')
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *arguments):
      pass

  server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  monkeypatch.setenv(judge.URL, f'http://127.0.0.1:{server.server_port}/v1')
  monkeypatch.setenv(judge.MODEL, 'judge')
  yield asked
  server.shutdown()
  server.server_close()
  thread.join()


def test_both_orders_are_averaged(table, endpoint, run):
  scores, outcome, folder = run(table, lambda x: 'OURS')
  # Question 0: 6.5 and, when first, 8; question 1 counts in one order only.
  assert [x.scores['score'] for x in outcome.items] == [7.25, 6.5]
  assert scores == {
    'score': pytest.approx((7.25 + 6.5) / 2),
    'reference': pytest.approx((7.25 + 8) / 2),
    'judged': 0.75,
  }
  assert len(endpoint) == 4
  assert {(x['temperature'], x['model']) for x in endpoint} == {(0, 'judge')}
  queries = [x['messages'][1]['content'] for x in endpoint]
  assert sum("Assistant 1's Answer]\nREFERENCE" in x for x in queries) == 2
  # Killed while it wrote: the last reply, which is cut off, is asked again.
  file = folder / 'judge.jsonl'
  file.write_bytes(file.read_bytes()[:-9])
  again, *_ = run(table, lambda x: 'OURS')
  assert again == scores and len(endpoint) == 5
  again, *_ = run(table, lambda x: 'OURS')
  assert again == scores and len(endpoint) == 5


def test_replies_are_replayed_offline(table, endpoint, run, monkeypatch):
  scores, *_ = run(table, lambda x: 'OURS')
  monkeypatch.setenv(judge.URL, 'http://127.0.0.1:9/v1')
  count = len(endpoint)
  again, *_ = run(table, lambda x: 'OURS')
  assert again == scores and len(endpoint) == count


def test_without_a_judge_nothing_starts(table, files, monkeypatch):
  for name in (judge.KEY, judge.URL):
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(ConfigError, match='no judge: set OPENAI_API_KEY'):
    runner.take(table, files.root)


@pytest.mark.parametrize(
  ('reply', 'scores'),
  [
    ('7 8.5\nBecause', (7, 8.5)),
    (' 10  1', (10, 1)),
    ('7, 8', None),
    ('', None),
    ('7', None),
    ('70 80', None),
    ('nan 8', None),
  ],
)
def test_two_scores(reply, scores):
  assert judge.two_scores(reply) == scores
