import dataclasses

import pytest

from qwenvl_jax.data import prepare, sources
from qwenvl_jax.errors import ConfigError, DataError


def test_a_missing_folder_says_how_to_prepare_it(tmp_path):
  source = sources.Scenes(str(tmp_path / 'none'))
  with pytest.raises(
    DataError, match=f'qwenvl-data prepare scenes --data_dir {tmp_path}/none'
  ):
    source.open()
  with pytest.raises(DataError, match='--config small'):
    sources.Scenes(str(tmp_path), config='small').open()
  with pytest.raises(DataError, match='qwenvl-data prepare scenes'):
    sources.small_vocabulary(str(tmp_path))


def test_a_damaged_folder_says_how_to_mend_it(small_scenes, tmp_path):
  folder = sources.scenes_folder(small_scenes.data_dir, 'small')
  copy = tmp_path / 'scenes' / 'small' / folder.name
  copy.mkdir(parents=True)
  for file in folder.iterdir():
    content = file.read_bytes()
    if 'train.array_record' in file.name:
      content = content[: len(content) // 3]
    (copy / file.name).write_bytes(content)
  scenes = sources.Scenes(str(tmp_path), config='small')
  with pytest.raises(DataError, match='scenes/small/.*prepare scenes'):
    list(scenes.open())


def test_scenes_are_in_order_and_can_be_narrowed(small_scenes):
  scenes = small_scenes.open()
  assert len(scenes) == 400
  assert [scenes[i].id for i in (0, 399)] == [
    'scenes/train/000000',
    'scenes/train/000399',
  ]
  counts = [len(x.objects) for x in scenes]
  assert set(counts) == {1, 2, 3}
  alone = sources.Scenes(small_scenes.data_dir, config='small', max_objects=1)
  assert [x.id for x in alone.open()] == [
    x.id for x in scenes if len(x.objects) == 1
  ]
  several = sources.Scenes(small_scenes.data_dir, config='small', min_objects=2)
  assert [x.id for x in several.open()] == [
    x.id for x in scenes if len(x.objects) > 1
  ]
  crowded = dataclasses.replace(several, min_objects=4)
  with pytest.raises(ConfigError, match='min_objects=4.*have 1 to 3 objects'):
    crowded.open()
  with pytest.raises(ConfigError, match='limit=0. leaves none'):
    dataclasses.replace(several, limit=0).open()
  few = sources.Scenes(small_scenes.data_dir, config='small', limit=3)
  assert [x.id for x in few.open()] == [scenes[i].id for i in range(3)]


def test_scenes_of_an_earlier_version_are_drawn_again(tmp_path):
  folder = prepare.scenes(tmp_path, 'small')
  reports = [*folder.glob('*.report.json')]
  for report in reports:  # Earlier ones had none.
    report.unlink()
  with pytest.raises(DataError, match='run `qwenvl-data prepare scenes`'):
    sources.Scenes(str(tmp_path), config='small').open()
  prepare.scenes(tmp_path, 'small')
  assert all(report.exists() for report in reports)
  assert len(sources.Scenes(str(tmp_path), config='small').open()) == 400


def test_unknown_splits(small_scenes):
  source = sources.Scenes(small_scenes.data_dir, 'validation', 'small')
  with pytest.raises(DataError, match="'validation'.*'combos'"):
    source.open()
  with pytest.raises(ConfigError, match="'val'"):
    sources.EasyVqa('val').open()


def test_easy_vqa_is_whole():
  train, test = (sources.EasyVqa(x).open() for x in ('train', 'test'))
  assert sum(len(x.questions) for x in train) == 38_575
  assert sum(len(x.questions) for x in test) == 9_673
  assert len(train) + len(test) == 5_000
  answers = {y.answer for x in train + test for y in x.questions}
  assert len(answers) == 13
