"""Stage 3 of the quickstart: conversations about scenes.

About one picture, two, or none; `text.chatml` says how they are written.
"""

from collections.abc import Sequence

from qwenvl_jax.data.examples import Question, Sample
from qwenvl_jax.text import chatml
from qwenvl_jax.text.chatml import TextSpan


def sample(
  record: str,
  pictures: Sequence[TextSpan],
  conversations: Sequence[Sequence[Question]],
  images: Sequence[object] = (),
) -> Sample:
  """Makes a sample of several conversations about the same pictures.

  Each conversation is questions asked one after the other; `pictures` holds an
  image span for each of `images`, or words in its place.
  """
  prefix = chatml.turn_spans('system', chatml.DEFAULT_SYSTEM)
  prefix += chatml.open_turn('user')
  for number, span in enumerate(pictures, start=1):
    prefix += (TextSpan(f'Picture {number}: '), span, TextSpan('\n'))
  return Sample(
    record=record,
    prefix=prefix,
    continuations=tuple(map(_continuation, conversations)),
    images=tuple(images),
  )


def _continuation(turns: Sequence[Question]) -> tuple[TextSpan, ...]:
  """The turns, but for the beginning of the first, which the prefix holds."""
  spans = ()
  for number, asked in enumerate(turns):
    spans += chatml.open_turn('user') if number else ()
    spans += (TextSpan(asked.prompt), *chatml.CLOSE_TURN)
    spans += chatml.turn_spans('assistant', asked.answer)
  return spans
