"""The golden model, and a tiny chat checkpoint that recites one answer."""

from typing import Any, NamedTuple

import flax.linen as nn
import golden as golden_files
import jax
import numpy as np
import pytest

from qwenvl_jax import batch
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.infer.engine import Engine, EngineConfig
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
)
from qwenvl_jax.model.qwen_vl import QwenVL
from qwenvl_jax.text.tokenizer import Tokenizer

# What the chat checkpoint says to everything.
ANSWER = 'I see <ref>狗</ref><box>(250,100),(750,900)</box>'


class Golden(NamedTuple):
  """The golden checkpoint and the arrays that PyTorch computed with it."""

  config: QwenVLConfig
  params: Any
  expected: Any

  def prompt(self, case):
    """(ids [T], pixels [I,R,R,3]) of a `generate/` case."""
    ids = self.expected[f'generate/{case}/ids'].reshape(-1)
    return ids.tolist(), self.images(ids)

  def images(self, ids):
    """Pixels [I,R,R,3] that a row of golden ids names, None for none."""
    starts, pixels = golden_files.spans(np.asarray(ids))
    return pixels if starts else None

  def new(self, case):
    return self.expected[f'generate/{case}/new'].reshape(-1).tolist()


@pytest.fixture(scope='session')
def golden():
  return Golden(
    golden_files.config(), golden_files.params(), golden_files.expected()
  )


@pytest.fixture(scope='session')
def golden_engine(golden):
  """Room for all goldens; two searches of three or four beams at a time."""
  sizes = EngineConfig(slots=8, max_len=1024, chunk=512)
  return Engine(golden.config, golden.params, sizes)


@pytest.fixture(scope='session')
def recited():
  return ANSWER


@pytest.fixture(scope='session')
def chat_checkpoint(tmp_path_factory):
  """A folder with a model that answers `ANSWER`, whatever it is asked.

  Its blocks pass embeddings on, embeddings are unit vectors, and the head says
  which token follows which.
  """
  pieces = [bytes([i]) for i in range(256)]
  pieces += [b'I see ', b'(250,100),(750,900)', b'system', b'user']
  tokenizer = Tokenizer.from_ranks([*pieces, b'assistant'])
  size = tokenizer.vocab_size
  config = QwenVLConfig(
    vision=VisionConfig(28, width=16, layers=1, heads=1, mlp_dim=16),
    adapter=AdapterConfig(queries=16, dim=512, heads=4),
    decoder=DecoderConfig(
      vocab_size=size,
      dim=512,
      layers=1,
      heads=2,
      head_dim=16,
      mlp_dim=16,
      seq_length=256,
      max_position_embeddings=1024,
    ),
    image_start_id=tokenizer.img_start_id,
    dtype='float32',
  )
  shapes = jax.eval_shape(
    QwenVL(config).init, jax.random.key(0), batch.text_batch(np.zeros((1, 4)))
  )
  noise = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: noise.normal(0, 0.02, leaf.shape).astype(np.float32),
    nn.meta.unbox(shapes)['params'],
  )
  chain = [
    pieces.index(b'\n'),
    pieces.index(b'I see '),
    tokenizer.ref_start_id,
    *'狗'.encode(),  # byte b is id b in this vocabulary
    tokenizer.ref_end_id,
    tokenizer.box_start_id,
    pieces.index(b'(250,100),(750,900)'),
    tokenizer.box_end_id,
    tokenizer.im_end_id,
  ]
  head = np.zeros((512, size), np.float32)
  head[chain[:-1], chain[1:]] = 1
  decoder = params['decoder']
  decoder['embed'] = np.eye(size, 512, dtype=np.float32)
  decoder['lm_head']['kernel'] = head
  decoder['ln_f']['scale'] = np.ones(512, np.float32)
  for part, name in (('attn', 'out'), ('mlp', 'down')):
    decoder['blocks'][part][name]['kernel'][:] = 0
  folder = tmp_path_factory.mktemp('chat') / 'checkpoint'
  assets.write_assets(folder, config)
  tokenizer.save(folder / assets.VOCABULARY)
  golden_files.save_params(folder, params)
  return folder
