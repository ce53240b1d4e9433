"""An answer's tokens as text, piece by piece, up to a stop text."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from qwenvl_jax.infer.request import Token
from qwenvl_jax.text.tokenizer import Tokenizer


class Piece(NamedTuple):
  """Text that is certain, and the tokens that made it so."""

  text: str
  tokens: list[Token]


class Writer:
  """Text of tokens as they come.

  Half of a character waits for its rest, and what may be the beginning of a
  stop text waits until it is known.

  Attributes:
    stopped: whether a stop text was met; the text ends before it.
    text: all that was given out.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    self._tokenizer = tokenizer
    self._stops = [stop for stop in stops if stop]
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
    self._held = ''
    self._tokens: list[Token] = []
    self.stopped = False
    self.text = ''

  def add(self, tokens: Sequence[Token], last: bool) -> Piece:
    """Takes tokens in.

    Returns:
      What can be given out now.
    """
    for token in tokens:
      if self.stopped:
        break
      self._tokens.append(token)
      data = self._tokenizer.decode_bytes([token.id])
      self._held += self._decoder.decode(data)
      self._look_for_stop()
    if last and not self.stopped:
      self._held += self._decoder.decode(b'', final=True)
      self._look_for_stop()
    keep = 0 if last or self.stopped else self._undecided()
    text = self._held[: len(self._held) - keep]
    self._held = self._held[len(text) :]
    given: list[Token] = []
    if text or last or self.stopped:
      given, self._tokens = self._tokens, []
    self.text += text
    return Piece(text, given)

  def _look_for_stop(self) -> None:
    places = [self._held.find(stop) for stop in self._stops]
    found = [place for place in places if place >= 0]
    if found:
      self._held, self.stopped = self._held[: min(found)], True

  def _undecided(self) -> int:
    """Characters at the end that may begin a stop text."""
    return max(
      (
        size
        for stop in self._stops
        for size in range(1, min(len(stop), len(self._held) + 1))
        if self._held.endswith(stop[:size])
      ),
      default=0,
    )
