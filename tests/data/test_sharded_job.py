"""Shards are made again if, and only if, what they were made from changes."""

import json
import os

import downloads
import pytest

from qwenvl_jax.data import cli, shards, sources, storage
from qwenvl_jax.data.readers.img2dataset import Img2Dataset
from qwenvl_jax.data.readers.release import EvaluationLines
from qwenvl_jax.data.record_errors import ErrorBudget
from qwenvl_jax.data.sharded_job import ShardedJob, check_settings, run
from qwenvl_jax.errors import ConfigError, DataError


def archive(root, number, caption):
  downloads.tar(
    root / f'{number:05d}.tar',
    {'a.jpg': downloads.picture(), 'a.txt': caption.encode()},
  )


@pytest.fixture
def prepared(tmp_path):
  """Prepares the archives of a folder; gives captions and what was said."""
  root = tmp_path / 'in'

  def prepare(reader=None, split='train', **options):
    said = []
    report = shards.prepare(
      'pairs', {split: reader or Img2Dataset()}, root, tmp_path / 'data',
      say=said.append, **options,
    )  # fmt: skip
    records = sources.Prepared('pairs', split, str(tmp_path / 'data')).open()
    return [x.captions[0] for x in records], said, report.folder

  for number in range(3):
    archive(root, number, f'caption {number}')
  prepare.root = root
  return prepare


def times(folder):
  """Of the shards."""
  return {
    x.name: x.stat().st_mtime_ns
    for x in folder.glob('*array_record-*')
    if x.suffix != '.json'
  }


def test_a_changed_part_is_read_again_and_no_other(prepared):
  captions, said, folder = prepared()
  assert captions == ['caption 0', 'caption 1', 'caption 2'] and not said
  before = times(folder)
  archive(prepared.root, 1, 'corrected')
  captions, said, _ = prepared()
  assert captions == ['caption 0', 'corrected', 'caption 2']
  (line,) = said
  assert '1 of 3 shards are made again' in line and '00001.tar' in line
  after = times(folder)
  changed = [name for name in before if before[name] != after[name]]
  assert changed == ['pairs-train.array_record-00001-of-00003']
  assert prepared()[1] == []


def test_other_reading_or_again_reads_everything(prepared):
  _, _, folder = prepared()
  captions, said, _ = prepared(Img2Dataset(language='zh'))
  assert '3 of 3' in said[0] and "language='zh'" in said[0]
  before = times(folder)
  assert prepared(Img2Dataset(language='zh'))[1] == []
  assert times(folder) == before
  _, said, _ = prepared(Img2Dataset(language='zh'), again=True)
  assert said == ['pairs, train: all shards are made again']
  assert not before.items() & times(folder).items()


def test_shards_of_another_number_are_kept_or_removed(prepared):
  _, _, folder = prepared()
  archive(prepared.root, 3, 'caption 3')
  (prepared.root / '00000.tar').unlink()
  captions, said, _ = prepared()
  assert captions == ['caption 1', 'caption 2', 'caption 3']
  assert '3 of 3' in said[0]
  kept = set(times(folder).values())
  archive(prepared.root, 4, 'caption 4')
  captions, said, _ = prepared()
  assert captions == [f'caption {i}' for i in range(1, 5)]
  assert '3 are kept' in said[0]
  assert sorted(times(folder)) == [
    f'pairs-train.array_record-{i:05d}-of-00004' for i in range(4)
  ]
  assert kept < set(times(folder).values())
  assert len(list(folder.glob('*.report.json'))) == 4


def test_a_corrected_download_is_read_again(prepared):
  """A cut archive, then the whole one: the error does not stay."""
  path = prepared.root / '00002.tar'
  whole = path.read_bytes()
  path.write_bytes(whole[:700])
  captions, _, folder = prepared(limit=ErrorBudget(share=1.0))
  assert captions == ['caption 0', 'caption 1']
  path.write_bytes(whole)
  captions, said, _ = prepared()
  assert captions[2:] == ['caption 2'] and '1 of 3' in said[0]


def test_a_picture_that_comes_later_is_read(tmp_path):
  downloads.write(tmp_path, 'in/a.jpg', downloads.picture())
  lines = [json.dumps({'image': f'{x}.jpg', 'caption': x}) for x in 'ab']
  downloads.write(tmp_path, 'in/x.jsonl', '\n'.join(lines).encode())

  def prepare():
    return shards.prepare(
      'x', {'train': EvaluationLines()}, tmp_path / 'in', tmp_path,
      limit=ErrorBudget(share=0.5),
    ).lengths  # fmt: skip

  assert prepare() == {'train': [1]}
  downloads.write(tmp_path, 'in/b.jpg', downloads.picture())
  assert prepare() == {'train': [2]}


def test_another_split_leaves_the_first(prepared):
  prepared()
  _, _, folder = prepared(split='val')
  assert storage.split_lengths(folder) == {
    'train': [1, 1, 1], 'val': [1, 1, 1],
  }  # fmt: skip
  archive(prepared.root, 1, 'corrected')
  assert prepared(split='val')[0][1] == 'corrected'
  assert set(storage.split_lengths(folder)) == {'train', 'val'}


def test_killed_between_shard_and_report(prepared):
  _, _, folder = prepared()
  report = next(folder.glob('*-00001-of-00003.report.json'))
  for content in (None, '', '{', '[]', '{"made_from": 5}'):
    report.unlink() if content is None else report.write_text(content)
    captions, _, _ = prepared()
    assert captions == ['caption 0', 'caption 1', 'caption 2']
  (folder / '.x.1234.partial').write_text('left by a killed program')
  prepared()
  assert not list(folder.glob('.*'))


def test_damaged_origin_is_said_to_be_unknown(tmp_path):
  job = ShardedJob(tmp_path, 'x', 'train', ('one', 'two'))
  for shard in job.shards:
    job.path(shard).write_text('records')
    job.finish(shard, {})
  assert job.unfinished() == [] and job.begin() == []
  job.report_path(1).write_text('{}')
  (line,) = job.begin()
  assert '1 of 2' in line and 'something unknown, now two' in line
  assert job.unfinished() == [1] and not job.path(1).exists()


def test_settings_are_compared_line_by_line(tmp_path):
  file = tmp_path / 'work' / 'settings.txt'
  check_settings(file, 'a=1\nb=2\n')
  check_settings(file, 'a=1\nb=2\n')
  with pytest.raises(ConfigError, match='b=2, now b=3.*--again'):
    check_settings(file, 'a=1\nb=3\n')
  with pytest.raises(ConfigError, match='the same in another order'):
    check_settings(file, 'b=2\na=1\n')
  check_settings(file, 'a=1\nb=3\n', again=True)
  assert file.read_text() == 'a=1\nb=3\n'


def test_a_killed_worker_is_told():
  works = dict.fromkeys(range(4), _die)
  with pytest.raises(DataError, match='killed, perhaps for its memory'):
    run(works, 2, lambda done, total: None)
  with pytest.raises(ConfigError, match='--workers 0'):
    run(works, 0, lambda done, total: None)


def _die():
  os._exit(9)


def test_a_small_source_is_judged_at_its_end(prepared, tmp_path):
  archive(prepared.root, 1, ' ')
  with pytest.raises(DataError) as caught:
    prepared()
  for part in (
    'source train: 1 of 3', 'more than the allowed 10%', '--max_bad',
    'The first: empty_text: 00001.tar/a', '.report.json',
  ):  # fmt: skip
    assert part in str(caught.value)
  assert len(prepared(limit=ErrorBudget(share=0.4))[0]) == 2


def test_the_first_example_is_shown_when_nothing_can_be_used(tmp_path, capsys):
  downloads.tar(tmp_path / 'in/0.tar', {'a.txt': b'no picture'})
  options = ['--format', 'img2dataset', '--manual_dir', str(tmp_path / 'in')]
  assert cli.main(['prepare', 'x', *options, '--data_dir', str(tmp_path)]) == 2
  error = capsys.readouterr().err
  assert 'missing_image: 0.tar/a: no picture' in error
  assert 'x-train.array_record-00000-of-00001.report.json' in error
  assert 'list --name' not in error and error.count('\n') == 1


def test_names_that_are_no_text_are_names_all_the_same(prepared):
  """A file name of other bytes, and a key with a line break and an escape."""
  odd = prepared.root / os.fsdecode(b'caf\xe9.tar')
  downloads.tar(odd, {'a\n\x1b[31m.jpg': b'no picture'})
  with pytest.raises(DataError) as caught:
    prepared()
  assert '\n' not in str(caught.value)
  captions, (dropped,), folder = prepared(limit=ErrorBudget(share=0.3))
  assert captions == ['caption 0', 'caption 1', 'caption 2']
  assert dropped.startswith('dropped: empty_text: caf') and '\n' not in dropped
  before = times(folder)
  prepared(limit=ErrorBudget(share=0.3))
  assert times(folder) == before
  archive(prepared.root, 0, 'corrected')
  downloads.tar(odd, {'b.jpg': b'no picture'})
  _, (line, *_), _ = prepared(limit=ErrorBudget(share=0.3))
  assert '2 of 4' in line and line.isprintable()
