"""Prompts as the model reads them: token ids, and what stands for pictures."""

import hashlib
import json
from collections.abc import Sequence

from qwenvl_jax.eval.task import Example, Picture, Prompt
from qwenvl_jax.text import chatml
from qwenvl_jax.text.tokenizer import Tokenizer


def chat_parts(prompt: Prompt) -> list[str | Picture]:
  """The content of a chat's turn: its pictures are numbered, mostly."""
  if not prompt.numbered:
    return list(prompt.parts)
  parts, number = [], 0
  for part in prompt.parts:
    if isinstance(part, Picture):
      number += 1
      parts += [f'Picture {number}: ', part, '\n']
    else:
      parts.append(part)
  return parts


def token_ids(
  tokenizer: Tokenizer, prompt: Prompt, image_tokens: int
) -> list[int]:
  """Ids of a prompt, up to where the answer begins."""

  def encode(parts: Sequence[str | Picture]) -> list[int]:
    texts = [None if isinstance(x, Picture) else x for x in parts]
    return chatml.encode_parts(tokenizer, texts, image_tokens)

  if not prompt.chat:
    return encode(prompt.parts)
  newline = tokenizer.encode_ordinary('\n')

  def turn(role: str, content: Sequence[str | Picture]) -> list[int]:
    return [
      *(tokenizer.im_start_id, *tokenizer.encode_ordinary(role), *newline),
      *(*encode(content), tokenizer.im_end_id, *newline),
    ]

  system = chatml.DEFAULT_SYSTEM if prompt.system is None else prompt.system
  return [
    *turn('system', [system]),
    *turn('user', chat_parts(prompt)),
    *(tokenizer.im_start_id, *tokenizer.encode_ordinary('assistant')),
    *newline,
  ]


def digest(example: Example) -> str:
  """What differs between examples that ask for something else.

  Pictures count by their place only: a data folder may move.
  """
  prompt = example.prompt
  parts = [x if isinstance(x, str) else None for x in prompt.parts]
  about = [
    *(parts, prompt.chat, prompt.system, prompt.numbered),
    list(example.choices),
  ]
  return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
