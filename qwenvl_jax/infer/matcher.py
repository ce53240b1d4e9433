"""Follows answers through a compiled grammar, token by token.

This is where llguidance is called. Its matchers of one grammar share the states
of its automaton, which are made as answers come to them: the first answer pays
for what the others find.
"""

import functools
import re
import time
from collections.abc import Sequence

import numpy as np

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.infer.request import GrammarError
from qwenvl_jax.text.special_tokens import SPECIAL_TOKENS
from qwenvl_jax.text.tokenizer import Tokenizer

# llguidance's own limits: with them each mask takes a bounded time, and a
# grammar a bounded memory (1 to 2 kB a state).
LIMITS = {'max_lexer_states': 50_000, 'verbose_errors': False}

# Sets of tokens whose masks are made once and joined where a grammar allows the
# whole set, as within the texts of JSON, phrases and lines: 500 microseconds
# instead of 7,000.
_TEXT = r'[^"\\<>\x00-\x1F\x7F]'
_WORDS = '[A-Za-z ]'
_TOKEN_SETS = [
  r'[ \t\n\r]+',
  _WORDS + '{1,10}',
  _WORDS + '{1,30}',
  _TEXT + '{1,10}',
  _TEXT + '{1,30}',
  _TEXT + '+',
]

# A grammar that compiles faster is compiled again between two tokens where that
# helps, so many times an answer; for more, running answers would wait too long.
_QUICK_SECONDS = 0.05
_MAX_RESTARTS = 4

# What llguidance says (its beginning) -> what helps who wrote the grammar.
_REWORDED = {
  'NoExtension': 'nothing satisfies it',
  'oneOf constraints': (
    'oneOf needs alternatives of different types, or objects told apart by a '
    'const property; else write anyOf'
  ),
}

_ALL_BITS = np.uint32(0xFFFFFFFF)


class Grammar:
  """A compiled grammar.

  Attributes:
    name: what errors call it.
    tokenizer: its ids are those of the masks.
    vocab_size: V of the masks.
  """

  def __init__(
    self, name: str, source: str, tokenizer: Tokenizer, vocab_size: int
  ):
    """Compiles a grammar.

    Raises:
      DataError: llguidance does not accept it, or it has no answers.
    """
    self.name = name
    self.tokenizer = tokenizer
    self.vocab_size = vocab_size
    self._source = source
    start = time.monotonic()
    self._fresh = self._compile()
    self._quick = time.monotonic() - start < _QUICK_SECONDS
    self._used_up = False
    # Nothing at all in the first mask: better said now than in an answer. It is
    # also the mask that takes longest, and its states are kept.
    first = self.matcher(())
    try:
      possible = first.mask().any()
    except GrammarError as error:
      # Too much work for the whole vocabulary, or nothing to go on with.
      message = f'{name} allows no answer; loosen it'
      failed = first._inner.is_error()
      raise DataError(str(error) if failed else message) from error
    if not possible:
      raise DataError(f'{name} allows only an empty answer; loosen it')

  def matcher(self, stop_ids: Sequence[int]) -> 'Matcher':
    """Returns a matcher at the beginning of an answer.

    Args:
      stop_ids: ids that end the answer. They are allowed exactly where the
        grammar may end, also if they are text.

    Raises:
      ConfigError: an id outside the vocabulary.
    """
    for stop in stop_ids:
      if not 0 <= stop < self.vocab_size:
        raise ConfigError(
          f'stop id {stop} is not from 0 to {self.vocab_size - 1}, the ids of '
          'the model'
        )
    if self._used_up:
      self._fresh = self._compile()
      self._used_up = False
    return Matcher(self, self._fresh.deep_copy(), tuple(map(int, stop_ids)))

  def restart(self, now: bool):
    """Compiles again, without the states that answers have made so far.

    Args:
      now: False to leave it to the next call of `matcher`.

    Returns:
      An llguidance matcher at the beginning, or None if not now, or if
      compiling takes too long for that.
    """
    self._used_up = not (now and self._quick)
    if self._used_up:
      return None
    self._fresh = self._compile()
    return self._fresh.deep_copy()

  def _compile(self):
    module = load_llguidance()
    matcher = module.LLMatcher(
      prepare_vocabulary(self.tokenizer),
      self._source,
      log_level=0,
      limits=module.LLParserLimits(**LIMITS),
    )
    if matcher.is_error():
      raise refusal(self.name, matcher.get_error())
    return matcher


class Matcher:
  """Follows one answer; not for two threads at the same time."""

  def __init__(self, grammar: Grammar, inner, stop_ids: tuple[int, ...]):
    """See `Grammar.matcher`."""
    self._grammar = grammar
    self._inner = inner
    self._stop_ids = stop_ids
    self._tokens: list[int] = []
    self._stopped = False
    self._restarts = 0
    self._ids = grammar.tokenizer.vocab_size
    self._eod_id = grammar.tokenizer.eod_id
    self._words = -(-grammar.vocab_size // 32)

  @property
  def finished(self) -> bool:
    """Whether a stop id was accepted, or the answer can only end here."""
    return self._stopped or (self._inner.is_stopped() and self.may_end)

  @property
  def may_end(self) -> bool:
    """Whether the tokens so far are an answer of the grammar."""
    return self._inner.is_accepting()

  def mask(self) -> np.ndarray:
    """Returns the next mask, [ceil(V/32)] uint32, see `fill`."""
    row = np.empty(self._words, np.uint32)
    self.fill(row)
    return row

  def fill(self, row: np.ndarray) -> None:
    """Writes a bit for each id that may come next: bit i%32 of word i//32.

    Other Python threads run meanwhile.

    Args:
      row: [ceil(V/32)] uint32, contiguous: of one answer, in a batch's masks.

    Raises:
      GrammarError: no id may come next though the answer is not complete, or
        the grammar needs more work than is allowed.
    """
    if row.shape != (self._words,) or row.dtype != np.uint32:
      raise ValueError(
        f'a mask is [{self._words}] uint32, not {list(row.shape)} {row.dtype}'
      )
    row[:] = 0
    if not self._stopped:
      self._write(row[: -(-self._ids // 32)])
      # llguidance's own end; the request's follow.
      _set(row, self._eod_id, False)
    may_end = self.may_end
    for stop in self._stop_ids:
      _set(row, stop, may_end)
    if not may_end and not row.any():
      raise GrammarError(
        f'{self._grammar.name}: no token may follow the {len(self._tokens)} '
        f'so far, and an end (stop ids {list(self._stop_ids)}) would be too '
        'early; give other stop ids or loosen the grammar'
      )

  def allows(self, token: int) -> bool:
    """Returns whether the answer may go on with this id.

    The mask has these ids, but for one case: where the grammar leaves one text
    only, its mask has the first token of that text as the tokenizer splits it,
    and not the other tokens that the text begins with.
    """
    if self._stopped or token in self._stop_ids:
      return token in self._stop_ids and self.may_end
    return (
      0 <= token < self._ids
      and token != self._eod_id
      and self._inner.validate_tokens([token]) == 1
    )

  def accept(self, token: int) -> None:
    """Goes on after a token.

    Raises:
      GrammarError: it is not allowed (the matcher stays where it was), or
        the grammar needs more work than may be done.
    """
    token = int(token)
    if not self.allows(token):
      raise GrammarError(
        f'{self._grammar.name} does not allow token {token} after '
        f'{len(self._tokens)} tokens; choose tokens by its masks'
      )
    if token in self._stop_ids:
      self._stopped = True
      return
    self._tokens.append(token)
    if not self._inner.consume_token(token):
      self._recover()

  def copy(self) -> 'Matcher':
    """Returns a matcher at the same place that goes its own way."""
    other = Matcher(self._grammar, self._inner.deep_copy(), self._stop_ids)
    other._tokens = self._tokens.copy()
    other._stopped = self._stopped
    return other

  def _write(self, row: np.ndarray) -> None:
    """Has llguidance write its mask."""
    self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    if self._inner.is_error():
      self._recover()
      self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
      self._check()

  def _recover(self) -> None:
    """Starts over and repeats the tokens so far.

    The states that a grammar may have are a bounded number, and other answers
    may have used them up; that must not end this one.
    """
    self._restarts += 1
    fresh = self._grammar.restart(now=self._restarts <= _MAX_RESTARTS)
    if fresh is not None:
      self._inner = fresh
      self._inner.consume_tokens(self._tokens)
    self._check()

  def _check(self) -> None:
    if self._inner.is_error():
      raise GrammarError(
        f'{self._grammar.name} needs more work than is allowed after '
        f'{len(self._tokens)} tokens ({_one_line(self._inner.get_error())}); '
        'make it simpler: smaller counts, fewer alternatives'
      )


def load_llguidance():
  """Imports llguidance.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    import llguidance
  except ModuleNotFoundError as error:
    raise ConfigError(
      'answers by a grammar need llguidance, which is not installed: pip '
      "install 'qwenvl_jax[serve]'"
    ) from error
  return llguidance


@functools.lru_cache(maxsize=4)
def prepare_vocabulary(tokenizer: Tokenizer):
  """Makes llguidance's form of a vocabulary, once: it takes a second."""
  module = load_llguidance()
  return module.LLTokenizer(
    module.TokenizerWrapper(_TokenizerForLlguidance(tokenizer)),
    slices=_TOKEN_SETS,
  )


def refusal(name: str, message: str) -> DataError:
  """The error for a grammar that llguidance does not accept."""
  return DataError(
    f'{name} cannot be used: {_one_line(message)}; docs/serving.md, '
    '"Grammars", says what is supported'
  )


class _TokenizerForLlguidance:
  """What llguidance asks of a tokenizer."""

  bos_token_id = None

  def __init__(self, tokenizer: Tokenizer):
    ranks = len(tokenizer.vocabulary)
    self.eos_token_id = tokenizer.eod_id
    self.tokens = [*tokenizer.vocabulary, *map(str.encode, SPECIAL_TOKENS)]
    self.special_token_ids = list(range(ranks, len(self.tokens)))
    self._tokenizer = tokenizer

  def __call__(self, text: bytes | str) -> list[int]:
    text = text.decode('utf-8', 'replace') if isinstance(text, bytes) else text
    return self._tokenizer.encode_ordinary(text)


def _one_line(message: str) -> str:
  """What llguidance's error says, without the drawing and the quotation."""
  found = re.search(r'^error: (.*)$', message, re.MULTILINE)
  line = found.group(1) if found else message.strip().partition('\n')[0]
  line = re.sub(r'^at \d+\(\d+\): ', '', line)
  line = re.sub(r'^invalid regex .*\(in regex\): ', '', line)
  for start, words in _REWORDED.items():
    line = words if line.startswith(start) else line
  return line if len(line) <= 200 else line[:200] + '..'


def _set(row: np.ndarray, token: int, value: bool) -> None:
  """Sets the bit of an id."""
  bit = np.uint32(1 << token % 32)
  if value:
    row[token // 32] |= bit
  else:
    row[token // 32] &= _ALL_BITS ^ bit
