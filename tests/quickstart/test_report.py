"""The report is one file that shows what fell short."""

import dataclasses
import json
import re

import golden
import pytest
from PIL import Image

from qwenvl_jax.data import questions
from qwenvl_jax.data.examples import Question
from qwenvl_jax.eval.tasks import scenes
from qwenvl_jax.quickstart import origin, report

REFER = Question(
  task='referring',
  kind='refer',
  language='en',
  prompt='<ref>the cat</ref>',
  answer='<box>(100,100),(300,300)</box>',
  record='r',
  boxes=((100, 100, 300, 300),),
)


CAPTION = dataclasses.replace(
  REFER,
  kind='grounded_caption',
  prompt='Describe the picture with boxes.',
  answer='<ref>a cat</ref><box>(100,100),(300,300)</box> on red',
)


def write(folder, scores, **options):
  """Writes a report with these scores; returns the page."""
  run = folder / 'stage1'
  run.mkdir()
  (run / 'log.jsonl').write_text(
    ''.join(json.dumps({'step': i, 'loss': 1 / i}) + '\n' for i in (1, 2, 3))
  )
  report.write(
    folder / 'report.html',
    title='A <title>',
    facts={'commit': 'a <commit>'},
    runs={'stage1': run},
    tables=[report.Table('Held-out', scores)],
    floors={'caption': report.Floor(0.5, 0.8)},
    **({'examples': {}, 'conversations': []} | options),
  )
  return (folder / 'report.html').read_text()


def test_a_report_is_one_page(tmp_path):
  score = scenes.Score('caption', 'zh', 5, 0.4, 0.1, 0.2)
  picture = Image.new('RGB', (112, 112), 'red')
  told = report.Turn('这是什么？', 'a <cat>', False, 'a dog', picture, picture)
  asked = scenes.judge(REFER, '<box>(1,1),(9,9)</box>')
  described = scenes.judge(CAPTION, CAPTION.answer)
  page = write(
    tmp_path,
    [score],
    examples={'Where': [(picture, asked), (picture, described)]},
    conversations=[[told]],
  )
  assert 'A &lt;title&gt;' in page and 'a &lt;commit&gt;' in page
  assert 'say what is there (zh) 0.400, floor 0.500' in page
  assert page.count('data:image/png;base64,') == 4
  assert '<svg' in page
  assert '这是什么？' in page
  assert 'a &lt;cat&gt;' in page and 'wrong: a dog' in page
  for outside in ('src="http', 'href="http', 'url(http'):
    assert outside not in page


def test_questions_and_answers_are_told_in_words(tmp_path):
  picture = Image.new('RGB', (112, 112), 'red')
  answers = [
    scenes.judge(REFER, '<box>(100,100),(300,300)</box>'),
    scenes.judge(CAPTION, CAPTION.answer),
  ]
  page = write(tmp_path, [], examples={'x': [(picture, a) for a in answers]})
  assert '&lt;' not in page.split('<h2>x</h2>')[1].split('<h2>')[0]
  assert 'the cat' in page and 'a cat on red' in page


def test_labels_name_what_was_asked_for(tmp_path, monkeypatch):
  labels = []

  def draw(picture, places):
    labels.append([place.ref for place in places])
    return picture, ''

  monkeypatch.setattr(report.drawing, 'draw', draw)
  picture = Image.new('RGB', (112, 112), 'red')
  answer = scenes.judge(REFER, '<box>(1,1),(9,9)</box>')
  write(tmp_path, [], examples={'x': [(picture, answer)]})
  assert labels == [['the cat', 'true']]


@pytest.mark.parametrize(
  'right, verdict, mark',
  [(0.9, 'yes', ''), (0.3, 'sometimes', ''), (0.2, 'no, guessing', 'blank')],
)
def test_what_was_not_read_from_the_picture_is_marked(
  right, verdict, mark, tmp_path
):
  page = write(tmp_path, [scenes.Score('count', 'en', 9, right, 0.2, 0.1)])
  assert verdict in page
  assert ('not above blank' in page) == (mark == 'blank')
  assert ('<tr class="blind">' in page) == (mark == 'blank')


def test_every_row_of_the_tables_has_words():
  kinds = {*questions.KINDS, *questions.PAIR_KINDS, 'easy_vqa'}
  # Asked without a picture, so never examined.
  kinds -= {'translate', 'compare', 'refer'}
  assert kinds <= report.SKILLS.keys()


def test_a_run_says_where_it_comes_from():
  told = origin.facts(golden.config(), golden.params())
  assert 'vision' in told['model'] and 'parameters' in told['model']
  assert re.search(r'commit [0-9a-f]{10}|no checkout', told['code'])
  assert 'cores' in told['machine'] and 'JAX' in told['machine']
