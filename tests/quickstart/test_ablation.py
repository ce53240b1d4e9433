"""The ablations: their configs at full size, and the command in small."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from qwenvl_jax import configuration
from qwenvl_jax.data import things
from qwenvl_jax.data.records import Object, scene
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.eval import runner
from qwenvl_jax.eval.answering import Reply
from qwenvl_jax.model.adapter import Adapter
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.vision import VisionTransformer
from qwenvl_jax.quickstart import __main__ as quickstart
from qwenvl_jax.quickstart import ablation, text_exams
from qwenvl_jax.quickstart.phases import Phases

_VARIANTS = [
  variant for x in ablation.TRAININGS.values() for variant in x.variants
]


@pytest.mark.parametrize('variant', _VARIANTS, ids=lambda x: x.name)
def test_at_full_size(variant):
  """Shapes of the variant's features, and parameters of the released size."""
  files = ['stage1.gin', *(f'ablation/{name}.gin' for name in variant.files)]
  configuration.load(files)
  config = configuration.build(QwenVLConfig, whole=False)
  side = config.vision.image_size
  pixels = jax.ShapeDtypeStruct((2, side, side, 3), jnp.uint8)
  vision, adapter = VisionTransformer(config.vision), Adapter(config.adapter)
  key = jax.random.key(0)
  params = jax.eval_shape(vision.init, key, pixels)
  released = jax.eval_shape(
    VisionTransformer(QwenVLConfig().vision).init, key, pixels
  )
  assert params == released
  patches = jax.eval_shape(vision.apply, params, pixels)
  assert patches.shape == (2, (side // 14) ** 2, 1664)
  found = jax.eval_shape(
    lambda x: adapter.init_with_output(key, x, (side // 14,) * 2)[0], patches
  )
  assert found.shape == (2, variant.queries, 4096)
  if 'queries' not in variant.name:
    assert str(side) == variant.name.split()[0]
    assert config.vision.window == (16 if 'window' in variant.name else None)


def _run(folder, losses, seconds=1.0):
  folder.mkdir(parents=True)
  lines = [
    {'step': i, 'loss': loss, 'seconds': seconds if i > 1 else 60}
    for i, loss in enumerate(losses, 1)
  ]
  (folder / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
  return folder


def test_table_compares_step_by_step(tmp_path):
  """A difference that is the same in every step has no error."""
  training = ablation.TRAININGS['window']
  base = [5, 4, 3, 2, 1, 2, 1, 2, 1, 2]
  runs = {
    x.name: _run(tmp_path / x.name, [b + i for b in base], 2.0 + i)
    for i, x in enumerate(training.variants)
  }
  head, rows = ablation.table(training, runs)
  assert [len(row) for row in rows] == [len(head)] * 4
  assert rows[0] == ['448 global', '4.500', '1.500', '', '2.00', '10']
  assert rows[1][1:] == ['5.500', '2.500', '+1.000 ± 0.000', '3.00', '9']
  assert rows[3][3] == '+1.000 ± 0.000'


def test_runs_of_other_steps_are_not_mixed_in(tmp_path, monkeypatch):
  training = ablation.TRAININGS['queries']
  variant = training.variants[0]
  folder = _run(tmp_path / '64_queries', [3, 2, 1])
  quickstart.mark_finished(folder, 1.0)
  settings = quickstart.Settings(tmp_path, smoke=True, platform='cpu')
  phases = Phases([variant.name], estimated=False)
  ablation._train(settings, training, variant, tmp_path, 3, phases)
  with pytest.raises(ConfigError, match='run of 3 steps, not of 4: name anoth'):
    ablation._train(settings, training, variant, tmp_path, 4, phases)
  # Of a run that was stopped at step 3, and goes on with 2: there is nothing to
  # do, and nothing to compare with runs of 2.
  monkeypatch.setattr(quickstart, 'command', lambda *_, **__: None)
  (folder / 'finished').unlink()
  with pytest.raises(ConfigError, match='run of 3 steps, not of 2: name anoth'):
    ablation._train(settings, training, variant, tmp_path, 2, phases)
  assert not quickstart.finished(folder)


def _scenes():
  places = [(2, 10, 22, 30), (40, 30, 60, 50), (70, 60, 90, 80)]
  contents = [[0, 1], [2], [3, 3, 4], [5, 6, 7], [8, 8]]
  return [
    scene(
      f's{i}',
      b'',
      100,
      [Object(kind, box) for kind, box in zip(kinds, places)],
      i,
    )
    for i, kinds in enumerate(contents)
  ]


@dataclasses.dataclass
class _Reader:
  """Prefers a choice by what stands in the prompt."""

  def answer(self, examples, decoding):
    for example in examples:
      told, _, question = example.prompt.text.partition('\n')
      losses = [1.0] * 4
      if 'color' in question or '颜色' in question:
        for i, choice in enumerate(example.choices):
          losses[i] -= told.endswith(choice.strip())
          losses[i] -= _translated(choice.strip()) in told
      said = example.choices[losses.index(min(losses))]
      yield example, Reply(said, tuple(losses))


def _translated(name):
  for colour in things.COLOURS:
    if name in (colour.en, colour.zh):
      return colour.zh if name == colour.en else colour.en
  return '?'


def test_text_exams_score_the_options_themselves(tmp_path):
  text_exams.write(tmp_path / 'data', _scenes())
  english, chinese = text_exams.tasks()
  for task, space in ((english, ' '), (chinese, '')):
    examples = runner.take(task, tmp_path / 'data')
    assert len(examples) == 5 * len(text_exams.SUBJECTS)
    for example in examples:
      assert len(set(example.choices)) == 4
      assert all(x.startswith(space) for x in example.choices)
    folder = tmp_path / task.name
    runner.ask(task, examples, _Reader, folder)
    found = runner.score(task, examples, folder).items
    colours = [x for x in found if x.example.category == 'colour']
    assert [x.scores['accuracy'] for x in colours] == [1.0] * 5
  # The form of the official files.
  with (tmp_path / 'data/MMLU/test/count_test.csv').open() as file:
    assert [len(row) for row in csv.reader(file)] == [6] * 5
  with (tmp_path / 'data/C-Eval/val/count_val.csv').open() as file:
    rows = csv.DictReader(file)
    assert {row['answer'] for row in rows} <= set('ABCD')


def test_too_few_scenes_for_four_options(tmp_path):
  with pytest.raises(
    ConfigError, match='2 scenes have 2 different answers to c'
  ):
    text_exams.write(tmp_path, _scenes()[:2])


@pytest.mark.slow
def test_command(tmp_path, monkeypatch, capfd):
  """One variant is trained, found again, and told in a table and a picture."""
  training = ablation.TRAININGS['queries']
  few = dataclasses.replace(training.variants[0], beside='64 queries')
  few = dataclasses.replace(training, variants=(few,), batch=2)
  monkeypatch.setitem(ablation.TRAININGS, 'queries', few)
  command = ['queries', '--smoke', '--steps=2']
  command += [f'--quickstart={tmp_path}/qs', f'--out={tmp_path}/out']
  assert ablation.main(command) == 0
  written = (tmp_path / 'out/queries.md').read_text()
  assert '| 64 queries | ' in written and '2 steps of 2 pictures' in written
  assert (tmp_path / 'out/queries.png').read_bytes().startswith(b'\x89PNG')
  capfd.readouterr()
  assert ablation.main(command) == 0
  assert '64 queries: finished before' in capfd.readouterr().out
  assert (tmp_path / 'out/queries.md').read_text() == written
  assert ablation.main([*command[:2], '--steps=1']) == 2
