"""PEFT's layout of an adapter, read and written.

  adapter_config.json           settings
  adapter_model.safetensors     tensors; `adapter_model.bin` of old versions

Names are those of the released model after `base_model.model.`, with
`lora_A.weight` and `lora_B.weight` of adapted layers, and the weights
themselves of modules that are trained whole (`modules_to_save`).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from qwenvl_jax import buckets
from qwenvl_jax.conversion import layout
from qwenvl_jax.conversion.families.qwen_vl.lora_table import (
  layer_name,
  lora_rules,
)
from qwenvl_jax.conversion.json_schema import (
  FLAG,
  TEXT,
  TEXTS,
  Field,
  Schema,
  check,
  one_of,
  read_json,
  real,
  whole,
)
from qwenvl_jax.conversion.low_rank import Base, LowRank, released
from qwenvl_jax.conversion.reader import open_file
from qwenvl_jax.conversion.tensors import Tensor
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.lora import TARGETS, LoraConfig

CONFIG = 'adapter_config.json'
_WEIGHTS = ('adapter_model.safetensors', 'adapter_model.bin')
_PREFIX = 'base_model.model.'

# What can be trained whole beside factors: path to the released module.
_WHOLE = {
  'decoder/embed': 'transformer.wte',
  'decoder/lm_head/kernel': 'lm_head',
}

_SCHEMA: Schema = {
  'peft_type': Field(one_of('LORA')),
  'r': Field(whole(1, 2**16)),
  'lora_alpha': Field(real(1e-6, 1e6)),
  'lora_dropout': Field(real(0, 1), 0.0),
  'use_rslora': Field(FLAG, False),
  'modules_to_save': Field(TEXTS, []),
  'base_model_name_or_path': Field(TEXT, ''),
}
# Settings that change nothing of what an adapter computes, or that its tensors
# say as well.
_HARMLESS = {
  *_SCHEMA,
  'auto_mapping',
  'exclude_modules',
  'inference_mode',
  'layers_pattern',
  'megatron_core',
  'peft_version',
  'qalora_group_size',
  'revision',
  'target_modules',
  'task_type',
}
# Of settings that have a value that is not false and changes nothing.
_NEUTRAL = {'bias': ('none',), 'init_lora_weights': (True, 'gaussian')}


def is_peft(folder: Path) -> bool:
  """Whether a folder holds an adapter in PEFT's layout."""
  return (folder / CONFIG).exists()


def read(folder: Path, config: QwenVLConfig) -> LowRank:
  """Reads an adapter.

  Args:
    folder: in PEFT's layout.
    config: of the model that it is for.

  Raises:
    CheckpointError: it is damaged, incomplete or of another model, or has
      settings that are not supported, which are named.
  """
  path = folder / CONFIG
  raw = read_json(path)
  raw = {key: value for key, value in raw.items() if value is not None}
  _check_supported(raw, path)
  settings = check(raw, _SCHEMA, str(path))
  file, tensors = _open(folder)
  lora = _settings(settings, tensors, path, file)
  config = config.replace(lora=lora, scan_layers=True)
  whole = _whole_rules(config, tensors, settings['modules_to_save'], folder)
  rules = [*lora_rules(config), *whole]
  layout.check_shapes(
    layout.released_shapes(rules),
    {name: tensor.shape for name, tensor in tensors.items()},
    f'{file} and the model that it is to adapt (rank {lora.rank})',
  )
  values = {}
  for rule in rules:
    layers = [
      rule.to_ours(tensors[name].load().astype(np.float32))
      for name in rule.released_names()
    ]
    for path, parts in zip(rule.paths, zip(*layers, strict=True), strict=True):
      values[path] = parts[0] if rule.layers is None else np.stack(parts)
  base = Base(settings['base_model_name_or_path'])
  return LowRank(lora, base, values, str(folder))


def _check_supported(raw: dict, path: Path) -> None:
  wrong = [
    f'{key}={raw[key]!r}'
    for key in sorted(raw.keys() - _HARMLESS)
    if raw[key] and raw[key] not in _NEUTRAL.get(key, ())
  ]
  kind = raw.get('peft_type')
  if kind != 'LORA':
    wrong.insert(0, f'peft_type={kind!r}')
  if wrong:
    raise CheckpointError(
      f'{path}: {", ".join(wrong)} is not supported: LoRA of whole linear '
      'layers is, all with one rank and one alpha (use_rslora, too). Merge '
      'such an adapter in PEFT (merge_and_unload) and convert the result'
    )


def _open(folder: Path) -> tuple[Path, dict[str, Tensor]]:
  """The file, and its tensors by released names."""
  present = [folder / name for name in _WEIGHTS if (folder / name).exists()]
  if not present:
    raise CheckpointError(
      f'{folder} holds {CONFIG} but no {" or ".join(_WEIGHTS)}'
    )
  found = {}
  for name, tensor in open_file(present[0]).items():
    name = re.sub(r'\.modules_to_save(\.default)?\.', '.', name)
    name = re.sub(r'\.(lora_[AB])\.default\.', r'.\1.', name)
    found[name.removeprefix(_PREFIX)] = tensor
  return present[0], found


def _settings(settings, tensors, path: Path, file: Path) -> LoraConfig:
  """The settings; which layers are adapted is what tensors there are."""
  layers = {
    re.sub(r'\.\d+\.', '.*.', name.partition('.lora_')[0], count=1): name
    for name in tensors
    if '.lora_' in name
  }
  known = {layer_name(target): target for target in TARGETS}
  unknown = [name for layer, name in layers.items() if layer not in known]
  if unknown or not layers:
    raise CheckpointError(
      f'{file} adapts '
      + (f'{", ".join(unknown[:3])}, which' if unknown else 'no layer, but')
      + f' is not supported: known are {", ".join(known)}'
    )
  targets = [target for layer, target in known.items() if layer in layers]
  for name, tensor in tensors.items():
    factor = name.endswith('.lora_A.weight')
    if factor and tensor.shape[:1] != (settings['r'],):
      raise CheckpointError(
        f'{file}: {name} is {list(tensor.shape)}, of rank {tensor.shape[0]}, '
        f'but {path.name} says r={settings["r"]}'
      )
  try:
    return LoraConfig(
      rank=settings['r'],
      alpha=settings['lora_alpha'],
      dropout=settings['lora_dropout'],
      targets=tuple(targets),
      rslora=settings['use_rslora'],
    )
  except ConfigError as error:
    raise CheckpointError(f'{path}: {error}') from error


def _whole_rules(config: QwenVLConfig, tensors, listed, folder: Path):
  """The rules of what was trained whole."""
  missing = [
    name
    for name in listed
    if not any(f'.{name}.' in f'.{tensor}' for tensor in tensors)
  ]
  if missing:
    raise CheckpointError(
      f'{folder} lacks {", ".join(missing)}, which modules_to_save of {CONFIG} '
      'lists: old versions of PEFT did not save it, and what was trained of it '
      'is lost'
    )
  return [
    rule
    for rule in layout.rules(config, ['decoder'])
    if rule.paths[0] in _WHOLE and rule.tensor in tensors
  ]


def tensors_of(adapter: LowRank, config: QwenVLConfig) -> dict:
  """PEFT's names and tensors of an adapter.

  Args:
    adapter: of the model.
    config: of the model.

  Returns:
    Name to float32 array, as `adapter_model.safetensors` has them.

  Raises:
    CheckpointError: PEFT has no form of what was trained whole.
  """
  other = [path for path in adapter.whole if path not in _WHOLE]
  if other:
    raise CheckpointError(
      f'{adapter.where} also trained {", ".join(other[:3])} whole'
      f'{" and others" if len(other) > 3 else ""}, which is no adapter of '
      f"PEFT's (decoder/embed and decoder/lm_head/kernel may be, beside "
      'low-rank factors): merge it instead (qwenvl-convert merge-adapter)'
    )
  table = lora_rules(config.replace(lora=adapter.lora)) + [
    rule
    for rule in layout.rules(config, ['decoder'])
    if rule.paths[0] in adapter.whole
  ]
  tensors = released(adapter, table)
  return {_PREFIX + name: x for name, x in tensors.items()}


def config_of(adapter: LowRank, base: str) -> dict:
  """What `adapter_config.json` says of an adapter.

  Args:
    adapter: of a model.
    base: folder or hub id of the released model.
  """
  layers = [layer_name(target) for target in adapter.lora.names]
  names = [layer.rpartition('*.')[2] for layer in layers]
  alpha = adapter.lora.alpha
  towers = {target.split('/')[0] for target in adapter.lora.names}
  # A name is matched as the end of a layer's name, in both towers.
  targets = (
    names
    if towers == {'decoder'} and 'mlp.c_proj' not in names
    else '|'.join(
      layer.replace('.', r'\.').replace('*', r'\d+') for layer in layers
    )
  )
  return {
    'auto_mapping': None,
    'base_model_name_or_path': base,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    # PEFT's own are whole numbers.
    'lora_alpha': int(alpha) if alpha == int(alpha) else alpha,
    'lora_dropout': adapter.lora.dropout,
    'modules_to_save': [
      name.rpartition('.')[2]
      for path, name in _WHOLE.items()
      if path in adapter.whole
    ]
    or None,
    'peft_type': 'LORA',
    'r': adapter.lora.rank,
    'revision': None,
    'target_modules': targets,
    'task_type': 'CAUSAL_LM',
    'use_rslora': adapter.lora.rslora,
  }


def write(
  folder: Path, tensors: Mapping[str, np.ndarray], settings: dict
) -> None:
  """Writes both files to a new folder on a disk.

  Args:
    folder: exists.
    tensors: PEFT's name to array, in their released dtype.
    settings: adapter_config.json.
  """
  buckets.write(folder / CONFIG, json.dumps(settings, indent=2) + '\n')
  # `save_file` would let nobody else read it.
  (folder / _WEIGHTS[0]).write_bytes(
    safetensors.numpy.save(dict(tensors), metadata={'format': 'pt'})
  )
