"""Checkpoint folders: the released layout, ours, and a training run.

Ours keeps the released side files and has Orbax parameters:

  config.json  generation_config.json  qwen.tiktoken  params/

A training run has the same files at its root and `checkpoints/STEP/params/`;
opening it means its newest complete step. Of OpenCLIP's folders the vision
transformer is read, of Qwen-7B's the decoder.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from qwenvl_jax import buckets
from qwenvl_jax.conversion import (
  gptq,
  layout,
  openclip,
  orbax_store,
  rounding,
)
from qwenvl_jax.conversion.atomic import UNFINISHED
from qwenvl_jax.conversion.blocks import plan
from qwenvl_jax.conversion.hf_config import config_from_hf, config_to_hf
from qwenvl_jax.conversion.loader import BUCKET_THREADS, THREADS, to_devices
from qwenvl_jax.conversion.reader import (
  Tensor,
  has_released_weights,
  open_released,
  read_json,
)
from qwenvl_jax.conversion.source import (
  CastSource,
  OrbaxSource,
  ReleasedSource,
  Source,
)
from qwenvl_jax.conversion.writer import narrow
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.text.tokenizer import Tokenizer

VOCABULARY = 'qwen.tiktoken'
# Of a training run: where its steps are, and Orbax's mark of a complete one if
# that is in a bucket.
CHECKPOINTS = 'checkpoints'
COMPLETE = 'commit_success.txt'

GENERATION = 'generation_config.json'

# Files that go along with the weights: settings, tokenizer and licences.
_TRAVELLERS = (
  GENERATION,
  '*.tiktoken',
  'tokenizer_config.json',
  'LICENSE*',
  'NOTICE*',
)

# What the release says of its packed weights beside them.
_QUANTIZE = 'quantize_config.json'

# The released code for the same model, which `verify --logits` runs.
_CODE = ('*.py', 'SimSun.ttf')

# What the release's generation_config.json says; ids follow the vocabulary.
_GENERATION = {
  'chat_format': 'chatml',
  'do_sample': True,
  'max_new_tokens': 512,
  'max_window_size': 6144,
  'top_k': 0,
  'top_p': 0.3,
}


def params_folder(folder: Path) -> Path | None:
  """The Orbax parameters under a folder of ours, None if it is not ours.

  Raises:
    CheckpointError: a training run without a complete checkpoint.
  """
  if (folder / 'params').is_dir():
    return folder / 'params'
  steps = folder / CHECKPOINTS
  if not steps.is_dir():
    return None
  complete = [
    int(path.name)
    for path in steps.iterdir()
    if path.name.isdigit() and _complete(path)
  ]
  if not complete:
    raise CheckpointError(
      f'{steps} holds no complete checkpoint yet: let the run save one first'
    )
  return steps / str(max(complete)) / 'params'


def _complete(step: Path) -> bool:
  """Whether Orbax has finished a step; in a bucket it says so in the end."""
  if buckets.in_bucket(step) and not (step / COMPLETE).exists():
    return False
  return (step / 'params').is_dir()


def side_file(folder: Path, name: str) -> Path:
  """A side file of a folder; for one step of a run, at the run's root."""
  for place in (folder, folder.parent.parent):
    if (place / name).exists():
      return place / name
  return folder / name


def side_files(folder: Path, code: bool = True) -> list[Path]:
  """All files of a folder that travel with its weights, or all but code."""
  root = side_file(folder, 'config.json').parent
  names = _TRAVELLERS + (_CODE if code else ())
  return sorted({path for name in names for path in root.glob(name)})


def read_config(folder: Path, keep_int4: bool = False) -> QwenVLConfig:
  """The config of a checkpoint folder of any kind.

  Args:
    folder: the checkpoint.
    keep_int4: of int4 weights in the released layout, whether they are to stay
      packed, rather than be dequantized as they are read.

  Raises:
    CheckpointError: the folder does not exist, has no valid config.json, is of
      another model family, or has no int4 weights that can be kept.
  """
  if not folder.is_dir():
    raise CheckpointError(
      f'{folder} does not exist: expected a checkpoint folder (released '
      'layout, a converted checkpoint or a training run)'
    )
  if folder.name.endswith(UNFINISHED) or (folder / UNFINISHED).exists():
    raise CheckpointError(
      f'{folder} is what an unfinished conversion left: start it again'
    )
  path = side_file(folder, 'config.json')
  if not path.exists() and openclip.is_openclip(folder):
    return QwenVLConfig(vision=openclip.read_config(folder))
  inside = sorted(folder.glob('*/config.json'))
  if not path.exists() and inside:
    names = ', '.join(str(file.parent) for file in inside)
    raise CheckpointError(
      f'{folder} is no checkpoint itself, but holds some: name one of {names}'
    )
  released = has_released_weights(folder)
  config = config_from_hf(read_json(path), str(path), int4=not released)
  if keep_int4 and released:
    group = gptq.group_size(folder, open_released(folder))
    return _with_int4(config, group)
  if keep_int4 and config.decoder.int4_group is None:
    raise CheckpointError(
      f'{folder} holds no int4 weights: leave out keep_int4'
    )
  return config


def _with_int4(config: QwenVLConfig, group: int | None) -> QwenVLConfig:
  decoder = dataclasses.replace(config.decoder, int4_group=group)
  return config.replace(decoder=decoder)


def dequantized(config: QwenVLConfig) -> QwenVLConfig:
  """The same model with plain kernels."""
  return _with_int4(config, None)


def check_whole(folder: Path) -> None:
  """Tells a run that trained a part from a model.

  Raises:
    CheckpointError: says what the folder holds, and which ones beside it are
      whole.
  """
  found = _parts(folder)
  missing = [part for part in layout.PARTS if part not in found]
  if not found or not missing:
    return
  held = [part for part in layout.PARTS if part in found] or ['params']
  whole = [
    str(path)
    for path in sorted(folder.absolute().parent.iterdir())
    if path != folder.absolute() and set(layout.PARTS) <= _parts(path)
  ]
  beside = f'; whole models beside it: {", ".join(whole)}' if whole else ''
  raise CheckpointError(
    f'{folder} is no whole model, but the run of a part: it holds '
    f'{", ".join(sorted(found))} and lacks {" and ".join(missing)}. Another '
    f'run can start from it (InitFrom.{held[0]}){beside}'
  )


def _parts(folder: Path) -> set[str]:
  """The top of the parameter tree in a folder of ours; empty of others."""
  try:
    stored = params_folder(folder)
    return set(orbax_store.metadata(stored)) if stored else set()
  except (CheckpointError, OSError):  # Said where parameters are read.
    return set()


def read_tokenizer(folder: Path, config: QwenVLConfig) -> Tokenizer | None:
  """The folder's own vocabulary for its model, None if it has none."""
  path = side_file(folder, VOCABULARY)
  return Tokenizer(path, config.adapter.queries) if path.exists() else None


def open_source(
  folder: Path, config: QwenVLConfig, dtype=None
) -> tuple[Source, list[layout.Rule]]:
  """Opens the values of a checkpoint folder of any kind.

  Args:
    folder: the checkpoint.
    config: from `read_config`, which says whether int4 weights are kept; a
      source is of stacked layers, whatever it says of those.
    dtype: to cast to, but for packed kernels; None keeps what is stored, and
      dequantizes int4 weights to bfloat16.

  Returns:
    The source, and the conversion table of what it holds.

  Raises:
    CheckpointError: tensors missing, unknown, misshapen or damaged.
  """
  config = config.replace(scan_layers=True)
  stored = params_folder(folder)
  if stored is not None:
    source = OrbaxSource(stored)
    found = {layout.part_of(path) for path in source.shapes}
    parts = [part for part in layout.PARTS if part in found]
    layout.check_shapes(
      layout.parameter_shapes(config, parts), source.shapes, str(folder)
    )
    if dtype is not None:
      source = CastSource(source, np.dtype(dtype), str(folder))
    return source, layout.rules(config, parts)
  if openclip.is_openclip(folder) and not has_released_weights(folder):
    tensors = openclip.open_vision(folder)
    parts, rules = ['vision'], openclip.openclip_rules(config)
  else:
    tensors = open_released(folder)
    if config.decoder.int4_group is not None:
      tensors = gptq.kept(tensors, config)
    elif gptq.is_quantized(tensors):
      tensors = gptq.dequantized(folder, tensors, config)
      dtype = dtype or 'bfloat16'
    parts = layout.PARTS
    if not any(name.startswith('transformer.visual.') for name in tensors):
      parts = ['decoder']
    rules = layout.rules(config, parts)
  if dtype is not None:
    tensors = {name: cast(name, x, dtype) for name, x in tensors.items()}
  return (
    ReleasedSource(tensors, rules, str(folder)),
    layout.rules(config, parts),
  )


def open_dequantized(
  folder: Path, config: QwenVLConfig
) -> tuple[Source, list[layout.Rule]]:
  """`open_source` with plain kernels, also where packed ones were kept."""
  source, table = open_source(folder, config)
  if config.decoder.int4_group is not None:
    source = gptq.DequantizedSource(source)
    parts = {layout.part_of(rule.paths[0]) for rule in table}
    parts = [part for part in layout.PARTS if part in parts]
    table = layout.rules(dequantized(config), parts)
  return source, table


def cast(name: str, tensor: Tensor, dtype) -> Tensor:
  """The tensor in another dtype.

  Raises:
    CheckpointError: on reading, if a value does not fit.
  """

  def read(start, stop):
    try:
      return narrow(name, tensor.read(start, stop), dtype)
    except OverflowError as error:
      raise CheckpointError(f'{tensor.file}: {error}') from error

  if tensor.dtype.kind not in 'fV' or layout.is_packed(name):
    return tensor  # If that is an error, then later, as if there was no cast.
  return Tensor(tensor.shape, np.dtype(dtype), tensor.file, read)


def read_params(
  folder: Path, config: QwenVLConfig, dtype=None, shardings=None, keep=None
) -> dict:
  """Parameters of a checkpoint folder of any kind.

  Args:
    folder: the checkpoint.
    config: see `open_source`; also whether the decoder's layers are stacked
      (`scan_layers`) or apart. Stacked arrays are never made on the way.
    dtype: see there.
    shardings: tree of `jax.sharding.Sharding` like the parameters (may be
      partial with `keep`); None puts everything on the default device.
    keep: predicate on paths ('decoder/embed'); others are left out unread.

  Returns:
    Nested dict of jax arrays. A process reads the shards of its own devices
    only.

  Raises:
    CheckpointError: tensors missing, unknown, misshapen or damaged.
  """
  keep = keep or (lambda path: True)
  placements = dict(layout.flatten(shardings or {}))
  stored = params_folder(folder)
  if stored is not None and config.scan_layers:
    return orbax_store.restore(stored, dtype, placements, keep)
  source, table = open_source(folder, config, dtype)
  shapes = {
    path: shape
    for path, shape in layout.parameter_shapes(
      rounding.as_stored(config)
    ).items()
    if keep(path)
  }
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def place(path):
    # Where 8 bits of a kernel go, there all of it goes before it is rounded.
    return placements.get(path, placements.get(f'{path}/values', device))

  arrays = to_devices(
    source,
    plan(table),
    shapes,
    {path: place(path) for path in shapes},
    BUCKET_THREADS if buckets.in_bucket(folder) else THREADS,
    outputs_first=not config.scan_layers,
    finish=rounding.finish(config, placements),
  )
  return layout.unflatten(arrays)


def write_side_files(
  folder: Path, config: QwenVLConfig, vocabulary: Path | None
):
  """Writes config.json, generation_config.json and the vocabulary."""
  buckets.make_folder(folder)
  if vocabulary is not None and vocabulary != folder / VOCABULARY:
    buckets.copy(vocabulary, folder / VOCABULARY)
  end = config.image_start_id - 214  # <|endoftext|> heads the special tokens.
  write_json(
    folder / GENERATION,
    _GENERATION | {'eos_token_id': end, 'pad_token_id': end},
  )
  write_json(folder / 'config.json', config_to_hf(config))


def carry_side_files(
  source: Path,
  folder: Path,
  config: QwenVLConfig,
  dtype: np.dtype,
  code: bool = True,
):
  """Writes side files as `source` has them, corrected where they must be.

  config.json comes last: a folder without it opens as nothing.

  Args:
    source: a checkpoint folder with a config.json.
    folder: what is being written.
    config: of the model written.
    dtype: of the parameters written.
    code: whether the code in `source` is for this model as well.
  """
  for path in side_files(source, code):
    buckets.copy(path, folder / path.name)
  written = folder / GENERATION
  if not written.exists():
    write_side_files(folder, config, None)
  raw = read_json(side_file(source, 'config.json'))
  quantize = side_file(source, _QUANTIZE)
  if config.decoder.int4_group is None:
    raw.pop('quantization_config', None)
  elif quantize.exists():
    buckets.copy(quantize, folder / _QUANTIZE)
  ours = config_to_hf(config)
  if config_from_hf(raw) != config:
    raw |= ours
  raw['torch_dtype'] = np.dtype(dtype).name
  write_json(folder / 'config.json', ours | raw)


def write_json(path: Path, content: dict):
  """Writes an object as the release formats it."""
  text = json.dumps(content, indent=2, ensure_ascii=False) + '\n'
  buckets.write(path, text)


def write_params(folder: Path, params: dict):
  """Saves parameters in memory as `folder/params`, atomically."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(buckets.absolute(folder / 'params'), params)


def check_against(config: QwenVLConfig, params: dict, where: str):
  """Compares a parameter tree with what the model expects.

  Args:
    config: of the model.
    params: nested dict of arrays, or of anything with a shape.
    where: the checkpoint, for messages.

  Raises:
    CheckpointError: names what is missing, unknown or misshapen.
  """
  layout.check_shapes(
    layout.parameter_shapes(config),
    {path: tuple(x.shape) for path, x in layout.flatten(params)},
    where,
  )
