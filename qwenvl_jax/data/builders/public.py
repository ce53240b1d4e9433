"""The data sets of the catalogue as builders of TFDS.

  builder = PublicBuilder('vqav2', data_dir='data')
  manual = tfds.download.DownloadConfig(manual_dir='downloads/vqav2')
  builder.download_and_prepare(download_config=manual)
  builder.as_data_source('train')[0]  # {'id': .., 'images': .., ..}

TFDS prepares all or nothing, in a temporary folder: a builder of the usual kind
starts anew after an interruption, and some of these data sets take days. This
one hands on to `shards.prepare`, goes on with the first shard that is missing,
and does the same as `qwenvl-data prepare`, in the same folder. TFDS opens what
was prepared without it, too:

  tfds.data_source('vqav2:1.0.0', split='train', data_dir='data')

`as_dataset` and `tfds.load`, which need TensorFlow, do not read array_record.
"""

import os

import tensorflow_datasets as tfds

from qwenvl_jax.data import catalogue, shards, sources, storage
from qwenvl_jax.errors import ConfigError


class PublicBuilder(
  # Unregistered: TFDS has data sets of its own called coco_captions, say.
  tfds.core.dataset_builder.FileReaderBuilder,
  skip_registration=True,
):
  """A data set of the catalogue, from files that a person has downloaded."""

  VERSION = tfds.core.Version(storage.VERSION)

  def __init__(
    self,
    name: str,
    data_dir: str | os.PathLike | None = None,
    workers: int = 1,
  ):
    """Opens the data set if it is prepared.

    Args:
      name: as `qwenvl-data list` has it.
      data_dir: where prepared data sets are; None for the default folder.
      workers: processes that write shards.

    Raises:
      ConfigError: no such data set.
    """
    if name not in catalogue.DATA_SETS:
      raise ConfigError(
        f'there is no data set {name!r}; there is '
        f'{", ".join(catalogue.DATA_SETS)}'
      )
    self.name = name
    self._entry = catalogue.DATA_SETS[name]
    self._workers = workers
    self.MANUAL_DOWNLOAD_INSTRUCTIONS = (
      f'{self._entry.put} (from {self._entry.url})'
    )
    base = sources.data_path(data_dir)
    super().__init__(data_dir=base, file_format='array_record')
    # What it is pickled as.
    self._original_state = {
      'name': name,
      'data_dir': os.fspath(base),
      'workers': workers,
    }

  def _info(self) -> tfds.core.DatasetInfo:
    return _OwnInfo(
      builder=self,
      description=f'{self._entry.task}: {self._entry.size}',
      homepage=self._entry.url,
      license=self._entry.licence,
      features=storage.features(),
    )

  def download_and_prepare(
    self,
    *,
    download_dir: str | os.PathLike | None = None,
    download_config: tfds.download.DownloadConfig | None = None,
    **unused,
  ) -> None:
    """Writes the shards that are not there yet; downloads nothing.

    Args:
      download_dir: holds `manual/NAME`, where no `manual_dir` is given.
      download_config: its `manual_dir` is where the files were downloaded to.
      **unused: other settings of TFDS, which have no meaning here.

    Raises:
      ConfigError: a folder that is not there.
      DataError: see `shards.prepare`.
    """
    if storage.split_lengths(self.data_path):
      if not self.info.splits:  # Prepared since this builder was made.
        self.info.read_from_directory(self.data_path)
      return
    manual_dir = download_config and download_config.manual_dir
    if manual_dir is None and download_dir is not None:
      manual_dir = os.path.join(download_dir, 'manual', self.name)
    if manual_dir is None:
      raise ConfigError(
        f'{self.name} has to be downloaded by hand: put '
        f'{self.MANUAL_DOWNLOAD_INSTRUCTIONS} into a folder, and name it as '
        'tfds.download.DownloadConfig(manual_dir=FOLDER)'
      )
    self._download_and_prepare(manual_dir)

  def _download_and_prepare(self, manual_dir) -> None:
    shards.prepare(
      self.name,
      self._entry.splits,
      manual_dir,
      self.data_path.parents[1],
      workers=self._workers,
      description=self.info.description,
      homepage=self.info.homepage,
      license=self._entry.licence,
    )
    self.info.read_from_directory(self.data_path)


class _OwnInfo(tfds.core.DatasetInfo):
  """Of a data set that TFDS may know under the same name, in other files."""

  def initialize_from_bucket(self) -> None:
    """Leaves out what TFDS publishes under that name."""
