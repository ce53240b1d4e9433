"""Prepares the quickstart's scenes: record files and the small vocabulary."""

import os
import pathlib
from collections.abc import Callable

import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.data import sources, vocabulary
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.text.tokenizer import Tokenizer


def scenes(
  data_dir: str | os.PathLike | None = None,
  config: str = 'default',
  vocabulary_file: str | None = None,
  progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> pathlib.Path:
  """Builds the composed scenes and the small vocabulary beside them.

  What is there already stays as it is, so a second call is quick.

  Args:
    data_dir: where to; None for the default folder.
    config: a configuration of the builder, 'default' or 'small'.
    vocabulary_file: the vocabulary to reduce; None for the released one.
    progress: called with what is being done, how far it is, and of how much.

  Returns:
    The folder of the scenes.

  Raises:
    ConfigError: no such configuration.
    DataError: the folder cannot be written.
  """
  # Imported here: it takes a second, and listing does not need it.
  import tensorflow_datasets as tfds

  from qwenvl_jax.data.builders import scenes as builders

  configs = {x.name: x for x in builders.Scenes.BUILDER_CONFIGS}
  if config not in configs:
    raise ConfigError(
      f'no configuration {config!r} of scenes; there is '
      f'{", ".join(map(repr, configs))}'
    )
  settings = configs[config]
  total = settings.train + settings.test + settings.combos
  counts = {'train': [], 'test': [], 'combos': []}

  def count(split, drawing):
    counts[split].append(len(drawing.objects))
    progress('drawing scenes', sum(map(len, counts.values())), total)

  base = sources.disk_path(data_dir)
  tfds.disable_progress_bar()
  try:
    base.mkdir(parents=True, exist_ok=True)
    builder = builders.Scenes(
      data_dir=str(base), config=settings, on_scene=count
    )
    builder.download_and_prepare()
    folder = sources.scenes_folder(data_dir, config)
    _write_object_counts(folder, counts)
    _write_vocabulary(base, settings.style.classes, vocabulary_file, progress)
  except OSError as error:
    raise DataError(
      f'cannot write to {base} ({error}); free some space, or name another '
      'folder with --data_dir'
    ) from error
  return folder


def _write_object_counts(folder, counts):
  """So that filtering by the number of objects need not read every scene."""
  for split, numbers in counts.items():
    if numbers:
      with (
        buckets.atomic_write(folder / f'objects-{split}.npy') as local,
        local.open('wb') as file,
      ):
        np.save(file, np.array(numbers, np.int32))


def _write_vocabulary(base, classes, vocabulary_file, progress):
  progress('reducing the vocabulary', 0, 1)
  file = base / sources.VOCABULARY
  vocabulary.build(Tokenizer(vocabulary_file), classes).save(file)
  progress('reducing the vocabulary', 1, 1)
