"""What 8 bits cost: a quickstart's scores with kernels or cache at 8 bits.

  source launch/env.sh
  bash launch/quickstart.sh
  python benchmarks/int8_quality.py runs/quickstart

Asks stage 2 the questions that the quickstart's evaluation asks of held-out
scenes, in bfloat16 and with each option of `docs/serving.md`. Printed are the
share of right answers by kind, and how many answers are other texts than in
bfloat16.
"""

import argparse
import collections
import dataclasses
import pathlib

from qwenvl_jax import api
from qwenvl_jax.eval import registry
from qwenvl_jax.eval.engine_model import EngineModel
from qwenvl_jax.eval.task import Item
from qwenvl_jax.eval.tasks import scenes
from qwenvl_jax.infer.engine import EngineConfig

WAYS = {
  'float32': ({'dtype': 'float32'}, None),
  'bfloat16': ({'dtype': 'bfloat16'}, None),
  'int8 kernels': ({'dtype': 'bfloat16', 'int8': True}, None),
  'int8 cache': ({'dtype': 'bfloat16'}, 'int8'),
  'both': ({'dtype': 'bfloat16', 'int8': True}, 'int8'),
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=pathlib.Path, help='of a quickstart')
  parser.add_argument('--scenes', type=int, default=200)
  args = parser.parse_args()
  task = dataclasses.replace(registry.get('scenes_test'), scenes=args.scenes)
  examples = [x for x in task.examples(args.folder / 'data') if x.meta]
  texts = {}
  for way, (settings, cache) in WAYS.items():
    handle = api.load(args.folder / 'stage2', **settings)
    sizes = EngineConfig(
      slots=128,
      max_len=handle.config.decoder.seq_length,
      read_rows=8,
      cache_dtype=cache,
    )
    model = EngineModel(handle.engine(sizes), handle.tokenizer, {})
    said = {
      example.key: reply.text
      for example, reply in model.answer(examples, task.decoding)
    }
    right, count = collections.Counter(), collections.Counter()
    for example in examples:
      kind = example.meta['kind']
      item = Item(example, said[example.key])
      judged = scenes.judge(scenes.question_of(item), item.text)
      count[kind] += 1
      right[kind] += judged.correct
    texts[way] = [said[example.key] for example in examples]
    shares = ', '.join(f'{k} {right[k] / count[k]:.3f}' for k in sorted(count))
    print(
      f'{way:13s} all {right.total() / count.total():.3f} of {len(examples)}; '
      f'{shares}',
      flush=True,
    )
  for way, found in texts.items():
    other = sum(a != b for a, b in zip(found, texts['bfloat16'], strict=True))
    print(f'{way:13s} {other} answers are not those of bfloat16')


if __name__ == '__main__':
  main()
