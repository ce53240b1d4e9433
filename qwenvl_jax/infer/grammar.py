"""Grammars, for answers of a given form: JSON, choices, regex, boxes.

llguidance (the extra `serve`) compiles them; a `Matcher` then follows an answer
and tells before each token which ids may come next.

Text is made of ordinary tokens only. Control tokens (`<|im_end|>`, `<img>`, ..)
are never allowed within an answer, whatever the form says; only box grammars
ask for special tokens: `<ref>`, `</ref>`, `<box>` and `</box>`.

  compiler = GrammarCompiler(tokenizer, vocab_size)
  grammar = compiler.choice(['yes', 'no'])
  request = Request.create(.., matcher=grammar.matcher(sampling.stop_ids))

A grammar may come from anyone: its size, the time it takes to compile and the
work of each mask are bounded.
"""

import functools
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.infer import grammar_check
from qwenvl_jax.infer.matcher import (
  LIMITS,
  Grammar,
  load_llguidance,
  prepare_vocabulary,
  refusal,
)
from qwenvl_jax.text.tokenizer import Tokenizer

MAX_SCHEMA_CHARS = 100_000
MAX_REGEX_CHARS = 10_000
MAX_CHOICES = 10_000
MAX_CHOICES_CHARS = 500_000
MAX_BOXES = 256  # of a phrase, and phrases of an answer

# What compiling may take; a schema of usual size takes milliseconds.
_COMPILE_SECONDS = 5
_COMPILE_BYTES = 1 << 30
_COMPILE_WALL_SECONDS = 30  # on a machine that is busy

# Grammars that a compiler keeps, for requests that ask for the same one.
_KEPT_GRAMMARS = 32

# Between the tokens of a JSON text. Not any number: a model that has nothing
# more to say would write line feeds until its tokens run out.
_JSON_SPACE = r'[ \t\n\r]{1,32}'

# What llguidance takes from a schema as settings.
_JSON_SETTINGS = 'x-guidance'

# One line of up to 128 characters and, as the release has it, a space before.
_PHRASE = r'/ ?[^\s<>\x00-\x1F\x7F][^<>\x00-\x1F\x7F]{0,127}/'
_BOX = '<box> "(" N "," N "),(" N "," N ")" </box>'
_COORDINATE = 'N: /0|[1-9][0-9]{0,2}/'


class GrammarCompiler:
  """Compiles grammars for one vocabulary."""

  def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None):
    """Prepares the vocabulary, once per tokenizer and process.

    Args:
      tokenizer: tells the bytes of each id.
      vocab_size: V of the model's logits; ids past the tokenizer's are never
        allowed. None for the tokenizer's own size.

    Raises:
      ConfigError: llguidance is not installed, or V is too small.
    """
    size = tokenizer.vocab_size
    vocab_size = size if vocab_size is None else vocab_size
    if vocab_size < size:
      raise ConfigError(
        f'vocab_size={vocab_size} is less than the {size} ids of the '
        "tokenizer; use the checkpoint's own tokenizer"
      )
    self.tokenizer = tokenizer
    self.vocab_size = vocab_size
    prepare_vocabulary(tokenizer)
    self._kept = functools.lru_cache(_KEPT_GRAMMARS)(self._compile)

  def json_schema(self, schema: str | Mapping[str, Any]) -> Grammar:
    """Compiles a JSON schema: the answer is one JSON text that it describes.

    Properties come in the schema's order. `{'type': 'object'}` is any object.

    Raises:
      DataError: not a JSON schema, one that llguidance does not support in all
        its keywords, one that nothing satisfies, or one that is too large.
    """
    name, text = 'the JSON schema', _schema_text(schema)
    settings = {
      'whitespace_flexible': True,
      'whitespace_pattern': _JSON_SPACE,
      'lenient': False,
    }
    compiler = load_llguidance().LLMatcher
    try:
      source = compiler.grammar_from_json_schema(text, overrides=settings)
    except ValueError as error:  # Its parser of JSON is stricter than Python's.
      raise refusal(name, str(error)) from error
    return self._kept(name, source, True)

  def regex(self, pattern: str) -> Grammar:
    """Compiles a regular expression that the whole answer matches.

    Args:
      pattern: in the syntax of Rust's `regex`: no look-around and no
        references; `.` is any character but a line feed.

    Raises:
      DataError: not such a pattern, one that nothing matches, or too large.
    """
    if not isinstance(pattern, str) or not pattern:
      raise DataError(
        f'the regex must be a text that is not empty, not {_shown(pattern)}'
      )
    _check_text(pattern, 'the regex')
    _check_size(len(pattern), MAX_REGEX_CHARS, 'the regex', 'characters')
    source = load_llguidance().LLMatcher.grammar_from_regex(pattern)
    return self._kept('the regex', source, True)

  def choice(self, options: Sequence[str]) -> Grammar:
    """Compiles a list of texts: the answer is one of them.

    Raises:
      DataError: no options, one that is no text or empty, or too many.
    """
    if isinstance(options, str) or not isinstance(options, Sequence):
      raise DataError(
        f'the choices must be a list of texts, not {_shown(options)}'
      )
    if not options:
      raise DataError('the choices are an empty list; give one text at least')
    _check_size(len(options), MAX_CHOICES, 'the choices', 'texts')
    for number, option in enumerate(options, start=1):
      if not isinstance(option, str) or not option:
        raise DataError(
          f'choice {number} of {len(options)} must be a text that is not '
          f'empty, not {_shown(option)}'
        )
      _check_text(option, f'choice {number}')
    length = sum(map(len, options))
    _check_size(length, MAX_CHOICES_CHARS, 'the choices', 'characters in all')
    # In capitals: a terminal, which becomes one automaton. As rules, each
    # choice would be an item of its own in the parser.
    literals = ' | '.join(map(_literal, dict.fromkeys(options)))
    return self._kept('the choices', f'start: C\nC: {literals}', False)

  def boxes(
    self,
    max_boxes: int = 1,
    ref: bool | str = False,
    max_refs: int = 1,
  ) -> Grammar:
    """Compiles boxes: `<box>(x,y),(x,y)</box>` with x, y from 0 to 999.

    Args:
      max_boxes: the answer, or each phrase of it, has 1 to so many boxes.
      ref: True for a phrase of the model's own in front of the boxes,
        `<ref>phrase</ref>`; a text for that phrase; False for none.
      max_refs: with `ref`, the answer has 1 to so many phrases.

    Raises:
      ConfigError: a number out of range.
      DataError: a phrase that is empty or has tags in it.
    """
    for name, value in (('max_boxes', max_boxes), ('max_refs', max_refs)):
      if type(value) is not int or not 1 <= value <= MAX_BOXES:
        raise ConfigError(
          f'{name}={_shown(value)} must be a number from 1 to {MAX_BOXES}'
        )
    phrase = ''
    if isinstance(ref, str):
      _check_text(ref, 'the phrase')
      _check_size(len(ref), MAX_REGEX_CHARS, 'the phrase', 'characters')
      if not ref.strip() or re.search('[<>]', ref):
        raise DataError(
          f'the phrase {_shown(ref)} must be words without < and >'
        )
      phrase = f'<ref> {_literal(ref)} </ref>'
    elif ref:
      phrase = f'<ref> {_PHRASE} </ref>'
    elif max_refs != 1:
      raise ConfigError(f'max_refs={max_refs} is for ref=True or a phrase')
    source = (
      f'start: place{{1,{max_refs}}}\n'
      f'place: {phrase} box{{1,{max_boxes}}}\n'
      f'box: {_BOX}\n{_COORDINATE}'
    )
    return self._kept('the boxes', source, False)

  def _compile(self, name: str, source: str, check: bool) -> Grammar:
    """Compiles what llguidance understands.

    Sources that others wrote may do harm: these are checked.
    """
    if check:
      _check(name, source)
    return Grammar(name, source, self.tokenizer, self.vocab_size)


def _check(name: str, source: str) -> None:
  """Compiles in a process with limits; raises DataError where that fails."""
  job = {
    'path': sys.path,
    'seconds': _COMPILE_SECONDS,
    'size': _COMPILE_BYTES,
    'source': source,
    'limits': LIMITS,
  }
  try:
    done = subprocess.run(
      [sys.executable, '-I', '-S', str(pathlib.Path(grammar_check.__file__))],
      input=json.dumps(job),
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      timeout=_COMPILE_WALL_SECONDS,
      text=True,
    )
  except subprocess.TimeoutExpired:
    done = None
  if done is None or done.returncode:
    raise DataError(
      f'{name} takes more than {_COMPILE_SECONDS} s or '
      f'{_COMPILE_BYTES >> 30} GiB to compile; make it simpler: smaller '
      'multiples and counts, fewer alternatives'
    )
  message = json.loads(done.stdout)
  if message:
    raise refusal(name, message)


def _schema_text(schema: str | Mapping[str, Any]) -> str:
  """A schema's JSON text, after a look at what llguidance would not refuse."""
  name = 'the JSON schema'
  try:
    if isinstance(schema, str):
      _check_size(len(schema), MAX_SCHEMA_CHARS, name, 'characters')
      schema = json.loads(schema)
    if not isinstance(schema, Mapping):
      raise DataError(
        f"{name} must be an object such as {{'type': 'object'}}, not "
        f'{_shown(schema)}'
      )
    text = json.dumps(dict(schema), allow_nan=False)
  except RecursionError as error:
    raise DataError(f'{name} is nested too deep; make it flatter') from error
  except (TypeError, ValueError) as error:
    raise DataError(f'{name} is not JSON: {error}') from error
  _check_size(len(text), MAX_SCHEMA_CHARS, name, 'characters')
  if _JSON_SETTINGS in schema:
    raise DataError(f'{name} has the key {_JSON_SETTINGS!r}; take it out')
  return text


def _literal(text: str) -> str:
  """A text as a grammar of llguidance writes it."""
  # Of the control characters, JSON alone leaves the last one as it is.
  return json.dumps(text, ensure_ascii=False).replace('\x7f', '\\u007f')


def _check_text(text: str, name: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise DataError(
      f'{name} has half of a character ({error.object[error.start]!r} at '
      f'character {error.start}); write the whole one'
    ) from error


def _check_size(size: int, most: int, name: str, unit: str) -> None:
  if size > most:
    raise DataError(
      f'{name}: {size} {unit} are more than {most}; make it smaller'
    )


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 40 else text[:40] + '..'
