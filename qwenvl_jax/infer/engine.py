"""The engine: slots that hold running answers, and one step for all of them.

Everything on the device has a fixed shape, so that requests come and go without
compiling anything:

  encode    pixels of an image into the bank of image features
  prefill   a piece of a prompt (or of several short ones) into a `Prefix`
  insert    a prefix into free slots of the `State`
  choose    the next token of every slot, from the logits that the state holds
  forward   the decoder on the chosen tokens: the logits after them
  free      a slot that is not needed any more

A step is `choose`, then `forward`; the host reads the chosen tokens while the
device works on `forward`, which does not depend on what the host does with
them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from qwenvl_jax.errors import ConfigError, check_at_least_1, did_you_mean
from qwenvl_jax.infer.programs import programs
from qwenvl_jax.infer.prompts import MIN_LENGTH, bucket
from qwenvl_jax.infer.sampling import Sampling, Settings
from qwenvl_jax.infer.state import Chosen, Prefix, Scores, State
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.stacking import unstack_layers

Params = Any

# Tokens of a prompt that are read at once. More keep a TPU's matrix units busy,
# fewer let running answers go on sooner.
_CHUNK_TPU = 2048
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Sizes of an engine.

  Attributes:
    slots: answers that run at the same time.
    max_len: tokens of a prompt and its answer; None for the decoder's
      `max_position_embeddings`.
    chunk: tokens of a prompt that are read at once, a multiple of 4 times
      `prompts.MIN_LENGTH`; None for what suits the device.
    read_rows: prompts of up to a chunk that are read at once where so many of
      about one length wait; 1 lets running answers go on soonest.
    images: images whose features are kept; None for as many as `read_rows`
      prompts of `max_len` can hold, at least 32.
    cache_dtype: of the key-value cache: None for the compute dtype, or 'int8',
      which halves its memory beside bfloat16.
  """

  slots: int = 8
  max_len: int | None = None
  chunk: int | None = None
  read_rows: int = 1
  images: int | None = None
  cache_dtype: str | None = None

  def __post_init__(self):
    sizes = ('slots', 'max_len', 'chunk', 'read_rows', 'images')
    check_at_least_1(self, *sizes)
    if self.chunk is not None and self.chunk % (4 * MIN_LENGTH):
      raise ConfigError(
        f'EngineConfig.chunk={self.chunk} is not a multiple of {4 * MIN_LENGTH}'
      )
    if self.cache_dtype not in (None, 'int8'):
      raise ConfigError(
        f'EngineConfig.cache_dtype={self.cache_dtype!r} is neither None nor '
        "'int8'"
      )


class Piece(NamedTuple):
  """A part of a prompt that is read at once.

  Attributes:
    start: index of its first token.
    stop: index after its last.
    length: tokens that the program reads; those past `stop` are padding.
  """

  start: int
  stop: int
  length: int


class Engine:
  """The functions of one model at one set of sizes.

  Attributes:
    config: of the model, with layers apart.
    params: its parameters.
    slots: B.
    max_len: tokens of a prompt and its answer.
    chunk: tokens of a prompt that are read at once.
    read_rows: prompts that are read at once.
    images: places for image features.
    adapters: [R] float32 of each low-rank adapter that a request may name, what
      `KVCache.ranks` has in its rows.
  """

  def __init__(
    self,
    config: QwenVLConfig,
    params: Params,
    sizes: EngineConfig = EngineConfig(),
    adapters: Mapping[str, np.ndarray] = MappingProxyType({}),
  ):
    """Takes a model into use.

    Args:
      params: its parameters, layers stacked or apart.
      adapters: by name, of parameters with several (`LoraConfig.by_row`).

    Raises:
      ConfigError: `max_len` is more than the decoder's positions.
    """
    if config.scan_layers:
      config = config.replace(scan_layers=False)
      params = unstack_layers(params)
    self.config, self.params, self.adapters = config, params, adapters
    devices = {
      device
      for leaf in jax.tree.leaves(params)
      if isinstance(leaf, jax.Array)
      for device in leaf.devices()
    }
    self._device = devices.pop() if len(devices) == 1 else None
    positions = config.decoder.max_position_embeddings
    self.max_len = sizes.max_len or positions
    if self.max_len > positions:
      raise ConfigError(
        f'EngineConfig.max_len={self.max_len} is more than the {positions} '
        'positions of the model (max_position_embeddings)'
      )
    on_tpu = jax.default_backend() == 'tpu'
    self.chunk = sizes.chunk or (_CHUNK_TPU if on_tpu else _CHUNK)
    self.slots, self.read_rows = sizes.slots, sizes.read_rows
    queries = config.adapter.queries
    most = self.read_rows * (self.max_len // (queries + 2))
    self.images = sizes.images or max(32, most)
    self._size = self.prefix_size(self.max_len)
    self._programs = programs(config, sizes.cache_dtype)

  @property
  def queries(self) -> int:
    """Q, features of an image."""
    return self.config.adapter.queries

  def pieces(self, length: int) -> list[Piece]:
    """How a prompt is read: a function of its length alone."""
    if length <= self.chunk:
      padded = min(bucket(length, MIN_LENGTH), self.chunk)
      return [Piece(0, length, padded)]
    starts = range(0, length, self.chunk)
    # The last piece is padded to a quarter, a half or all of a chunk.
    rest = length - starts[-1]
    last = next(self.chunk // n for n in (4, 2, 1) if rest <= self.chunk // n)
    lengths = [self.chunk] * (len(starts) - 1) + [last]
    return [
      Piece(start, min(start + self.chunk, length), padded)
      for start, padded in zip(starts, lengths)
    ]

  def prefix_size(self, length: int) -> int:
    """Tokens that the prefix of a prompt of this length has room for."""
    if length <= self.chunk:
      return self.pieces(length)[0].length
    return bucket(-(-length // self.chunk)) * self.chunk

  def joins(self, length: int, other: int) -> bool:
    """Whether prompts of these lengths may be read together."""
    size = self.prefix_size(length)
    return size <= self.chunk and size == self.prefix_size(other)

  def program_lengths(self) -> list[int]:
    """Lengths of prompts that need every program of reading between them."""
    ends = {self.prefix_size(n) for n in range(1, self.chunk + 1)}
    tails = (self.chunk // 4, self.chunk // 2, self.chunk)
    longer = (
      start + tail
      for start in range(self.chunk, self.max_len, self.chunk)
      for tail in tails
    )
    seen, lengths = set(), []
    for length in (min(n, self.max_len) for n in (*sorted(ends), *longer)):
      needs = {
        (self.prefix_size(length), piece.length, piece.start == 0)
        for piece in self.pieces(length)
      }
      if needs - seen:
        seen |= needs
        lengths.append(length)
    return lengths

  def warm_up(
    self, state: State, bank, top: int, scores: bool = False
  ) -> tuple[State, jax.Array]:
    """Compiles all programs of sampled answers, by running them.

    Args:
      state: given up; all slots free.
      bank: given up.
      scores: whether prompts may be scored, too: one more program for each
        length of a piece.

    Returns:
      A state with all slots free, and a bank.
    """
    side = self.config.vision.image_size
    for count in {1, self.read_rows}:
      pixels = np.zeros((count, side, side, 3), np.uint8)
      bank = self.encode(bank, pixels, [0] * count)
      for length in self.program_lengths():
        pieces = self.pieces(length)
        if count > 1 and len(pieces) > 1:
          continue
        tokens = [np.zeros(length, np.int32)] * count
        rows = [np.full(length, -1, np.int32)] * count
        arguments = bank, tokens, rows
        prefix = self.start([length] * count)
        for piece in pieces:
          prefix = self.prefill(prefix, *arguments, piece)
        state = self.insert(state, prefix, [0] * count, [Sampling()] * count)
        if scores and count == 1:
          prefix = self.start([length])
          for piece in pieces:
            prefix, _ = self.score(prefix, *arguments, piece, top)
    words = -(-self.config.decoder.vocab_size // 32)
    everything = np.full((self.slots, words), 0xFFFFFFFF, np.uint32)
    for masks in (None, everything):
      for count in (0, top):
        state, _ = self.choose(state, masks, count)
    state = self.free(self.forward(state), 0)
    return jax.block_until_ready((state, bank))

  def init_state(self) -> State:
    """Makes a state with all slots free."""
    return self._put(self._programs.init_state(self.slots, self._size))

  def init_bank(self) -> jax.Array:
    """Makes an empty bank [F,Q,D] of image features."""
    return self._put(self._programs.init_bank(self.images))

  def _put(self, arrays):
    """Places new arrays like what the programs make of them.

    JAX compiles again for arrays that are bound to a device after some that
    were not, and parameters that were loaded are bound. On a mesh, the programs
    themselves say where arrays are.
    """
    device = self._device
    return arrays if device is None else jax.device_put(arrays, device)

  def encode(self, bank, pixels, places: Sequence[int]) -> jax.Array:
    """Puts the features of images into the bank.

    Args:
      bank: [F,Q,D], given up.
      pixels: [E,R,R,3] uint8 or normalized float.
      places: [E], which of the F.
    """
    return self._programs.encode(
      self.params, bank, pixels, np.asarray(places, np.int32)
    )

  def check_adapter(self, name: str | None) -> None:
    """Raises ConfigError if no adapter has this name."""
    if name is not None and name not in self.adapters:
      raise ConfigError(
        f'no adapter is called {name!r}{did_you_mean(name, self.adapters)}; '
        f'there is {", ".join(map(repr, self.adapters)) or "none"}'
      )

  def start(
    self, lengths: Sequence[int], adapters: Sequence[str | None] = ()
  ) -> Prefix:
    """Makes the prefix of prompts of so many tokens, none of them read.

    Args:
      lengths: one, or several whose `prefix_size` is the same.
      adapters: of each prompt, a name or None; empty for none at all.
    """
    size = self.prefix_size(lengths[0])
    ranks = None
    if self.adapters:
      ranks = np.zeros((len(lengths), self.config.lora.rank), np.float32)
      for row, name in zip(ranks, adapters):
        if name is not None:
          row[:] = self.adapters[name]
    lengths = np.asarray(lengths, np.int32)
    return self._put(self._programs.start(size, lengths, ranks))

  def prefill(
    self,
    prefix: Prefix,
    bank,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[np.ndarray],
    piece: Piece,
  ) -> Prefix:
    """Reads one piece of prompts.

    Args:
      prefix: of what stands before the piece; given up.
      bank: of image features.
      prompts: [T] ids of each whole prompt.
      rows: [T] int32 of each: for each token the row of the bank's F*Q features
        that stands in its place, or -1.
      piece: from `pieces`, of the longest; several prompts have one.
    """
    return self._programs.prefill(
      self.params, prefix, bank, *_piece_arrays(prompts, rows, piece)
    )

  def score(
    self,
    prefix: Prefix,
    bank,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[np.ndarray],
    piece: Piece,
    top: int = 0,
  ) -> tuple[Prefix, Scores]:
    """`prefill` of one prompt, and what the model says of the token after each.

    The token after the prompt's last is nothing: leave its score alone.
    """
    targets = np.zeros(piece.length, np.int32)
    following = prompts[0][piece.start + 1 : piece.stop + 1]
    targets[: len(following)] = following
    return self._programs.score(
      self.params,
      prefix,
      bank,
      *_piece_arrays(prompts, rows, piece),
      targets,
      top=top,
    )

  def insert(
    self,
    state: State,
    prefix: Prefix,
    slots: Sequence[int],
    samplings: Sequence[Sampling],
  ) -> State:
    """Puts prompts that were read into slots; the prefix stays usable.

    Args:
      state: given up.
      prefix: of whole prompts.
      slots: free ones, one a prompt.
      samplings: how their tokens are chosen.
    """
    return self._programs.insert(
      state, prefix, np.asarray(slots, np.int32), Settings.create(samplings)
    )

  def choose(
    self, state: State, masks=None, top: int = 0
  ) -> tuple[State, Chosen]:
    """Chooses the next token of every slot.

    Args:
      state: given up.
      masks: [B,ceil(V/32)] uint32, tokens that grammars allow; None for all.
      top: how many of the most likely tokens are told.
    """
    return self._programs.choose(state, masks, top=top)

  def forward(self, state: State) -> State:
    """Runs the decoder on the tokens that were chosen; gives `state` up."""
    return self._programs.forward(self.params, state)

  def free(self, state: State, slot: int) -> State:
    """Makes a slot free; gives `state` up."""
    return self._programs.free(state, np.int32(slot))

  def copy(
    self, state: State, sources: Sequence[int], targets: Sequence[int], tokens
  ) -> State:
    """Copies slots onto others, and replaces the tokens that were chosen.

    Penalties still count what was chosen.

    Args:
      state: given up.
      sources: [K] slots.
      targets: [K] slots that become what the sources were.
      tokens: [B] ids of all slots.
    """
    return self._programs.copy(
      state,
      *(np.asarray(x, np.int32) for x in (sources, targets, tokens)),
    )


def _piece_arrays(prompts, rows, piece: Piece):
  """[R,T] tokens, [R,T] rows of the bank, [R] counts, the offset or None."""
  shape = len(prompts), piece.length
  padded, taken = np.empty(shape, np.int32), np.full(shape, -1, np.int32)
  counts = np.empty(len(prompts), np.int32)
  for index, (tokens, features) in enumerate(zip(prompts, rows, strict=True)):
    stop = min(piece.stop, len(tokens))
    count = counts[index] = stop - piece.start
    # Padded with a token of the prompt: any other may have an embedding that is
    # not finite, which would stay in the cache.
    padded[index] = tokens[stop - 1]
    padded[index, :count] = tokens[piece.start : stop]
    taken[index, :count] = features[piece.start : stop]
  return padded, taken, counts, np.int32(piece.start) if piece.start else None
