"""What batching gives an evaluation: answers a second at batch 1 and at 32.

  source launch/env.sh
  bash launch/quickstart.sh
  python benchmarks/evaluation.py runs/quickstart

Asks the quickstart's stage 2 the questions of held-out scenes, as
`qwenvl-eval --tasks scenes_test` does, `--rounds` times one after the other
with one slot and with 32, after each has answered all of them once. Printed are
examples a second, their ratio (also by processor time, which others on the
machine change less), programs that were compiled while answers were
timed (0 is right), and answers that differ (0 is right).
"""

import argparse
import dataclasses
import pathlib
import statistics
import time

import jax

from qwenvl_jax import api
from qwenvl_jax.eval import registry
from qwenvl_jax.eval.engine_model import EngineModel
from qwenvl_jax.infer.engine import EngineConfig

_COMPILED = '/jax/core/compile/backend_compile_duration'


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=pathlib.Path, help='of a quickstart')
  parser.add_argument('--scenes', type=int, default=20)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  task = dataclasses.replace(registry.get('scenes_test'), scenes=args.scenes)
  examples = list(task.examples(args.folder / 'data'))
  handle = api.load(args.folder / 'stage2')

  def model(slots: int) -> EngineModel:
    sizes = EngineConfig(
      slots=slots,
      max_len=handle.config.decoder.seq_length,
      read_rows=min(slots, 8),
    )
    return EngineModel(handle.engine(sizes), handle.tokenizer, {})

  models = {slots: model(slots) for slots in (1, 32)}

  def answer(slots: int) -> dict[str, str]:
    found = models[slots].answer(examples, task.decoding)
    return {example.key: said.text for example, said in found}

  texts = {slots: answer(slots) for slots in models}
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if name == _COMPILED else None
  )
  seconds = {slots: [] for slots in models}
  for _ in range(args.rounds):
    for slots, found in seconds.items():
      begun = time.perf_counter(), time.process_time()
      answer(slots)
      ended = time.perf_counter(), time.process_time()
      found.append([b - a for a, b in zip(begun, ended, strict=True)])
  for slots, found in seconds.items():
    rate = statistics.median(len(examples) / wall for wall, _ in found)
    print(f'batch {slots:2d}: {rate:.1f} examples/s')
  for index, name in enumerate(('by the clock', 'by processor time')):
    ratios = [
      one[index] / many[index]
      for one, many in zip(seconds[1], seconds[32], strict=True)
    ]
    print(
      f'ratio {name}: {statistics.median(ratios):.2f} '
      f'({min(ratios):.2f} to {max(ratios):.2f} over {args.rounds} rounds)'
    )
  print(f'compiled while timed: {len(compiled)}')
  other = sum(texts[1][key] != texts[32][key] for key in texts[1])
  print(f'answers that differ: {other} of {len(examples)}')


if __name__ == '__main__':
  main()
