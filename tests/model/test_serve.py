"""The decoder on a cache that another engine keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import toy

from qwenvl_jax.batch import text_batch
from qwenvl_jax.model.qwen_vl import QwenVL


def attend(q, k, v, cache):
  """Causal attention to what the cache, lists of keys and values, has."""
  keys, values = (
    jnp.concatenate([*old, new], 1)
    for old, new in zip(cache, (k, v), strict=True)
  )
  scores = jnp.einsum('btnh,bsnh->bnts', q, keys) * q.shape[-1] ** -0.5
  old = keys.shape[1] - q.shape[1]
  seen = jnp.tril(jnp.ones(scores.shape[2:], bool), old)
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
  return jnp.einsum('bnts,bsnh->btnh', weights, values), ([keys], [values])


def test_pieces_give_what_whole_rows_give():
  config = toy.config(layers=2)
  model = QwenVL(config)
  ids = np.random.default_rng(0).integers(0, config.decoder.vocab_size, (1, 11))
  params = {'params': toy.params(config)}
  wanted = jax.jit(model.apply)(params, text_batch(ids))

  def serve(model, ids, positions, caches):
    x = model.decoder.embed_tokens(ids)
    x, caches = model.decoder.serve(x, positions, caches, attend)
    return model.decoder.head(x), caches

  step = jax.jit(lambda *arguments: model.apply(*arguments, method=serve))
  found, caches = [], [([], [])] * config.decoder.layers
  for start, end in ((0, 6), (6, 10), (10, 11)):
    positions = np.arange(start, end)[None]
    logits, caches = step(params, ids[:, start:end], positions, caches)
    found.append(logits)
  np.testing.assert_allclose(np.concatenate(found, 1), wanted, atol=2e-5)
