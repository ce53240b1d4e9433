"""What the report shows beside scores: answers with boxes, conversations."""

from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from qwenvl_jax import api, image
from qwenvl_jax.data import questions
from qwenvl_jax.data.examples import Question
from qwenvl_jax.data.records import Scene
from qwenvl_jax.eval.tasks import scenes
from qwenvl_jax.eval.tasks.scenes import Answered
from qwenvl_jax.quickstart import report
from qwenvl_jax.text import drawing, grounding

_FIGURES = 8

# What the conversations ask: two questions about each picture, as many as
# stage 3 has seen in a row. Kinds are those that the model can do; scenes and
# subjects are whatever comes first.
_ASKED = (
  (('refer', 'en'), ('caption', 'zh')),
  (('exist', 'en'), ('colour', 'zh')),
  (('side', 'en'), ('count', 'zh')),
)


def picture(scene: Scene) -> Image.Image:
  """Returns a scene's picture."""
  return image.load(scene.image, scene.id)


def gallery(
  answers: Iterable[Answered], by_id: Mapping[str, Scene], kind: str
) -> list[tuple[Image.Image, Answered]]:
  """Returns answers of one kind with their pictures.

  Scenes of one and of several objects alternate.
  """
  of_kind = [x for x in answers if x.question.kind == kind]
  one = [x for x in of_kind if x.question.objects == 1]
  several = [x for x in of_kind if x.question.objects > 1]
  # Every third: both languages occur, and other scenes.
  mixed = [
    x for pair in zip(one[::3], several[::3], strict=False) for x in pair
  ]
  return [(picture(by_id[x.question.record]), x) for x in mixed[:_FIGURES]]


def conversations(
  handle: api.QwenVLModel, test: Sequence[Scene], classes: int
) -> list[list[report.Turn]]:
  """Holds short conversations about held-out scenes.

  Returns:
    The turns of each, marked right or wrong.
  """
  held, scenes_left = [], list(test)
  for asks in _ASKED:
    for scene in scenes_left:
      asked = [_question(scene, kind, x, classes) for kind, x in asks]
      # A thing that is alone is what it can find.
      if all(asked) and (len(scene.objects) == 1) == (asks[0][0] == 'refer'):
        held.append(_converse(handle, scene, asked))
        scenes_left.remove(scene)
        break
  return held


def _question(
  scene: Scene, kind: str, language: str, classes: int
) -> Question | None:
  """Returns a question of a kind, None if the scene does not allow it."""
  asked = questions.held_out(scene, [kind], classes=classes, chat=True)
  return next((x for x in asked if x.language == language), None)


def _converse(
  handle: api.QwenVLModel, scene: Scene, asked: Sequence[Question]
) -> list[report.Turn]:
  turns, history, shown = [], None, picture(scene)
  for question in asked:
    answer, history = handle.chat(
      question.prompt, () if turns else [shown], history, max_new_tokens=112
    )
    judged = scenes.judge(question, answer)
    places = grounding.parse(answer)
    boxes = any(place.boxes for place in places.places)
    turns.append(
      report.Turn(
        grounding.parse(question.prompt).text,
        places.text or answer,
        right=judged.correct,
        expected=grounding.parse(question.reference).text,
        picture=None if turns else shown,
        drawn=drawing.draw(shown, places)[0] if boxes else None,
      )
    )
  return turns
