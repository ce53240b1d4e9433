"""A tiny chat checkpoint that recites one answer."""

import flax.linen as nn
import golden as golden_files
import jax
import numpy as np

from qwenvl_jax import batch
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
)
from qwenvl_jax.model.qwen_vl import QwenVL
from qwenvl_jax.text.tokenizer import Tokenizer

# What it says, in so many tokens.
ANSWER = 'I see <ref>狗</ref><box>(250,100),(750,900)</box>'
TOKENS = 9


def save(folder):
  """Writes a checkpoint whose model answers `ANSWER` to everything.

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
  assets.write_assets(folder, config)
  tokenizer.save(folder / assets.VOCABULARY)
  golden_files.save_params(folder, params)
