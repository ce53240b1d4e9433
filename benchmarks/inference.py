"""Prefill and decoding on a CPU beside Hugging Face transformers, and the
engine with many requests beside one by one.

  source launch/env.sh
  python benchmarks/inference.py --torch_python TORCH_VENV/bin/python

One decoder of 271M parameters in float32 with the same random weights on both
sides, on the same threads. Rounds alternate in one run, so that a noisy machine
disturbs both alike; the same tokens are checked. Printed are the best of the
rounds and the ratio of the bests, then the median of the rounds' ratios.

--torch_python names a Python with torch, transformers and numpy (`pip install
torch transformers`); it need not have jax. Without it only the engine is
measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import flax.linen as nn
import jax
import numpy as np

from qwenvl_jax.batch import text_batch
from qwenvl_jax.infer.engine import Engine, EngineConfig
from qwenvl_jax.infer.request import Request
from qwenvl_jax.infer.sampling import Sampling
from qwenvl_jax.infer.scheduler import Scheduler
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
)
from qwenvl_jax.model.qwen_vl import QwenVL

# Tokens of the prompts that are compared.
PROMPT = 512

# Of the decoder.
DIM, LAYERS, HEADS, MLP, VOCABULARY = 1024, 16, 16, 2816, 32000


def config() -> QwenVLConfig:
  """The decoder that is compared, and the least vision tower."""
  return QwenVLConfig(
    vision=VisionConfig(28, width=16, layers=1, heads=1, mlp_dim=16),
    adapter=AdapterConfig(queries=16, dim=DIM, heads=1),
    decoder=DecoderConfig(
      vocab_size=VOCABULARY,
      dim=DIM,
      layers=LAYERS,
      heads=HEADS,
      head_dim=DIM // HEADS,
      mlp_dim=MLP,
    ),
    image_start_id=VOCABULARY - 3,
    dtype='float32',
    remat='none',
    scan_layers=False,
  )


def random_params(made: QwenVLConfig) -> dict:
  """Parameters under which activations keep their size."""
  shapes = jax.eval_shape(
    QwenVL(made).init, jax.random.key(0), text_batch(np.zeros((1, 4)))
  )
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == 'scale':
      return np.ones(leaf.shape, np.float32)
    size = 0.1 if path[-1].key == 'bias' else DIM**-0.5
    return rng.standard_normal(leaf.shape, np.float32) * np.float32(size)

  params = nn.meta.unbox(shapes)['params']
  return jax.tree_util.tree_map_with_path(draw, params)


def released_names(params: dict) -> dict[str, np.ndarray]:
  """The decoder's parameters as transformers' Qwen2 names and shapes them."""
  decoder = params['decoder']
  found = {
    'model.embed_tokens.weight': decoder['embed'],
    'model.norm.weight': decoder['ln_f']['scale'],
    'lm_head.weight': decoder['lm_head']['kernel'],
  }
  for number in range(LAYERS):
    block, to = decoder[f'blocks_{number}'], f'model.layers.{number}.'
    found[to + 'input_layernorm.weight'] = block['ln_1']['scale']
    found[to + 'post_attention_layernorm.weight'] = block['ln_2']['scale']
    for name in 'qkv':
      part, inside = block['attn'][name], f'{to}self_attn.{name}_proj.'
      found[inside + 'weight'] = part['kernel'].reshape(DIM, DIM)
      found[inside + 'bias'] = part['bias'].reshape(DIM)
    out = block['attn']['out']['kernel']
    found[to + 'self_attn.o_proj.weight'] = out.reshape(DIM, DIM)
    for name in ('up', 'gate', 'down'):
      found[f'{to}mlp.{name}_proj.weight'] = block['mlp'][name]['kernel']
  return found


class Torch:
  """Transformers in a process of its own."""

  def __init__(self, python: str, settings: dict):
    script = Path(__file__).with_name('torch_inference.py')
    self._process = subprocess.Popen(
      [python, str(script)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.versions = self.ask(**settings)

  def ask(self, **request):
    """Its answer to one request."""
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    line = self._process.stdout.readline()
    if not line:
      sys.exit('torch_inference.py ended; what it said is above')
    return json.loads(line)

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


class Here:
  """The engine, asked the same."""

  def __init__(self, made: QwenVLConfig, params: dict, prompts, room: int):
    self._made, self._params, self._room = made, params, room
    self._prompts = prompts
    self._engines: dict[int, Engine] = {}
    self._prefixes: list = []
    engine = self.engine(1)
    self._bank = engine.init_bank()

  def engine(self, slots: int) -> Engine:
    if slots not in self._engines:
      sizes = EngineConfig(slots=slots, max_len=self._room, images=1)
      self._engines[slots] = Engine(self._made, self._params, sizes)
    return self._engines[slots]

  def read(self, tokens):
    engine, rows = self.engine(1), np.full(len(tokens), -1, np.int32)
    prefix = engine.start([len(tokens)])
    for piece in engine.pieces(len(tokens)):
      prefix = engine.prefill(prefix, self._bank, [tokens], [rows], piece)
    return prefix

  def prefill(self, rows: int) -> dict:
    """Seconds, and the tokens that follow the prompts."""
    began = time.perf_counter()
    prefixes = [self.read(tokens) for tokens in self._prompts[:rows]]
    tokens = [int(np.argmax(x.logits[0])) for x in prefixes]
    seconds = time.perf_counter() - began
    self._prefixes[len(self._prefixes) :] = prefixes[len(self._prefixes) :]
    return {'seconds': seconds, 'tokens': tokens}

  def decode(self, rows: int, steps: int) -> dict:
    """Seconds of a step after the prompts, and the steps' tokens."""
    if len(self._prefixes) < rows:
      self.prefill(rows)
    engine = self.engine(rows)
    state = engine.init_state()
    for slot in range(rows):
      state = engine.insert(state, self._prefixes[slot], [slot], [Sampling()])
    chosen, times = [], []
    for _ in range(steps + 1):
      began = time.perf_counter()
      state, found = engine.choose(state)
      state = engine.forward(state)
      chosen.append(jax.device_get(found).tokens.tolist())
      jax.block_until_ready(state)
      times.append(time.perf_counter() - began)
    # The first token is the prefill's.
    return {'seconds': statistics.median(times[1:]), 'tokens': chosen[1:]}


def compare(here: Here, torch: Torch, rounds: int, steps: int) -> None:
  """Prints the table of both sides."""
  rows = {
    f'prefill of {PROMPT} tokens': ('prefill', {'rows': 1}),
    'decode, 1 row': ('decode', {'rows': 1, 'steps': steps}),
    'decode, 8 rows': ('decode', {'rows': 8, 'steps': steps}),
  }
  times = {name: ([], []) for name in rows}
  for number in range(rounds + 1):
    for name, (what, arguments) in rows.items():
      theirs = torch.ask(what=what, **arguments)
      time.sleep(0.1)  # Threads that wait for more work go to sleep.
      ours = getattr(here, what)(**arguments)
      time.sleep(0.1)
      if ours['tokens'] != theirs['tokens']:
        sys.exit(f'{name}: other tokens than transformers')
      if not number:
        continue  # Compiles, and allocates what is used again.
      for side, found in zip(times[name], (theirs, ours), strict=True):
        side.append(found['seconds'])
      print(
        f'round {number}: {name}: transformers {theirs["seconds"] * 1e3:.1f} '
        f'ms ({theirs["cache"]} cache), here {ours["seconds"] * 1e3:.1f} ms, '
        f'{theirs["seconds"] / ours["seconds"]:.2f} times as fast',
        flush=True,
      )
  print(
    f'{"":24s}{"transformers":>14s}{"here":>12s}{"ratio":>8s}{"median":>9s}'
  )
  for name, (theirs, ours) in times.items():
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    print(
      f'{name:24s}{min(theirs) * 1e3:11.1f} ms{min(ours) * 1e3:9.1f} ms'
      f'{min(theirs) / min(ours):8.2f}{statistics.median(ratios):9.2f}'
    )


def answer(engine: Engine, requests, at_once: bool) -> tuple[float, list]:
  """Seconds that all requests take, and that each waits for its first token."""
  scheduler = Scheduler(engine)
  first = {}

  def listen(found):
    first.setdefault(id(found), time.perf_counter())

  answers, waits = [], []
  began = time.perf_counter()
  for request in requests:
    asked = time.perf_counter()
    answers.append((scheduler.submit(request, listen), asked))
    while not at_once and scheduler.step():
      pass
  while scheduler.step():
    pass
  seconds = time.perf_counter() - began
  for found, asked in answers:
    if found.error is not None:
      raise found.error
    waits.append(first[id(found)] - asked)
  return seconds, waits


def serve(here: Here, count: int, new: int, rounds: int) -> None:
  """Prints many requests at once beside one by one."""
  rng = np.random.default_rng(1)
  lengths = rng.integers(32, PROMPT + 1, count)
  requests = [
    Request.create(
      here.engine(1).config,
      rng.integers(0, VOCABULARY - 8, length),
      max_new_tokens=new,
    )
    for length in lengths
  ]
  print(
    f'{count} requests of {min(lengths)} to {max(lengths)} prompt tokens '
    f'({sum(lengths)} together), {new} new tokens each'
  )
  ways = {'one by one': (1, False), 'at once': (count, True)}
  for slots, _ in ways.values():
    engine = here.engine(slots)
    engine.warm_up(engine.init_state(), engine.init_bank(), 1)
  speeds = {name: [] for name in ways}
  reading = []
  for _ in range(rounds):
    began = time.perf_counter()
    for request in requests:
      jax.block_until_ready(here.read(request.tokens))
    reading.append(time.perf_counter() - began)
    for name, (slots, at_once) in ways.items():
      seconds, waits = answer(here.engine(slots), requests, at_once)
      speeds[name].append(count * new / seconds)
      print(
        f'{name}: {speeds[name][-1]:.1f} tokens/s ({seconds:.1f} s), first '
        f'token after {np.percentile(waits, 50):.2f} s (p50), '
        f'{np.percentile(waits, 95):.2f} s (p95)',
        flush=True,
      )
  print(
    f'at once: {max(speeds["at once"]) / max(speeds["one by one"]):.2f} times '
    'the tokens/s of one by one'
  )
  alone = count * new / max(speeds['one by one'])
  print(
    f'reading the prompts takes {min(reading):.1f} s either way: '
    f'{alone / min(reading):.2f} times could not be passed'
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--torch_python', help='has torch and transformers')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=16, help='of decoding')
  parser.add_argument(
    '--requests', type=int, default=16, help='at once; 0 to leave that out'
  )
  parser.add_argument('--new', type=int, default=64, help='tokens of an answer')
  parser.add_argument('--serve_rounds', type=int, default=1)
  args = parser.parse_args()
  threads = len(os.sched_getaffinity(0))
  made = config()
  params = random_params(made)
  count = sum(x.size for x in jax.tree.leaves(params['decoder']))
  prompts = np.random.default_rng(2).integers(0, VOCABULARY - 8, (8, PROMPT))
  room = PROMPT + max(args.new, args.steps + 1)
  print(
    f'decoder of {count / 1e6:.0f}M parameters, float32, {threads} threads; '
    f'jax {jax.__version__}',
    flush=True,
  )
  here = Here(made, jax.device_put(params), prompts, room)
  if args.torch_python:
    with tempfile.TemporaryDirectory() as folder:
      weights = f'{folder}/weights.npz'
      np.savez(weights, **released_names(params))
      del params
      torch = Torch(
        args.torch_python,
        {
          'weights': weights,
          'threads': threads,
          'prompts': prompts.tolist(),
          'room': room,
          'config': {
            'vocab_size': VOCABULARY,
            'hidden_size': DIM,
            'intermediate_size': MLP,
            'num_hidden_layers': LAYERS,
            'num_attention_heads': HEADS,
            'num_key_value_heads': HEADS,
            'max_position_embeddings': 8192,
            'rms_norm_eps': made.decoder.norm_eps,
            'tie_word_embeddings': False,
          },
        },
      )
    print('torch, transformers', *torch.versions, flush=True)
    compare(here, torch, args.rounds, args.steps)
    torch.close()
  if args.requests:
    serve(here, args.requests, args.new, args.serve_rounds)


if __name__ == '__main__':
  main()
