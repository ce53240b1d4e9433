"""Requests that nobody should send: each gets an answer."""

import collections
import urllib.parse

from fuzzing import serving
from serve_support import KEY

REQUESTS = 400


def test_every_request_gets_an_answer(address, server):
  port = urllib.parse.urlsplit(address).port
  counts = collections.Counter()
  for seed in range(REQUESTS):
    case = serving.make(seed, KEY)
    status, wrong = serving.judge(case, serving.send(port, case))
    assert not wrong, (seed, status, wrong, case.data[:2000])
    counts[case.kind, status] += 1
  for kind in 'body', 'picture', 'stream':
    # Neither is everything refused, nor everything taken.
    assert counts[kind, '200'] >= 3, counts
  for kind in 'body', 'bytes', 'picture':
    assert counts[kind, '400'] >= 3, counts
  assert counts['key', '401'] == REQUESTS // len(serving.KINDS)
  assert not serving.still_busy(port, KEY)
  scheduler = server.worker.scheduler
  assert scheduler.load.free == scheduler.engine.slots
