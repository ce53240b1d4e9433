"""The graph of Beam: clean every shard, compare all pairs, finish every shard.

The one module that needs the package apache-beam.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Sequence

from qwenvl_jax.data.cleaning import shards
from qwenvl_jax.data.cleaning.shards import Job
from qwenvl_jax.data.cleaning.unique import best
from qwenvl_jax.errors import ConfigError, QwenVLError

try:
  # It warns about Google's clients, which only its own stores need.
  logging.disable(logging.WARNING)
  import apache_beam as beam
  from apache_beam.options import pipeline_options
except ImportError as error:
  raise ConfigError(
    'cleaning needs Apache Beam, which asks for other versions of some '
    'packages than the rest: put launch/in_env.sh beam before qwenvl-data (it '
    "makes an environment of its own), or `pip install 'qwenvl_jax[clean]'` in "
    'one that you made'
  ) from error
finally:
  logging.disable(logging.NOTSET)

# Seconds between two looks at what is done.
_LOOK = 0.5


def run(
  job: Job,
  options: Sequence[str],
  progress: Callable[[str, int, int], None],
) -> None:
  """Runs the graph to its end, with options of Beam's command line.

  Raises:
    ConfigError: options that Beam does not take.
    QwenVLError: what a worker raised.
  """
  pipeline = _pipeline(list(options))
  build(pipeline, job)
  # Every warning of a worker would tear the progress bar.
  logging.getLogger('apache_beam').setLevel(logging.ERROR)
  with _watching(job, progress):
    try:
      result = pipeline.run()
      result.wait_until_finish()
    except Exception as error:  # Runners wrap what a worker raised.
      raise _cause(error) from error


def build(pipeline, job: Job):
  """Adds the graph to a pipeline; gives the numbers of the finished shards."""
  numbers = range(len(job.shards))
  cleaned = (
    pipeline
    | 'Shards' >> beam.Create(numbers)
    # Or a runner would hand all of them to one worker.
    | 'SpreadShards' >> beam.Reshuffle()
    | 'Clean' >> beam.Map(functools.partial(_clean, job))
  )
  # Of finished shards too: the best of a group may be in one.
  survivors = cleaned | 'Entries' >> beam.FlatMap(
    functools.partial(_entries, job)
  )
  kept = {}
  for rule in job.unique:
    survivors = (
      survivors
      | f'Key/{rule.name}' >> beam.Map(functools.partial(_keyed, rule))
      | f'Best/{rule.name}' >> beam.CombinePerKey(_Best(rule))
      | f'Survivors/{rule.name}' >> beam.FlatMap(_values)
    )
    kept[rule.name] = survivors | f'Kept/{rule.name}' >> beam.Map(_index)
  return (
    {'': cleaned | 'All' >> beam.Map(_with_nothing), **kept}
    | 'Gather' >> beam.CoGroupByKey()
    | 'Finish' >> beam.MapTuple(functools.partial(_finish, job))
  )


class _Best(beam.CombineFn):
  """The best entries of a group, a part of it at a time."""

  def __init__(self, rule):
    self._rule = rule

  def create_accumulator(self):
    return []

  def add_input(self, accumulator, entry):
    accumulator.append(entry)
    if len(accumulator) > 4 * self._rule.keep:
      accumulator = best(self._rule, accumulator)
    return accumulator

  def merge_accumulators(self, accumulators):
    return best(self._rule, [x for part in accumulators for x in part])

  def extract_output(self, accumulator):
    return best(self._rule, accumulator)


def _clean(job, shard):
  return shards.clean_shard(job, shard)


def _entries(job, shard):
  return shards.entries(job, shard)


def _keyed(rule, entry):
  return rule.key(entry), entry


def _values(group):
  return group[1]


def _index(entry):
  return entry.shard, entry.index


def _with_nothing(shard):
  return shard, None


def _finish(job, shard, gathered):
  kept = {rule.name: frozenset(gathered[rule.name]) for rule in job.unique}
  return shards.finish_shard(job, shard, kept)


def _pipeline(options) -> beam.Pipeline:
  if not any(x.partition('=')[0] == '--runner' for x in options):
    # The default would look for a runner to download first.
    options = ['--runner=FnApiRunner', *options]
  try:
    return beam.Pipeline(options=pipeline_options.PipelineOptions(options))
  except (SystemExit, ValueError, ImportError, AttributeError) as error:
    raise ConfigError(
      f'Beam does not take the options {" ".join(options)} ({error}); see its '
      'documentation of pipeline options'
    ) from error


def _cause(error: BaseException) -> BaseException:
  """What went wrong in a worker, as far as it can be told."""
  seen = error
  while seen is not None:
    if isinstance(seen, QwenVLError):
      return seen
    seen = seen.__cause__ or seen.__context__
  return error


@contextlib.contextmanager
def _watching(job, progress):
  """Reports what is done by the files that appear, whoever writes them."""
  total = len(job.shards)
  stop = threading.Event()

  def look():
    left = {
      'cleaning': (job.candidates.is_finished, set(range(total))),
      'writing': (job.finished.is_finished, set(range(total))),
    }
    while True:
      last = stop.wait(_LOOK)
      for what, (is_done, waiting) in left.items():
        waiting -= {shard for shard in waiting if is_done(shard)}
        progress(what, total - len(waiting), total)
        if waiting:
          break
      if last:
        return

  thread = threading.Thread(target=look, daemon=True)
  thread.start()
  try:
    yield
  finally:
    stop.set()
    thread.join()
