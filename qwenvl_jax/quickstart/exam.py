"""Evaluation of a quickstart run: scores, pictures, a chat, a report."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table as ConsoleTable

from qwenvl_jax import api, image
from qwenvl_jax.data import sources
from qwenvl_jax.eval import report, scenes
from qwenvl_jax.text import drawing, grounding

FLOORS = {
  'caption': report.Floor(0.50, 0.80),
  'exist': report.Floor(0.85, 0.95),
  'count': report.Floor(0.70, 0.90),
  'colour': report.Floor(0.90, 0.95),
  'refer, one object': report.Floor(0.60, 0.85),
  'refer, several objects': report.Floor(0.30, 0.60),
}

# Kinds of questions with a floor are asked of all scenes, plainly and in chats;
# others, held-out combinations of thing and colour, and easy-VQA of this share.
_SHARE = 0.1
_WITH_FLOOR = ('caption', 'exist', 'count', 'colour', 'refer')
_OTHERS = tuple(kind for kind in scenes.KINDS if kind not in _WITH_FLOOR)

_GALLERY = 12
_PICTURE_SIDE = 448


def evaluate(
  out: Path,
  stages: Sequence[str],
  seconds: dict[str, float],
  *,
  config: str = 'default',
  scenes_count: int = 500,
) -> bool:
  """Scores stages 2 and 3 and writes `report.html` and `scores.json`.

  Args:
    out: the quickstart's folder, with `data` and a run for each stage.
    stages: names of the runs, in order.
    seconds: how long each took, where known.
    config: which set of scenes.
    scenes_count: how many held-out scenes.

  Returns:
    Whether every score reaches its floor.

  Raises:
    CheckpointError: a stage is not there.
    DataError: the scenes are not there.
  """
  began = time.monotonic()
  data = out / 'data'
  few = max(int(scenes_count * _SHARE), 1)
  test = list(
    sources.Scenes(str(data), 'test', config, limit=scenes_count).open()
  )
  combos = list(sources.Scenes(str(data), 'combos', config, limit=few).open())
  easy_vqa = sources.EasyVqa('test', limit=few).open()
  handles = {name: api.load(out / name) for name in ('stage2', 'stage3')}
  tables, answers = [], {}
  size = handles['stage2'].config.vision.image_size

  def about(split, kinds, chat=False):
    return scenes.exam(split, size, kinds=kinds, chat=chat)

  exams = (
    ('stage2', 'Stage 2, held-out layouts', about(test, _WITH_FLOOR)),
    ('stage2', 'Stage 2, further questions', about(test[:few], _OTHERS)),
    ('stage2', 'Stage 2, held-out combinations', about(combos, _WITH_FLOOR)),
    ('stage2', 'Stage 2, easy-VQA', scenes.exam_asked(easy_vqa, size)),
    (
      'stage3',
      'Stage 3, the same in ChatML',
      about(test, _WITH_FLOOR, chat=True),
    ),
  )
  for name, title, (asked, pictures) in exams:
    handle = handles[name]
    seen, blind = scenes.ask(
      handle.config,
      handle.params,
      handle.tokenizer,
      asked,
      pictures,
      chat=name == 'stage3',
    )
    table = report.Table(title, scenes.tabulate(seen, blind))
    _print(table)
    tables.append(table)
    answers[title] = seen
  first = answers[exams[0][1]]
  (out / 'scores.json').write_text(
    json.dumps(
      {
        table.title: [dataclasses.asdict(score) for score in table.scores]
        for table in tables
      },
      ensure_ascii=False,
      indent=1,
    )
    + '\n'
  )
  by_id = {scene.id: scene for scene in test}
  example = next((s for s in by_id.values() if len(s.objects) > 1), test[0])
  picture(example).resize((_PICTURE_SIDE,) * 2).save(out / 'example.png')
  report.write(
    out / 'report.html',
    title='Qwen-VL in small: a quickstart',
    facts=_facts(out, stages, seconds, time.monotonic() - began, tables[0]),
    runs={stage: out / stage for stage in stages},
    tables=tables,
    floors=FLOORS,
    examples=_gallery(first, by_id),
    transcript=_converse(handles['stage3'], list(by_id.values())),
  )
  return not any(
    score.accuracy < FLOORS[score.name].least
    for table in tables[:1]
    for score in table.scores
    if score.name in FLOORS
  )


def picture(scene) -> Image.Image:
  """A scene's picture."""
  return image.load(scene.image, scene.id)


def _print(table: report.Table):
  shown = ConsoleTable(title=table.title)
  for column in ('question', 'language', 'n', 'right', 'blank', 'majority'):
    shown.add_column(
      column, justify='left' if column == 'question' else 'right'
    )
  for score in table.scores:
    shown.add_row(
      score.name,
      score.language,
      str(score.count),
      f'{score.accuracy:.3f}',
      f'{score.blank:.3f}',
      f'{score.majority:.3f}',
    )
  Console().print(shown)


def _facts(out, stages, seconds, evaluation, table) -> dict[str, str]:
  facts = {'folder': str(out)}
  for stage in stages:
    records = [
      json.loads(line)
      for line in (out / stage / 'log.jsonl').read_text().splitlines()
    ]
    losses = [r for r in records if 'loss' in r]
    took = f'{seconds[stage]:.0f} s, ' if stage in seconds else ''
    facts[stage] = (
      f'{took}{losses[-1]["step"]} steps, loss {losses[0]["loss"]:.2f} to '
      f'{losses[-1]["loss"]:.2f}'
    )
  facts['evaluation'] = f'{evaluation:.0f} s'
  facts['questions'] = str(sum(score.count for score in table.scores))
  return facts


def _gallery(answers, by_id):
  """Referring answers on scenes of one and of several objects, alternating."""
  one = [a for a in answers if scenes.row_name(a.question) == list(FLOORS)[4]]
  several = [
    a for a in answers if scenes.row_name(a.question) == list(FLOORS)[5]
  ]
  # Every third: both languages occur, and other scenes.
  mixed = [
    x for pair in zip(one[::3], several[::3], strict=False) for x in pair
  ]
  return [(picture(by_id[a.question.record]), a) for a in mixed[:_GALLERY]]


def _converse(handle, test) -> list[report.Turn]:
  """A short conversation in both languages about one picture, then a second."""
  several = [scene for scene in test if len(scene.classes) > 1]
  pictures = [picture(scene) for scene in (several or test)[:2]]
  turns, history, current = [], None, pictures[0]
  questions = (
    ('Describe the picture with boxes.', pictures[:1]),
    ('What color is the background?', []),
    ('用中文描述图片。', []),
    ('Describe picture 2.', pictures[1:]),
  )
  for question, shown in questions:
    answer, history = handle.chat(question, shown, history, max_new_tokens=112)
    current = shown[0] if shown else current
    places = grounding.parse(answer)
    boxes = any(place.boxes for place in places.places)
    drawn = drawing.draw(current, places)[0] if boxes else None
    turns.append(
      report.Turn(question, places.text or answer, tuple(shown), drawn)
    )
  return turns
