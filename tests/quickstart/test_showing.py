"""What the report shows is what the model said of the first scenes."""

import pytest
import reciter

from qwenvl_jax import api
from qwenvl_jax.data import prepare, questions, sources
from qwenvl_jax.eval.tasks import scenes
from qwenvl_jax.quickstart import showing


@pytest.fixture(scope='module')
def test_scenes(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  prepare.scenes(folder, 'small')
  return list(sources.Scenes(str(folder), 'test', 'small').open())


def test_conversations_are_short_and_judged(test_scenes, tmp_path):
  reciter.save(tmp_path / 'model')
  handle = api.load(tmp_path / 'model')
  held = showing.conversations(handle, test_scenes, scenes.CLASSES)
  assert [len(turns) for turns in held] == [2, 2, 2]
  for first, second in held:
    assert first.picture is not None and second.picture is None
    # What it recites has a box, and is never right.
    assert first.answer == second.answer == 'I see 狗'
    assert first.drawn is not None and not first.right
    assert first.expected and '<' not in first.question + first.expected


def test_galleries_show_scenes_of_one_thing_and_of_several(test_scenes):
  by_id = {scene.id: scene for scene in test_scenes}
  answers = [
    scenes.judge(question, question.reference)
    for scene in test_scenes
    for question in questions.held_out(
      scene, ['caption', 'refer'], classes=scenes.CLASSES
    )
  ]
  shown = showing.gallery(answers, by_id, 'refer')
  assert {x.question.kind for _, x in shown} == {'refer'}
  counts = [x.question.objects > 1 for _, x in shown]
  assert counts == [bool(i % 2) for i in range(len(shown))] and shown
