"""`qwenvl-data clean`: from downloaded shards to clean ones, with a report."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import rich.console
import rich.table

from qwenvl_jax import buckets, configuration, entry
from qwenvl_jax.data import storage
from qwenvl_jax.data.cleaning import inputs, pipeline, report
from qwenvl_jax.errors import ConfigError, did_you_mean
from qwenvl_jax.progress import bars

DESCRIPTION = """
Cleans picture-text pairs as the paper's Appendix A lists it.

Reads WebDataset tars, Parquet files (both as img2dataset writes them) or JSONL;
writes array_record shards as `qwenvl-data prepare` does (a data set called NAME
in DATA_DIR) and report.html: what each rule kept and dropped, with examples.
The rules and their numbers are in the config file. Started again with the same
--output, it goes on where it stopped: finished shards are not done again, but
for those whose files have changed.

It runs on Apache Beam: here by default, on Flink, Spark or Dataflow by Beam's
own options, which follow after `--`. Beam asks for other versions of some
packages than training: launch/in_env.sh beam makes an environment for it.
"""

EXAMPLES = """
launch/in_env.sh beam qwenvl-data clean --gin_file=clean.gin \\
  --output data/pairs \\
  --input laion_en='laion/*.tar' --input coyo='coyo/*.parquet'
launch/in_env.sh beam qwenvl-data clean --gin_file=clean.gin \\
  --output data/pairs \\
  --input laion_en='laion/*.tar' --gin.Size.minimum=200 --workers 8
launch/in_env.sh beam qwenvl-data clean --gin_file=clean.gin \\
  --output gs://B/pairs \\
  --input laion_en='gs://B/laion/*.tar' -- --runner=FlinkRunner
"""


def command(argv: Sequence[str], console: rich.console.Console) -> None:
  """Runs the command; raises QwenVLError on bad input."""
  parser = entry.parser('qwenvl-data clean', DESCRIPTION, EXAMPLES)
  parser.add_argument(
    '--input',
    action='append',
    default=[],
    metavar='NAME=FILES',
    help='a source: its name (of which the config file knows CLIP limits) and '
    'a pattern of its shards; may be repeated; replaces Cleaning.sources',
  )
  parser.add_argument(
    '--output',
    metavar='DATA_DIR/NAME',
    help='the folder to write (Cleaning.output)',
  )
  parser.add_argument(
    '--workers',
    type=int,
    default=1,
    metavar='N',
    help="processes of the local runner (Beam's --direct_num_workers)",
  )
  parser.add_argument(
    '--again',
    action='store_true',
    help='clean all shards again, with other settings if need be',
  )
  argv, beam_options = _split(list(argv))
  flags, bindings = entry.parse(parser, argv)
  if flags.workers < 1:
    raise ConfigError(f'--workers {flags.workers}: give 1 or more')
  if flags.workers > 1:
    beam_options = [
      '--direct_running_mode=multi_processing',
      # Their small talk would tear the progress bar.
      '--default_sdk_harness_log_level=ERROR',
      f'--direct_num_workers={flags.workers}',
      *beam_options,
    ]
  configuration.load(flags.gin_file or ['clean.gin'], bindings)
  cleaning = configuration.build(pipeline.Cleaning)
  cleaning = dataclasses.replace(
    cleaning,
    sources=[_source(x) for x in flags.input] or cleaning.sources,
    output=flags.output or cleaning.output,
  )
  if not cleaning.output:
    raise ConfigError('no --output given: name the folder to write')
  if not cleaning.sources:
    raise ConfigError(
      "no --input given: name what to clean, e.g. --input laion_en='laion/"
      "*.tar'"
    )
  job = cleaning.job()

  def say(line):
    console.print(line, soft_wrap=True, highlight=False, markup=False)

  for line in _without_limit(cleaning):
    say(line)
  # Now: while threads of Beam import TFDS, this one could not, as drawing does.
  storage.proto()
  with bars(console) as progress:
    tally = pipeline.run(
      job,
      beam_options,
      lambda step, done, total: progress(f'{step} shards', done, total),
      flags.again,
      say,
    )
  console.print(_table(job, tally))
  console.print(f'{buckets.as_path(job.output) / "report.html"}: open it in a '
                'browser')  # fmt: skip


def _without_limit(cleaning) -> Iterator[str]:
  """Lines about sources whose CLIP scores are not looked at."""
  for rule in cleaning.rules:
    for source in cleaning.sources:
      known = getattr(rule, 'minimum', None)
      # Of a rule that has limits by source.
      if isinstance(known, Mapping) and source.name not in known:
        yield (
          f'source {source.name}: {rule.name} has no limit for it, so that all '
          f'its scores pass (--gin.{type(rule).__name__}.minimum sets one)'
          f'{did_you_mean(source.name, known)}'
        )


def _split(argv):
  """What is before and after `--`."""
  at = argv.index('--') if '--' in argv else len(argv)
  return argv[:at], argv[at + 1 :]


def _source(text: str) -> inputs.Source:
  name, found, files = text.partition('=')
  if not (name and found and files):
    raise ConfigError(
      f"--input {text}: write NAME=FILES, e.g. laion_en='laion/*.tar'"
    )
  return inputs.Source(name=name, files=files)


def _table(job, tally):
  table = rich.table.Table(title=job.output)
  table.add_column('outcome')
  for source in (*report.sources(job), 'share'):
    table.add_column(source, justify='right')
  for reason, counts, share in report.outcomes(job, tally):
    table.add_row(
      reason or 'kept',
      *(f'{n:,}' for n in counts),
      f'{share:.2%}',
      style='' if reason else 'bold',
    )
  return table
