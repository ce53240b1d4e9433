"""What the quickstart's settings give to training on a CPU.

  source launch/env.sh
  python benchmarks/cpu_training.py [--steps 30] [--rounds 2]

Trains the quickstart's stage 2 for some steps, from random parameters, as the
quickstart does, then with one setting less at a time: large arrays in huge
pages, a device for each core, XLA's own matrix products. Rounds alternate, so
that a noisy machine disturbs all alike. Prints images a second (the median of
the rounds' best ten steps) and how many times as fast it is with the setting.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from qwenvl_jax.quickstart import __main__ as quickstart

HUGE_PAGES = 'glibc.malloc.hugetlb=1'
# Name -> variables that training lacks then.
WITHOUT = {
  'all settings': (),
  'small pages': ('GLIBC_TUNABLES',),
  'one device': ('JAX_NUM_CPU_DEVICES',),
  "YNNPACK's products": ('XLA_FLAGS',),
}


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--steps',
    type=int,
    default=30,
    help='of each run, at least 20 (default: %(default)s)',
  )
  parser.add_argument(
    '--rounds', type=int, default=2, help='(default: %(default)s)'
  )
  args = parser.parse_args()
  if args.steps < 20 or args.rounds < 1:
    parser.error('the first ten steps warm up: --steps 20 or more, --rounds 1')
  found = {name: [] for name in WITHOUT}
  with tempfile.TemporaryDirectory() as folder:
    data = Path(folder) / 'data'
    run('qwenvl_jax.data.cli', 'prepare', 'scenes', f'--data_dir={data}')
    for number in range(args.rounds):
      for name, left_out in WITHOUT.items():
        workdir = Path(folder) / f'{name} {number}'
        run(
          'qwenvl_jax.train.main',
          '--gin_file=quickstart/stage2.gin',
          '--gin.InitFrom.params=None',
          f'--workdir={workdir}',
          f'--gin.DATA={json.dumps(str(data))}',
          f'--gin.OptimizerConfig.steps={args.steps}',
          '--gin.OptimizerConfig.warmup=1',
          left_out=left_out,
        )
        found[name].append(images_per_second(workdir))
  with_all = statistics.median(found['all settings'])
  for name, speeds in found.items():
    speed = statistics.median(speeds)
    print(f'{name:20s} {speed:6.1f} images/s, ratio {with_all / speed:.2f}')
  return 0


def run(module: str, *arguments: str, left_out=()) -> None:
  """A command as the quickstart runs it, but for some settings."""
  settings = quickstart.training_environment() | {
    'JAX_PLATFORMS': 'cpu',
    'GLIBC_TUNABLES': HUGE_PAGES,
  }
  env = {k: v for k, v in (os.environ | settings).items() if k not in left_out}
  subprocess.run(
    [sys.executable, '-m', module, *arguments],
    env=env,
    check=True,
    stdout=subprocess.DEVNULL,
  )


def images_per_second(workdir: Path) -> float:
  """The best of a run; the log has a line for ten steps."""
  lines = (workdir / 'log.jsonl').read_text().splitlines()
  return max(json.loads(line).get('images_per_second', 0.0) for line in lines)


if __name__ == '__main__':
  sys.exit(main())
