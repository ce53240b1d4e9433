"""Hostile checkpoints: every file of a folder, changed in many ways.

`KINDS` maps a kind of input to a function of a random generator and an empty
folder: it makes one such input there, hands it to the reader that the product
has for it, and returns 'handled' where that told of it, 'accepted' where it
found nothing. Whatever else is raised is a fault of the reader.
"""

import copy
import functools
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import golden

from qwenvl_jax.conversion import checkpoint_io, gptq
from qwenvl_jax.conversion.families import openclip
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.reader import open_released
from qwenvl_jax.errors import QwenVLError
from qwenvl_jax.text.tokenizer import Tokenizer

try:
  import torch
except ImportError:
  torch = None

_GOLDENS = Path(golden.__file__).parent / 'goldens'

# Values of other types, sizes and shapes than any key wants.
_VALUES = (
  None,
  True,
  0,
  -1,
  1,
  3,
  2**31,
  10**9,
  10**300,
  -(2**63),
  0.5,
  -0.0,
  1e308,
  float('inf'),
  float('nan'),
  '',
  '8',
  '../../../etc/passwd',
  '/dev/zero',
  'a\x1b[31mb\n',
  '\ud800',
  'x' * 5000,
  [],
  [1, 2],
  [[[]]],
  {},
  {'a': {}},
)
# JSON that no dict gives.
_TEXTS = (
  '[' * 100_000,
  '{"a":' * 100_000,
  '9' * 5000,
  '{"model_type": "qwen", "model_type": "qwen"}',
  'null',
  '3',
  '"qwen"',
  '{"model_type": "qwen"',
  '\ufeff{}',
  '{"vocab_size": 1e999}',
  '',
)


def mutate_json(chance: random.Random, raw: dict) -> bytes:
  """Gives a changed copy of an object as JSON; now and then no JSON at all."""
  if chance.random() < 0.05:
    return chance.choice(_TEXTS).encode('utf-8', 'surrogatepass')
  raw = json.loads(json.dumps(raw))
  for _ in range(chance.randint(1, 3)):
    node = raw
    while True:
      keys = range(len(node)) if isinstance(node, list) else list(node)
      if not keys:
        break
      key = chance.choice(keys)
      if isinstance(node[key], (dict, list)) and chance.random() < 0.8:
        node = node[key]
        continue
      change = chance.random()
      if change < 0.15:
        del node[key]
      elif change < 0.25 and isinstance(node[key], (int, float)):
        node[key] = node[key] * chance.choice((2, -1, 0.5, 1e6, 10**12))
      else:
        node[key] = copy.deepcopy(chance.choice(_VALUES))
      break
  text = json.dumps(raw).encode()
  return mutate_bytes(chance, text) if chance.random() < 0.2 else text


def mutate_bytes(chance: random.Random, data: bytes) -> bytes:
  """Flips, cuts, repeats or inserts some bytes."""
  data = bytearray(data)
  for _ in range(chance.randint(1, 4)):
    at = chance.randrange(len(data) + 1)
    length = chance.choice((1, 1, 2, 8, 100))
    change = chance.randrange(5)
    if change == 0 and at < len(data):
      data[at] ^= 1 << chance.randrange(8)
    elif change == 1:
      del data[at : at + length]
    elif change == 2:
      data[at:at] = data[at : at + length]
    elif change == 3:
      data[at:at] = chance.randbytes(length)
    else:
      del data[at:]
  return bytes(data)


def _outcome(read: Callable[[], object]) -> str:
  try:
    read()
  except QwenVLError as error:
    assert str(error) and '\n' not in str(error).strip(), error
    return 'handled'
  return 'accepted'


def _small(count: int = 4) -> dict:
  """Name to (dtype, shape, bytes) of a few tensors."""
  return {
    f'transformer.h.{i}.ln_1.weight': ('BF16', [2, 3], bytes(range(12)))
    for i in range(count)
  }


def _safetensors(header: bytes, data: bytes, length: int | None = None):
  size = len(header) if length is None else length
  return struct.pack('<Q', size % 2**64) + header + data


def _make_header(tensors: dict) -> tuple[dict, bytes]:
  header, data = {'__metadata__': {'format': 'pt'}}, b''
  for name, (dtype, shape, values) in tensors.items():
    offsets = [len(data), len(data) + len(values)]
    header[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}
    data += values
  return header, data


def _read_all(folder: Path) -> None:
  for tensor in open_released(folder).values():
    tensor.load()


def safetensors_header(chance: random.Random, folder: Path) -> str:
  """A header with keys, types, offsets or its length changed."""
  header, data = _make_header(_small())
  text = mutate_json(chance, header)
  length = None
  if chance.random() < 0.1:
    length = chance.choice((0, 1, len(text) - 1, 2**31, 2**62, 2**64 - 1))
  data = chance.choice((data, data, data, data[:-1], data + b'0', b''))
  (folder / 'model.safetensors').write_bytes(_safetensors(text, data, length))
  return _outcome(lambda: _read_all(folder))


def safetensors_bytes(chance: random.Random, folder: Path) -> str:
  """A file with bytes flipped, cut, repeated or inserted."""
  header, data = _make_header(_small())
  whole = _safetensors(json.dumps(header).encode(), data)
  (folder / 'model.safetensors').write_bytes(mutate_bytes(chance, whole))
  return _outcome(lambda: _read_all(folder))


def index(chance: random.Random, folder: Path) -> str:
  """An index beside two shards."""
  tensors, weight_map = _small(), {}
  for number, (name, tensor) in enumerate(tensors.items()):
    file = f'model-{number % 2}.safetensors'
    weight_map[name] = file
    shard = {k: x for k, x in tensors.items() if weight_map.get(k) == file}
    header, data = _make_header(shard)
    (folder / file).write_bytes(_safetensors(json.dumps(header).encode(), data))
    del tensor
  raw = {'metadata': {'total_size': 48}, 'weight_map': weight_map}
  path = folder / 'model.safetensors.index.json'
  path.write_bytes(mutate_json(chance, raw))
  return _outcome(lambda: _read_all(folder))


def config(chance: random.Random, folder: Path) -> str:
  """config.json beside the golden's weights, of which headers are read."""
  raw = json.loads((golden.FOLDER / 'config.json').read_text())
  if chance.random() < 0.3:
    raw['quantization_config'] = {'bits': 4, 'group_size': 128}
  (folder / 'config.json').write_bytes(mutate_json(chance, raw))
  (folder / 'model.safetensors').symlink_to(golden.FOLDER / 'model.safetensors')

  def read():
    found = checkpoint_io.read_config(folder)
    checkpoint_io.open_tensors(folder, found)

  return _outcome(read)


@functools.cache
def _int4_tensors():
  return open_released(_GOLDENS / 'int4')


def int4(chance: random.Random, folder: Path) -> str:
  """What says how the Int4 golden is packed."""
  for name in ('config.json', 'quantize_config.json'):
    text = (_GOLDENS / 'int4' / name).read_bytes()
    if chance.random() < 0.6:
      text = mutate_json(chance, json.loads(text))
    (folder / name).write_bytes(text)
  return _outcome(lambda: gptq.zero_offset(folder, _int4_tensors()))


def open_clip(chance: random.Random, folder: Path) -> str:
  """OpenCLIP's config."""
  text = (_GOLDENS / 'openclip' / openclip.CONFIG).read_text()
  path = folder / openclip.CONFIG
  path.write_bytes(mutate_json(chance, json.loads(text)))
  return _outcome(lambda: checkpoint_io.read_config(folder))


def generation(chance: random.Random, folder: Path) -> str:
  """generation_config.json."""
  raw = {'chat_format': 'chatml', 'top_p': 0.3, 'eos_token_id': 151643}
  path = folder / assets.GENERATION
  path.write_bytes(mutate_json(chance, raw))
  return _outcome(lambda: assets.is_chat(folder))


def vocabulary(chance: random.Random, folder: Path) -> str:
  """A `.tiktoken` file with lines cut, doubled, swapped or damaged."""
  lines = golden.vocabulary(256 + chance.randrange(9)).encode().splitlines(True)
  change = chance.randrange(4)
  at = chance.randrange(len(lines))
  if change == 0:
    lines[at:at] = [lines[chance.randrange(len(lines))]]
  elif change == 1:
    del lines[at]
  elif change == 2:
    lines[at] = chance.choice((b'', b' ', b'\n', b'IQ==\n', b'!! 3\n', b'\xff'))
  data = b''.join(lines)
  path = folder / assets.VOCABULARY
  path.write_bytes(mutate_bytes(chance, data) if change == 3 else data)
  return _outcome(lambda: Tokenizer(path))


def torch_file(chance: random.Random, folder: Path) -> str:
  """A `.bin` file: bytes changed, or records replaced or compressed."""
  buffer = io.BytesIO()
  torch.save({'a': torch.ones(2, 3), 'b': torch.ones(2)}, buffer)
  data = buffer.getvalue()
  if chance.random() < 0.6:
    data = mutate_bytes(chance, data)
  else:
    changed = io.BytesIO()
    with (
      zipfile.ZipFile(buffer) as old,
      zipfile.ZipFile(changed, 'w', chance.choice((0, 0, 8))) as new,
    ):
      for name in old.namelist():
        content = old.read(name)
        if chance.random() < 0.3:
          content = mutate_bytes(chance, content)
        new.writestr(name, content)
    data = changed.getvalue()
  (folder / 'pytorch_model.bin').write_bytes(data)
  return _outcome(lambda: _read_all(folder))


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
  'safetensors header': safetensors_header,
  'safetensors bytes': safetensors_bytes,
  'weight index': index,
  'config.json': config,
  'quantize_config.json': int4,
  'open_clip_config.json': open_clip,
  'generation_config.json': generation,
  'vocabulary': vocabulary,
}
if torch is not None:
  KINDS['torch file'] = torch_file
