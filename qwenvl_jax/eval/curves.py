"""Loss curves of runs, from their logs."""

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from qwenvl_jax.errors import DataError

LOSSES = ('loss', 'heldout_loss')


def draw(runs: Mapping[str, Path]) -> Figure:
  """Draws the loss of each run over its steps, beside each other.

  Where a run was evaluated while it trained, the loss on what was held out is
  drawn, too.

  Raises:
    DataError: a run has no log yet.
  """
  figure = Figure(figsize=(3.2 * len(runs), 2.6))
  axes = figure.subplots(1, len(runs), squeeze=False)[0]
  for axis, (title, folder) in zip(axes, runs.items(), strict=True):
    for name, points in losses(folder).items():
      axis.plot(*zip(*points, strict=True), linewidth=1.2, label=name)
    if len(axis.lines) > 1:
      axis.legend(fontsize=7)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel('step', fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel('loss', fontsize=8)
  figure.tight_layout()
  return figure


def losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
  """Reads (step, loss) of each of `LOSSES` that a log has, None left out.

  Raises:
    DataError: there is no log.
  """
  path = Path(folder) / 'log.jsonl'
  try:
    lines = path.read_text().splitlines()
  except FileNotFoundError as error:
    raise DataError(
      f'{path} does not exist: {folder} is no training run, or none that has '
      'come to its first line yet'
    ) from error
  found = {}
  for record in map(json.loads, lines):
    for name in LOSSES:
      if record.get(name) is not None:
        found.setdefault(name, []).append((record['step'], record[name]))
  return found
