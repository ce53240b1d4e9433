"""How full rows are: packed by task, against one sample a row.

  python benchmarks/data_utilization.py [--config stage2.gin] [--rows 2000]

Synthetic records stand for the data sets of the mixture, with lengths like
theirs (benchmarks/synthetic.py); texts, tokens and packing are the real ones.
"""

import argparse
import collections
import dataclasses
import itertools

import numpy as np
import rich.console
import rich.table
import synthetic

from qwenvl_jax import configuration
from qwenvl_jax.batch import NO_IMAGE
from qwenvl_jax.data.pipeline import Pipeline


def pipeline(config: str) -> Pipeline:
  """The pipeline of a stage on synthetic records and tiny pictures."""
  configuration.load([config], ["MISSING='allow'"])
  made = configuration.build(Pipeline, whole=False)
  streams = [
    dataclasses.replace(x, source=synthetic.Synthetic(x.source.name))
    for x in made.streams
  ]
  return dataclasses.replace(made, streams=streams, image_size=14)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='stage2.gin')
  parser.add_argument('--rows', type=int, default=2000)
  arguments = parser.parse_args()
  made = pipeline(arguments.config)
  groups = collections.defaultdict(lambda: np.zeros(5, np.int64))
  for row, stats in itertools.islice(made.rows(), arguments.rows):
    segments = row['segment_ids']
    used = np.count_nonzero(segments)
    images = np.count_nonzero(row['image_starts'] != NO_IMAGE)
    numbers = [1, segments.max(), used, (row['loss_weights'] > 0).sum(), images]
    groups[stats.group or 'all'] += np.array(numbers)
  table = rich.table.Table(title=f'{arguments.config}, {arguments.rows} rows')
  for column in (
    'task', 'rows', 'samples', 'share', 'samples a row', 'images a row',
    'utilization', 'one sample a row',
  ):  # fmt: skip
    table.add_column(column, justify='left' if column == 'task' else 'right')
  everything = sum(groups.values())
  for name, numbers in [*sorted(groups.items()), ('all', everything)]:
    rows, samples, used, _, images = numbers.tolist()
    table.add_row(
      name, f'{rows:,}', f'{samples:,}', f'{samples / everything[1]:.1%}',
      f'{samples / rows:.2f}', f'{images / rows:.2f}',
      f'{used / rows / made.sequence_length:.1%}',
      f'{used / samples / made.sequence_length:.1%}',
    )  # fmt: skip
  rich.console.Console(width=100).print(table)
  rows, samples, used, _, images = everything.tolist()
  print(
    f'packed {used / rows / made.sequence_length:.2%}, padded '
    f'{used / samples / made.sequence_length:.2%}: '
    f'{samples / rows:.2f} times as many samples in a row of '
    f'{made.sequence_length}; image slots used '
    f'{images / rows / max(made.image_slots, 1):.1%}'
  )


if __name__ == '__main__':
  main()
