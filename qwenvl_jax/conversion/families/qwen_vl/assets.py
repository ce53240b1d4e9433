"""Files beside the weights: config, vocabulary, settings, code, licences."""

import json
from pathlib import Path

import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.conversion import json_schema, schemas
from qwenvl_jax.conversion.families.qwen_vl.config import (
  config_from_hf,
  config_to_hf,
)
from qwenvl_jax.conversion.gptq import QUANTIZE
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

VOCABULARY = 'qwen.tiktoken'
GENERATION = 'generation_config.json'
CONVERSION = 'convert.gin'

# Settings, tokenizer and licences.
_ASSETS = (
  GENERATION,
  '*.tiktoken',
  'tokenizer_config.json',
  'LICENSE*',
  'NOTICE*',
)

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

# From <|endoftext|>, the first of the special tokens.
_IMAGE_START = SPECIAL_TOKENS.index('<img>')


def find_asset(folder: Path, name: str) -> Path:
  """Finds a file of a folder; for one step of a run, at the run's root."""
  for place in (folder, folder.parent.parent):
    if (place / name).exists():
      return place / name
  return folder / name


def assets(folder: Path, code: bool = True) -> list[Path]:
  """Lists the files that go along with the weights, or all but code."""
  root = find_asset(folder, 'config.json').parent
  names = _ASSETS + (_CODE if code else ())
  found = {path for name in names for path in root.glob(name)}
  return sorted(path for path in found if path.is_file())


def is_chat(folder: Path) -> bool:
  """Whether a folder's settings are those of a chat model.

  Raises:
    CheckpointError: they are damaged.
  """
  path = find_asset(folder, GENERATION)
  if not path.exists():
    return False
  raw = json_schema.read_json(path)
  settings = json_schema.check(raw, schemas.GENERATION, str(path))
  return settings['chat_format'] == 'chatml'


def read_tokenizer(folder: Path, config: QwenVLConfig) -> Tokenizer | None:
  """Reads the folder's own vocabulary for its model, None if it has none.

  Raises:
    DataError: the file is damaged.
    CheckpointError: it is of another model, or cut.
  """
  path = find_asset(folder, VOCABULARY)
  if not path.exists():
    return None
  tokenizer = Tokenizer(path, config.adapter.queries)
  if tokenizer.img_start_id != config.image_start_id:
    raise CheckpointError(
      f'{path} has {len(tokenizer.vocabulary):,} ranks, so that <img> is '
      f'{tokenizer.img_start_id:,}, but image_start_id of config.json is '
      f'{config.image_start_id:,}: the file is cut, or of another model; copy '
      'it again'
    )
  return tokenizer


def write_assets(
  folder: Path, config: QwenVLConfig, chat_format: str = 'chatml'
) -> None:
  """Writes config.json and generation_config.json."""
  buckets.make_folder(folder)
  end = config.image_start_id - _IMAGE_START
  settings = {'eos_token_id': end, 'pad_token_id': end}
  settings = _GENERATION | {'chat_format': chat_format} | settings
  _write_json(folder / GENERATION, settings)
  _write_json(folder / 'config.json', config_to_hf(config))


def carry_assets(
  source: Path,
  folder: Path,
  config: QwenVLConfig,
  dtype: np.dtype,
  code: bool = True,
) -> list[str]:
  """Writes the assets as `source` has them, corrected where they must be.

  config.json comes last: a folder without it opens as nothing.

  Args:
    source: a checkpoint folder with a config.json.
    folder: what is being written.
    config: of the model written.
    dtype: of the parameters written.
    code: whether the code in `source` is for this model as well.

  Returns:
    What to say of it, a line each.

  Raises:
    CheckpointError: a JSON file of `source` is damaged.
  """
  notes = []
  is_chat(source)  # Tells of damage.
  for path in assets(source, code):
    buckets.copy(path, folder / path.name)
  if not (folder / VOCABULARY).exists():
    notes.append(
      f'{source} has no {VOCABULARY}: without one the model takes ids, no '
      'text; copy it there from the release'
    )
  if not (folder / GENERATION).exists():
    # Whether it chats is not known: the release says so there.
    write_assets(folder, config, chat_format='raw')
    notes.append(
      f'{source} has no {GENERATION}: the result is no Chat model (its '
      "chat_format is 'raw')"
    )
  raw = json_schema.read_json(find_asset(source, 'config.json'))
  quantize = find_asset(source, QUANTIZE)
  if config.decoder.int4_group is None:
    raw.pop('quantization_config', None)
  elif quantize.exists():
    buckets.copy(quantize, folder / QUANTIZE)
  ours = config_to_hf(config)
  if config_from_hf(raw) != config:
    raw |= ours
  raw['torch_dtype'] = np.dtype(dtype).name
  _write_json(folder / 'config.json', ours | raw)
  return notes


def write_conversion(folder: Path, text: str) -> None:
  """Writes the config file that makes a checkpoint again."""
  buckets.write(folder / CONVERSION, text)


def _write_json(path: Path, content: dict) -> None:
  """Writes an object as the release formats it."""
  text = json.dumps(content, indent=2, ensure_ascii=False) + '\n'
  buckets.write(path, text)
