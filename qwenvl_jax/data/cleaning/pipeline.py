"""The cleaning of any number of shards on Apache Beam.

Which machine cleans which shard is Beam's affair: the local runner by default,
Flink, Spark or Dataflow by Beam's own options. The result is the same.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from qwenvl_jax import buckets
from qwenvl_jax.data import sharded_job, storage
from qwenvl_jax.data.cleaning import inputs, report
from qwenvl_jax.data.cleaning.rule_stats import RuleStats
from qwenvl_jax.data.cleaning.shards import Job
from qwenvl_jax.data.cleaning.unique import Fingerprints, default_rules
from qwenvl_jax.errors import ConfigError, DataError

# Examples of each reason and source in the report.
_EXAMPLES = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cleaning:
  """A cleaning, as a config file describes it.

  Attributes:
    sources: what is read.
    output: the folder that is written, DATA_DIR/NAME: `sources.Prepared` with
      these reads it.
    rules: functions of one pair, in order; the first that drops a pair decides.
    unique: rules about alike pairs, in order.
    fingerprints: what makes pairs alike.
  """

  sources: Sequence[inputs.Source]
  output: str
  rules: Sequence[Any]
  unique: Sequence[Any] = dataclasses.field(default_factory=default_rules)
  fingerprints: Fingerprints = Fingerprints()

  def job(self) -> Job:
    """The same with every shard listed.

    Raises:
      ConfigError: names that occur twice, or nothing to do.
      DataError: files that are not there.
    """
    for what, named in (
      ('sources', self.sources),
      ('rules', (*self.rules, *self.unique)),
    ):
      names = [x.name for x in named]
      twice = sorted({name for name in names if names.count(name) > 1})
      if twice:
        raise ConfigError(
          f'Cleaning.{what}: {", ".join(twice)} occurs more than once; the '
          'report could not tell them apart'
        )
    for source in self.sources:
      if not re.fullmatch(r'[\w.-]+', source.name):
        raise ConfigError(
          f'the name of source {source.name!r} may have letters, digits, -, _ '
          'and . only'
        )
    found = tuple(shard for source in self.sources for shard in source.shards())
    if not found:
      raise ConfigError('Cleaning.sources is empty; name at least one source')
    return Job(
      str(buckets.as_path(self.output)),
      found,
      tuple(self.rules),
      tuple(self.unique),
      self.fingerprints,
    )


def run(
  job: Job,
  beam_options: Sequence[str] = (),
  progress: Callable[[str, int, int], None] = lambda what, done, total: None,
  again: bool = False,
  say: Callable[[str], None] = lambda line: None,
) -> RuleStats:
  """Cleans all shards and writes the report; goes on where a run stopped.

  Args:
    job: what to clean.
    beam_options: of Beam's command line, e.g. '--runner=FlinkRunner'.
    progress: called with a step, how many shards are done, and of how many.
    again: cleans everything again, with other settings if need be.
    say: called with lines about what is cleaned again.

  Returns:
    The counts, with some examples.

  Raises:
    ConfigError: the folder was begun with other settings, or Beam is missing.
    DataError: a file cannot be read or written.
  """
  for line in begin(job, again):
    say(line)
  if not job.is_complete:
    # Imported here: it takes seconds, and a finished folder needs none of it.
    from qwenvl_jax.data.cleaning import beam

    beam.run(job, beam_options, progress)
  return complete(job)


def begin(job: Job, again: bool = False) -> list[str]:
  """Makes the output's folder; removes what is out of date, or (`again`) all.

  Returns:
    Lines that tell a person what will be cleaned again.

  Raises:
    ConfigError: it was begun with other settings.
    DataError: it cannot be written.
  """
  work = buckets.as_path(job.output) / 'work'
  with sharded_job.writing(job.output):
    if again:
      buckets.remove(work)
    sharded_job.check_settings(work / 'settings.txt', describe(job))
    job.finished.begin(again)
    said = job.candidates.begin()
    if again:
      said.append(f'{job.name}: everything is cleaned again')
    missing = job.finished.unfinished()
    if missing:
      (job.folder / storage.INFO).unlink(missing_ok=True)
    # Candidates are not kept once all shards are finished.
    lost = [
      shard
      for shard in job.candidates.shards
      if missing
      and job.candidates.is_finished(shard)
      and not job.candidates.path(shard).exists()
    ]
    for shard in lost:
      job.candidates.forget(shard)
    if lost:
      said.append(
        f'{job.name}: {len(lost)} further shards are read again, to be compared'
      )
    return said


def describe(job: Job) -> str:
  """All that decides what the output holds, one setting a line."""
  lines = [
    repr(job.fingerprints),
    *map(repr, job.rules),
    *map(repr, job.unique),
  ]
  lines += [f'{shard.source!r} {shard.path}' for shard in job.shards]
  return '\n'.join(lines) + '\n'


def complete(job: Job) -> RuleStats:
  """Writes the report and what makes the folder a data set.

  Raises:
    DataError: a shard is missing or damaged.
  """
  missing = job.finished.unfinished()
  if missing:
    raise DataError(
      f'{job.output}: {len(missing)} of {len(job.shards)} shards are not '
      'finished; run the same command again'
    )
  total, lengths = RuleStats(), []
  for shard in job.finished.shards:
    cleaned, finished = job.candidates.tally(shard), job.finished.tally(shard)
    counts = finished.counts
    lengths.append(sum(map(counts.kept_of, counts.sources())))
    total = (total + cleaned + finished).thinned(_EXAMPLES)
  with sharded_job.writing(job.output):
    folder = buckets.as_path(job.output)
    buckets.write(folder / 'report.html', report.page(job, total))
    buckets.write(folder / 'report.json', report.figures(job, total))
    storage.write_info(
      job.folder,
      job.name,
      {'train': lengths},
      description='Pictures with their texts, cleaned; see report.html.',
    )
    for shard in job.finished.shards:
      job.candidates.path(shard).unlink(missing_ok=True)
      job.candidates.fingerprints_path(shard).unlink(missing_ok=True)
    for place in (folder, folder / 'work', job.folder):
      buckets.remove_partial(place)
  return total
