"""What inference takes with kernels of 4 bits, beside plain ones.

  python benchmarks/int4_memory.py [--topology v5e:1x1] [--length 2048]

Compiles the full-size model for a TPU that is not there (pip install
'qwenvl_jax[plan]'; a few minutes): reading a prompt with four pictures, which
needs all parameters, and one more token, which needs no vision. Prints the
compiler's peak of memory with the decoder's kernels in bfloat16 and packed, and
the ratio.
"""

import argparse
import sys

from qwenvl_jax import configuration
from qwenvl_jax.plan import jobs, topology
from qwenvl_jax.plan.main import UNREAD
from qwenvl_jax.plan.plan import Plan, make_plan
from qwenvl_jax.train.loop import TrainConfig

GIB = 2**30
GROUP = 128  # Inputs that share a scale, as in the Int4 release.


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--topology', default='v5e:1x1', help='one chip (default: %(default)s)'
  )
  parser.add_argument(
    '--length',
    type=int,
    default=2048,
    help='of the prompt, and of the cache (default: %(default)s)',
  )
  args = parser.parse_args()
  wanted = topology.parse(args.topology)
  devices = topology.devices(wanted)
  usable = wanted.chip.hbm_bytes / GIB
  print(f'{wanted.name}: {usable:.2f} GiB usable')
  for what in ('prefill', 'decode'):
    plain, packed = (
      compiled(what, wanted, devices, args.length, group)
      for group in (None, GROUP)
    )
    texts = [
      f'{name} {plan.peak_hbm_bytes / GIB:.2f} GiB'
      f'{"" if plan.fits else " (does not fit)"}'
      for name, plan in (('bfloat16', plain), ('int4', packed))
    ]
    ratio = packed.peak_hbm_bytes / plain.peak_hbm_bytes
    print(f'{what:8s} {", ".join(texts)}, ratio {ratio:.2f}', flush=True)
  return 0


def compiled(what, wanted, devices, length: int, group: int | None) -> Plan:
  """The plan of one row."""
  bindings = [
    *UNREAD,
    f'DecoderConfig.int4_group={group}',
    'MeshConfig.data=1',
    'MeshConfig.tensor=1',
  ]
  configuration.load(['stage3.gin'], bindings)
  config = configuration.build(TrainConfig, whole=False)
  job = jobs.make(what, config, devices, rows=1, length=length)
  return make_plan(job, wanted, quick=True)


if __name__ == '__main__':
  sys.exit(main())
