"""Our tokenizer with the methods that vLLM calls (`TokenizerLike`).

A token is text by its bytes: byte b is the character b (Latin-1), so that
pieces of a character are kept apart from what they make together.
"""

from collections.abc import Sequence
from pathlib import Path

from qwenvl_jax import buckets
from qwenvl_jax.conversion import checkpoint_io
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.serve.conversation import PLACE_TOKENS, encode
from qwenvl_jax.text.tokenizer import Tokenizer


class ServedTokenizer:
  """Reads and writes as our server does.

  Of the special tokens only `<ref>`, `<box>` and `<quad>` are read in text, and
  only the others are left out of answers.

  Attributes:
    vocabulary: the tokenizer.
    config: of the model.
  """

  is_fast = True
  truncation_side = 'left'

  def __init__(self, vocabulary: Tokenizer, config: QwenVLConfig):
    self.vocabulary = vocabulary
    self.config = config
    self._control = {
      id: name
      for name, id in vocabulary.special.items()
      if name not in PLACE_TOKENS
    }

  @classmethod
  def from_pretrained(cls, folder: str | Path, *_, **__) -> 'ServedTokenizer':
    """Reads the vocabulary of a checkpoint folder.

    Raises:
      CheckpointError: the folder has none, or is no checkpoint.
    """
    path = buckets.as_path(folder)
    config = checkpoint_io.read_config(path)
    vocabulary = assets.read_tokenizer(path, config)
    if vocabulary is None:
      raise CheckpointError(
        f'{folder} has no vocabulary ({assets.VOCABULARY}): copy it from the '
        'model that this one comes from'
      )
    return cls(vocabulary, config)

  @property
  def all_special_tokens(self) -> list[str]:
    return list(self._control.values())

  @property
  def all_special_ids(self) -> list[int]:
    return list(self._control)

  @property
  def bos_token_id(self) -> int:
    return self.vocabulary.eod_id

  @property
  def eos_token_id(self) -> int:
    return self.vocabulary.im_end_id

  @property
  def pad_token_id(self) -> int:
    return self.vocabulary.eod_id

  @property
  def vocab_size(self) -> int:
    """Rows of the embedding table."""
    return self.config.decoder.vocab_size

  @property
  def max_token_id(self) -> int:
    return self.vocab_size - 1

  @property
  def max_chars_per_token(self) -> int:
    return max(map(len, self.vocabulary.vocabulary))

  def num_special_tokens_to_add(self) -> int:
    return 0

  def __len__(self) -> int:
    return self.vocab_size

  def __call__(self, text: str | list[str], *_, **options) -> dict:
    """`input_ids` of a text, or of each."""
    if isinstance(text, str):
      return {'input_ids': self.encode(text, **options)}
    return {'input_ids': [self.encode(one, **options) for one in text]}

  def encode(
    self,
    text: str,
    truncation: bool | None = None,
    max_length: int | None = None,
    **_,
  ) -> list[int]:
    """Ids of what somebody wrote, without control ids."""
    ids = encode(self.vocabulary, text)
    # Of a prompt that is too long, the end is kept.
    return ids[-max_length:] if truncation and max_length else ids

  def decode(
    self, ids: Sequence[int] | int, skip_special_tokens: bool = False, **_
  ) -> str:
    """Text of ids."""
    ids = [ids] if isinstance(ids, int) else ids
    return self.convert_tokens_to_string(
      self.convert_ids_to_tokens(ids, skip_special_tokens)
    )

  def convert_ids_to_tokens(
    self, ids: Sequence[int], skip_special_tokens: bool = False
  ) -> list[str]:
    """Tokens of ids."""
    return [
      self.vocabulary.decode_bytes([id]).decode('latin-1')
      for id in ids
      if not (skip_special_tokens and id in self._control)
    ]

  def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
    """Text of tokens."""
    return ''.join(tokens).encode('latin-1').decode('utf-8', 'replace')

  def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
    """Ids of tokens; KeyError for one that there is none of."""
    if isinstance(tokens, str):
      return self.get_vocab()[tokens]
    vocab = self.get_vocab()
    return [vocab[token] for token in tokens]

  def get_vocab(self) -> dict[str, int]:
    """Every token's id."""
    ranks = enumerate(self.vocabulary.vocabulary)
    return {
      token.decode('latin-1'): rank for rank, token in ranks
    } | self.vocabulary.special

  def get_added_vocab(self) -> dict[str, int]:
    """Every special token's id."""
    return self.vocabulary.special

  def apply_chat_template(self, messages, tools=None, **_):
    """Messages are not text on their way: see `renderer`."""
    raise NotImplementedError('messages become ids in the renderer')
