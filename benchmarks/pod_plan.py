"""What the stages take on their pods, beside what they should.

  python benchmarks/pod_plan.py [--row NAME ..] [--keep DIR] [--json]

Compiles the full-size training steps ahead of time, on a machine without TPUs
(pip install 'qwenvl_jax[plan]'; minutes a row). Times, and the utilization that
follows from them, are estimates. Answers are kept, so that a second call prints
at once what an unchanged package gave.
"""

import argparse
import dataclasses
import json
import operator
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from qwenvl_jax import configuration
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.plan import topology
from qwenvl_jax.plan.main import UNREAD, pod_settings
from qwenvl_jax.plan.plan import Plan
from qwenvl_jax.plan.plan_cache import cached_plan
from qwenvl_jax.train.loop import TrainConfig

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
  """A stage on a pod.

  Attributes:
    stage: its config file.
    topology: of the pod.
    peak_gib: most memory a chip; None for what fits.
    ratio: most FLOPs of the program over those of the model.
    mfu: least estimated utilization.
    overlapped: least share of the gathers' bytes sent beside computation; None
      where nothing is promised.
  """

  stage: str
  topology: str
  peak_gib: float | None
  ratio: float
  mfu: float
  overlapped: float | None = None

  @property
  def name(self) -> str:
    return f'{self.stage.removesuffix(".gin")} {self.topology}'


# stage2_unpacked.gin: 4,096 sequences of 2,048 with an image each; stage2.gin
# and stage1_packed.gin: rows of 2,048, packed, with seven.
ROWS = (
  Row('stage2.gin', 'v5e:16x16', None, 1.17, 0.58),
  Row('stage2.gin', 'v5p:4x4x4', None, 1.12, 0.56),
  Row('stage2_unpacked.gin', 'v5e:16x16', 14.0, 1.12, 0.54, 0.75),
  Row('stage2_unpacked.gin', 'v5p:4x4x4', 85.0, 1.05, 0.56),
  Row('stage1.gin', 'v5e:16x16', 14.0, 1.15, 0.60, 0.75),
  Row('stage1_packed.gin', 'v5e:16x16', None, 1.15, 0.60),
  Row('stage3.gin', 'v5e:4x4', None, 1.15, 0.45, 0.75),
  Row('stage3.gin', 'v5p:2x2x1', None, 1.15, 0.45),
)


def plan(row: Row, folder: Path) -> Plan:
  """The stage on the pod, used as configs/topology/ says."""
  wanted = topology.parse(row.topology)
  devices = topology.devices(wanted)
  files, _ = pod_settings([row.stage], wanted)
  configuration.load(files, UNREAD)
  config = configuration.build(TrainConfig, whole=False)
  return cached_plan(config, wanted, devices, folder)


@dataclasses.dataclass(frozen=True)
class Check:
  """A figure against its target."""

  name: str
  value: float
  target: float | None
  meets: Callable[[float, float], bool]
  form: str

  @property
  def met(self) -> bool:
    return self.target is None or self.meets(self.value, self.target)

  @property
  def text(self) -> str:
    text = format(self.value, self.form)
    if self.target is None:
      return text
    sign = '<=' if self.meets is operator.le else '>='
    target = f'{sign} {self.target:{self.form}}'
    return f'{text} ({target})' if self.met else f'{text} MISSED ({target})'


def checks(row: Row, made: Plan) -> list[Check]:
  """All that the row promises; only that it fits, if it does not."""
  most, least = operator.le, operator.ge
  limit = row.peak_gib or made.hbm_limit_bytes / GIB
  peak = Check('peak GiB', made.peak_hbm_bytes / GIB, limit, most, '.2f')
  if not made.fits:
    return [peak]
  return [
    peak,
    Check('program/model', made.flops_ratio, row.ratio, most, '.3f'),
    Check('estimated MFU', made.estimated_mfu, row.mfu, least, '.1%'),
    Check('estimated s', made.estimated_step_seconds, None, least, '.2f'),
    Check(
      'float32 gathers GB', made.float32_gather_bytes / 1e9, 0, most, '.2f'
    ),
    Check('gathers/bf16 model', made.gather_ratio, 2.1, most, '.2f'),
    Check(
      'full gradient all-reduces',
      made.full_gradient_all_reduces,
      0,
      most,
      'd',
    ),
    Check(
      'gathers overlapped',
      made.gather_overlapped_share,
      row.overlapped,
      least,
      '.0%',
    ),
    Check(
      'arguments/ideal',
      made.argument_bytes / made.ideal_argument_bytes,
      1.06,
      most,
      '.3f',
    ),
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  names = [row.name for row in ROWS]
  parser.add_argument(
    '--row',
    action='append',
    choices=names,
    metavar='NAME',
    help=f'only this one (may be repeated): {", ".join(names)}',
  )
  parser.add_argument(
    '--keep',
    type=Path,
    default=Path('runs/plan'),
    metavar='DIR',
    help='where answers are kept (default: runs/plan)',
  )
  parser.add_argument(
    '--json', action='store_true', help='print the whole plans instead'
  )
  arguments = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  console = Console()
  found = []
  for row in ROWS:
    if arguments.row and row.name not in arguments.row:
      continue
    try:
      made = plan(row, arguments.keep)
    except ConfigError as error:
      parser.exit(2, f'{row.name}: {error}\n')
    found.append((row, checks(row, made), made))
    if not arguments.json:
      show(row, made, found[-1][1], console)
  if arguments.json:
    print(json.dumps([dataclasses.asdict(made) for _, _, made in found]))
  missed = sum(not c.met for _, made, _ in found for c in made)
  if not arguments.json:
    console.print(f'{missed} targets missed in {len(found)} rows')


def show(row: Row, made: Plan, figures: list[Check], console: Console):
  axes = ', '.join(f'{axis} {size}' for axis, size in made.mesh.items())
  table = Table(
    title=f'{row.name}: {axes}; {made.accumulation} microbatches of '
    f'{made.rows_per_chip:g} rows a shard',
    title_justify='left',
    show_header=False,
  )
  for check in figures:
    table.add_row(check.name, check.text)
  console.print(table)


if __name__ == '__main__':
  main()
