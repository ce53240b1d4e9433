"""Errors that a person can act on.

Each message names the thing that is wrong (file, record, key) and the remedy.
Entry points print the message without a traceback and exit with status 2; any
other exception is a bug and keeps its traceback.
"""


class QwenVLError(Exception):
  """Base of every error caused by input rather than by this package."""


class ConfigError(QwenVLError):
  """A configuration that cannot be run as written."""


class CheckpointError(QwenVLError):
  """A checkpoint that is missing, damaged or of another model."""


class DataError(QwenVLError):
  """A record, image or data folder that cannot be used."""
