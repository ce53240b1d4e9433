"""The report is one file that shows what fell short."""

import json

from PIL import Image

from qwenvl_jax.data.examples import Question
from qwenvl_jax.eval.tasks import scenes
from qwenvl_jax.quickstart import report

REFER = Question(
  task='referring',
  kind='refer',
  language='en',
  prompt='<ref>the cat</ref>',
  answer='<box>(100,100),(300,300)</box>',
  record='r',
  boxes=((100, 100, 300, 300),),
)


def test_report(tmp_path):
  run = tmp_path / 'stage1'
  run.mkdir()
  (run / 'log.jsonl').write_text(
    ''.join(json.dumps({'step': i, 'loss': 1 / i}) + '\n' for i in (1, 2, 3))
  )
  picture = Image.new('RGB', (112, 112), 'red')
  score = scenes.Score('caption', 'zh', 5, 0.4, 0.1, 0.2)
  report.write(
    tmp_path / 'report.html',
    title='A <title>',
    facts={'folder': 'here'},
    runs={'stage1': run},
    tables=[report.Table('Held-out', [score])],
    floors={'caption': report.Floor(0.5, 0.8)},
    examples=[(picture, scenes.judge(REFER, '<box>(1,1),(9,9)</box>'))],
    transcript=[report.Turn('这是什么？', 'a <cat>', (picture,), picture)],
  )
  page = (tmp_path / 'report.html').read_text()
  assert 'A &lt;title&gt;' in page
  assert '<li>Held-out: caption (zh) 0.40 &lt; 0.50</li>' in page
  assert '0.400' in page
  assert page.count('data:image/png;base64,') == 3
  assert '<svg' in page
  assert '这是什么？' in page
  assert 'a &lt;cat&gt;' in page
  for outside in ('src="http', 'href="http', 'url(http'):
    assert outside not in page
