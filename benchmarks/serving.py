"""Answers over HTTP beside the engine alone, at 1, 4 and 16 clients.

  source launch/env.sh
  python benchmarks/serving.py

The model of `inference.py` in float32 with random weights, with fewer layers
unless `--layers` says otherwise: the faster a step, the more HTTP costs beside
it. Clients are a process of their own; each sends its next request when it has
the answer to the last one, streamed. The engine alone gets the same prompts, as
many at a time, without HTTP and without text. Each round is a pair, once with
one and once with the other first. Printed are tokens a second of the best
rounds, the median of the pairs' ratios and the ratio of the best, and the
seconds to the first token and to the last, over HTTP.
"""

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import os
import pathlib
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))

import httpx
import inference
import jax
import numpy as np
from serve_support import running

from qwenvl_jax.infer.engine import Engine, EngineConfig
from qwenvl_jax.infer.grammar import GrammarCompiler
from qwenvl_jax.infer.request import Request
from qwenvl_jax.infer.sampling import Sampling
from qwenvl_jax.infer.scheduler import Scheduler
from qwenvl_jax.serve.limits import Limits
from qwenvl_jax.serve.metrics import Metrics
from qwenvl_jax.serve.server import Server
from qwenvl_jax.serve.worker import Worker
from qwenvl_jax.text.tokenizer import Tokenizer

SLOTS, ROOM = 16, 256


def ask(pipe) -> None:
  """The clients' process: answers (address, clients, prompts, new)."""
  while (task := pipe.recv()) is not None:
    pipe.send(asyncio.run(_clients(*task)))


async def _clients(address, clients, prompts, new):
  """(seconds for all, to each first token, to each answer's end)."""
  waiting, firsts, ends = [*prompts], [], []
  limits = httpx.Limits(max_connections=clients)

  async def one(client):
    while waiting:
      body = {
        'prompt': waiting.pop(),
        'max_tokens': new,
        'temperature': 0,
        'ignore_eos': True,
        'stream': True,
      }
      began, first = time.perf_counter(), None
      url = f'{address}/v1/completions'
      async with client.stream('POST', url, json=body) as answer:
        async for line in answer.aiter_lines():
          if line.startswith('data: {'):
            if 'error' in json.loads(line[6:]):
              raise RuntimeError(line)
            first = first or time.perf_counter() - began
      firsts.append(first)
      ends.append(time.perf_counter() - began)

  began = time.perf_counter()
  async with httpx.AsyncClient(timeout=600, limits=limits) as client:
    await asyncio.gather(*(one(client) for _ in range(clients)))
  return time.perf_counter() - began, firsts, ends


def alone(scheduler, config, clients, prompts, new) -> float:
  """Seconds that the engine takes for the same."""
  waiting, answers = [*prompts], []
  began = time.perf_counter()
  while True:
    answers = [answer for answer in answers if not answer.finished]
    while waiting and len(answers) < clients:
      request = Request.create(
        config, waiting.pop(), max_new_tokens=new, sampling=Sampling()
      )
      answers.append(scheduler.submit(request))
    if not answers:
      return time.perf_counter() - began
    scheduler.step()


def _shown(seconds) -> str:
  p50, p95 = np.percentile(seconds, (50, 95))
  return f'{p50:.2f} s (p95 {p95:.2f})'


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=4)
  parser.add_argument('--layers', type=int, default=4, help='24 are 271M')
  parser.add_argument('--requests', type=int, default=16, help='at least')
  parser.add_argument('--prompt', type=int, default=64, help='tokens')
  parser.add_argument('--new', type=int, default=32, help='tokens')
  args = parser.parse_args()
  config = inference.config()
  decoder = dataclasses.replace(config.decoder, layers=args.layers)
  config = config.replace(decoder=decoder)
  params = jax.device_put(inference.random_params(config))
  engine = Engine(config, params, EngineConfig(SLOTS, ROOM, images=1))
  tokenizer = Tokenizer.from_ranks([bytes([i]) for i in range(256)])

  def serve(scheduler):
    return Server(
      name='random',
      config=config,
      tokenizer=tokenizer,
      compiler=GrammarCompiler(tokenizer, config.decoder.vocab_size),
      worker=Worker(scheduler),
      metrics=Metrics('random', scheduler),
      limits=Limits(),
    )

  own = Scheduler(engine)
  own.warm_up()
  context = multiprocessing.get_context('spawn')
  pipe, theirs = context.Pipe()
  process = context.Process(target=ask, args=(theirs,), daemon=True)
  process.start()
  rng = np.random.default_rng(0)
  print(f'{args.prompt} tokens read and {args.new} written a request')
  with running(serve(Scheduler(engine))) as address:
    for clients in 1, 4, 16:
      count = max(args.requests if clients > 1 else args.requests // 2, clients)
      took = {'HTTP': [], 'alone': []}
      firsts, ends = [], []
      for number in range(args.rounds):
        prompts = rng.integers(0, 256, (count, args.prompt)).tolist()
        for side in [*took][:: 1 if number % 2 else -1]:
          if side == 'alone':
            seconds = alone(own, config, clients, prompts, args.new)
          else:
            pipe.send((address, clients, prompts, args.new))
            seconds, *waits = pipe.recv()
            firsts += waits[0]
            ends += waits[1]
          took[side].append(seconds)
      http, engine = (np.asarray(took[side]) for side in took)
      tokens = count * args.new
      print(
        f'{clients:3d} clients: {tokens / http.min():.1f} tokens/s over HTTP, '
        f'{tokens / engine.min():.1f} by the engine alone: '
        f'{np.median(engine / http):.2f} (median of {args.rounds}), '
        f'{engine.min() / http.min():.2f} (best); '
        f'first token {_shown(firsts)}, answer {_shown(ends)}',
        flush=True,
      )
  pipe.send(None)
  process.join()


if __name__ == '__main__':
  main()
