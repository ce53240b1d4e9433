"""Continuations of many prompts at once, or of one prompt token by token.

Two programs do the work: a prefill, compiled per (rows, prompt length, image
slots), and a loop or a step that decodes with a donated cache, compiled per
(rows, cache size). All other settings are arguments, not constants, so that
changing them compiles nothing.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.batch import Batch
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.infer import prompts as prompts_lib
from qwenvl_jax.infer.sampling import Chooser, Sampling
from qwenvl_jax.model.cache import KVCache
from qwenvl_jax.model.qwen_vl import QwenVL

Params = Any

_MIN_ROOM = 32


def generate(
  model: QwenVL,
  params: Params,
  prompts: Sequence[Sequence[int]],
  images: Sequence | None = None,
  *,
  max_new_tokens: int,
  stop_ids: Sequence[int] = (),
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  key: jax.Array | None = None,
  min_new_tokens: int = 0,
  batch_size: int = 32,
) -> list[list[int]]:
  """Continues every prompt; each row gets what it would get alone.

  Args:
    model: the module.
    params: its parameters.
    prompts: token ids, of any lengths.
    images: per prompt [I,R,R,3] pixels, uint8 or normalized float, that fill
      its `<img>` spans in reading order, or None; None for no images at all.
    max_new_tokens: most tokens of an answer.
    stop_ids: an answer ends before the first of these.
    temperature: 0 for the most likely token, see `Sampling`.
    top_k: see `Sampling`.
    top_p: see `Sampling`.
    key: PRNG key for temperatures above 0; row i draws from fold_in(key, i).
      None is key 0: the same call gives the same answers.
    min_new_tokens: an answer does not stop before it has this many.
    batch_size: most rows decoded together; prompts of like length go together.

  Returns:
    The new ids of each prompt, in the order of `prompts`.

  Raises:
    DataError: a prompt or its images cannot be used; names the row.
    ConfigError: settings out of range.
  """
  chooser = Chooser.create(
    Sampling(temperature, top_k, top_p), stop_ids, min_new_tokens, key
  )
  answers = {}
  for chosen, (logits, cache), rows in prefill_in_batches(
    model, params, prompts, images, max_new_tokens, batch_size
  ):
    numbers = np.zeros(rows, np.int32)
    numbers[: len(chosen)] = chosen
    # The cache that comes back is let go before the next one is made.
    tokens = _decode(
      model,
      params,
      cache,
      logits,
      chooser,
      numbers,
      np.arange(rows) >= len(chosen),
      max_new_tokens,
      room=room(max_new_tokens),
    )[0]
    for row, new in zip(chosen, np.asarray(tokens).tolist(), strict=False):
      answers[row] = cut(new[:max_new_tokens], stop_ids)
  return [answers[row] for row in range(len(prompts))]


def stream(
  model: QwenVL,
  params: Params,
  prompt: Sequence[int],
  images: Sequence | None = None,
  *,
  max_new_tokens: int,
  stop_ids: Sequence[int] = (),
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  key: jax.Array | None = None,
  min_new_tokens: int = 0,
) -> Iterator[int]:
  """Continues one prompt and yields each new id as soon as it is known.

  The same ids as row 0 of `generate`. The arguments are checked and the prompt
  is read at the call, not at the first id.

  Args:
    model: the module.
    params: its parameters.
    prompt: token ids.
    images: [I,R,R,3] pixels for its spans, or None.
    max_new_tokens: see `generate`, as all that follow.
    stop_ids: see there.
    temperature: see there.
    top_k: see there.
    top_p: see there.
    key: see there.
    min_new_tokens: see there.

  Returns:
    An iterator that may be left at any time.

  Raises:
    DataError: the prompt or its images cannot be used.
    ConfigError: settings out of range.
  """
  chooser = Chooser.create(
    Sampling(temperature, top_k, top_p), stop_ids, min_new_tokens, key
  )
  check_count('max_new_tokens', max_new_tokens)
  name = 'the prompt'
  prompt = prompts_lib.check_ids(prompt, model.config, name)
  prompts_lib.check_room(prompt, max_new_tokens, model.config, name)
  logits, cache = prefill(
    model,
    params,
    [prompt],
    [images],
    rows=1,
    max_new_tokens=max_new_tokens,
    names=[name],
  )

  def ids():
    nonlocal cache
    row = np.zeros(1, np.int32)
    token = _choose(chooser, logits, row, 0)
    for step in range(1, max_new_tokens + 1):
      following = None
      if step < max_new_tokens:
        # Under way before this id is waited for.
        following, cache = _step(
          model, params, cache, token, chooser, row, step
        )
      new = int(np.asarray(token)[0])
      if new in stop_ids:
        return
      yield new
      token = following

  return ids()


def prefill_in_batches(
  model: QwenVL,
  params: Params,
  prompts: Sequence[Sequence[int]],
  images: Sequence | None,
  max_new_tokens: int,
  batch_size: int,
) -> Iterator[tuple[list[int], tuple[jax.Array, KVCache], int]]:
  """Reads prompts of like length together, after checking all of them.

  Args:
    model: the module.
    params: its parameters.
    prompts: token ids.
    images: per prompt [I,R,R,3] or None; or None.
    max_new_tokens: tokens that will be decoded.
    batch_size: most rows at a time.

  Yields:
    Numbers of the prompts in this batch; what `prefill` returns for them; rows
    of the batch, of which the first are those prompts and the rest padding.
  """
  check_count('max_new_tokens', max_new_tokens)
  check_count('batch_size', batch_size)
  images = prompts_lib.images_per_prompt(prompts, images)
  names = [f'row {row}' for row in range(len(prompts))]
  prompts = [
    prompts_lib.check_ids(prompt, model.config, name)
    for prompt, name in zip(prompts, names, strict=True)
  ]
  for prompt, name in zip(prompts, names, strict=True):
    prompts_lib.check_room(prompt, max_new_tokens, model.config, name)
  # Rows without images would otherwise get slots that are encoded for nothing.
  alike = [
    (np.count_nonzero(prompt == model.config.image_start_id), len(prompt))
    for prompt in prompts
  ]
  order = sorted(range(len(prompts)), key=alike.__getitem__)
  for start in range(0, len(order), batch_size):
    chosen = order[start : start + batch_size]
    # What is left over pads its batch rather than compiling another program.
    rows = min(prompts_lib.bucket(min(len(order), batch_size)), batch_size)
    read = prefill(
      model,
      params,
      [prompts[row] for row in chosen],
      [images[row] for row in chosen],
      rows=rows,
      max_new_tokens=max_new_tokens,
      names=[names[row] for row in chosen],
    )
    yield chosen, read, rows


def prefill(
  model: QwenVL,
  params: Params,
  prompts: Sequence[Sequence[int]],
  images: Sequence | None,
  *,
  rows: int,
  max_new_tokens: int,
  names: Sequence[str],
) -> tuple[jax.Array, KVCache]:
  """Reads prompts into a new cache.

  Args:
    model: the module.
    params: its parameters.
    prompts: token ids.
    images: per prompt [I,R,R,3] or None.
    rows: rows of the batch, at least one a prompt.
    max_new_tokens: tokens that will be decoded.
    names: what an error calls each prompt.

  Returns:
    ([rows,V] logits after the prompts, the cache).
  """
  longest = max(len(prompt) for prompt in prompts)
  length = prompts_lib.bucket(longest, prompts_lib.MIN_LENGTH)
  batch = prompts_lib.pad_prompts(
    model.config, prompts, images, rows=rows, length=length, names=names
  )
  return _prefill(model, params, batch, size=length + room(max_new_tokens))


def room(max_new_tokens: int) -> int:
  """Slots that programs reserve for new tokens."""
  return prompts_lib.bucket(max_new_tokens, _MIN_ROOM)


def token_batch(tokens, positions) -> Batch:
  """One more token in every row.

  Args:
    tokens: [B] int32.
    positions: [B] int32.
  """
  tokens = tokens[:, None]
  rows = tokens.shape[0]
  return Batch(
    tokens=tokens,
    targets=tokens,
    loss_weights=jnp.zeros(tokens.shape, jnp.float32),
    positions=positions[:, None],
    segment_ids=jnp.ones_like(tokens),
    branch_ids=jnp.zeros_like(tokens),
    pixels=jnp.zeros((rows, 0, 1, 1, 3), jnp.uint8),
    image_starts=jnp.zeros((rows, 0), jnp.int32),
  )


def cut(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
  """What stands before the first of the stop ids.

  >>> cut([5, 6, 2, 7], stop_ids=(2, 3))
  [5, 6]
  """
  for index, token in enumerate(ids):
    if token in stop_ids:
      return ids[:index]
  return ids


def check_count(name: str, value: int) -> None:
  """ConfigError if a number of things is below one."""
  if value < 1:
    raise ConfigError(f'{name}={value}: must be at least 1')


@functools.partial(jax.jit, static_argnames=('model', 'size'))
def _prefill(model: QwenVL, params: Params, batch: Batch, *, size: int):
  lengths = jnp.sum(batch.segment_ids, axis=1)
  rows = batch.tokens.shape[0]
  cache = KVCache.create(model.config, rows, size, lengths)
  return model.apply({'params': params}, batch, cache, method='extend')


def extend(model: QwenVL, params: Params, cache: KVCache, tokens, step):
  """Logits after one more token a row, the `step`-th new one from 1 on."""
  batch = token_batch(tokens, cache.prompt_lengths + step - 1)
  return model.apply({'params': params}, batch, cache, method='extend')


@functools.partial(
  jax.jit, static_argnames=('model', 'room'), donate_argnames='cache'
)
def _decode(
  model, params, cache, logits, chooser, rows, finished, limit, *, room
):
  """Decodes until all rows have stopped or have `limit` tokens.

  Returns:
    ([B,room] int32 new tokens, undefined after a row's stop id; the cache, so
    that its buffers are reused).
  """
  token = chooser.choose(logits, rows, 0)
  new = jnp.zeros((token.shape[0], room), jnp.int32).at[:, 0].set(token)
  finished = finished | chooser.stops(token)

  def unfinished(state):
    step, _, finished, _, _ = state
    return (step < limit) & ~finished.all()

  def decode(state):
    step, token, finished, new, cache = state
    logits, cache = extend(model, params, cache, token, step)
    token = chooser.choose(logits, rows, step)
    new = jax.lax.dynamic_update_slice(new, token[:, None], (0, step))
    return step + 1, token, finished | chooser.stops(token), new, cache

  state = jnp.int32(1), token, finished, new, cache
  _, _, _, new, cache = jax.lax.while_loop(unfinished, decode, state)
  return new, cache


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
def _step(model, params, cache, token, chooser, row, step):
  logits, cache = extend(model, params, cache, token, step)
  return chooser.choose(logits, row, step), cache


@jax.jit
def _choose(chooser, logits, row, step):
  return chooser.choose(logits, row, step)
