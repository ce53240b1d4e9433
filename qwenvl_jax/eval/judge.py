"""A language model that compares two answers, by any OpenAI endpoint.

What it says is kept beside the run: a run that is started again asks only what
is new, and one whose replies are all there needs no endpoint.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from qwenvl_jax.data.readers import fields, json_lines
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.eval import predictions

# Environment variables; the first two are those of OpenAI's own client.
KEY, URL, MODEL = 'OPENAI_API_KEY', 'OPENAI_BASE_URL', 'QWENVL_JUDGE'
_DEFAULT_MODEL = 'gpt-4'
_RETRIES = 8
_AT_A_TIME = 8
_NUMBER = re.compile(r'\d+(?:\.\d+)?')


@dataclasses.dataclass(frozen=True)
class Judge:
  """Asks a judge, and remembers its replies in a file of JSON lines.

  Attributes:
    file: of the replies.
    model: that judges; a reply counts for it alone.
  """

  file: pathlib.Path
  model: str = dataclasses.field(
    default_factory=lambda: os.environ.get(MODEL, _DEFAULT_MODEL)
  )

  def replies(self, questions: Sequence[Sequence[Mapping]]) -> list[str]:
    """Returns the reply to each list of messages, in order.

    Each new one is written as soon as it is there.

    Raises:
      ConfigError: something is to be asked, and no endpoint is set.
      DataError: the endpoint does not answer, what it said so far is kept; or
        a line of the file is none.
    """
    known = self._read()
    keys = [self._key(messages) for messages in questions]
    asked = dict(zip(keys, questions, strict=True))
    new = [key for key in asked if key not in known]
    if new:
      client = _client()
      pool = ThreadPoolExecutor(_AT_A_TIME)
      try:
        replies = pool.map(lambda key: self._ask(client, asked[key]), new)
        with predictions.lines_to(self.file) as file:
          for key, reply in zip(new, replies, strict=True):
            known[key] = reply
            line = {'key': key, 'model': self.model, 'reply': reply}
            text = json.dumps(line, ensure_ascii=False)
            file.write(text.encode('utf-8', 'backslashreplace') + b'\n')
      finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [known[key] for key in keys]

  def _key(self, messages) -> str:
    about = json.dumps([self.model, *messages], sort_keys=True)
    return hashlib.sha256(about.encode()).hexdigest()[:32]

  def _read(self) -> dict[str, str]:
    known = {}
    predictions.drop_torn(self.file)
    if not self.file.exists():
      return known
    for record, line in json_lines.lines(self.file):
      entry = json_lines.parse(line, record)
      key = fields.text_field(entry, 'key', record)
      known[key] = str(fields.field(entry, 'reply', record))
    return known

  def _ask(self, client, messages) -> str:
    import openai

    try:
      answer = client.chat.completions.create(
        model=self.model, messages=list(messages), temperature=0, stop=['\n']
      )
    except openai.OpenAIError as error:
      raise DataError(
        f'the judge {self.model} does not answer ({error!s:.200}); set {KEY}, '
        f'{URL} and {MODEL}, and run again: its replies so far are kept in '
        f'{self.file}'
      ) from error
    return answer.choices[0].message.content or ''


def check_endpoint() -> None:
  """Raises ConfigError if no judge is set in the environment."""
  if not (os.environ.get(KEY) or os.environ.get(URL)):
    raise ConfigError(
      f'no judge: set {KEY}, and {URL} for an endpoint other than OpenAI; '
      f'{MODEL} names the model ({_DEFAULT_MODEL})'
    )


def _client():
  check_endpoint()
  try:
    import openai
  except ImportError as error:
    raise ConfigError(
      'a judge needs openai; pip install "qwenvl_jax[eval]"'
    ) from error
  return openai.OpenAI(
    api_key=os.environ.get(KEY) or 'none', max_retries=_RETRIES
  )


def two_scores(reply: str) -> tuple[float, float] | None:
  """Returns the two scores in the first line of a reply, None without them.

  >>> two_scores('7 8.5')
  (7.0, 8.5)
  """
  lines = reply.strip().splitlines()
  found = lines[0].split() if lines else []
  if len(found) != 2 or not all(map(_NUMBER.fullmatch, found)):
    return None
  first, second = map(float, found)
  return (first, second) if max(first, second) <= 10 else None
