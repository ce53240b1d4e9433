"""What of tpu-inference a machine without TPUs cannot run, done otherwise.

A mesh without coordinates, a memory size, and attention by XLA in place of the
kernel. Everything else of vLLM runs as it does on TPUs.
"""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np

# Of vLLM and JAX; to be set before either is imported.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'SKIP_JAX_PRECOMPILE': '1',
  'VLLM_ENABLE_V1_MULTIPROCESSING': '0',
  'VLLM_NO_USAGE_STATS': '1',
}
# Of an engine. Results are wrong on a CPU if steps overlap.
SIZES = {
  'dtype': 'float32',
  'max_num_seqs': 8,
  'max_num_batched_tokens': 512,
  'num_gpu_blocks_override': 256,
  'async_scheduling': False,
  'seed': 0,
}


def available() -> bool:
  """Whether this is vLLM's environment."""
  return importlib.util.find_spec('tpu_inference') is not None


def prepare() -> bool:
  """Takes the places of the three before vLLM is imported; False without."""
  if not available():
    return False
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  jax.config.update('jax_platforms', 'cpu')
  from tpu_inference import utils
  from tpu_inference.layers.common import attention_interface
  from tpu_inference.runner import tpu_runner

  utils.hbm_usage_bytes = lambda devices: [(0, 2**32) for _ in devices]
  for module in (utils, tpu_runner):
    module.make_optimized_mesh = _mesh
  attention_interface.sharded_ragged_paged_attention = attend
  return True


def _mesh(shape, names, *, devices=None):
  devices = np.array(devices or jax.devices()).reshape(shape)
  types = (jax.sharding.AxisType.Auto,) * len(names)
  return jax.sharding.Mesh(devices, names, axis_types=types)


def attend(
  mesh,
  q,
  k,
  v,
  cache,
  kv_lens,
  pages,
  starts,
  distribution,
  sink,
  *,
  sm_scale,
  **_,
):
  """Causal attention of T tokens of several requests through pages.

  Args:
    mesh: unused.
    q: [T,N,H], request after request.
    k: [T,N,H].
    v: [T,N,H].
    cache: [P,S,..], of each token the N keys and values [2H] in float32.
    kv_lens: [R] int32 tokens of each request, these included.
    pages: [R * pages a request] int32.
    starts: [R + 1] int32, where in T each request begins.
    distribution: [3] int32, the last is how many requests there are.
    sink: None.
    sm_scale: what products are multiplied by.
  """
  assert sink is None and cache.dtype == jnp.float32
  length, heads, size = q.shape
  page = cache.shape[1]
  flat = cache.reshape(-1, heads, 2 * size)
  rows, token = len(kv_lens), jnp.arange(length)
  count = distribution[2]
  ended = (token[:, None] >= starts[None, 1:]) & (jnp.arange(rows) < count)
  row = jnp.minimum(jnp.sum(ended, axis=1), rows - 1)
  real = token < starts[count]
  position = kv_lens[row] - starts[row + 1] + token
  table = pages.reshape(rows, -1)
  slot = table[row, position // page] * page + position % page
  slot = jnp.where(real, slot, len(flat))
  flat = flat.at[slot].set(jnp.concatenate([k, v], -1), mode='drop')

  seen = flat.reshape(-1, page, *flat.shape[1:])[table]
  seen = seen.reshape(-1, heads, 2 * size)
  room = table.shape[1] * page
  owner, index = jnp.divmod(jnp.arange(rows * room), room)
  mask = (owner == row[:, None]) & (index <= position[:, None])
  scores = jnp.einsum('tnh,snh->nts', q, seen[..., :size]) * sm_scale
  weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
  out = jnp.einsum('nts,snh->tnh', weights, seen[..., size:])
  return out, flat.reshape(cache.shape)
