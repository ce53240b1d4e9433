"""Requests of the API as requests to the engine."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.infer.chat import stop_ids
from qwenvl_jax.infer.grammar import GrammarCompiler
from qwenvl_jax.infer.matcher import Grammar
from qwenvl_jax.infer.request import Request
from qwenvl_jax.infer.sampling import MIN_TEMPERATURE, Sampling
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.serve.limits import ApiError, Limits
from qwenvl_jax.serve.schemas import Settings
from qwenvl_jax.text.tokenizer import Tokenizer

# The released chat model's own; OpenAI's is 1.
DEFAULT_TOP_P = 0.3


def stop_texts(body: Settings, limits: Limits) -> list[str]:
  """The texts that end an answer.

  Raises:
    ApiError: too many, too long or empty ones.
  """
  stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
  if len(stops) > limits.stops:
    raise ApiError(f'stop: at most {limits.stops} texts', 'stop')
  if any(not 0 < len(stop) <= limits.stop_chars for stop in stops):
    raise ApiError(
      f'stop: texts have 1 to {limits.stop_chars} characters', 'stop'
    )
  return stops


def compile_grammar(
  body: Settings, compiler: GrammarCompiler
) -> Grammar | None:
  """The form that an answer must have, None for any.

  Raises:
    ApiError: more than one form, or one that cannot be compiled.
  """
  wanted = body.structured_outputs
  forms = {
    name: value
    for name, value in (
      ('json', wanted and wanted.json_),
      ('regex', wanted and wanted.regex),
      ('choice', wanted and wanted.choice),
      ('boxes', wanted and wanted.boxes),
    )
    if value is not None and value is not False
  }
  if body.response_format and body.response_format.type != 'text':
    form = body.response_format
    if form.type == 'json_schema' and form.json_schema is None:
      raise ApiError(
        "response_format of type 'json_schema' needs json_schema.schema",
        'response_format',
      )
    schema = (
      form.json_schema.schema_ if form.json_schema else {'type': 'object'}
    )
    forms['response_format'] = schema
  if not forms:
    return None
  if len(forms) > 1:
    raise ApiError(
      f'an answer has one form, not {" and ".join(forms)}', [*forms][0]
    )
  ((name, value),) = forms.items()
  try:
    if name in ('json', 'response_format'):
      return compiler.json_schema(value)
    if name == 'regex':
      return compiler.regex(value)
    if name == 'choice':
      return compiler.choice(value)
    if value is True:
      return compiler.boxes()
    return compiler.boxes(value.max_boxes, value.ref, value.max_refs)
  except (DataError, ConfigError) as error:
    raise ApiError(str(error), name) from error


def engine_requests(
  config: QwenVLConfig,
  tokenizer: Tokenizer,
  body: Settings,
  tokens: Sequence[int],
  pixels: Any,
  max_tokens: int,
  grammar: Grammar | None,
  **settings,
) -> list[Request]:
  """One request to the engine for each of the `n` answers to a prompt.

  Args:
    pixels: [I,R,R,3] of its pictures, a list or None.
    **settings: other attributes of `Request`.

  Raises:
    ApiError: settings that contradict the model or each other.
  """
  ends = stop_ids(tokenizer)
  stops = (*(() if body.ignore_eos else ends), *body.stop_token_ids)
  seed = secrets.randbits(62) if body.seed is None else body.seed % 2**62
  temperature = body.temperature
  # Logits divided by less leave float32; the most likely token is the limit.
  if 0 < temperature < MIN_TEMPERATURE:
    temperature = 0.0
  try:
    sampling = Sampling(
      temperature,
      max(body.top_k, 0),
      DEFAULT_TOP_P if body.top_p is None else body.top_p,
      min_p=body.min_p,
      repetition_penalty=body.repetition_penalty,
      presence_penalty=body.presence_penalty,
      frequency_penalty=body.frequency_penalty,
      logit_bias=_biases(body),
      min_new_tokens=body.min_tokens,
      stop_ids=stops,
    )
    request = Request.create(
      config,
      tokens,
      pixels,
      max_new_tokens=max_tokens,
      sampling=sampling,
      **settings,
    )
    # Pixels are there once, however many answers are wanted.
    return [
      dataclasses.replace(
        request,
        sampling=dataclasses.replace(sampling, seed=(seed, number)),
        matcher=grammar and grammar.matcher(stops),
      )
      for number in range(body.n)
    ]
  except (DataError, ConfigError) as error:
    raise ApiError(str(error)) from error


def room_for(
  length: int, wanted: int | None, max_len: int, what: str = 'max_tokens'
) -> int:
  """Tokens that an answer may have.

  Args:
    wanted: None for all that there is room for.

  Raises:
    ApiError: there is no room for the prompt, or for so long an answer.
  """
  room = max_len - length
  if room < 1 or (wanted or 0) > room:
    asked = f' and {what}={wanted}' if wanted else ''
    raise ApiError(
      f'{length} prompt tokens{asked} are more than the {max_len} of this '
      "model's context; shorten the prompt or ask for less",
      'messages' if room < 1 else what,
      code='context_length_exceeded',
    )
  return room if wanted is None else wanted


def _biases(body: Settings) -> dict[int, float]:
  try:
    return {int(token): bias for token, bias in (body.logit_bias or {}).items()}
  except ValueError as error:
    raise ApiError(
      'logit_bias: keys are token ids, written as numbers', 'logit_bias'
    ) from error
