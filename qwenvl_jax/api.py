"""The public face: open a checkpoint folder, use the model.

  import qwenvl_jax
  qwen = qwenvl_jax.load('Qwen-VL-Chat')
  answer, history = qwen.chat('What is this?', images=['picture.png'])

A thin handle over pure functions; `handle.model.apply({'params':
handle.params}, batch)` is the same computation.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.batch import NO_IMAGE, Batch, text_batch
from qwenvl_jax.conversion import adapters as opening
from qwenvl_jax.conversion import checkpoint_io, hub, inspection, low_rank
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.placement import shardings_in_use
from qwenvl_jax.conversion.side_by_side import side_by_side
from qwenvl_jax.errors import CheckpointError, ConfigError, DataError
from qwenvl_jax.image import pixels as decode_pixels
from qwenvl_jax.infer import chat as chatting
from qwenvl_jax.infer import generate as generation
from qwenvl_jax.infer import prompts
from qwenvl_jax.infer.beam import Hypothesis, beam_search
from qwenvl_jax.infer.engine import Engine, EngineConfig
from qwenvl_jax.infer.scheduler import Scheduler
from qwenvl_jax.infer.score import score
from qwenvl_jax.infer.state import Scores
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.loss import next_token_loss
from qwenvl_jax.model.qwen_vl import QwenVL
from qwenvl_jax.model.vision import normalize_pixels
from qwenvl_jax.text.tokenizer import Tokenizer


@buckets.refusals_told()
def load(
  folder: str | Path,
  dtype: Any = None,
  shardings=None,
  keep_int4: bool = False,
  int8: bool = False,
  adapter: str | Path | None = None,
  adapters: Mapping[str, str | Path] = MappingProxyType({}),
) -> 'QwenVLModel':
  """Opens a checkpoint folder.

  Args:
    folder: the released layout (safetensors or `.bin` shards), a converted
      checkpoint, or a training run (its newest complete step; of one with
      low-rank factors, on its base); on a disk, in a bucket (`gs://..`), or a
      hub id (`Qwen/Qwen-VL-Chat`; extra `hub`), which is downloaded the first
      time.
    dtype: of parameters and activations, e.g. 'bfloat16'; None computes in the
      dtype that is stored, and in bfloat16 with int4 weights.
    shardings: tree of shardings like the parameters; None splits them over the
      mesh in use (`sharding.use_mesh`), if there is one. Each device's shard is
      read by itself.
    keep_int4: of the Int4 release, keep the decoder's kernels at 4 bits, which
      halves the memory of the whole model. Otherwise they are dequantized. A
      checkpoint that was converted with them always keeps them.
    int8: round the decoder's kernels to 8 bits as they are read, which halves
      what a token reads from memory beside bfloat16 (docs/serving.md says what
      that costs in quality).
    adapter: folder of a low-rank adapter for this model: a run of
      `finetune/lora.gin`, what `qwenvl-convert adapter-from-peft` made, or
      PEFT's own. It is applied beside the kernels, unmerged, so that these may
      stay packed (`qwenvl-convert merge-adapter` makes one model of both).
    adapters: instead of one, several by name, of the decoder's projections
      only. Each request names its own (`adapter=` of `chat`, `generate` and
      `score`), or none for the model itself, and one batch may mix them.

  Returns:
    A `QwenVLModel`.

  Raises:
    CheckpointError: the folder is not a Qwen-VL checkpoint, or damaged, or has
      no int4 weights to keep; or it cannot be downloaded; or the adapter is
      none of this model.
    ConfigError: no such dtype, or a bucket that may not be used.
  """
  try:
    dtype = dtype and jnp.dtype(dtype)
  except TypeError as error:
    raise ConfigError(
      f"dtype={dtype!r} is no number format; 'bfloat16', 'float16' and "
      "'float32' are"
    ) from error
  folder = hub.local_folder(os.fspath(folder))
  if adapter is None and low_rank.is_ours(folder):
    # A run with low-rank factors: what it trained, on its base.
    adapter, (_, base) = folder, low_rank.read_settings(folder)
    try:
      folder = hub.local_folder(base.folder)
    except CheckpointError as error:
      raise CheckpointError(
        f'{adapter} was trained on {base.folder}, which is not there: open its '
        'base where that is now, with this folder as adapter'
      ) from error
  config = checkpoint_io.read_config(folder, keep_int4).replace(
    scan_layers=False
  )
  if int8:
    decoder = dataclasses.replace(config.decoder, int8=True)
    config = config.replace(decoder=decoder)
  checkpoint_io.check_whole(folder)
  if config.decoder.int4_group is not None:
    dtype = dtype or jnp.dtype('bfloat16')
  adapted, rows = None, {}
  if adapters and adapter is not None:
    raise ConfigError('adapter= and adapters= are two ways; give one of them')
  if adapter is not None:
    place = buckets.as_path(adapter)
    adapted = opening.open_adapter(place, folder, config)
    config = config.replace(lora=adapted.lora)
  elif adapters:
    opened = {
      name: opening.open_adapter(buckets.as_path(place), folder, config)
      for name, place in adapters.items()
    }
    adapted, rows = side_by_side(opened, config)
    config = config.replace(lora=adapted.lora)
  if shardings is None:
    shardings = shardings_in_use(config)
  params = checkpoint_io.read_params(folder, config, dtype, shardings)
  checkpoint_io.check_against(config, params, str(folder))
  if adapted is not None:
    params = opening.applied(params, config, adapted, shardings)
  dtype = dtype or params['decoder']['embed'].dtype
  config = config.replace(dtype=dtype, param_dtype=dtype, remat='none')
  tokenizer = assets.read_tokenizer(folder, config)
  source = inspection.origin(folder, adapter)
  return QwenVLModel(config, params, tokenizer, rows, source)


@buckets.refusals_told()
def digest(folder: str | Path) -> str:
  """Returns what tells a model from others: a digest of its values.

  Args:
    folder: as in `load`; of a training run, the step that `load` opens.

  Raises:
    CheckpointError: not a checkpoint.
  """
  return opening.identity(hub.local_folder(os.fspath(folder)))


@dataclasses.dataclass(frozen=True)
class QwenVLModel:
  """A model ready to use.

  Attributes:
    config: sizes and dtypes.
    params: nested dict of arrays with the children vision, adapter, decoder.
      The decoder's layers are apart, as inference runs them
      (`model.stacking.stack_layers` gives the tree that training has).
    tokenizer: the folder's own vocabulary, None if it has none.
    adapters: by name, see `Engine`.
    source: the folder that it was opened from, and its layout.
  """

  config: QwenVLConfig
  params: dict
  tokenizer: Tokenizer | None
  adapters: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  source: str = 'made in memory'

  def __repr__(self) -> str:
    """Says in one line what this is; the arrays stay out."""
    about = inspection.in_short(self.config, self.params, self.adapters)
    return f'<{type(self).__name__} {self.source}: {about}>'

  @functools.cached_property
  def model(self) -> QwenVL:
    """The linen module."""
    return QwenVL(self.config)

  @functools.cached_property
  def _kept(self) -> dict[str, Scheduler]:
    return {}

  @functools.cached_property
  def _encode(self):
    return jax.jit(
      lambda params, pixels: self.model.apply(
        {'params': params}, pixels, method='encode_images'
      )
    )

  @functools.cached_property
  def _logits(self):
    return jax.jit(
      lambda params, batch, inference: self.model.apply(
        {'params': params}, batch, inference=inference
      ),
      static_argnums=2,
    )

  def preprocess(self, image) -> np.ndarray:
    """A PIL image (or path) to normalized pixels.

    Squashed to the model's square with Pillow's bicubic on uint8, as released.

    Returns:
      [R,R,3] float32.

    Raises:
      DataError: the image cannot be read.
    """
    pixels = decode_pixels(image, self.config.vision.image_size)
    return np.asarray(normalize_pixels(jnp.asarray(pixels)))

  def encode_images(self, pixels) -> jax.Array:
    """Image features.

    Args:
      pixels: [I,R,R,3] float, normalized (or uint8).

    Returns:
      [I,Q,D].
    """
    return self._encode(self.params, jnp.asarray(pixels))

  def logits(self, tokens, images=None) -> jax.Array:
    """Logits in inference mode.

    Args:
      tokens: [B,T] int, no padding.
      images: [I,R,R,3] pixels that fill the `<img>` spans in reading order.

    Returns:
      [B,T,V].

    Raises:
      DataError: the number of images differs from that of the spans, or a span
        is cut.
    """
    return self._logits(self.params, self._batch(tokens, None, images), True)

  def loss(self, tokens, labels, mask=None, images=None) -> jax.Array:
    """Mean next-token cross entropy in training mode.

    Args:
      tokens: [B,T] int.
      labels: [B,T] int aligned with `tokens`, -100 for no loss.
      mask: [B,T] bool, false for padding.
      images: as in `logits`.

    Returns:
      [] float32.
    """
    batch = self._batch(tokens, mask, images)
    labels = np.pad(
      np.asarray(labels)[:, 1:], ((0, 0), (0, 1)), constant_values=-100
    )
    weights = (labels != -100).astype(np.float32)
    logits = self._logits(self.params, batch, False)
    total, weight = next_token_loss(logits, np.maximum(labels, 0), weights)
    return total / weight

  def engine(self, sizes: EngineConfig) -> Engine:
    """What answers many requests at a time; see `infer.scheduler`."""
    return Engine(self.config, self.params, sizes, self.adapters)

  def scheduler(self, max_len: int) -> Scheduler:
    """One slot with room for so many tokens; kept, with its image features."""
    room = generation.room_for(self.config, max_len)
    kept = self._kept.get('scheduler')
    if kept is None or kept.engine.max_len < room:
      # The old one's memory is let go before there is a new one.
      kept = self._kept.pop('scheduler', None)
      del kept
      engine = self.engine(EngineConfig(slots=1, max_len=room))
      kept = self._kept['scheduler'] = Scheduler(engine)
    return kept

  def generate(
    self,
    tokens: Sequence[Sequence[int]],
    images=None,
    max_new_tokens: int = 512,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    slots: int = 32,
    **sampling,
  ) -> list[list[int]]:
    """Continues prompts; greedy at temperature 0.

    Args:
      tokens: B prompts of any lengths.
      images: [I,R,R,3] pixels for all spans in reading order.
      max_new_tokens: upper bound on the new tokens.
      stop: ids that end a row; they are not returned.
      temperature: of sampling.
      slots: most rows answered at a time.
      **sampling: `seed`, `adapter`, and see `infer.sampling.Sampling`.

    Returns:
      New ids of each row.

    Raises:
      DataError: `tokens` is one prompt, not a list of them, or the images do
        not match the spans.
    """
    rows, images = self._rows(tokens, images)
    return generation.generate(
      generation.engine_for(
        self.config, self.params, rows, max_new_tokens, slots, self.adapters
      ),
      rows,
      images,
      max_new_tokens=max_new_tokens,
      stop_ids=tuple(stop),
      temperature=temperature,
      **sampling,
    )

  def beam_search(
    self,
    tokens: Sequence[Sequence[int]],
    images=None,
    *,
    beams: int,
    max_new_tokens: int = 512,
    stop: Sequence[int] = (),
    slots: int = 32,
    **settings,
  ) -> list[Hypothesis]:
    """Finds the best continuations of prompts by beam search.

    Args:
      tokens: as in `generate`; images, max_new_tokens and stop, too.
      beams: continuations kept for a prompt.
      slots: most beams at a time, at least those of one prompt.
      **settings: see `infer.beam.beam_search`.
    """
    rows, images = self._rows(tokens, images)
    # Every prompt takes as many slots as it has beams.
    engine = generation.engine_for(
      self.config, self.params, rows * beams, max_new_tokens, max(slots, beams)
    )
    return beam_search(
      engine,
      rows,
      images,
      beams=beams,
      max_new_tokens=max_new_tokens,
      stop_ids=tuple(stop),
      **settings,
    )

  def score(
    self,
    tokens: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    images=None,
    top: int = 0,
    adapter: str | None = None,
  ) -> list[Scores]:
    """Log-probabilities of given continuations.

    Args:
      tokens: as in `generate`, as are images.
      continuations: ids after each prompt.
      top: how many of the most likely tokens to tell beside each.
      adapter: name of the adapter that is asked, None for none.

    Returns:
      See `infer.score.score`.
    """
    rows, images = self._rows(tokens, images)
    together = [
      [*row, *more] for row, more in zip(rows, continuations, strict=False)
    ]
    engine = generation.engine_for(
      self.config, self.params, together, 1, 1, self.adapters
    )
    return score(engine, rows, continuations, images, top=top, adapter=adapter)

  def chat(self, query: str, images=(), history=None, **options):
    """One turn of a conversation.

    Args:
      query: what the user says.
      images: PIL images or paths that come with this turn.
      history: what an earlier call returned, None to start.
      **options: system prompt, sampling and `adapter`, see `infer.chat`.

    Returns:
      (answer, history).

    Raises:
      CheckpointError: the folder has no vocabulary.
    """
    if self.tokenizer is None:
      raise CheckpointError(
        f'this checkpoint has no vocabulary ({assets.VOCABULARY}): chat needs '
        'one beside config.json'
      )
    return chatting.chat(self, query, images, history, **options)

  def _rows(self, tokens, images) -> tuple[list[list[int]], list]:
    """Prompts, and the images of each."""
    try:
      rows = [list(row) for row in tokens]
    except TypeError as error:
      raise DataError(
        'tokens must be a list of prompts, each a list of ids; for one prompt, '
        'generate([ids])'
      ) from error
    starts, images = self._spans(rows, images)
    ends = np.cumsum([len(row) for row in starts])
    return rows, np.split(images, ends[:-1]) if rows else []

  def _spans(self, rows, images) -> tuple[list[list[int]], np.ndarray]:
    """Where each row's images start, and all images in reading order."""
    starts = [
      prompts.image_starts(row, self.config, f'row {i}')
      for i, row in enumerate(rows)
    ]
    images = prompts.match_images(sum(starts, []), images, 'the batch')
    return starts, images

  def _batch(self, tokens, mask, images) -> Batch:
    batch = text_batch(tokens, mask)
    starts, images = self._spans(batch.tokens, images)
    slots = max(len(row) for row in starts)
    if not slots:
      return batch
    where = np.full((len(starts), slots), NO_IMAGE, np.int32)
    for row, found in zip(where, starts, strict=True):
      row[: len(found)] = found
    pixels = np.zeros((*where.shape, *images.shape[1:]), images.dtype)
    pixels[where != NO_IMAGE] = images
    return dataclasses.replace(batch, pixels=pixels, image_starts=where)
