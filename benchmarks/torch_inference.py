"""The model of inference.py by Hugging Face transformers: run by that script.

Reads a request in JSON from each line of stdin and answers on stdout with one.
Transformers in its fastest form that changes no result: `inference_mode`,
scaled dot-product attention, logits of the last position only, and with both
kinds of caches, of which the faster one counts. It knows nothing of
qwenvl_jax, so that it runs where torch is installed and jax is not.
"""

import json
import os
import sys
import time

import numpy as np
import torch
import transformers

CACHES = ('dynamic', 'static')


class Model:
  """A decoder with the weights of a file, and what it is asked to do."""

  def __init__(self, settings: dict):
    torch.set_num_threads(settings['threads'])
    self.config = transformers.Qwen2Config(
      **settings['config'], dtype='float32', attn_implementation='sdpa'
    )
    self.model = transformers.Qwen2ForCausalLM(self.config).eval()
    weights = np.load(settings['weights'])
    found = {name: torch.from_numpy(weights[name]) for name in weights.files}
    self.model.load_state_dict(found, strict=True)
    self.room = settings['room']
    self.prompts = torch.tensor(settings['prompts'])
    self.kept: dict[int, tuple] = {}

  def cache(self, kind: str):
    if kind == 'dynamic':
      return transformers.DynamicCache(config=self.config)
    return transformers.StaticCache(self.config, max_cache_len=self.room)

  def forward(self, tokens, cache):
    """The next token of every row, [B,1]."""
    logits = self.model(
      input_ids=tokens,
      cache=cache,
      use_cache=True,
      logits_to_keep=1,
    ).logits
    return logits[:, -1:].argmax(-1)

  def prefill(self, rows: int) -> dict:
    """Seconds of the faster cache, and the tokens that follow the prompts."""
    prompts, seconds = self.prompts[:rows], {}
    for kind in CACHES:
      cache = self.cache(kind)
      began = time.perf_counter()
      chosen = self.forward(prompts, cache)
      tokens = chosen[:, 0].tolist()
      seconds[kind] = time.perf_counter() - began
      if kind == 'dynamic' and rows not in self.kept:
        layers = [(x.keys, x.values) for x in cache.layers]
        self.kept[rows] = layers, chosen
    return {**_faster(seconds), 'tokens': tokens}

  def decode(self, rows: int, steps: int) -> dict:
    """Seconds of a step after the prompts, and the steps' tokens."""
    if rows not in self.kept:
      self.prefill(rows)
    layers, first = self.kept[rows]
    seconds = {}
    for kind in CACHES:
      cache = self.cache(kind)
      for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
      tokens, chosen, times = first, [], []
      for _ in range(steps):
        began = time.perf_counter()
        tokens = self.forward(tokens, cache)
        chosen.append(tokens[:, 0].tolist())
        times.append(time.perf_counter() - began)
      seconds[kind] = float(np.median(times))
    return {**_faster(seconds), 'tokens': chosen}


def _faster(seconds: dict[str, float]) -> dict:
  kind = min(seconds, key=seconds.get)
  return {'seconds': seconds[kind], 'cache': kind}


@torch.inference_mode()
def main() -> None:
  model = Model(json.loads(sys.stdin.readline()))
  print(json.dumps([torch.__version__, transformers.__version__]), flush=True)
  for line in sys.stdin:
    request = json.loads(line)
    found = getattr(model, request.pop('what'))(**request)
    print(json.dumps(found), flush=True)
  os._exit(0)


if __name__ == '__main__':
  main()
