"""Evaluation of a quickstart run: scores, pictures, a chat, a report."""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Column

from qwenvl_jax import api
from qwenvl_jax.data import sources
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.eval import registry
from qwenvl_jax.eval.engine_model import EngineModel
from qwenvl_jax.eval.run import Run
from qwenvl_jax.eval.tasks import scenes
from qwenvl_jax.infer.engine import EngineConfig
from qwenvl_jax.progress import print_table
from qwenvl_jax.quickstart import origin, report, showing

FLOORS = {
  'caption': report.Floor(0.55, 0.75),
  'exist': report.Floor(0.85, 0.95),
  'count': report.Floor(0.70, 0.90),
  'colour': report.Floor(0.90, 0.95),
  'refer, one object': report.Floor(0.80, 0.90),
  'refer, several objects': report.Floor(0.28, 0.55),
}

# Of each stage, titles and tasks. Kinds of questions with a floor are asked of
# all scenes, plainly and in chats; others of a share, a tenth by default.
_TASKS = {
  'stage2': {
    'scenes_test': 'Stage 2, held-out layouts',
    'scenes_others': 'Stage 2, further questions',
    'scenes_combos': 'Stage 2, held-out combinations',
    'easy_vqa_test': 'Stage 2, easy-VQA',
  },
  'stage3': {
    'scenes_chat': 'Stage 3, the same in ChatML',
    'scenes_pairs': 'Stage 3, about two pictures',
  },
}
# Not about what the model can do, but whether it can also do it elsewhere.
_ELSEWHERE = ('scenes_combos', 'easy_vqa_test')
_SHARES = {
  'scenes_test': 1,
  'scenes_chat': 1,
  'scenes_pairs': 0.2,
  'scenes_others': 0.2,
}

_PICTURE_SIDE = 448

# Answers at a time, and tokens of a prompt with its answer.
_SLOTS = 128
_MAX_LEN = 384


def evaluate(
  out: Path,
  stages: Sequence[str],
  seconds: dict[str, float],
  *,
  config: str = 'default',
  scenes_count: int = 500,
) -> bool:
  """Scores stages 2 and 3 and writes `report.html` and `scores.json`.

  Returns:
    Whether every score reaches its floor.

  Raises:
    CheckpointError: a stage is not there.
    DataError: the scenes are not there.
  """
  began = time.monotonic()
  data = out / 'data'
  test = list(
    sources.Scenes(str(data), 'test', config, limit=scenes_count).open()
  )
  handles = {name: api.load(out / name) for name in _TASKS}
  tables, items = [], {}
  for stage, titles in _TASKS.items():
    run = open_run(out / stage, data, out / 'eval' / stage, handles[stage])
    tasks = {
      title: _task(name, config, scenes_count) for name, title in titles.items()
    }
    _prepare(run, list(tasks.values()))
    for title, task in tasks.items():
      found = items[task.name] = run(task).items
      told = task.name not in _ELSEWHERE
      table = report.Table(title, scenes.tabulate(found), told)
      _print(table)
      tables.append(table)
    run.write_tables()
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
  example = next((s for s in by_id.values() if len(s.objects) == 1), test[0])
  showing.picture(example).resize((_PICTURE_SIDE,) * 2).save(
    out / 'example.png'
  )
  handle = handles['stage3']
  facts = origin.facts(handle.config, handle.params)
  evaluation = time.monotonic() - began
  facts |= _facts(out, stages, seconds, evaluation, tables)
  judged = [
    scenes.judge(scenes.question_of(item), item.text)
    for item in (*items['scenes_test'], *items['scenes_others'])
    if item.example.meta
  ]
  report.write(
    out / 'report.html',
    title='Qwen-VL in small: a quickstart',
    facts=facts,
    runs={stage: out / stage for stage in stages},
    tables=tables,
    floors=FLOORS,
    examples={
      'Where is it?': showing.gallery(judged, by_id, 'refer'),
      'Captions with boxes': showing.gallery(judged, by_id, 'grounded_caption'),
    },
    conversations=showing.conversations(handle, test, scenes.CLASSES),
  )
  return not any(
    score.accuracy < FLOORS[score.name].least
    for table in tables[:1]
    for score in table.scores
    if score.name in FLOORS
  )


def _task(name: str, config: str, count: int) -> scenes.SceneTask:
  return dataclasses.replace(
    registry.get(name),
    config=config,
    scenes=max(int(count * _SHARES.get(name, 0.1)), 2),
  )


def open_run(
  checkpoint: Path,
  data: Path,
  out: Path,
  handle: api.QwenVLModel | None = None,
  slots: int = _SLOTS,
) -> Run:
  """Opens an evaluation; what is there of an earlier call is not asked again.

  Without a handle, the checkpoint is opened when the first question is asked.
  """
  digest = api.digest(checkpoint)
  identity = {'checkpoint': checkpoint.name, 'digest': digest}

  def open_model():
    opened = handle or api.load(checkpoint)
    sizes = EngineConfig(slots=slots, max_len=_MAX_LEN, read_rows=8)
    return EngineModel(opened.engine(sizes), opened.tokenizer, identity)

  return Run(out, data, identity, open_model)


def _prepare(run: Run, tasks: Sequence[scenes.SceneTask]) -> None:
  """As `Run.prepare`; answers of an earlier model make room."""
  try:
    run.prepare(tasks)
  except ConfigError:
    shutil.rmtree(run.out)
    run.prepare(tasks)


def _print(table: report.Table):
  names = ('language', 'n', 'right', 'blank', 'majority')
  head = ('question', *(Column(name, justify='right') for name in names))
  rows = (
    (
      *(score.name, score.language, str(score.count)),
      *(f'{x:.3f}' for x in (score.accuracy, score.blank, score.majority)),
    )
    for score in table.scores
  )
  print_table(head, rows, title=table.title)


def _facts(out, stages, seconds, evaluation, tables) -> dict[str, str]:
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
  facts['questions'] = str(
    sum(score.count for table in tables for score in table.scores)
  )
  return facts
