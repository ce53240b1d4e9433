"""Prepares the quickstart's scenes, and the small vocabulary beside them."""

import os
import pathlib
from collections.abc import Callable

from qwenvl_jax.data import sharded_job, sources, storage, vocabulary
from qwenvl_jax.data.builders import scenes as drawn
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.text.tokenizer import Tokenizer

_PER_SHARD = 1000


def scenes(
  data_dir: str | os.PathLike | None = None,
  config: str = 'default',
  vocabulary_file: str | None = None,
  progress: Callable[[str, int, int], None] = lambda what, done, total: None,
  again: bool = False,
) -> pathlib.Path:
  """Draws the composed scenes, and makes the small vocabulary beside them.

  What is there already stays as it is, so a second call is quick.

  Args:
    data_dir: where to; None for the default folder.
    config: a key of `builders.scenes.CONFIGS`, 'default' or 'small'.
    vocabulary_file: the vocabulary to reduce; None for the released one.
    progress: called with what is being done, how far it is, and of how much.
    again: draws all scenes again.

  Returns:
    The folder of the scenes.

  Raises:
    ConfigError: no such configuration.
    DataError: the folder cannot be written.
  """
  if config not in drawn.CONFIGS:
    raise ConfigError(
      f'no configuration {config!r} of scenes; there is '
      f'{", ".join(map(repr, drawn.CONFIGS))}'
    )
  settings = drawn.CONFIGS[config]
  base = sources.disk_path(data_dir)
  folder = storage.folder(base / 'scenes', config)
  total = sum(getattr(settings, split) for split in drawn.SPLITS)
  lengths = {}
  with sharded_job.writing(base):
    for split in drawn.SPLITS:
      numbers = range(getattr(settings, split))
      parts = [numbers[i:][:_PER_SHARD] for i in numbers[::_PER_SHARD]]
      origins = tuple(f'{settings!r}, {part!r}' for part in parts)
      job = sharded_job.ShardedJob(folder, 'scenes', split, origins)
      job.begin(again)
      for shard in job.unfinished():
        (folder / storage.INFO).unlink(missing_ok=True)
        made, before = [], sum(map(sum, lengths.values())) + parts[shard].start
        for number in parts[shard]:
          made.append(drawn.draw(settings, split, number))
          progress('drawing scenes', before + len(made), total)
        count = storage.write_shard(job.path(shard), made)
        objects = [len(x.objects) for x in made]
        job.finish(shard, {'length': count, 'counts': {}, 'objects': objects})
      lengths[split], _ = job.totals()
    storage.write_info(
      folder,
      'scenes',
      lengths,
      description=drawn.__doc__,
      homepage='https://github.com/googlefonts/noto-emoji',
      license='Sprites: Apache-2.0 (Noto Emoji, Google)',
    )
    progress('reducing the vocabulary', 0, 1)
    small = vocabulary.build(Tokenizer(vocabulary_file), settings.style.classes)
    small.save(base / sources.VOCABULARY)
    progress('reducing the vocabulary', 1, 1)
  return folder
