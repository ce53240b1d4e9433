"""What the quickstart's model is fine-tuned on, as a person would bring it."""

import numpy as np

from qwenvl_jax import image
from qwenvl_jax.data import cli, prepare, questions, sources
from qwenvl_jax.data.builders import compose
from qwenvl_jax.quickstart import own_pictures


def prepared(folder, form, raw):
  assert not cli.main(
    ['prepare', 'mine', '--format', form, '--manual_dir', str(raw),
     '--data_dir', str(folder)]
  )  # fmt: skip
  return sources.Prepared('mine', data_dir=folder).open()


def test_half_of_the_pictures_show_the_new_thing(tmp_path):
  own_pictures.write(tmp_path / 'mine', 10)
  records = prepared(tmp_path, 'csv', tmp_path / 'mine')
  answers = [record.turns[-1].text for record in records]
  assert sum(answer.endswith(' / mushroom') for answer in answers) == 5
  assert len(answers) == 10
  assert own_pictures.NEW not in range(compose.Style().classes)


def test_conversations_to_mix_in_are_about_the_scenes(tmp_path):
  """Pictures and answers, with their boxes, stay what they were trained on."""
  prepare.scenes(tmp_path, 'small')
  raw = tmp_path / 'known'
  own_pictures.write_known(raw, tmp_path, 12, config='small')
  scenes = sources.Scenes(tmp_path, config='small').open()
  records = prepared(tmp_path, 'conversations', raw)
  assert len(records) == 12
  for record, scene in zip(records, scenes, strict=False):
    ours, theirs = record.images[0], scene.image
    assert np.array_equal(image.load(ours, ''), image.load(theirs, ''))
    right = {
      x.reference
      for x in questions.enumerate_all(
        scene, compose.Style().classes, chat=True
      )
    }
    said = {x.text for x in record.turns if x.role == 'assistant'}
    assert said and said <= right
