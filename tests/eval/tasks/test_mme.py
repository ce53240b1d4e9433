import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.eval import registry, runner
from qwenvl_jax.eval.prompting import chat_parts
from qwenvl_jax.eval.tasks.mme import SUBTASKS


def mme(files, pictures=2):
  """Two pictures a subtask, in both layouts that the archive has."""
  for subtask in SUBTASKS:
    nested = subtask in ('artwork', 'celebrity')
    texts = 'questions_answers_YN/' if nested else ''
    images = 'images/' if nested else ''
    for number in range(pictures):
      files.pictures(f'MME/{subtask}/{images}{number:04}.jpg')
      files.write(
        f'MME/{subtask}/{texts}{number:04}.txt',
        b'Is there a dog? Please answer yes or no.\tYes\r\n'
        b'Is there a cat? Please answer yes or no.\tNo\n',
      )


def test_mme(files, run):
  mme(files)

  def said(example):
    picture, question = example.key.rpartition('/')[::2]
    if picture == 'OCR/0001.jpg':  # one of two right
      return 'Yes, there is.'
    if picture == 'code_reasoning/0000.jpg':  # none right
      return {'1': 'No.', '2': 'I see no cat'}[question]
    return {'1': ' Yes', '2': 'no, there is none'}[question]

  task = registry.get('mme')
  scores, outcome, _ = run(task, said, 14 * 4)
  # OCR: three of four questions and one of two pictures: 75 + 50.
  # code_reasoning: two of four and one of two: 50 + 50.
  assert scores == {
    'perception': pytest.approx(9 * 200 + 125),
    'cognition': pytest.approx(3 * 200 + 100),
  }
  prompt = outcome.items[0].example.prompt
  # The release's query: without `Picture 1: `.
  assert prompt.chat and chat_parts(prompt) == list(prompt.parts)
  assert prompt.parts[1] == ('\nIs there a dog? Please answer yes or no.')


def test_a_subtask_that_is_cut_off_is_named(files):
  mme(files)
  with pytest.raises(DataError, match='MME/existence: 56 examples.*2,374'):
    runner.take(registry.get('mme'), files.root)
  files.write('MME/scene/0001.txt', b'Is there a dog?\tperhaps\n')
  with pytest.raises(DataError, match='scene/0001.txt, line 1.*no question'):
    list(registry.get('mme').examples(files.root))
  (files.root / 'MME/count/0000.jpg').unlink()
  with pytest.raises(DataError, match='count/0000.txt: no picture 0000.jpg'):
    list(registry.get('mme').examples(files.root))
