"""The folder of a run: its lock, and the files that open its checkpoints."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from qwenvl_jax import buckets
from qwenvl_jax.conversion import low_rank
from qwenvl_jax.conversion.adapters import base_of, check_base
from qwenvl_jax.conversion.families.qwen_vl.assets import (
  VOCABULARY,
  write_assets,
)
from qwenvl_jax.conversion.low_rank import Base
from qwenvl_jax.data.pipeline import Pipeline
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.text.tokenizer import Tokenizer
from qwenvl_jax.train import saved_config
from qwenvl_jax.train.best import FOLDER as BEST
from qwenvl_jax.train.lock import locked
from qwenvl_jax.train.run_config import TrainConfig


@contextlib.contextmanager
def opened(workdir: Path, first: bool) -> Iterator[Callable[[], None]]:
  """Makes the folder, and holds its lock in the `first` process.

  Yields:
    A function that raises ConfigError if another process took the lock away.

  Raises:
    ConfigError: another process holds it, or nothing can be written there.
  """
  warn = functools.partial(print, file=sys.stderr, flush=True)
  with contextlib.ExitStack() as held:
    with _writing(workdir):
      buckets.make_folder(workdir)
      unlocked = contextlib.nullcontext(lambda: None)
      check = held.enter_context(locked(workdir, warn) if first else unlocked)
    yield check


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
  try:
    yield
  except Exception as error:
    reason = buckets.in_bucket(workdir) and buckets.unreachable(error)
    if not reason and not isinstance(error, OSError):
      raise
    raise ConfigError(
      f'cannot write to --workdir {workdir}: {reason or error}'
    ) from error


def find_base(config: TrainConfig, workdir: Path) -> Base | None:
  """The model whose frozen parameters a run's checkpoints do not hold.

  Returns:
    Its folder and digest; None of a run that saves all parameters.

  Raises:
    CheckpointError: the run was started on another one.
  """
  if config.objective.config.lora is None:
    return None
  folder = buckets.as_path(config.init.params)
  if low_rank.is_ours(workdir):
    _, base = low_rank.read_settings(workdir)
    check_base(base, folder, str(workdir))
    return base
  return base_of(folder)


def write_files(
  config: TrainConfig, workdir: Path, resolved: str | None, base: Base | None
) -> list[str]:
  """Writes what opens the run's checkpoints, and what made them.

  Args:
    resolved: the configuration as a config file, to be kept as `config.gin`.

  Returns:
    What of the configuration differs from the last start's, a line each.

  Raises:
    ConfigError: nothing can be written there.
  """
  with _writing(workdir):
    for folder in [workdir] + [workdir / BEST] * (config.measure is not None):
      write_assets(folder, config.objective.config)
      if base is not None:
        low_rank.write_settings(folder, config.objective.config.lora, base)
      if isinstance(config.data, Pipeline):
        Tokenizer(config.data.vocabulary).save(folder / VOCABULARY)
    return [] if resolved is None else saved_config.save(workdir, resolved)
