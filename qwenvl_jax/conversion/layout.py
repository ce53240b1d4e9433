"""The conversion table: released tensor names, parameter paths, transforms.

One rule a kind of tensor; `*` in a name is the layer's number. A rule's pattern
is einops', from the released axes to ours; a leading `c` on our side is the
fused axis that splits over several paths (`attn/{q,k,v}`). The same table
converts both ways, lists what a checkpoint must hold, and says each tensor's
shape.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

import einops
import numpy as np

from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import DecoderConfig, QwenVLConfig
from qwenvl_jax.model.int4 import PER_WORD
from qwenvl_jax.model.layers import outputs_first
from qwenvl_jax.model.stacking import (
  apart_path,
  inputs_of,
  is_plain_kernel,
  is_stacked,
)


@dataclasses.dataclass(frozen=True)
class Rule:
  """How one kind of released tensor maps to parameters.

  Attributes:
    tensor: released name, `*` for the layer.
    paths: parameter paths; more than one if the released tensor is fused.
    pattern: einops pattern from released to ours. A leading 'c' on the right
      side enumerates `paths`.
    sizes: names of axes in `pattern` to their lengths.
    shape: of the released tensor.
    layers: how many layers are stacked, None if the tensor stands alone.
  """

  tensor: str
  paths: tuple[str, ...]
  pattern: str
  sizes: dict[str, int]
  shape: tuple[int, ...]
  layers: int | None = None

  def released_names(self) -> list[str]:
    """Names of the released tensors under this rule, by layer."""
    if self.layers is None:
      return [self.tensor]
    return [self.tensor.replace('*', str(i)) for i in range(self.layers)]

  def to_ours(self, tensor: np.ndarray) -> tuple[np.ndarray, ...]:
    """One released tensor to one array a path (one layer of it). A view."""
    result = einops.rearrange(tensor, self.pattern, **self.axis_sizes())
    return tuple(result) if self._fused else (result,)

  def to_released(self, *arrays: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`."""
    stacked = np.stack(arrays) if self._fused else arrays[0]
    left, right = self.pattern.split(' -> ')
    view = f'{right} -> {left}'
    return einops.rearrange(stacked, view, **self.axis_sizes())

  @property
  def _fused(self) -> bool:
    return len(self.paths) > 1

  def axis_sizes(self) -> dict[str, int]:
    """Lengths of the axes that `pattern` names."""
    axes = set(re.findall('[a-z]', self.pattern))
    return {k: v for k, v in self.sizes.items() if k in axes}


def _expand(path: str) -> tuple[str, ...]:
  """'a/{q,k}/b' to ('a/q/b', 'a/k/b')."""
  match = re.search(r'\{(.*?)\}', path)
  if not match:
    return (path,)
  return tuple(path.replace(match[0], part) for part in match[1].split(','))


# Released name, our path, pattern. Axes: v vocabulary, d decoder width, n heads
# h head dim, f decoder mlp, w vision width, m heads and j head dim of vision,
# u vision mlp, i k patch, s position rows, q queries, a heads and b head dim of
# the adapter, r colour, c fused (q, k, v). Of packed kernels: p words (8 values
# each) of d, t of f, x of (n h), o of h; g groups of d, z of f, y of (n h).
_DECODER = (
  ('transformer.wte.weight', 'decoder/embed', 'v d -> v d'),
  ('transformer.ln_f.weight', 'decoder/ln_f/scale', 'd -> d'),
  ('lm_head.weight', 'decoder/lm_head/kernel', 'v d -> d v'),
)
_DECODER_BLOCK = (
  ('ln_1.weight', 'ln_1/scale', 'd -> d'),
  ('attn.c_attn.weight', 'attn/{q,k,v}/kernel', '(c n h) d -> c d n h'),
  ('attn.c_attn.bias', 'attn/{q,k,v}/bias', '(c n h) -> c n h'),
  ('attn.c_proj.weight', 'attn/out/kernel', 'd (n h) -> n h d'),
  ('ln_2.weight', 'ln_2/scale', 'd -> d'),
  ('mlp.w1.weight', 'mlp/up/kernel', 'f d -> d f'),
  ('mlp.w2.weight', 'mlp/gate/kernel', 'f d -> d f'),
  ('mlp.c_proj.weight', 'mlp/down/kernel', 'd f -> f d'),
)
# Packed, in place of the weights of the same name.
_INT4_KERNELS = (
  ('attn.c_attn.qweight', 'attn/{q,k,v}/kernel/words', 'p (c n h) -> c p n h'),
  ('attn.c_attn.qzeros', 'attn/{q,k,v}/kernel/zeros', 'g (c n o) -> c g n o'),
  ('attn.c_attn.scales', 'attn/{q,k,v}/kernel/scales', 'g (c n h) -> c g n h'),
  ('attn.c_proj.qweight', 'attn/out/kernel/words', 'x d -> x d'),
  ('attn.c_proj.qzeros', 'attn/out/kernel/zeros', 'y p -> y p'),
  ('attn.c_proj.scales', 'attn/out/kernel/scales', 'y d -> y d'),
  ('mlp.w1.qweight', 'mlp/up/kernel/words', 'p f -> p f'),
  ('mlp.w1.qzeros', 'mlp/up/kernel/zeros', 'g t -> g t'),
  ('mlp.w1.scales', 'mlp/up/kernel/scales', 'g f -> g f'),
  ('mlp.w2.qweight', 'mlp/gate/kernel/words', 'p f -> p f'),
  ('mlp.w2.qzeros', 'mlp/gate/kernel/zeros', 'g t -> g t'),
  ('mlp.w2.scales', 'mlp/gate/kernel/scales', 'g f -> g f'),
  ('mlp.c_proj.qweight', 'mlp/down/kernel/words', 't d -> t d'),
  ('mlp.c_proj.qzeros', 'mlp/down/kernel/zeros', 'z p -> z p'),
  ('mlp.c_proj.scales', 'mlp/down/kernel/scales', 'z d -> z d'),
)
_VISION = (
  ('conv1.weight', 'vision/patch_embed/kernel', 'w r i k -> i k r w'),
  ('positional_embedding', 'vision/pos_embed', 's w -> s w'),
  ('ln_pre.weight', 'vision/ln_pre/scale', 'w -> w'),
  ('ln_pre.bias', 'vision/ln_pre/bias', 'w -> w'),
)
# Rows of the fused projection are interleaved head by head.
_VISION_BLOCK = (
  ('ln_1.weight', 'ln_1/scale', 'w -> w'),
  ('ln_1.bias', 'ln_1/bias', 'w -> w'),
  ('attn.in_proj.weight', 'attn/{q,k,v}/kernel', '(m c j) w -> c w m j'),
  ('attn.in_proj.bias', 'attn/{q,k,v}/bias', '(m c j) -> c m j'),
  ('attn.out_proj.weight', 'attn/out/kernel', 'w (m j) -> m j w'),
  ('attn.out_proj.bias', 'attn/out/bias', 'w -> w'),
  ('ln_2.weight', 'ln_2/scale', 'w -> w'),
  ('ln_2.bias', 'ln_2/bias', 'w -> w'),
  ('mlp.c_fc.weight', 'mlp/up/kernel', 'u w -> w u'),
  ('mlp.c_fc.bias', 'mlp/up/bias', 'u -> u'),
  ('mlp.c_proj.weight', 'mlp/down/kernel', 'w u -> u w'),
  ('mlp.c_proj.bias', 'mlp/down/bias', 'w -> w'),
)
_ADAPTER = (
  ('attn_pool.query', 'adapter/query', 'q d -> q d'),
  ('attn_pool.pos_embed', 'adapter/pos_embed', 'q d -> q d'),
  ('attn_pool.kv_proj.weight', 'adapter/kv_proj/kernel', 'd w -> w d'),
  ('attn_pool.ln_q.weight', 'adapter/ln_q/scale', 'd -> d'),
  ('attn_pool.ln_q.bias', 'adapter/ln_q/bias', 'd -> d'),
  ('attn_pool.ln_kv.weight', 'adapter/ln_kv/scale', 'd -> d'),
  ('attn_pool.ln_kv.bias', 'adapter/ln_kv/bias', 'd -> d'),
  (
    'attn_pool.attn.in_proj_weight',
    'adapter/{q,k,v}/kernel',
    '(c a b) d -> c d a b',
  ),
  (
    'attn_pool.attn.in_proj_bias',
    'adapter/{q,k,v}/bias',
    '(c a b) -> c a b',
  ),
  (
    'attn_pool.attn.out_proj.weight',
    'adapter/out/kernel',
    'd (a b) -> a b d',
  ),
  ('attn_pool.attn.out_proj.bias', 'adapter/out/bias', 'd -> d'),
  ('ln_post.weight', 'adapter/ln_post/scale', 'd -> d'),
  ('ln_post.bias', 'adapter/ln_post/bias', 'd -> d'),
  ('proj', 'adapter/proj', 'd e -> d e'),
)


PARTS = ('decoder', 'vision', 'adapter')


def rules(config: QwenVLConfig, parts: Iterable[str] = PARTS) -> list[Rule]:
  """The table for one model.

  Args:
    config: sizes, and whether the decoder's kernels are packed.
    parts: which parts of the model; Qwen-7B has the decoder only.

  Returns:
    A list of `Rule`.
  """
  decoder, vision, adapter = config.decoder, config.vision, config.adapter
  sizes = {
    'v': decoder.vocab_size,
    'd': decoder.dim,
    'e': decoder.dim,
    'n': decoder.heads,
    'h': decoder.head_dim,
    'f': decoder.mlp_dim,
    'w': vision.width,
    'm': vision.heads,
    'j': vision.head_dim,
    'u': vision.mlp_dim,
    'i': vision.patch_size,
    'k': vision.patch_size,
    's': vision.position_grid**2,
    'q': adapter.queries,
    'a': adapter.heads,
    'b': adapter.head_dim,
    'r': 3,
    'c': 3,
  }
  block = _DECODER_BLOCK
  if decoder.int4_group is not None:
    sizes |= _packed_sizes(decoder)
    packed = {row[0].replace('.qweight', '.weight') for row in _INT4_KERNELS}
    block = [row for row in block if row[0] not in packed] + [*_INT4_KERNELS]
  visual = 'transformer.visual.'
  groups = {
    'decoder': (
      ('', '', None, _DECODER),
      ('transformer.h.*.', 'decoder/blocks/', decoder.layers, block),
    ),
    'vision': (
      (visual, '', None, _VISION),
      (
        visual + 'transformer.resblocks.*.',
        'vision/blocks/',
        vision.layers,
        _VISION_BLOCK,
      ),
    ),
    'adapter': ((visual, '', None, _ADAPTER),),
  }
  return [
    Rule(
      tensor=prefix + tensor,
      paths=_expand(root + path),
      pattern=pattern,
      sizes=sizes,
      shape=_released_shape(pattern, sizes),
      layers=layers,
    )
    for part in parts
    for prefix, root, layers, table in groups[part]
    for tensor, path, pattern in table
  ]


def _packed_sizes(decoder: DecoderConfig) -> dict[str, int]:
  joined, group = decoder.heads * decoder.head_dim, decoder.int4_group
  return {
    'p': decoder.dim // PER_WORD,
    't': decoder.mlp_dim // PER_WORD,
    'x': joined // PER_WORD,
    'o': decoder.head_dim // PER_WORD,
    'g': decoder.dim // group,
    'z': decoder.mlp_dim // group,
    'y': joined // group,
  }


def is_packed(name: str) -> bool:
  """Whether a parameter is part of a packed kernel, whose dtypes are fixed.

  Args:
    name: a path, or the released name.
  """
  return name.endswith(
    ('/words', '/zeros', '/scales', '.qweight', '.qzeros', '.scales')
  )


def _released_shape(pattern: str, sizes: dict[str, int]) -> tuple[int, ...]:
  left = pattern.split(' -> ')[0]
  return tuple(
    int(np.prod([sizes[axis] for axis in re.findall('[a-z]', group)]))
    for group in re.findall(r'\(.*?\)|[a-z]', left)
  )


def flatten(tree: dict, prefix: str = '') -> Iterator[tuple[str, object]]:
  """Leaves of a nested dict with their paths joined by '/'."""
  for key, value in tree.items():
    path = f'{prefix}/{key}' if prefix else key
    if isinstance(value, dict):
      yield from flatten(value, path)
    else:
      yield path, value


def unflatten(leaves: dict[str, object]) -> dict:
  """The inverse of `flatten`."""
  tree = {}
  for path, value in leaves.items():
    *parents, last = path.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def released_shapes(table: list[Rule]) -> dict[str, tuple[int, ...]]:
  """Released name to shape of every tensor that a checkpoint must hold."""
  return {name: rule.shape for rule in table for name in rule.released_names()}


def parameter_shapes(
  config: QwenVLConfig, parts: Iterable[str] = PARTS
) -> dict[str, tuple[int, ...]]:
  """Path to shape of every parameter of a model, or of some parts of it.

  For training or for inference (`model.stacking`), as `config.scan_layers`
  says.
  """
  shapes = {}
  for rule in rules(config, parts):
    stack = () if rule.layers is None else (rule.layers,)
    blank = np.broadcast_to(np.int8(0), rule.shape)
    for path, part in zip(rule.paths, rule.to_ours(blank), strict=True):
      shapes[path] = stack + part.shape
  if config.scan_layers:
    return shapes
  return _apart(shapes, config.decoder.int8)


def _apart(
  shapes: dict[str, tuple[int, ...]], int8: bool
) -> dict[str, tuple[int, ...]]:
  apart = {}
  for path, shape in shapes.items():
    layers = 1
    if is_stacked(path):
      layers, *shape = shape
    if is_plain_kernel(path):
      shape = outputs_first(tuple(shape), inputs_of(path))
    parts = {'': tuple(shape)}
    if int8 and is_plain_kernel(path):
      outputs = tuple(shape)[: -inputs_of(path)]
      parts = {'/values': tuple(shape), '/scales': outputs}
    for i in range(layers):
      apart |= {apart_path(path, i) + x: parts[x] for x in parts}
  return apart


def released_order(table: list[Rule]) -> list[tuple[str, Rule]]:
  """(released name, rule) of every tensor, layer after layer."""
  groups = {}
  for position, rule in enumerate(table):
    prefix = rule.tensor.partition('*')[0] if rule.layers else ''
    for layer, name in enumerate(rule.released_names()):
      key = (part_of(name), prefix, layer if prefix else 0, position)
      groups[key] = (name, rule)
  order = {part: i for i, part in enumerate(PARTS)}
  return [groups[k] for k in sorted(groups, key=lambda k: (order[k[0]], k[1:]))]


def part_of(name: str) -> str:
  """'vision', 'adapter' or 'decoder' of a released name or one of our paths."""
  if '/' in name:
    return name.split('/')[0]
  visual = name.partition('transformer.visual.')[2]
  if not visual:
    return 'decoder'
  adapter = ('attn_pool.', 'ln_post.', 'proj')
  return 'adapter' if visual.startswith(adapter) else 'vision'


def check_shapes(
  expected: dict[str, tuple], found: dict[str, tuple], where: str
):
  """Compares what a checkpoint holds with what it must hold.

  Args:
    expected: name to shape.
    found: name to shape.
    where: the checkpoint, for the message.

  Raises:
    CheckpointError: names missing, unknown and misshapen tensors.
  """
  problems = []
  missing = sorted(expected.keys() - found.keys())
  unknown = sorted(found.keys() - expected.keys())
  misshapen = [
    f'{name} is {list(found[name])}, not {list(shape)}'
    for name, shape in expected.items()
    if name in found and tuple(found[name]) != tuple(shape)
  ]
  for kind, names in (
    ('missing', missing),
    ('unknown', unknown),
    ('misshapen', misshapen),
  ):
    if names:
      problems.append(f'{len(names)} {kind}: {_some(names)}')
  if problems:
    raise CheckpointError(
      f'{where}: tensors do not match config.json. ' + '; '.join(problems)
    )


def _some(names: list[str], limit: int = 5) -> str:
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return ', '.join(names[:limit]) + more


def to_released(table: list[Rule], params: dict):
  """Yields (released name, array) for every tensor, one at a time.

  Raises:
    CheckpointError: the tree lacks a parameter or has an unknown one.
  """
  leaves = dict(flatten(params))
  expected = {path for rule in table for path in rule.paths}
  if leaves.keys() != expected:
    raise CheckpointError(
      'parameter tree does not match the conversion table. '
      f'missing: {_some(sorted(expected - leaves.keys())) or "none"}; '
      f'unknown: {_some(sorted(leaves.keys() - expected)) or "none"}'
    )
  for rule in table:
    stacked = [leaves[path] for path in rule.paths]
    for layer, name in enumerate(rule.released_names()):
      arrays = [
        np.asarray(x if rule.layers is None else x[layer]) for x in stacked
      ]
      yield name, np.ascontiguousarray(rule.to_released(*arrays))
