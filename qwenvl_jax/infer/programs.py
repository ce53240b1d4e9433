"""The engine's programs: pure functions, jitted once for a model.

Rows are computed independently: what a slot gets is what it would get with all
others empty.
"""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwenvl_jax.infer.sampling import Sampling, Settings, adjust, draw
from qwenvl_jax.infer.state import Chosen, Prefix, Scores, State, place
from qwenvl_jax.model.cache import KVCache
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.qwen_vl import QwenVL
from qwenvl_jax.sharding import constrain, platform, rows_over_tensor

# Settings that cost nothing.
_PLAIN = {
  'temperature': 0,
  'repetition_penalty': 1,
  'presence_penalty': 0,
  'frequency_penalty': 0,
  'bias_values': 0,
}


# For decoding on TPUs, where products wait for their kernels: read each by
# itself, and further ahead.
_DECODE_OPTIONS = {
  'xla_tpu_dot_dot_fusion': 'false',
  'xla_tpu_async_copy_bandwidth_scaling_factor': '3',
}


def decode_options() -> dict[str, str] | None:
  """The compiler's options for `forward` on the platform in use."""
  return _DECODE_OPTIONS if platform() == 'tpu' else None


class Programs(NamedTuple):
  """The jitted functions behind `Engine`'s methods of the same names."""

  init_state: Any
  init_bank: Any
  encode: Any
  start: Any
  prefill: Any
  score: Any
  insert: Any
  choose: Any
  forward: Any
  free: Any
  copy: Any

  def compiled(self) -> int:
    """Number of compilations so far."""
    return sum(program._cache_size() for program in self)


@functools.lru_cache(maxsize=8)
def programs(config: QwenVLConfig, cache_dtype: str | None = None) -> Programs:
  """The programs of a model, shared by all engines of it."""
  functions = Functions(config, cache_dtype)
  return Programs(
    init_state=jax.jit(functions.init_state, static_argnums=(0, 1)),
    init_bank=jax.jit(functions.init_bank, static_argnums=0),
    encode=jax.jit(functions.encode, donate_argnums=1),
    start=jax.jit(functions.start, static_argnums=0),
    prefill=jax.jit(functions.prefill, donate_argnums=1),
    score=jax.jit(functions.score, donate_argnums=1, static_argnames='top'),
    insert=jax.jit(functions.insert, donate_argnums=0),
    choose=jax.jit(functions.choose, donate_argnums=0, static_argnames='top'),
    forward=jax.jit(
      functions.forward, donate_argnums=1, compiler_options=decode_options()
    ),
    free=jax.jit(functions.free, donate_argnums=0),
    copy=jax.jit(functions.copy, donate_argnums=0),
  )


class Functions:
  """What `Programs` compiles."""

  def __init__(self, config: QwenVLConfig, cache_dtype: str | None):
    self._model = QwenVL(config)
    self._config = config
    self._cache_dtype = cache_dtype

  def init_state(self, slots: int, size: int) -> State:
    vocabulary = self._config.decoder.vocab_size
    settings = Settings.create([Sampling()])
    return place(
      State(
        cache=KVCache.create(
          self._config, slots, size, dtype=self._cache_dtype
        ),
        logits=jnp.zeros((slots, vocabulary), jnp.float32),
        tokens=jnp.zeros(slots, jnp.int32),
        active=jnp.zeros(slots, bool),
        generated=jnp.zeros(slots, jnp.int32),
        settings=jax.tree.map(
          lambda x: jnp.repeat(jnp.asarray(x), slots, axis=0), settings
        ),
        counts=jnp.zeros((slots, vocabulary), jnp.int32),
        in_prompt=jnp.zeros((slots, vocabulary), bool),
      )
    )

  def init_bank(self, images: int) -> jax.Array:
    adapter = self._config.adapter
    return jnp.zeros((images, adapter.queries, adapter.dim), self._config.dtype)

  def encode(self, params, bank, pixels, places):
    with rows_over_tensor(len(pixels)):
      features = self._apply(params, pixels, method='encode_images')
    bank = bank.at[places].set(features.astype(bank.dtype))
    return constrain(bank, None, None, None)

  def start(self, size: int, lengths, ranks=None) -> Prefix:
    vocabulary, (rows,) = self._config.decoder.vocab_size, lengths.shape
    cache = KVCache.create(
      self._config, rows, size, lengths, dtype=self._cache_dtype, ranks=ranks
    )
    return Prefix(
      cache=cache,
      tokens=jnp.full((rows, size), -1, jnp.int32),
      logits=jnp.zeros((rows, vocabulary), jnp.float32),
    )

  def prefill(self, params, prefix, bank, tokens, rows, counts, offset):
    x, prefix = self._read(
      params, prefix, bank, tokens, rows, counts, offset, last=counts - 1
    )
    logits = self._apply(params, x, method='head')[:, 0]
    logits = constrain(logits.astype(jnp.float32), 'batch', 'vocab_act')
    return dataclasses.replace(prefix, logits=logits)

  def score(
    self, params, prefix, bank, tokens, rows, counts, offset, targets, *, top
  ):
    x, prefix = self._read(params, prefix, bank, tokens, rows, counts, offset)
    logits = self._apply(params, x, method='head')[0].astype(jnp.float32)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    found = jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]
    tops, ids = jax.lax.top_k(logprobs, top)
    last = logits[counts - 1]
    prefix = dataclasses.replace(
      prefix, logits=constrain(last, 'batch', 'vocab_act')
    )
    return prefix, Scores(found, ids, tops)

  def _read(
    self, params, prefix, bank, tokens, rows, counts, offset, last=None
  ):
    """Hidden states of a piece, and the prefix with it in its cache."""
    with self._split(*tokens.shape):
      x, cache = self._apply(
        params,
        tokens,
        prefix.cache,
        offset,
        bank.reshape(-1, bank.shape[-1]),
        rows,
        last,
        method='extend',
      )
    start = 0 if offset is None else offset
    real = jnp.arange(tokens.shape[1]) < counts[:, None]
    written = jax.lax.dynamic_update_slice(
      prefix.tokens, jnp.where(real, tokens, -1), (0, start)
    )
    cache = dataclasses.replace(cache, lengths=start + counts)
    return x, dataclasses.replace(prefix, cache=cache, tokens=written)

  def _split(self, rows: int, length: int):
    """How a mesh reads: by rows where kernels are less to send than sums.

    A layer has 4 D^2 + 3 D F values of kernels, and sums 2 T D values over
    'tensor', each of which is sent twice.
    """
    decoder = self._config.decoder
    many = rows * length >= decoder.dim + 0.75 * decoder.mlp_dim
    return rows_over_tensor(rows) if many else contextlib.nullcontext()

  def insert(self, state: State, prefix: Prefix, slots, settings) -> State:
    vocabulary, (rows,) = state.logits.shape[1], slots.shape
    ids = jnp.where(prefix.tokens < 0, vocabulary, prefix.tokens)
    in_prompt = jnp.zeros((rows, vocabulary), bool)
    in_prompt = in_prompt.at[jnp.arange(rows)[:, None], ids].set(
      True, mode='drop'
    )
    new = State(
      cache=prefix.cache,
      logits=prefix.logits,
      tokens=jnp.zeros(rows, jnp.int32),
      active=jnp.ones(rows, bool),
      generated=jnp.zeros(rows, jnp.int32),
      settings=settings,
      counts=jnp.zeros((rows, vocabulary), jnp.int32),
      in_prompt=in_prompt,
    )

    def put(old, new):
      # Slice by slice: a scatter of whole rows is slower on a CPU.
      for row in range(rows):
        start = (slots[row], *(0,) * (old.ndim - 1))
        part = jnp.asarray(new)[row : row + 1].astype(old.dtype)
        old = jax.lax.dynamic_update_slice(old, part, start)
      return old

    return place(jax.tree.map(put, state, new))

  def choose(self, state: State, masks, *, top: int):
    logits = state.logits
    adjusted = adjust(
      logits,
      state.settings,
      state.counts,
      state.in_prompt,
      state.generated,
      masks,
    )
    tokens = draw(adjusted, state.settings, state.generated)
    tokens = jnp.where(state.active, tokens, 0)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    tops, ids = jax.lax.top_k(logprobs, top)
    chosen = Chosen(
      tokens=tokens,
      valid=jnp.isfinite(jnp.max(logits, axis=-1)),
      possible=jnp.max(adjusted, axis=-1) > -jnp.inf,
      logprobs=jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0],
      top_ids=ids,
      top_logprobs=tops,
    )
    return self._with_tokens(state, tokens), chosen

  def _with_tokens(self, state: State, tokens) -> State:
    active = state.active.astype(jnp.int32)
    rows = jnp.arange(tokens.shape[0])
    return place(
      dataclasses.replace(
        state,
        tokens=tokens,
        generated=state.generated + active,
        counts=state.counts.at[rows, tokens].add(active),
      )
    )

  def forward(self, params, state: State) -> State:
    logits, cache = self._apply(
      params, state.tokens, state.cache, method='decode'
    )
    lengths = cache.lengths + state.active
    return place(
      dataclasses.replace(
        state,
        cache=dataclasses.replace(cache, lengths=lengths),
        logits=logits.astype(jnp.float32),
      )
    )

  def free(self, state: State, slot) -> State:
    # Values that are not finite would reach the next answer in this slot, for
    # attention multiplies them by 0. Where the cache holds any, the logits are
    # not finite either.
    good = jnp.isfinite(jnp.max(state.logits[slot]))

    def clean(x):
      return x.at[slot].set(jnp.where(good, x[slot], jnp.zeros_like(x[slot])))

    cache = dataclasses.replace(
      state.cache,
      layers=jax.tree.map(clean, state.cache.layers),
      lengths=state.cache.lengths.at[slot].set(0),
    )
    return place(
      dataclasses.replace(
        state,
        cache=cache,
        logits=clean(state.logits),
        active=state.active.at[slot].set(False),
        settings=dataclasses.replace(
          state.settings,
          # What a free slot asks for is computed for nobody.
          **{
            name: getattr(state.settings, name).at[slot].set(value)
            for name, value in _PLAIN.items()
          },
        ),
      )
    )

  def copy(self, state: State, sources, targets, tokens) -> State:
    state = jax.tree.map(lambda x: x.at[targets].set(x[sources]), state)
    return place(dataclasses.replace(state, tokens=tokens))

  def _apply(self, params, *arguments, method: str):
    return self._model.apply({'params': params}, *arguments, method=method)
