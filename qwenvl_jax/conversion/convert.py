"""Conversions between checkpoint folders, as functions."""

import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.batch import text_batch
from qwenvl_jax.conversion import folder as folders
from qwenvl_jax.conversion import layout, openclip, reader
from qwenvl_jax.conversion.writer import DTYPES, narrow, write_released
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.qwen_vl import QwenVL


def _fresh(destination: Path) -> Path:
  """The folder to write to first; renamed to its name when complete."""
  if destination.exists() and any(destination.iterdir()):
    raise CheckpointError(
      f'{destination} is not empty: choose another folder, or remove it'
    )
  partial = destination.with_name(destination.name + '.partial')
  # What an interrupted conversion left; never opens as a checkpoint.
  shutil.rmtree(partial, ignore_errors=True)
  return partial


def _publish(partial: Path, destination: Path):
  if destination.exists():
    destination.rmdir()
  partial.rename(destination)


def _vocabulary(source: Path) -> Path | None:
  path = source / folders.VOCABULARY
  return path if path.exists() else None


def from_hf(source: Path, destination: Path, dtype: str | None = None):
  """Released layout to Orbax.

  Args:
    source: folder with config.json and weights.
    destination: a new folder.
    dtype: to cast to; None keeps the stored dtype.

  Raises:
    CheckpointError: see `folder.read_params`.
  """
  config = folders.read_config(source)
  if not reader.has_released_weights(source):
    raise CheckpointError(
      f'{source} holds no released weights (safetensors or .bin)'
    )
  partial = _fresh(destination)
  params = folders.read_params(source, config, DTYPES[dtype] if dtype else None)
  folders.write_side_files(partial, config, _vocabulary(source))
  folders.write_params(partial, params)
  _publish(partial, destination)


def to_hf(
  source: Path,
  destination: Path,
  dtype: str | None = None,
  shard_bytes: int = 2 * 1024**3,
):
  """A checkpoint of ours (or a training run) to the released layout.

  Args:
    source: see `folder.params_folder`.
    destination: a new folder.
    dtype: of the tensors written; None keeps the stored dtype.
    shard_bytes: upper bound on a shard.

  Raises:
    CheckpointError: the source is no complete checkpoint, or a value does not
      fit the dtype.
  """
  config = folders.read_config(source)
  params = folders.read_params(source, config)
  folders.check_against(config, params, str(source))
  partial = _fresh(destination)
  tensors = layout.to_released(layout.rules(config), params)
  if dtype is not None:
    tensors = ((n, narrow(n, x, DTYPES[dtype])) for n, x in tensors)
  run = folders.params_folder(source)
  root = source if run is None or run.parent == source else run.parents[2]
  try:
    write_released(partial, tensors, shard_bytes)
  except OverflowError as error:
    raise CheckpointError(f'{source}: {error}') from error
  folders.write_side_files(partial, config, _vocabulary(root))
  _publish(partial, destination)


def init_stage1(vision: Path, decoder: Path, destination: Path, seed: int = 0):
  """Stage 1's start: OpenCLIP's vision, Qwen-7B's decoder, a new adapter.

  Args:
    vision: folder with open_clip_config.json and the weights.
    decoder: folder in the released layout, with or without `visual`.
    destination: a new folder.
    seed: of the adapter's parameters.

  Raises:
    CheckpointError: tensors do not match the configs.
  """
  config_file = vision / 'open_clip_config.json'
  vision_config = openclip.vision_config(
    reader.read_json(config_file), str(config_file)
  )
  config = folders.read_config(decoder).replace(vision=vision_config)
  params = _random_adapter(config, seed)
  params['vision'] = openclip.read_vision(vision, config)['vision']
  params['decoder'] = folders.read_params(
    decoder, config, keep=lambda path: path.startswith('decoder/')
  )['decoder']
  folders.check_against(config, params, f'{vision} with {decoder}')
  partial = _fresh(destination)
  folders.write_side_files(partial, config, _vocabulary(decoder))
  folders.write_params(partial, params)
  _publish(partial, destination)


def _random_adapter(config: QwenVLConfig, seed: int) -> dict:
  """{'adapter': a new one in float32}; the rest is never computed."""
  model = QwenVL(config.replace(param_dtype=jnp.float32))

  def init(key):
    variables = model.init(key, text_batch(np.zeros((1, 1), np.int32)))
    return {'adapter': nn.meta.unbox(variables['params']['adapter'])}

  return jax.jit(init)(jax.random.key(seed))
