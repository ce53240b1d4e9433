"""Mixtures of data sets, written as the paper's tables are."""

import collections
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from qwenvl_jax.data import catalogue, formats, sources, storage
from qwenvl_jax.data.pipeline import Stream, is_weight
from qwenvl_jax.errors import ConfigError, DataError

# Group, name of the data set, what to make of its records, weight.
Entry = tuple[str, str, Any, float]


def streams(
  table: Sequence[Entry],
  totals: Mapping[str, float] | None = None,
  temperature: float = 1.0,
  data_dir: str | os.PathLike | None = None,
  split: str = 'train',
  missing: str = 'error',
) -> list[Stream]:
  """The streams of a mixture of prepared data sets.

  Args:
    table: rows of (group, data set, format, weight). Samples of one group fill
      packed rows together; weights are relative within the group.
    totals: weight of each group; None for the sum of its rows.
    temperature: weights of groups are raised to 1/temperature: 1 is as written,
      above it small groups are seen more often.
    data_dir: where the data sets are; None for the default folder.
    split: which part of each. `NAME/SPLIT` in the table names another.
    missing: 'error', or 'skip' to leave out with a warning what is not
      prepared; a group's total then falls to its other data sets. 'allow' to
      look at a mixture without its data, which cannot be opened then.

  Raises:
    ConfigError: a table that cannot be used as written.
    DataError: data sets that are not prepared; all are named.
  """
  _check(table, totals, temperature, missing)
  present, absent = [], []
  for entry in table:
    name, part = _named(entry[1], split)
    folder = storage.folder(sources.data_path(data_dir), name)
    there = part in storage.split_lengths(folder)
    there = there or missing == 'allow'
    (present if there else absent).append(entry)
  if absent:
    said = _what_to_prepare(absent, split, data_dir)
    if missing == 'error':
      raise DataError(
        f"{said}\nmixture.streams.missing='skip' trains without what is missing"
      )
    if not present:
      raise DataError(f'{said}\nThere is nothing else in the mixture')
    logging.warning('%s\nThe mixture goes without.', said)
  weights = _weights(present, totals, temperature)
  made = []
  for (group, dataset, task, _), weight in zip(present, weights):
    name, part = _named(dataset, split)
    source = sources.Prepared(name, part, data_dir)
    made.append(Stream(source, task, weight, group, f'{group}/{name}'))
  return made


def _what_to_prepare(absent: Sequence[Entry], split, data_dir) -> str:
  """All that is missing, with the command that makes each."""
  names, commands = set(), []
  for _, dataset, task, _ in absent:
    name, part = _named(dataset, split)
    names.add(name)
    command = _command(name, task, data_dir)
    if part != split:
      command += f'  # split {part}'
    commands.append(command)
  count = len(names)
  sets = 'data set' if count == 1 else 'data sets'
  return '\n'.join(
    [
      f'{count} {sets} of the mixture not prepared in '
      f'{sources.data_path(data_dir)}:',
      *(f'  {command}' for command in dict.fromkeys(commands)),
      '`qwenvl-data list --name NAME` tells what to download to FOLDER.',
    ]
  )


def _command(name: str, task: Any, data_dir) -> str:
  """What makes a data set."""
  if isinstance(task, formats.Ocr):
    kind = name if name in ('pdf', 'html') else 'pages'
    folder = sources.data_path(data_dir) / name
    return f'qwenvl-data make-ocr --kind {kind} --n N {folder}'
  command = f'qwenvl-data prepare {name} --manual_dir FOLDER'
  if name not in catalogue.DATA_SETS:
    written = {
      formats.Text: 'text',
      formats.Conversations: 'conversations',
      formats.Interleaved: 'interleaved',
    }
    command += f' --format {written.get(type(task), "FORMAT")}'
  return command + sources.option(data_dir)


def _named(dataset: str, split: str) -> tuple[str, str]:
  name, _, part = dataset.partition('/')
  return name, part or split


def _weights(table, totals, temperature) -> list[float]:
  within = collections.Counter()
  for group, _, _, weight in table:
    within[group] += weight
  totals = totals or within
  return [
    weight / within[group] * totals[group] ** (1 / temperature)
    for group, _, _, weight in table
  ]


def _check(table, totals, temperature, missing) -> None:
  if missing not in ('error', 'skip', 'allow'):
    raise ConfigError(
      f"mixture.streams.missing={missing!r} is none of 'error', 'skip', 'allow'"
    )
  if not is_weight(temperature):
    raise ConfigError(
      f'mixture.streams.temperature={temperature} must be above 0'
    )
  groups = set()
  for entry in table:
    if len(entry) != 4 or not (callable(entry[2]) and is_weight(entry[3])):
      raise ConfigError(
        f'mixture.streams.table: {entry!r} is not (group, data set, format, '
        'weight above 0)'
      )
    groups.add(entry[0])
  for group, total in (totals or {}).items():
    if not is_weight(total):
      raise ConfigError(
        f'mixture.streams.totals: {total!r} of {group!r} is no number above 0'
      )
  unnamed = groups - set(totals) if totals is not None else ()
  if unnamed:
    raise ConfigError(
      f'mixture.streams.totals lacks {", ".join(sorted(unnamed))}, which the '
      'table names'
    )
