"""The conversion table of Qwen-VL: released names, parameter paths, axes."""

from collections.abc import Iterable

from qwenvl_jax.conversion.rules import FUSED, Row, Rule, make_rules
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.int4 import PER_WORD

PARTS = ('decoder', 'vision', 'adapter')

_VISUAL = 'transformer.visual.'

# fmt: off
_DECODER: tuple[Row, ...] = (
  ('transformer.wte.weight', 'decoder/embed', 'vocab dim -> vocab dim'),
  ('transformer.ln_f.weight', 'decoder/ln_f/scale', 'dim -> dim'),
  ('lm_head.weight', 'decoder/lm_head/kernel', 'vocab dim -> dim vocab'),
)
_DECODER_NORMS: tuple[Row, ...] = (
  ('ln_1.weight', 'ln_1/scale', 'dim -> dim'),
  ('attn.c_attn.bias', 'attn/{q,k,v}/bias',
   '(qkv heads head_dim) -> qkv heads head_dim'),
  ('ln_2.weight', 'ln_2/scale', 'dim -> dim'),
)
_DECODER_KERNELS: tuple[Row, ...] = (
  ('attn.c_attn.weight', 'attn/{q,k,v}/kernel',
   '(qkv heads head_dim) dim -> qkv dim heads head_dim'),
  ('attn.c_proj.weight', 'attn/out/kernel',
   'dim (heads head_dim) -> heads head_dim dim'),
  ('mlp.w1.weight', 'mlp/up/kernel', 'mlp dim -> dim mlp'),
  ('mlp.w2.weight', 'mlp/gate/kernel', 'mlp dim -> dim mlp'),
  ('mlp.c_proj.weight', 'mlp/down/kernel', 'dim mlp -> mlp dim'),
)
# In place of these: 8 values a word, a scale and a zero point for each group of
# inputs.
_INT4_KERNELS: tuple[Row, ...] = (
  ('attn.c_attn.qweight', 'attn/{q,k,v}/kernel/words',
   'dim_words (qkv heads head_dim) -> qkv dim_words heads head_dim'),
  ('attn.c_attn.qzeros', 'attn/{q,k,v}/kernel/zeros',
   'dim_groups (qkv heads head_words) -> qkv dim_groups heads head_words'),
  ('attn.c_attn.scales', 'attn/{q,k,v}/kernel/scales',
   'dim_groups (qkv heads head_dim) -> qkv dim_groups heads head_dim'),
  ('attn.c_proj.qweight', 'attn/out/kernel/words',
   'attn_words dim -> attn_words dim'),
  ('attn.c_proj.qzeros', 'attn/out/kernel/zeros',
   'attn_groups dim_words -> attn_groups dim_words'),
  ('attn.c_proj.scales', 'attn/out/kernel/scales',
   'attn_groups dim -> attn_groups dim'),
  ('mlp.w1.qweight', 'mlp/up/kernel/words', 'dim_words mlp -> dim_words mlp'),
  ('mlp.w1.qzeros', 'mlp/up/kernel/zeros',
   'dim_groups mlp_words -> dim_groups mlp_words'),
  ('mlp.w1.scales', 'mlp/up/kernel/scales', 'dim_groups mlp -> dim_groups mlp'),
  ('mlp.w2.qweight', 'mlp/gate/kernel/words', 'dim_words mlp -> dim_words mlp'),
  ('mlp.w2.qzeros', 'mlp/gate/kernel/zeros',
   'dim_groups mlp_words -> dim_groups mlp_words'),
  ('mlp.w2.scales', 'mlp/gate/kernel/scales',
   'dim_groups mlp -> dim_groups mlp'),
  ('mlp.c_proj.qweight', 'mlp/down/kernel/words',
   'mlp_words dim -> mlp_words dim'),
  ('mlp.c_proj.qzeros', 'mlp/down/kernel/zeros',
   'mlp_groups dim_words -> mlp_groups dim_words'),
  ('mlp.c_proj.scales', 'mlp/down/kernel/scales',
   'mlp_groups dim -> mlp_groups dim'),
)
_VISION: tuple[Row, ...] = (
  ('conv1.weight', 'vision/patch_embed/kernel',
   'width rgb patch_rows patch_columns -> patch_rows patch_columns rgb width'),
  ('positional_embedding', 'vision/pos_embed', 'places width -> places width'),
  ('ln_pre.weight', 'vision/ln_pre/scale', 'width -> width'),
  ('ln_pre.bias', 'vision/ln_pre/bias', 'width -> width'),
)
# Rows of the fused projection are interleaved head by head.
_VISION_BLOCK: tuple[Row, ...] = (
  ('ln_1.weight', 'ln_1/scale', 'width -> width'),
  ('ln_1.bias', 'ln_1/bias', 'width -> width'),
  ('attn.in_proj.weight', 'attn/{q,k,v}/kernel',
   '(heads qkv head_dim) width -> qkv width heads head_dim'),
  ('attn.in_proj.bias', 'attn/{q,k,v}/bias',
   '(heads qkv head_dim) -> qkv heads head_dim'),
  ('attn.out_proj.weight', 'attn/out/kernel',
   'width (heads head_dim) -> heads head_dim width'),
  ('attn.out_proj.bias', 'attn/out/bias', 'width -> width'),
  ('ln_2.weight', 'ln_2/scale', 'width -> width'),
  ('ln_2.bias', 'ln_2/bias', 'width -> width'),
  ('mlp.c_fc.weight', 'mlp/up/kernel', 'mlp width -> width mlp'),
  ('mlp.c_fc.bias', 'mlp/up/bias', 'mlp -> mlp'),
  ('mlp.c_proj.weight', 'mlp/down/kernel', 'width mlp -> mlp width'),
  ('mlp.c_proj.bias', 'mlp/down/bias', 'width -> width'),
)
_ADAPTER: tuple[Row, ...] = (
  ('attn_pool.query', 'query', 'queries dim -> queries dim'),
  ('attn_pool.pos_embed', 'pos_embed', 'queries dim -> queries dim'),
  ('attn_pool.kv_proj.weight', 'kv_proj/kernel', 'dim width -> width dim'),
  ('attn_pool.ln_q.weight', 'ln_q/scale', 'dim -> dim'),
  ('attn_pool.ln_q.bias', 'ln_q/bias', 'dim -> dim'),
  ('attn_pool.ln_kv.weight', 'ln_kv/scale', 'dim -> dim'),
  ('attn_pool.ln_kv.bias', 'ln_kv/bias', 'dim -> dim'),
  ('attn_pool.attn.in_proj_weight', '{q,k,v}/kernel',
   '(qkv heads head_dim) dim -> qkv dim heads head_dim'),
  ('attn_pool.attn.in_proj_bias', '{q,k,v}/bias',
   '(qkv heads head_dim) -> qkv heads head_dim'),
  ('attn_pool.attn.out_proj.weight', 'out/kernel',
   'dim (heads head_dim) -> heads head_dim dim'),
  ('attn_pool.attn.out_proj.bias', 'out/bias', 'dim -> dim'),
  ('ln_post.weight', 'ln_post/scale', 'dim -> dim'),
  ('ln_post.bias', 'ln_post/bias', 'dim -> dim'),
  ('proj', 'proj', 'dim dim_out -> dim dim_out'),
)
# fmt: on


def rules(config: QwenVLConfig, parts: Iterable[str] = PARTS) -> list[Rule]:
  """Makes the table for one model.

  Args:
    config: sizes, and whether the decoder's kernels are packed.
    parts: which parts of the model; Qwen-7B has the decoder only.
  """
  of_part = {'decoder': _decoder, 'vision': _vision, 'adapter': _adapter}
  return [rule for part in parts for rule in of_part[part](config)]


def _decoder(config: QwenVLConfig) -> Iterable[Rule]:
  c = config.decoder
  attn, group = c.heads * c.head_dim, c.int4_group or 1
  sizes = {
    FUSED: 3,
    'vocab': c.vocab_size,
    'dim': c.dim,
    'heads': c.heads,
    'head_dim': c.head_dim,
    'mlp': c.mlp_dim,
    'dim_words': c.dim // PER_WORD,
    'head_words': c.head_dim // PER_WORD,
    'attn_words': attn // PER_WORD,
    'mlp_words': c.mlp_dim // PER_WORD,
    'dim_groups': c.dim // group,
    'attn_groups': attn // group,
    'mlp_groups': c.mlp_dim // group,
  }
  kernels = _DECODER_KERNELS if c.int4_group is None else _INT4_KERNELS
  where = 'transformer.h.*.', 'decoder/blocks/', c.layers
  yield from make_rules(_DECODER, sizes)
  yield from make_rules(_DECODER_NORMS + kernels, sizes, *where)


def _vision(config: QwenVLConfig) -> Iterable[Rule]:
  c = config.vision
  sizes = {
    FUSED: 3,
    'rgb': 3,
    'patch_rows': c.patch_size,
    'patch_columns': c.patch_size,
    'places': c.position_grid**2,
    'width': c.width,
    'heads': c.heads,
    'head_dim': c.head_dim,
    'mlp': c.mlp_dim,
  }
  where = _VISUAL + 'transformer.resblocks.*.', 'vision/blocks/', c.layers
  yield from make_rules(_VISION, sizes, _VISUAL)
  yield from make_rules(_VISION_BLOCK, sizes, *where)


def _adapter(config: QwenVLConfig) -> Iterable[Rule]:
  c = config.adapter
  sizes = {
    FUSED: 3,
    'queries': c.queries,
    'dim': c.dim,
    'dim_out': config.decoder.dim,
    'width': config.vision.width,
    'heads': c.heads,
    'head_dim': c.head_dim,
  }
  yield from make_rules(_ADAPTER, sizes, _VISUAL, 'adapter/')


def part_of(name: str) -> str:
  """Tells 'vision', 'adapter' or 'decoder' of a released name or our path."""
  if '/' in name:
    return name.split('/')[0]
  visual = name.partition(_VISUAL)[2]
  if not visual:
    return 'decoder'
  adapter = ('attn_pool.', 'ln_post.', 'proj')
  return 'adapter' if visual.startswith(adapter) else 'vision'
