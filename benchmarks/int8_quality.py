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
import pathlib

from qwenvl_jax import api
from qwenvl_jax.data import sources
from qwenvl_jax.eval import scenes

WAYS = {
  'float32': ({'dtype': 'float32'}, None),
  'bfloat16': ({'dtype': 'bfloat16'}, None),
  'int8 kernels': ({'dtype': 'bfloat16', 'int8': True}, None),
  'int8 cache': ({'dtype': 'bfloat16'}, 'int8'),
  'both': ({'dtype': 'bfloat16', 'int8': True}, 'int8'),
}
KINDS = ('caption', 'exist', 'count', 'colour', 'refer')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=pathlib.Path, help='of a quickstart')
  parser.add_argument('--scenes', type=int, default=200)
  args = parser.parse_args()
  data = str(args.folder / 'data')
  test = list(sources.Scenes(data, 'test', 'default', limit=args.scenes).open())
  texts = {}
  for way, (settings, cache) in WAYS.items():
    handle = api.load(args.folder / 'stage2', **settings)
    size = handle.config.vision.image_size
    asked, pictures = scenes.exam(test, size, kinds=KINDS)
    answers, _ = scenes.ask(
      *(handle.config, handle.params, handle.tokenizer, asked, pictures),
      cache_dtype=cache,
    )
    right, count = collections.Counter(), collections.Counter()
    for answer in answers:
      count[answer.question.kind] += 1
      right[answer.question.kind] += answer.correct
    texts[way] = [answer.answer for answer in answers]
    shares = ', '.join(f'{k} {right[k] / count[k]:.3f}' for k in sorted(count))
    print(
      f'{way:13s} all {right.total() / count.total():.3f} of {len(asked)}; '
      f'{shares}',
      flush=True,
    )
  for way, found in texts.items():
    other = sum(a != b for a, b in zip(found, texts['bfloat16'], strict=True))
    print(f'{way:13s} {other} answers are not those of bfloat16')


if __name__ == '__main__':
  main()
