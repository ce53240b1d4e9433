"""`qwenvl-plan`: what a stage will take on a pod, before it is paid for."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qwenvl_jax import configuration, entry
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.plan import jobs, report, search, topology
from qwenvl_jax.plan.plan import make_plan
from qwenvl_jax.progress import PrintableConsole
from qwenvl_jax.sharding import MeshConfig
from qwenvl_jax.train.loop import TrainConfig

DESCRIPTION = """
Compiles the program of a stage for a TPU pod that is not there, and prints what
it will take: memory a chip, FLOPs, what is sent between chips, estimated time,
utilization, days and chip-hours. Programs of inference use all chips of a slice
for each row, up to the number of heads, unless the command says otherwise
(--gin.MeshConfig...).

Needs no TPU, no data and no checkpoint, but the compiler: pip install
'qwenvl_jax[plan]' (Linux on x86-64). A full-size step compiles in five to
fifteen minutes.

Exit status: 0 if it fits, 1 if it does not (the table then says what would
help), 2 for a mistake in configuration or arguments.
"""

EXAMPLES = """
qwenvl-plan --gin_file=stage2.gin --topology=v5e:16x16
qwenvl-plan --gin_file=stage2.gin --topology=v5e:8x8 --json \\
  --gin.MeshConfig.tensor=1 --gin.TrainConfig.accumulation=16
qwenvl-plan --gin_file=stage1.gin --topology=v5e:16x16 --slices=2
qwenvl-plan --gin_file=stage3.gin --topology=v5p:2x2x1 --search
qwenvl-plan --gin_file=stage3.gin --topology=v5e:2x4 --what=decode --rows=64
"""

INFERENCE = ('prefill', 'decode')

# What a run reads and a plan does not: neither has to exist, nor to be named.
UNREAD = ('TrainConfig.init=None', 'Pipeline.streams=()')


def command(argv: Sequence[str]) -> int:
  """Runs `qwenvl-plan`; returns the exit status.

  Raises:
    QwenVLError: bad input.
  """
  arguments = entry.parser('qwenvl-plan', DESCRIPTION, EXAMPLES)
  arguments.add_argument(
    '--topology',
    required=True,
    metavar='GENERATION:SHAPE',
    help='a TPU slice: v4, v5e, v5p or v6e, and its shape, e.g. v5e:16x16',
  )
  arguments.add_argument(
    '--slices',
    type=int,
    default=1,
    help='of these, connected by the data center network (default: 1)',
  )
  arguments.add_argument(
    '--plain',
    action='store_true',
    help='only what the files say: otherwise, for train and eval, what '
    'configs/topology/ has for this stage on these chips is read after the '
    'first of them, as launch/tpu_pod.sh does',
  )
  arguments.add_argument(
    '--what',
    choices=jobs.WHATS,
    default='train',
    help='which program (default: the training step)',
  )
  arguments.add_argument(
    '--rows',
    type=int,
    help='for eval, prefill and decode: rows at a time, all chips together '
    '(default: a microbatch for eval, else one for each shard of the batch)',
  )
  arguments.add_argument(
    '--length',
    type=int,
    help='for prefill: tokens of a prompt; for decode: of the cache (default: '
    'those of a training row)',
  )
  arguments.add_argument(
    '--cache_dtype',
    choices=('int8',),
    help='for decode: of the cache (default: that of the computation)',
  )
  arguments.add_argument(
    '--json', action='store_true', help='print one JSON object and nothing else'
  )
  arguments.add_argument(
    '--search',
    action='store_true',
    help='try meshes, microbatches and remat policies of the training step, '
    'and rank what fits',
  )
  arguments.add_argument(
    '--budget',
    type=int,
    default=8,
    help='programs that a search compiles at most, the most promising first '
    '(default: 8)',
  )
  arguments.add_argument(
    '--keep',
    type=Path,
    default=Path('runs/plan'),
    metavar='DIR',
    help='where a search keeps its answers, so that it goes on when started '
    'again (default: runs/plan)',
  )
  arguments.add_argument(
    '--quick',
    action='store_true',
    help='compile several times faster with a schedule of no use: memory and '
    'FLOPs, no times',
  )
  flags, bindings = entry.parse(arguments, argv, config='stage2.gin')
  wanted = topology.parse(flags.topology, flags.slices)
  # The chips that this machine may have are not those that are planned for.
  jax.config.update('jax_platforms', 'cpu')
  devices = topology.devices(wanted)
  files, more = pod_settings(flags.gin_file, wanted, flags.what, flags.plain)
  if len(files) > len(flags.gin_file) and not flags.json:
    print(f'with configs/{files[1]} (without: --plain)', file=sys.stderr)
  configuration.load(files, [*more, *bindings, *UNREAD])
  config = configuration.build(TrainConfig, whole=False)
  if flags.search:
    return _search(config, wanted, devices, flags)
  if flags.what in INFERENCE and not _says_mesh(bindings, files):
    mesh = inference_mesh(config.objective.config.decoder.heads, wanted)
    config = dataclasses.replace(config, mesh=mesh)
  job = jobs.make(
    flags.what, config, devices, flags.rows, flags.length, flags.cache_dtype
  )
  with _working(f'compiling {flags.what} for {wanted.name}', flags.json):
    plan = make_plan(job, wanted, quick=flags.quick)
  if flags.json:
    print(json.dumps(dataclasses.asdict(plan), indent=2))
  else:
    report.show(plan, PrintableConsole())
  return 0 if plan.fits else 1


def pod_settings(
  files: Sequence[str],
  wanted: topology.Topology,
  what: str = 'train',
  plain: bool = False,
) -> tuple[list[str], list[str]]:
  """What to read for these chips.

  Args:
    what: the program, one of `jobs.WHATS`. How training uses a pod is of no
      use to inference.
    plain: nothing else.

  Returns:
    (the files and, after the first, how the project uses a slice like this, if
    it says so and no file is about topologies already; bindings that repeat the
    parameters in several slices).
  """
  stage, *others = files
  pod = f'topology/{wanted.chip.name}_{math.prod(wanted.shape)}'
  about = [f'{pod}/{Path(stage).name}', f'{pod}/mesh.gin']
  found = [x for x in about if (configuration.CONFIGS / x).is_file()][:1]
  if (
    plain
    or what in INFERENCE
    or any('topology' in Path(x).parts for x in files)
  ):
    found = []
  slices = found and wanted.slices > 1
  more = [f'MeshConfig.data={wanted.slices}'] if slices else []
  return [stage, *found, *others], more


def inference_mesh(heads: int, wanted: topology.Topology) -> MeshConfig:
  """How inference uses a slice: all chips for each row, up to one a head."""
  tensor = math.gcd(heads, math.prod(wanted.shape))
  return MeshConfig(data=-1, fsdp=1, tensor=tensor)


def _says_mesh(bindings: Sequence[str], files: Sequence[str]) -> bool:
  """Whether the command itself says how to use the chips."""
  return any('MeshConfig.' in binding for binding in bindings) or any(
    'topology' in Path(file).parts for file in files
  )


def _search(config, wanted, devices, flags) -> int:
  if flags.what != 'train' or flags.quick:
    raise ConfigError(
      '--search is about the time of the training step: leave out --what and '
      '--quick'
    )
  if flags.budget < 1:
    raise ConfigError(f'--budget={flags.budget}: must be at least 1')
  console = Console(stderr=True, quiet=flags.json)
  with Progress(
    TextColumn('{task.completed}/{task.total}'),
    BarColumn(),
    TimeElapsedColumn(),
    TextColumn('{task.description}'),
    console=console,
  ) as bar:
    task = bar.add_task('counting', total=flags.budget)

    def said(done, total, text):
      bar.update(task, completed=done, total=total, description=text)

    found = []
    for candidate, plan in search.search(
      config, wanted, devices, flags.keep, flags.budget, said
    ):
      found.append((candidate, plan))
      bar.console.print(report.line(candidate, plan), highlight=False)
  ranked = search.rank(found)
  if flags.json:
    answers = [
      {'overrides': candidate.overrides, **dataclasses.asdict(plan)}
      for candidate, plan in ranked
    ]
    print(json.dumps(answers, indent=2))
  else:
    report.show_ranking(ranked, len(found), PrintableConsole())
  return 0 if ranked else 1


def _working(what: str, quiet: bool):
  console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
  return console.status(f'{what} ..')


def main() -> int:
  """Runs `qwenvl-plan` with the arguments of this process."""
  return entry.run(command)


if __name__ == '__main__':
  sys.exit(main())
