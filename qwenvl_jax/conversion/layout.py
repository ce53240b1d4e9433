"""Names and shapes of a whole model: released tensors and our parameters.

What a checkpoint must hold follows from the conversion table of its family,
which converts both ways.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from qwenvl_jax.conversion.families.qwen_vl.table import PARTS, part_of, rules
from qwenvl_jax.conversion.rules import Rule
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.int4 import PER_WORD
from qwenvl_jax.model.layers import outputs_first
from qwenvl_jax.model.stacking import (
  apart_path,
  inputs_of,
  is_plain_kernel,
  is_stacked,
)


def is_packed(name: str) -> bool:
  """Whether a parameter is part of a packed kernel, whose dtypes are fixed.

  Args:
    name: a path, or the released name.
  """
  return name.endswith(
    ('/words', '/zeros', '/scales', '.qweight', '.qzeros', '.scales')
  )


def flatten(tree: dict, prefix: str = '') -> Iterator[tuple[str, object]]:
  """Leaves of a nested dict with their paths joined by '/'."""
  for key, value in tree.items():
    path = f'{prefix}/{key}' if prefix else key
    if isinstance(value, dict):
      yield from flatten(value, path)
    else:
      yield path, value


def unflatten(leaves: dict[str, object]) -> dict:
  """The inverse of `flatten`."""
  tree = {}
  for path, value in leaves.items():
    *parents, last = path.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def entries(
  table: Iterable[Rule],
) -> Iterator[tuple[str, Rule, int | None]]:
  """(released name, rule, layer) of every tensor; no layer if it is alone."""
  for rule in table:
    for layer, name in enumerate(rule.released_names()):
      yield name, rule, None if rule.layers is None else layer


def released_shapes(table: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
  """Released name to shape of every tensor that a checkpoint must hold."""
  return {name: rule.shape for name, rule, _ in entries(table)}


def weights(path: str, shape: Sequence[int]) -> int:
  """Counts the weights of an array: words hold those of a packed kernel."""
  if is_packed(path):
    return math.prod(shape) * PER_WORD if path.endswith('/words') else 0
  return math.prod(shape)


def shapes_of(table: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
  """Path to shape of every parameter of a table, layers stacked."""
  shapes = {}
  for rule in table:
    stack = () if rule.layers is None else (rule.layers,)
    blank = np.broadcast_to(np.int8(0), rule.shape)
    for path, part in zip(rule.paths, rule.to_ours(blank), strict=True):
      shapes[path] = stack + part.shape
  return shapes


def parameter_shapes(
  config: QwenVLConfig, parts: Iterable[str] = PARTS
) -> dict[str, tuple[int, ...]]:
  """Path to shape of every parameter of a model, or of some parts of it.

  For training or for inference (`model.stacking`), as `config.scan_layers`
  says.
  """
  shapes = shapes_of(rules(config, parts))
  if config.scan_layers:
    return shapes
  return _apart(shapes, config.decoder.int8)


def _apart(
  shapes: dict[str, tuple[int, ...]], int8: bool
) -> dict[str, tuple[int, ...]]:
  apart = {}
  for path, shape in shapes.items():
    layers = 1
    if is_stacked(path):
      layers, *shape = shape
    if is_plain_kernel(path):
      shape = outputs_first(tuple(shape), inputs_of(path))
    parts = {'': tuple(shape)}
    if int8 and is_plain_kernel(path):
      outputs = tuple(shape)[: -inputs_of(path)]
      parts = {'/values': tuple(shape), '/scales': outputs}
    for i in range(layers):
      apart |= {apart_path(path, i) + x: parts[x] for x in parts}
  return apart


def released_order(table: list[Rule]) -> list[tuple[str, Rule]]:
  """(released name, rule) of every tensor, layer after layer."""
  groups = {}
  for position, rule in enumerate(table):
    prefix = rule.tensor.partition('*')[0] if rule.layers else ''
    for layer, name in enumerate(rule.released_names()):
      key = (part_of(name), prefix, layer if prefix else 0, position)
      groups[key] = (name, rule)
  order = {part: i for i, part in enumerate(PARTS)}
  return [groups[k] for k in sorted(groups, key=lambda k: (order[k[0]], k[1:]))]


def check_shapes(
  expected: dict[str, tuple], found: dict[str, tuple], where: str
):
  """Compares what a checkpoint holds with what it must hold.

  Args:
    expected: name to shape.
    found: name to shape.
    where: the checkpoint, for the message.

  Raises:
    CheckpointError: names missing, unknown and misshapen tensors.
  """
  problems = []
  missing = sorted(expected.keys() - found.keys())
  unknown = sorted(found.keys() - expected.keys())
  misshapen = [
    f'{name} is {list(found[name])}, not {list(shape)}'
    for name, shape in expected.items()
    if name in found and tuple(found[name]) != tuple(shape)
  ]
  for kind, names in (
    ('missing', missing),
    ('unknown', unknown),
    ('misshapen', misshapen),
  ):
    if names:
      problems.append(f'{len(names)} {kind}: {some(names)}')
  if problems:
    raise CheckpointError(
      f'{where}: tensors do not match config.json. ' + '; '.join(problems)
    )


def some(names: Sequence[str], limit: int = 5) -> str:
  """The first of some names, and how many more there are."""
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return ', '.join(names[:limit]) + more
